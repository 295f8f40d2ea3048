//! What streams look like on the wire, whichever way their bytes take: the connection's task or the
//! threads that write tokens.

use std::io::Read;
use std::time::Duration;

use pomona_gateway::{Config, Limits};
use pomona_types::Replica;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};

use crate::client::{PATIENCE, Server, wait_for};
use crate::fake::{END, FakeReplica, tokenizer};

const STEP: Duration = Duration::from_millis(1);

/// A request as bytes.
fn request(version: &str, body: &serde_json::Value) -> Vec<u8> {
    let (body, path) = (body.to_string(), "/v1/completions");
    let length = body.len();
    let head = format!(
        "POST {path} HTTP/{version}\r\nhost: x\r\ncontent-type: application/json\r\n\
         content-length: {length}\r\n\r\n"
    );
    (head + &body).into_bytes()
}

async fn send(server: &Server, version: &str, body: &serde_json::Value) -> TcpStream {
    let mut socket = TcpStream::connect(server.address).await.unwrap();
    socket.write_all(&request(version, body)).await.unwrap();
    socket
}

/// Reads on until the bytes end so.
async fn read_until(socket: &mut TcpStream, end: &str) -> String {
    let mut bytes = Vec::new();
    let reading = async {
        while !bytes.ends_with(end.as_bytes()) {
            assert!(socket.read_buf(&mut bytes).await.unwrap() > 0, "the server hung up");
        }
    };
    tokio::time::timeout(PATIENCE, reading).await.expect("the end in time");
    String::from_utf8(bytes).unwrap()
}

/// The body of a chunked answer, each chunk checked (RFC 9112, section 7.1).
fn unchunked(answer: &str) -> String {
    let (head, mut rest) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
    assert!(head.contains("transfer-encoding: chunked"), "{head}");
    let mut body = String::new();
    loop {
        let (length, after) = rest.split_once("\r\n").unwrap();
        let length = usize::from_str_radix(length, 16).unwrap();
        let (chunk, after) = after.split_at(length);
        body.push_str(chunk);
        rest = after.strip_prefix("\r\n").expect("a chunk ends in a line end");
        if length == 0 {
            assert_eq!(rest, "");
            return body;
        }
    }
}

/// Without what differs between two requests.
fn anonymous(body: &str) -> String {
    let without = |line: &str| {
        let Some(event) = line.strip_prefix("data: {") else { return line.to_owned() };
        let mut event: serde_json::Value = serde_json::from_str(&format!("{{{event}")).unwrap();
        event["id"].take();
        event["created"].take();
        event.to_string()
    };
    body.lines().map(without).collect::<Vec<_>>().join("\n")
}

/// The text of a stream that ended well.
fn text(body: &str) -> String {
    assert!(body.ends_with("data: [DONE]\n\n"), "{body}");
    let events = body.split_terminator("\n\n").filter_map(|event| event.strip_prefix("data: {"));
    let events = events.map(|event| format!("{{{event}"));
    let events = events.map(|event| serde_json::from_str::<serde_json::Value>(&event).unwrap());
    events.map(|event| event["choices"][0]["text"].as_str().unwrap().to_owned()).collect()
}

#[tokio::test]
async fn tokens_reach_the_client_while_the_servers_tasks_do_not_run() {
    let server = Server::new(FakeReplica::saying(&"x".repeat(1500), STEP)).await;
    let body = json!({ "prompt": "Once", "max_tokens": 1500, "stream": true });
    let mut socket = send(&server, "1.1", &body).await;
    let begun = read_until(&mut socket, "\n\n\r\n").await;
    let mut socket = socket.into_std().unwrap();
    socket.set_nonblocking(false).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    // Blocks the only thread that the server's tasks have.
    let mut some = vec![0; 40_000];
    socket.read_exact(&mut some).unwrap();
    socket.set_nonblocking(true).unwrap();
    let mut socket = TcpStream::from_std(socket).unwrap();
    let rest = read_until(&mut socket, "\r\n0\r\n\r\n").await;
    let all = begun + std::str::from_utf8(&some).unwrap() + &rest;
    assert_eq!(text(&unchunked(&all)), "x".repeat(1500));
}

#[tokio::test]
async fn every_way_carries_the_same_events() {
    let says = "Apples fall, \u{1f34e} says Zoë.".repeat(9);
    let server = Server::new(FakeReplica::saying(&says, STEP)).await;
    let body = json!({
        "prompt": "Once", "max_tokens": 400, "stream": true, "logprobs": 2, "stop": "no such",
        "stream_options": { "include_usage": true, "continuous_usage_stats": true },
    });
    let mut socket = send(&server, "1.1", &body).await;
    let chunked = unchunked(&read_until(&mut socket, "\r\n0\r\n\r\n").await);
    // HTTP/1.0 has no chunks, so the connection's task writes all of it.
    let mut socket = send(&server, "1.0", &body).await;
    let mut plain = String::new();
    tokio::time::timeout(PATIENCE, socket.read_to_string(&mut plain)).await.unwrap().unwrap();
    let (_, plain) = plain.split_once("\r\n\r\n").unwrap();
    assert_eq!(anonymous(&chunked), anonymous(plain));
    assert!(chunked.ends_with("data: [DONE]\n\n"));
}

#[tokio::test]
async fn a_connection_carries_one_stream_after_the_other() {
    let server = Server::new(FakeReplica::saying(&"abc ".repeat(20), Duration::ZERO)).await;
    let body = json!({ "prompt": "Once", "max_tokens": 100, "stream": true });
    let mut socket = TcpStream::connect(server.address).await.unwrap();
    for _ in 0..50 {
        socket.write_all(&request("1.1", &body)).await.unwrap();
        let answer = read_until(&mut socket, "\r\n0\r\n\r\n").await;
        assert_eq!(text(&unchunked(&answer)), "abc ".repeat(20));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_streams_at_once_keep_their_tokens_and_their_order() {
    let script = |seed: u64| format!("stream {seed}: {}", "0123456789".repeat(12));
    let replica = FakeReplica::new(
        STEP,
        Box::new(move |request| {
            let mut tokens =
                tokenizer().encode(&script(request.sampling.seed.unwrap()), false).unwrap();
            tokens.push(END);
            tokens
        }),
    );
    let server = Server::new(replica).await;
    let mut sockets = Vec::new();
    for seed in 0..200 {
        let body = json!({ "prompt": "a", "max_tokens": 500, "stream": true, "seed": seed });
        sockets.push((seed, send(&server, "1.1", &body).await));
    }
    for (seed, mut socket) in sockets {
        let answer = read_until(&mut socket, "\r\n0\r\n\r\n").await;
        assert_eq!(text(&unchunked(&answer)), script(seed));
    }
}

/// Choices whose events do not fit into sockets.
const CHOICES: usize = 8;

/// Begins an answer of several megabytes, more than the system buffers for a client.
async fn unread(server: &Server) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(32 << 10).unwrap();
    let mut socket = socket.connect(server.address).await.unwrap();
    let body = json!({
        "prompt": "Once", "max_tokens": 1500, "stream": true, "logprobs": 20, "n": CHOICES,
    });
    socket.write_all(&request("1.1", &body)).await.unwrap();
    socket
}

#[tokio::test]
async fn a_slow_reader_gets_everything_and_holds_nobody_up() {
    let server = Server::new(FakeReplica::saying(&"x".repeat(1500), Duration::ZERO)).await;
    let mut slow = unread(&server).await;
    server.settled().await;
    let body = json!({ "prompt": "Once", "max_tokens": 1500, "stream": true });
    let mut quick = send(&server, "1.1", &body).await;
    let answer = read_until(&mut quick, "\r\n0\r\n\r\n").await;
    assert_eq!(text(&unchunked(&answer)), "x".repeat(1500));
    let answer = read_until(&mut slow, "\r\n0\r\n\r\n").await;
    assert!(answer.len() > 6 << 20, "too little to wait in sockets: {}", answer.len());
    let all = text(&unchunked(&answer));
    assert_eq!(all, "x".repeat(CHOICES * 1500));
}

#[tokio::test]
async fn a_client_that_never_reads_is_given_up() {
    let limits = Limits { write_timeout: Duration::from_millis(50), ..Limits::default() };
    let config = Config { limits, ..Config::default() };
    let replica = FakeReplica::saying(&"x".repeat(1500), STEP);
    let server = Server::with(config, replica).await;
    let socket = unread(&server).await;
    wait_for("it to run", || server.replica.load().running == CHOICES as u32).await;
    server.settled().await;
    assert!(server.replica.load().generation_tokens < CHOICES as u64 * 1500, "it was cancelled");
    drop(socket);
}
