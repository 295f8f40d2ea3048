//! A server that a stage talks to: started, awaited, and ended as an operator would end it.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

/// How long a server may take to be ready; a first build may be part of it.
const READY_TIMEOUT: Duration = Duration::from_secs(600);
/// How long it may take to end; draining takes up to 30 s.
const END_TIMEOUT: Duration = Duration::from_secs(60);
/// How often its end is looked for.
const POLL_INTERVAL: Duration = Duration::from_millis(50);
/// Lines of its log that are shown when something goes wrong.
const LOG_LINES_SHOWN: usize = 30;

/// A running server.
pub struct Server {
    child: Child,
    log: PathBuf,
    /// Its address, without a slash at the end.
    pub url: String,
}

impl Server {
    /// Starts `command` and waits for the line that tells its address. What it logs goes to `log`.
    pub fn start(mut command: Command, log: PathBuf) -> Result<Server> {
        let file = File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(file);
        let child = command.spawn().context("cannot start the server")?;
        let mut server = Server { child, log, url: String::new() };
        let stdout = server.child.stdout.take().context("the server has no output")?;
        let (tell, told) = mpsc::channel();
        std::thread::spawn(move || {
            // Reads on after the address, or the server's writes would fail.
            for line in BufReader::new(stdout).lines().map_while(std::io::Result::ok) {
                if let Some(url) = address(&line) {
                    // Whoever waited may have given up.
                    let _ = tell.send(url.to_owned());
                }
            }
        });
        match told.recv_timeout(READY_TIMEOUT) {
            Ok(url) => server.url = url,
            Err(_) => bail!("the server is not ready:\n{}", server.last_lines()),
        }
        println!("serving at {}", server.url);
        Ok(server)
    }

    /// Runs `work`, then ends the server; shows the end of its log if either fails.
    pub fn during(mut self, work: impl FnOnce(&str) -> Result<()>) -> Result<()> {
        let result = work(&self.url).and_then(|()| self.end());
        result.with_context(|| format!("the server's log ends:\n{}", self.last_lines()))
    }

    /// Asks it to end, and expects that it does so gracefully.
    fn end(&mut self) -> Result<()> {
        let process = self.child.id().to_string();
        let asked = Command::new("kill").args(["-TERM", &process]).status();
        ensure!(asked.is_ok_and(|status| status.success()), "the server is gone before its end");
        let begun = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait()? {
                ensure!(status.success(), "the server ends with {status} after SIGTERM");
                return Ok(());
            }
            ensure!(begun.elapsed() < END_TIMEOUT, "the server does not end after SIGTERM");
            std::thread::sleep(POLL_INTERVAL);
        }
    }

    fn last_lines(&self) -> String {
        let log = std::fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(LOG_LINES_SHOWN)..].join("\n")
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // After `end` there is nothing left, and that is fine.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The address in a line of the server's output.
fn address(line: &str) -> Option<&str> {
    let at = line.find("http://")?;
    let address = line[at..].split_whitespace().next()?;
    Some(address.trim_end_matches(['/', '.', ',', ':']))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_address_is_found_in_the_line_that_announces_it() {
        let line = "Pomona serves at http://127.0.0.1:8000 after 0.41 s: open it";
        assert_eq!(address(line), Some("http://127.0.0.1:8000"));
        assert_eq!(address("loading"), None);
    }

    #[test]
    fn a_server_that_dies_is_told_with_its_log() {
        let mut command = Command::new("sh");
        command.args(["-c", "echo the reason >&2; exit 3"]);
        let log = std::env::temp_dir().join(format!("xtask-server-{}.log", std::process::id()));
        let error = Server::start(command, log.clone()).err().map(|error| error.to_string());
        assert!(error.is_some_and(|text| text.contains("the reason")));
        std::fs::remove_file(log).unwrap();
    }
}
