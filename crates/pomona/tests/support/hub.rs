//! A model hub of one repository on a thread of this test: listings, files with ranges, redirects,
//! and the ways in which real ones fail.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;

use serde_json::json;
use sha2::{Digest, Sha256};

/// How the hub behaves.
#[derive(Clone, Default)]
pub struct Manners {
    /// Files of `org/repo`.
    pub files: BTreeMap<String, Vec<u8>>,
    /// Drop the connection after this many bytes of a file, the given number of times.
    pub cut_after: usize,
    /// How often.
    pub cuts: usize,
    /// Answer every range with the whole file.
    pub ignores_ranges: bool,
    /// Send other bytes than the listing promises.
    pub lies: bool,
    /// Answer everything with this status.
    pub status: Option<u16>,
    /// Send files by way of a redirect to another path.
    pub redirects: bool,
    /// Accept nobody without this token.
    pub token: Option<String>,
}

/// A running hub.
pub struct FakeHub {
    /// Its address, for `HF_ENDPOINT`.
    pub url: String,
    manners: Arc<Mutex<Manners>>,
    log: Arc<Mutex<Vec<String>>>,
}

impl FakeHub {
    /// Starts one on a free port. It ends with the test's process.
    pub fn start(manners: Manners) -> FakeHub {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let manners = Arc::new(Mutex::new(manners));
        let log = Arc::new(Mutex::new(Vec::new()));
        let hub = FakeHub { url, manners: manners.clone(), log: log.clone() };
        thread::spawn(move || {
            for connection in listener.incoming().flatten() {
                let (manners, log) = (manners.clone(), log.clone());
                thread::spawn(move || serve(connection, &manners, &log));
            }
        });
        hub
    }

    /// Lines `METHOD PATH RANGE`, one for each request.
    pub fn log(&self) -> Vec<String> {
        self.log.lock().unwrap().clone()
    }

    /// Changes its behaviour.
    pub fn set(&self, change: impl FnOnce(&mut Manners)) {
        change(&mut self.manners.lock().unwrap());
    }
}

fn serve(connection: TcpStream, manners: &Mutex<Manners>, log: &Mutex<Vec<String>>) {
    let mut reader = BufReader::new(connection.try_clone().unwrap());
    let mut target = connection;
    while let Some((path, range, authorization)) = read_request(&mut reader) {
        log.lock().unwrap().push(format!("GET {path} {}", range.map_or(0, |r| r)));
        let mut now = manners.lock().unwrap();
        let open = now.token.as_ref().is_none_or(|t| authorization == format!("Bearer {t}"));
        let answer = answer(&now, &path, range, open);
        let cut = answer.is_file && now.cuts > 0 && answer.body.len() > now.cut_after;
        let cut_after = now.cut_after;
        if cut {
            now.cuts -= 1;
        }
        drop(now);
        let head = format!(
            "HTTP/1.1 {} X\r\nContent-Length: {}\r\n{}\r\n",
            answer.status,
            answer.body.len(),
            answer.headers
        );
        let sent = if cut { &answer.body[..cut_after] } else { &answer.body };
        if target.write_all(head.as_bytes()).is_err() || target.write_all(sent).is_err() || cut {
            return;
        }
    }
}

struct Answer {
    status: u16,
    headers: String,
    body: Vec<u8>,
    is_file: bool,
}

fn answer(manners: &Manners, path: &str, range: Option<usize>, open: bool) -> Answer {
    let plain = |status, headers: &str, body: &[u8]| Answer {
        status,
        headers: headers.to_owned(),
        body: body.to_vec(),
        is_file: false,
    };
    if let Some(status) = manners.status {
        return plain(status, "", b"");
    }
    // The place that a redirect leads to needs no token, as with a real hub's storage.
    if !open && !path.starts_with("/storage/") {
        return plain(401, "", b"{\"error\":\"Invalid username or password.\"}");
    }
    if path.starts_with("/api/models/org/repo/revision/main") {
        return plain(200, "Content-Type: application/json\r\n", &listing(manners));
    }
    let wanted = path.strip_prefix("/org/repo/resolve/c0ffee/");
    if let (Some(name), true) = (wanted, manners.redirects) {
        return plain(302, &format!("Location: /storage/{name}\r\n"), b"");
    }
    let name = wanted.or_else(|| path.strip_prefix("/storage/"));
    let Some(content) = name.and_then(|name| manners.files.get(name)) else {
        return plain(404, "", b"Not Found");
    };
    let mut content = content.clone();
    if manners.lies {
        content[0] ^= 1;
    }
    match range {
        Some(start) if !manners.ignores_ranges => Answer {
            status: 206,
            headers: format!(
                "Content-Range: bytes {start}-{}/{}\r\n",
                content.len() - 1,
                content.len()
            ),
            body: content[start..].to_vec(),
            is_file: true,
        },
        _ => Answer { status: 200, headers: String::new(), body: content, is_file: true },
    }
}

fn listing(manners: &Manners) -> Vec<u8> {
    let siblings: Vec<_> = manners
        .files
        .iter()
        .map(|(name, content)| {
            let sum: String = Sha256::digest(content).iter().map(|b| format!("{b:02x}")).collect();
            json!({"rfilename": name, "size": content.len(), "lfs": {"sha256": sum}})
        })
        .collect();
    json!({"sha": "c0ffee", "siblings": siblings}).to_string().into_bytes()
}

/// Path, first byte of a range, authorization; `None` when the connection is over.
fn read_request(reader: &mut impl BufRead) -> Option<(String, Option<usize>, String)> {
    let mut line = String::new();
    reader.read_line(&mut line).ok().filter(|n| *n > 0)?;
    let path = line.split(' ').nth(1)?.to_owned();
    let (mut range, mut authorization) = (None, String::new());
    loop {
        line.clear();
        reader.read_line(&mut line).ok().filter(|n| *n > 0)?;
        let Some((name, value)) = line.trim().split_once(": ") else {
            return Some((path, range, authorization));
        };
        match name.to_ascii_lowercase().as_str() {
            "range" => {
                range = value.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok();
            }
            "authorization" => authorization = value.to_owned(),
            _ => {}
        }
    }
}
