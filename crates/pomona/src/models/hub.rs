//! The Hugging Face hub over HTTP: what a repository holds, and files that go on where an earlier
//! download stopped.
//!
//! Nothing that the hub says is trusted with memory or with paths: listings are bounded, file
//! names are plain names, sizes and checksums are compared.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use serde::Deserialize;
use ureq::http::{Response, StatusCode, header};

use super::cache::{self, Expected};
use super::progress::Progress;

/// Longest wait for a name to resolve and a connection to open.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// The same when another source follows if the hub does not answer.
pub const CONNECT_TIMEOUT_SHORT: Duration = Duration::from_secs(3);
/// Longest wait for the first byte of an answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// Longest stretch that one connection downloads. Then it is dropped and the transfer goes on in a
/// new one: a connection that hangs costs this long, one that works a moment.
const BODY_TIMEOUT: Duration = Duration::from_secs(120);
/// Attempts in a row that bring nothing before a download gives up.
const ATTEMPTS_WITHOUT_PROGRESS: u32 = 4;
/// Wait before the first repetition; doubles each time.
const RETRY_PAUSE: Duration = Duration::from_millis(250);
/// Largest listing of a repository that is read.
const LISTING_BYTES_MAX: u64 = 16 << 20;
/// Bytes moved at a time.
const CHUNK: usize = 1 << 18;

/// A hub and how to talk to it.
pub struct Hub {
    agent: ureq::Agent,
    endpoint: String,
    token: Option<String>,
}

/// What a repository holds at one commit.
#[derive(Debug, Deserialize)]
pub struct Listing {
    /// The commit.
    pub sha: String,
    /// Its files.
    pub siblings: Vec<RepoFile>,
}

/// A file of a repository.
#[derive(Debug, Clone, Deserialize)]
pub struct RepoFile {
    /// Path within the repository.
    #[serde(rename = "rfilename")]
    pub name: String,
    /// Its size, where the hub says.
    pub size: Option<u64>,
    /// Present for large files.
    pub lfs: Option<LargeFile>,
}

/// What the hub knows about a large file.
#[derive(Debug, Clone, Deserialize)]
pub struct LargeFile {
    /// SHA-256 of its bytes.
    pub sha256: String,
}

impl Hub {
    /// A client of `endpoint`.
    pub fn new(endpoint: &str, token: Option<&str>, connect: Duration) -> Hub {
        let config = ureq::Agent::config_builder()
            .timeout_resolve(Some(connect))
            .timeout_connect(Some(connect))
            .timeout_recv_response(Some(ANSWER_TIMEOUT))
            .timeout_recv_body(Some(BODY_TIMEOUT))
            .http_status_as_error(false)
            // Compressed ranges of a file could not be put together.
            .accept_encoding("identity")
            .user_agent(concat!("pomona/", env!("CARGO_PKG_VERSION")))
            .build();
        let token = token.map(str::to_owned);
        Hub { agent: config.into(), endpoint: endpoint.to_owned(), token }
    }

    /// What `repo` holds at `revision` (a branch, a tag or a commit).
    ///
    /// # Errors
    /// When the hub does not answer, or there is no such repository or no access to it.
    pub fn list(&self, repo: &str, revision: &str) -> Result<Listing> {
        let url = format!("{}/api/models/{repo}/revision/{revision}?blobs=true", self.endpoint);
        let mut answer = self.get(&url, None).map_err(|e| self.unreachable(e))?;
        self.refusal(&answer, repo, None)?;
        let body = answer.body_mut().with_config().limit(LISTING_BYTES_MAX).read_to_vec();
        let body = body.with_context(|| format!("cannot read the listing of {repo}"))?;
        let listing: Listing = serde_json::from_slice(&body)
            .with_context(|| format!("the listing of {repo} is not what a hub sends"))?;
        if !is_plain_name(&listing.sha) {
            bail!("the listing of {repo} names the commit {:?}, which is none", listing.sha);
        }
        Ok(listing)
    }

    /// Brings `file` of `repo` to `path`, going on from `path.part` if that is there. Blocks;
    /// shows progress; a lost connection is taken up again.
    ///
    /// # Errors
    /// When the hub refuses or stops answering, the disk is full, or the bytes are not what was
    /// expected. What has arrived is kept, unless it is wrong.
    pub fn fetch(
        &self,
        repo: &str,
        revision: &str,
        file: &str,
        path: &Path,
        expected: Expected<'_>,
    ) -> Result<()> {
        let part = cache::with_suffix(path, ".part");
        if let Some(folder) = path.parent() {
            cache::make_folder(folder)?;
            let there = fs::metadata(&part).map_or(0, |m| m.len());
            cache::need_space(folder, expected.bytes.unwrap_or(0).saturating_sub(there))?;
        }
        let url = format!("{}/{repo}/resolve/{revision}/{file}", self.endpoint);
        let mut progress = Progress::new(file, expected.bytes);
        let mut idle_attempts = 0;
        loop {
            let before = fs::metadata(&part).map_or(0, |m| m.len());
            if expected.bytes.is_some_and(|wanted| wanted == before) {
                break;
            }
            let attempt = Attempt { repo, file, url: &url, part: &part, start: before, expected };
            match self.attempt(&attempt, &mut progress) {
                Ok(()) => break,
                Err(Stop::Final(error)) => return Err(error),
                Err(Stop::Again(error)) => {
                    let gained = fs::metadata(&part).map_or(0, |m| m.len()) > before;
                    idle_attempts = if gained { 0 } else { idle_attempts + 1 };
                    if idle_attempts >= ATTEMPTS_WITHOUT_PROGRESS {
                        return Err(error.context(format!(
                            "gave up on {file} after {ATTEMPTS_WITHOUT_PROGRESS} attempts; what \
                             has arrived is kept and the next attempt goes on from there"
                        )));
                    }
                    std::thread::sleep(RETRY_PAUSE * (1 << idle_attempts.min(8)));
                }
            }
        }
        drop(progress);
        cache::adopt(&part, path, expected)
    }

    fn attempt(&self, attempt: &Attempt<'_>, progress: &mut Progress) -> Result<(), Stop> {
        let answer = match self.get(attempt.url, Some(attempt.start)) {
            Ok(answer) => answer,
            // Nobody there at all: waiting for a connection once is enough.
            Err(error) if progress.position() == 0 => {
                return Err(Stop::Final(self.unreachable(error)));
            }
            Err(error) => return Err(Stop::Again(self.unreachable(error))),
        };
        if answer.status().is_server_error() || answer.status() == StatusCode::TOO_MANY_REQUESTS {
            let status = answer.status();
            return Err(Stop::Again(anyhow!("the hub answered {status} for {}", attempt.url)));
        }
        if answer.status() == StatusCode::RANGE_NOT_SATISFIABLE {
            // More has been kept than there is: what was kept is of another file.
            let _ = fs::remove_file(attempt.part);
            return Err(Stop::Again(anyhow!("the kept part of {} did not fit", attempt.file)));
        }
        self.refusal(&answer, attempt.repo, Some(attempt.file)).map_err(Stop::Final)?;
        let resumes = answer.status() == StatusCode::PARTIAL_CONTENT
            && range_start(&answer) == Some(attempt.start);
        let start = if resumes { attempt.start } else { 0 };
        let target = File::options()
            .create(true)
            .write(true)
            .append(resumes)
            .truncate(!resumes)
            .open(attempt.part)
            .map_err(|e| Stop::Final(cache::storage_error(e, "write", attempt.part, None)))?;
        let mut body = answer.into_body().into_reader();
        attempt.copy(&mut body, target, start, progress)
    }

    fn get(&self, url: &str, from: Option<u64>) -> Result<Response<ureq::Body>, ureq::Error> {
        let mut request = self.agent.get(url);
        if let Some(token) = &self.token {
            request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
        }
        if let Some(from) = from.filter(|from| *from > 0) {
            request = request.header(header::RANGE, format!("bytes={from}-"));
        }
        request.call()
    }

    fn unreachable(&self, error: ureq::Error) -> anyhow::Error {
        anyhow::Error::new(error).context(format!(
            "the hub at {} does not answer: check the network (and HTTPS_PROXY), set HF_ENDPOINT \
             to a mirror, or give the path of a model file",
            self.endpoint
        ))
    }

    fn refusal<B>(&self, answer: &Response<B>, repo: &str, file: Option<&str>) -> Result<()> {
        let what = file.map_or(repo.to_owned(), |file| format!("{file} of {repo}"));
        match answer.status() {
            StatusCode::OK | StatusCode::PARTIAL_CONTENT => Ok(()),
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                let token = match self.token {
                    Some(_) => "the token in HF_TOKEN does not open it",
                    None => "if it is gated or private, set HF_TOKEN to a token with access",
                };
                bail!("the hub does not hand out {what}: check the spelling; {token}")
            }
            StatusCode::NOT_FOUND => bail!("the hub has no {what}: check the spelling"),
            status => bail!("the hub answered {status} for {what}: try again later"),
        }
    }
}

/// One connection's worth of a download.
struct Attempt<'a> {
    repo: &'a str,
    file: &'a str,
    url: &'a str,
    part: &'a Path,
    start: u64,
    expected: Expected<'a>,
}

/// Why an attempt ended early.
enum Stop {
    /// Another attempt may bring more.
    Again(anyhow::Error),
    /// It would not.
    Final(anyhow::Error),
}

impl Attempt<'_> {
    fn copy(
        &self,
        body: &mut dyn Read,
        mut target: File,
        start: u64,
        progress: &mut Progress,
    ) -> Result<(), Stop> {
        let mut chunk = vec![0; CHUNK];
        let mut done = start;
        progress.set(done);
        loop {
            let got = match body.read(&mut chunk) {
                Ok(got) => got,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    let error = anyhow::Error::new(error);
                    return Err(Stop::Again(error.context("the connection was lost")));
                }
            };
            if got == 0 {
                break;
            }
            done += got as u64;
            if let Some(wanted) = self.expected.bytes.filter(|wanted| done > *wanted) {
                let _ = fs::remove_file(self.part);
                let file = self.file;
                return Err(Stop::Final(anyhow!(
                    "the hub sends more than the {wanted} bytes that {file} should have"
                )));
            }
            target.write_all(&chunk[..got]).map_err(|error| {
                let missing = self.expected.bytes.map(|wanted| wanted - (done - got as u64));
                Stop::Final(cache::storage_error(error, "write", self.part, missing))
            })?;
            progress.set(done);
        }
        match self.expected.bytes {
            Some(wanted) if done < wanted => {
                Err(Stop::Again(anyhow!("the connection ended after {done} of {wanted} bytes")))
            }
            _ => Ok(()),
        }
    }
}

/// First byte of a partial answer: `bytes 100-199/200` gives 100 (RFC 9110, section 14.4).
fn range_start<B>(answer: &Response<B>) -> Option<u64> {
    let range = answer.headers().get(header::CONTENT_RANGE)?.to_str().ok()?;
    range.strip_prefix("bytes ")?.split('-').next()?.parse().ok()
}

/// Whether a name from outside is a single, visible path component.
pub fn is_plain_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= 200
        && !name.starts_with('.')
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-+=@".contains(&b))
}
