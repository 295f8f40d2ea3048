//! Clients that go away, engines that hang or fail, and the end of the server.

use std::time::Duration;

use pomona_gateway::{Config, Limits};
use pomona_types::Replica;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::client::{PATIENCE, Server, wait_for};
use crate::fake::FakeReplica;

const LONG: usize = 1900;

/// Speaks for about 2 s per request.
async fn talkative() -> Server {
    Server::new(FakeReplica::saying(&"x".repeat(LONG), Duration::from_millis(1))).await
}

fn long(stream: bool) -> String {
    json!({ "prompt": "Once", "max_tokens": LONG, "stream": stream }).to_string()
}

fn running(server: &Server) -> u32 {
    let load = server.replica.load();
    load.running + load.waiting
}

#[tokio::test]
async fn hanging_up_in_the_middle_of_a_stream_cancels_at_once() {
    let server = talkative().await;
    let mut opened = server.open("POST", "/v1/completions", &[], &long(true)).await;
    opened.piece().await.unwrap();
    assert_eq!(running(&server), 1);
    let before = server.replica.load().generation_tokens;
    drop(opened);
    server.settled().await;
    assert!(server.replica.load().generation_tokens - before < LONG as u64 / 2);
}

#[tokio::test]
async fn hanging_up_before_the_answer_cancels_too() {
    use tokio::io::AsyncWriteExt;
    let server = talkative().await;
    let mut socket = tokio::net::TcpStream::connect(server.address).await.unwrap();
    let body = json!({ "prompt": "Once", "max_tokens": LONG, "n": 3 }).to_string();
    let head = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n\
         content-length: {}\r\n\r\n{body}",
        body.len()
    );
    socket.write_all(head.as_bytes()).await.unwrap();
    wait_for("three choices to run", || running(&server) == 3).await;
    drop(socket);
    server.settled().await;
    assert!(server.replica.load().generation_tokens < 3 * LONG as u64 / 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_random_disconnects_leave_nothing_behind() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let replica = FakeReplica::saying(&"x".repeat(LONG), Duration::from_micros(200));
    let server = Server::new(replica).await;
    let tasks = || tokio::runtime::Handle::current().metrics().num_alive_tasks();
    let before = tasks();
    for round in 0..24u64 {
        let clients = (0..50u64).map(|number| {
            let address = server.address;
            async move {
                let random = (round * 50 + number).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40;
                let mut socket = tokio::net::TcpStream::connect(address).await.unwrap();
                let stream = random & 1 == 0;
                let body = json!({
                    "prompt": "Once", "max_tokens": LONG, "stream": stream, "n": 1 + random % 3,
                    "ignore_eos": true,
                })
                .to_string();
                let text = format!(
                    "POST /v1/completions HTTP/1.1\r\nhost: x\r\n\
                     content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
                    body.len()
                );
                // Some leave in the middle of their request.
                let sent = if random.is_multiple_of(5) { text.len() / 2 } else { text.len() };
                socket.write_all(&text.as_bytes()[..sent]).await.unwrap();
                tokio::time::sleep(Duration::from_millis(random % 40)).await;
                if random.is_multiple_of(3) {
                    let mut some = [0; 512];
                    let wait = Duration::from_millis(5);
                    let _ = tokio::time::timeout(wait, socket.read(&mut some)).await;
                }
            }
        });
        futures::future::join_all(clients).await;
    }
    server.settled().await;
    wait_for("every task to end", || tasks() <= before).await;
    assert!(server.replica.seen().len() > 500, "most requests have run");
    // And the server is as good as new.
    server.post("/v1/completions", &json!({ "prompt": "a", "max_tokens": 1 })).await.ok();
}

#[tokio::test]
async fn a_client_that_reads_nothing_does_not_stop_the_others() {
    let server = Server::new(FakeReplica::saying(&"x".repeat(LONG), Duration::ZERO)).await;
    let sleeper = server.open("POST", "/v1/completions", &[], &long(true)).await;
    for _ in 0..5 {
        server.post("/v1/completions", &json!({ "prompt": "a", "max_tokens": 5 })).await.ok();
    }
    let reply = sleeper.read().await;
    assert!(!reply.events().is_empty());
}

#[tokio::test]
async fn a_client_that_never_reads_is_let_go() {
    use tokio::io::AsyncWriteExt;
    let limits = Limits { write_timeout: Duration::from_millis(100), ..Limits::default() };
    let config = Config { limits, ..Config::default() };
    let replica = FakeReplica::saying(&"x".repeat(LONG), Duration::ZERO);
    let server = Server::with(config, replica).await;
    let tasks = || tokio::runtime::Handle::current().metrics().num_alive_tasks();
    let before = tasks();
    let mut socket = tokio::net::TcpStream::connect(server.address).await.unwrap();
    // More than what the kernel takes for both ends.
    let body = json!({ "prompt": "a", "max_tokens": LONG, "n": 64, "stream": true }).to_string();
    let text = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n\
         content-length: {}\r\n\r\n{body}",
        body.len()
    );
    socket.write_all(text.as_bytes()).await.unwrap();
    wait_for("the request to run", || server.replica.seen().len() == 64).await;
    assert!(tasks() > before);
    wait_for("the connection to be closed", || tasks() <= before).await;
    server.settled().await;
    drop(socket);
}

#[tokio::test]
async fn a_client_that_never_asks_is_let_go() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let limits = Limits { header_timeout: Duration::from_millis(50), ..Limits::default() };
    let config = Config { limits, ..Config::default() };
    let server = Server::with(config, FakeReplica::saying("ok", Duration::ZERO)).await;
    for head in ["", "GET /health HTTP/1.1\r\nhost:"] {
        let mut socket = tokio::net::TcpStream::connect(server.address).await.unwrap();
        socket.write_all(head.as_bytes()).await.unwrap();
        let mut rest = Vec::new();
        let closed = tokio::time::timeout(PATIENCE, socket.read_to_end(&mut rest)).await;
        assert!(closed.is_ok(), "after {head:?}");
    }
}

#[tokio::test]
async fn a_quiet_stream_is_kept_alive_by_comments() {
    let config = Config { keepalive: Duration::from_millis(20), ..Config::default() };
    let server = Server::with(config, FakeReplica::saying("abc", Duration::ZERO)).await;
    server.replica.freeze(true);
    let mut opened = server.open("POST", "/v1/completions", &[], &long(true)).await;
    assert!(opened.piece().await.unwrap().starts_with(": "));
    server.replica.freeze(false);
    assert!(opened.read().await.body.contains("[DONE]"));
}

#[tokio::test]
async fn an_engine_that_fails_is_a_500_or_an_error_event() {
    let server = talkative().await;
    let mut opened = server.open("POST", "/v1/completions", &[], &long(true)).await;
    opened.piece().await.unwrap();
    let body = long(false);
    let waiting = server.post_text("/v1/completions", &body);
    let failing = async {
        wait_for("both to run", || running(&server) == 2).await;
        server.replica.lose_everything();
    };
    let (reply, ()) = tokio::join!(waiting, failing);
    reply.error(500);
    let events = opened.read().await.events();
    let error = &events.last().unwrap()["error"];
    assert_eq!(error["type"], "server_error");
}

#[tokio::test]
async fn health_fails_while_the_engine_hangs_and_recovers() {
    let config = Config { stall_after: Duration::from_millis(60), ..Config::default() };
    let replica = FakeReplica::saying(&"x".repeat(LONG), Duration::from_millis(1));
    let server = Server::with(config, replica).await;
    assert_eq!(server.get("/health").await.ok()["status"], "ok");
    tokio::time::sleep(Duration::from_millis(100)).await;
    server.get("/health").await.ok();
    server.replica.freeze(true);
    let opened = server.open("POST", "/v1/completions", &[], &long(true)).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(server.get("/health").await.error(503).contains("hangs"));
    server.get("/ready").await.error(503);
    server.replica.freeze(false);
    wait_for("a step", || server.replica.load().stalled_for.0 < 20_000).await;
    server.get("/health").await.ok();
    drop(opened);
    server.settled().await;
    server.replica.go_down("out of luck");
    assert!(server.get("/health").await.error(503).contains("out of luck"));
}

#[tokio::test]
async fn a_shutdown_lets_streams_finish_and_refuses_new_ones() {
    let replica = FakeReplica::saying(&"x".repeat(300), Duration::from_millis(1));
    let mut server = Server::new(replica).await;
    let body = json!({ "prompt": "a", "max_tokens": 300, "stream": true }).to_string();
    let mut opened = server.open("POST", "/v1/completions", &[], &body).await;
    opened.piece().await.unwrap();
    // Connected while the server was open, silent until it drains.
    let mut early = tokio::net::TcpStream::connect(server.address).await.unwrap();
    server.get("/ready").await.ok();
    let serving = server.shut_down();
    let draining = async {
        loop {
            let reply = server.get("/ready").await;
            if reply.status == 503 {
                return reply.error(503);
            }
        }
    };
    let message = tokio::time::timeout(PATIENCE, draining).await.unwrap();
    assert!(message.contains("shutting down"), "{message}");
    server.get("/health").await.ok();
    let refused = server.post("/v1/completions", &json!({ "prompt": "b" })).await;
    assert!(refused.error(503).contains("shutting down"));
    early.write_all(b"GET /ready HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    early.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 503"), "{answer}");
    assert!(answer.contains("connection: close"), "{answer}");
    let text: String = opened
        .read()
        .await
        .events()
        .iter()
        .filter_map(|event| event["choices"][0]["text"].as_str().map(str::to_owned))
        .collect();
    assert!(text.len() > 200, "the stream went on to its end: {}", text.len());
    tokio::time::timeout(PATIENCE, serving).await.unwrap().unwrap().unwrap();
    assert!(tokio::net::TcpStream::connect(server.address).await.is_err(), "the port is free");
}

#[tokio::test]
async fn after_the_drain_timeout_streams_are_cancelled_with_a_word() {
    let config = Config { drain_timeout: Duration::from_millis(50), ..Config::default() };
    let replica = FakeReplica::saying(&"x".repeat(LONG), Duration::from_millis(2));
    let mut server = Server::with(config, replica).await;
    let mut opened = server.open("POST", "/v1/completions", &[], &long(true)).await;
    opened.piece().await.unwrap();
    let serving = server.shut_down();
    let events = opened.read().await.events();
    let error = &events.last().unwrap()["error"];
    assert_eq!(error["code"], "unavailable", "{error}");
    tokio::time::timeout(PATIENCE, serving).await.unwrap().unwrap().unwrap();
    server.settled().await;
}
