//! `x-request-id`, and the log's line for each request.

use std::cell::RefCell;
use std::io::Write;
use std::sync::Once;
use std::time::Duration;

use pomona_gateway::Config;
use serde_json::json;

use crate::client::{Reply, Server, wait_for};
use crate::fake::FakeReplica;

thread_local! {
    /// What was logged on this thread; a test's server runs on the test's thread.
    static LOG: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// The log of this thread. One subscriber serves all tests: with one for each, what a call site
/// remembers of subscribers depends on which test comes to it first.
struct Log;

impl Log {
    fn start() -> Log {
        static ONCE: Once = Once::new();
        ONCE.call_once(|| {
            tracing_subscriber::fmt().with_writer(|| Log).with_ansi(false).init();
        });
        LOG.take();
        Log
    }

    fn text(&self) -> String {
        LOG.with_borrow(|log| String::from_utf8(log.clone()).unwrap())
    }

    /// Waits until something is there: a line is written when its connection is done with it.
    async fn waited(&self, words: &str) -> String {
        wait_for(words, || self.text().contains(words)).await;
        self.text()
    }
}

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        LOG.with_borrow_mut(|log| log.extend_from_slice(bytes));
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

async fn server(config: Config) -> Server {
    Server::with(config, FakeReplica::saying("one two", Duration::from_millis(1))).await
}

async fn with_id(server: &Server, id: &str) -> Reply {
    server.open("GET", "/v1/models", &[("x-request-id", id)], "").await.read().await
}

fn id(reply: &Reply) -> &str {
    reply.headers["x-request-id"].to_str().unwrap()
}

#[tokio::test]
async fn an_answer_carries_the_name_that_the_client_gave_its_request() {
    let server = server(Config::default()).await;
    for name in ["a", "4b1e-77:x/y", &"i".repeat(128)] {
        assert_eq!(id(&with_id(&server, name).await), name);
    }
}

#[tokio::test]
async fn a_request_without_a_sane_name_gets_one_of_its_own() {
    let server = server(Config::default()).await;
    let mut names = Vec::new();
    for name in ["two words", "", "tab\there", &"i".repeat(129)] {
        names.push(id(&with_id(&server, name).await).to_owned());
    }
    let body = json!({ "prompt": "a", "stream": true });
    for reply in [
        server.get("/nowhere").await,
        server.post("/v1/completions", &json!({ "prompt": 1.5 })).await,
        server.post("/v1/completions", &body).await,
    ] {
        names.push(id(&reply).to_owned());
    }
    assert!(names.iter().all(|name| name.starts_with("req-") && name.len() == 20), "{names:?}");
    names.sort();
    names.dedup();
    assert_eq!(names.len(), 7, "a name was used twice");
}

#[tokio::test]
async fn the_log_has_a_line_for_each_request_and_no_texts() {
    let log = Log::start();
    let server = server(Config::default()).await;
    server.get("/v1/models?secret=1").await.ok();
    server.get("/nowhere").await.error(404);
    let message = json!([{ "role": "user", "content": "apples" }]);
    let body = json!({ "messages": message, "stop": "pears" }).to_string();
    let headers = [("x-request-id", "mine"), ("authorization", "Bearer plums")];
    let chat = server.open("POST", "/v1/chat/completions", &headers, &body).await.read().await;
    chat.ok();
    log.waited("POST").await;
    let text = log.waited("/nowhere").await;
    let lines: Vec<&str> = text.lines().filter(|line| line.contains(" ms")).collect();
    assert_eq!(lines.len(), 3, "{text}");
    assert!(lines[0].contains("INFO") && lines[0].contains("GET /v1/models 200 "), "{text}");
    assert!(lines[1].contains("GET /nowhere 404 "), "{text}");
    assert!(lines[2].contains("POST /v1/chat/completions 200 "), "{text}");
    assert!(lines[2].contains("id=\"mine\"") && !text.contains("left"), "{text}");
    for word in ["secret", "apples", "pears", "plums", "one", "two"] {
        assert!(!text.contains(word), "{word}: {text}");
    }
}

#[tokio::test]
async fn a_streams_line_comes_at_its_end_and_says_if_the_client_left() {
    let log = Log::start();
    let server = server(Config::default()).await;
    let body = json!({ "prompt": "a", "stream": true, "ignore_eos": true, "max_tokens": 1000 });
    let mut opened = server.open("POST", "/v1/completions", &[], &body.to_string()).await;
    opened.piece().await.unwrap();
    assert!(!log.text().contains("/v1/completions"), "{}", log.text());
    drop(opened);
    log.waited("/v1/completions 200 ").await;
    assert!(log.text().contains(" ms, the client left"), "{}", log.text());
    let whole = json!({ "prompt": "a", "stream": true, "max_tokens": 2 });
    server.post("/v1/completions", &whole).await.events();
    wait_for("two lines", || log.text().matches("/v1/completions 200 ").count() == 2).await;
    assert_eq!(log.text().matches("the client left").count(), 1, "{}", log.text());
}

#[tokio::test]
async fn the_lines_can_be_switched_off() {
    let log = Log::start();
    let server = server(Config { access_log: false, ..Config::default() }).await;
    let reply = server.get("/v1/models").await;
    reply.ok();
    assert!(id(&reply).starts_with("req-"));
    server.settled().await;
    assert_eq!(log.text(), "");
}
