//! A client for OpenAI-compatible servers: JSON in, JSON or a stream of events out. Used by
//! `bench --url` and `chat --url`; speaks HTTP/1.1 over TCP or TLS.

use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::{Method, Request, Response, header};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client as HyperClient;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde_json::Value;

/// Longest wait for a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest wait for the next bytes of an answer.
const SILENCE_TIMEOUT: Duration = Duration::from_secs(600);
/// Largest JSON answer that is read.
const ANSWER_BYTES_MAX: usize = 16 << 20;
/// Longest line of an event stream.
const LINE_BYTES_MAX: usize = 4 << 20;

/// One server. Cheap to clone; clones share connections.
#[derive(Clone)]
pub struct Client {
    http: HyperClient<HttpsConnector<HttpConnector>, Full<Bytes>>,
    base: String,
    api_key: Option<String>,
}

impl Client {
    /// A client of the server at `url`, with or without `/v1` at its end. Connects to nothing yet.
    ///
    /// # Errors
    /// When `url` is not a web address.
    pub fn new(url: &str, api_key: Option<&str>) -> Result<Client> {
        let base = url.trim_end_matches('/').trim_end_matches("/v1").to_owned();
        let parsed: Result<hyper::Uri, _> = base.parse();
        if !parsed.is_ok_and(|uri| matches!(uri.scheme_str(), Some("http" | "https"))) {
            bail!("{url:?} is not the address of a server: write http://HOST:PORT");
        }
        let mut tcp = HttpConnector::new();
        tcp.set_nodelay(true);
        tcp.set_connect_timeout(Some(CONNECT_TIMEOUT));
        tcp.enforce_http(false);
        let connector = HttpsConnectorBuilder::new()
            .with_webpki_roots()
            .https_or_http()
            .enable_http1()
            .wrap_connector(tcp);
        let http = HyperClient::builder(TokioExecutor::new()).build(connector);
        Ok(Client { http, base, api_key: api_key.map(str::to_owned) })
    }

    /// `GET path`, as JSON.
    pub async fn get(&self, path: &str) -> Result<Value> {
        self.json(self.send(Method::GET, path, None).await?, path).await
    }

    /// `POST path` with a body that asks for a stream.
    pub async fn stream(&self, path: &str, body: &Value) -> Result<Events> {
        let answer = self.send(Method::POST, path, Some(body)).await?;
        if !answer.status().is_success() {
            self.json(answer, path).await?;
            bail!("{path} answered without an error and without a stream");
        }
        Ok(Events { body: answer.into_body(), lines: Lines::default() })
    }

    /// The name of the only, or first, model that the server has.
    pub async fn first_model(&self) -> Result<String> {
        let models = self.get("/v1/models").await?;
        let name = models.pointer("/data/0/id").and_then(Value::as_str);
        name.map(str::to_owned).ok_or_else(|| anyhow!("{} serves no model", self.base))
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
    ) -> Result<Response<Incoming>> {
        let url = format!("{}{path}", self.base);
        let mut request = Request::builder().method(method).uri(&url);
        if let Some(key) = &self.api_key {
            request = request.header(header::AUTHORIZATION, format!("Bearer {key}"));
        }
        if body.is_some() {
            request = request.header(header::CONTENT_TYPE, "application/json");
        }
        let bytes = body.map(serde_json::to_vec).transpose()?.unwrap_or_default();
        let request = request.body(Full::new(Bytes::from(bytes)))?;
        let answer = tokio::time::timeout(SILENCE_TIMEOUT, self.http.request(request));
        answer
            .await
            .with_context(|| format!("{url} does not answer"))?
            .with_context(|| format!("cannot reach {url}: is the server running?"))
    }

    async fn json(&self, answer: Response<Incoming>, path: &str) -> Result<Value> {
        let status = answer.status();
        let body = Limited::new(answer.into_body(), ANSWER_BYTES_MAX).collect().await;
        let bytes = body.map_err(|e| anyhow!("cannot read the answer of {path}: {e}"))?.to_bytes();
        if !status.is_success() {
            return Err(Refused { status: status.as_u16(), message: error_message(&bytes) }.into());
        }
        serde_json::from_slice(&bytes).with_context(|| format!("{path} answered no JSON"))
    }
}

/// The server's own refusal.
#[derive(Debug)]
pub struct Refused {
    /// HTTP status.
    pub status: u16,
    /// What it said.
    pub message: String,
}

impl std::fmt::Display for Refused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "the server answered {}: {}", self.status, self.message)
    }
}

impl std::error::Error for Refused {}

/// The message of an OpenAI-shaped error, or the start of whatever it is.
fn error_message(bytes: &[u8]) -> String {
    let json: Option<Value> = serde_json::from_slice(bytes).ok();
    let message = json.as_ref().and_then(|v| {
        [v.pointer("/error/message"), v.get("message"), v.get("detail"), v.get("error")]
            .into_iter()
            .flatten()
            .find_map(Value::as_str)
    });
    message.map_or_else(
        || String::from_utf8_lossy(&bytes[..bytes.len().min(300)]).into_owned(),
        str::to_owned,
    )
}

/// The events of a streaming answer. Dropping it hangs up.
pub struct Events {
    body: Incoming,
    lines: Lines,
}

impl Events {
    /// The next event's JSON; `None` at `[DONE]` or the end of the stream.
    pub async fn next(&mut self) -> Result<Option<Value>> {
        loop {
            while let Some(line) = self.lines.pop() {
                let Some(data) = line.strip_prefix("data:") else { continue };
                if data.trim() == "[DONE]" {
                    return Ok(None);
                }
                let event: Value = serde_json::from_str(data)
                    .context("the server sent an event that is no JSON")?;
                if let Some(message) = event.pointer("/error/message").and_then(Value::as_str) {
                    bail!("the server ended the stream: {message}");
                }
                return Ok(Some(event));
            }
            let frame = tokio::time::timeout(SILENCE_TIMEOUT, self.body.frame());
            match frame.await.context("the server fell silent in the middle of a stream")? {
                None => return Ok(None),
                Some(frame) => {
                    let frame = frame.context("the connection was lost in the middle")?;
                    if let Some(data) = frame.data_ref() {
                        self.lines.push(data)?;
                    }
                }
            }
        }
    }
}

/// Cuts bytes into lines, however they arrive.
#[derive(Default)]
struct Lines {
    bytes: Vec<u8>,
    taken: usize,
}

impl Lines {
    fn push(&mut self, data: &[u8]) -> Result<()> {
        self.bytes.drain(..self.taken);
        self.taken = 0;
        if self.bytes.len() + data.len() > LINE_BYTES_MAX {
            bail!("the server sent a line of more than {LINE_BYTES_MAX} bytes");
        }
        self.bytes.extend_from_slice(data);
        Ok(())
    }

    /// The next complete line, without its end.
    fn pop(&mut self) -> Option<String> {
        let rest = &self.bytes[self.taken..];
        let end = rest.iter().position(|b| *b == b'\n')?;
        let line = String::from_utf8_lossy(&rest[..end]).trim_end_matches('\r').to_owned();
        self.taken += end + 1;
        Some(line)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_whole_however_they_arrive() {
        let mut lines = Lines::default();
        let mut found = Vec::new();
        for byte in "data: {\"é\"}\r\n\ndata: x\n".bytes() {
            lines.push(&[byte]).unwrap();
            found.extend(std::iter::from_fn(|| lines.pop()));
        }
        assert_eq!(found, ["data: {\"é\"}", "", "data: x"]);
    }

    #[test]
    fn an_endless_line_is_refused() {
        let mut lines = Lines::default();
        assert!(lines.push(&vec![b'x'; LINE_BYTES_MAX]).is_ok());
        assert!(lines.push(b"x").is_err());
    }

    #[test]
    fn addresses_are_taken_with_and_without_v1() {
        for url in ["http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/"] {
            assert_eq!(Client::new(url, None).unwrap().base, "http://h:1");
        }
        let error = Client::new("localhost:8000", None).err().map(|e| e.to_string());
        assert!(error.is_some_and(|e| e.contains("http://HOST:PORT")));
    }

    #[test]
    fn an_error_says_what_the_server_said() {
        assert_eq!(error_message(br#"{"error":{"message":"no"}}"#), "no");
        assert_eq!(error_message(b"plain"), "plain");
    }
}
