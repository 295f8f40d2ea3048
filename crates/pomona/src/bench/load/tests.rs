//! Load on a server made here, which counts a word as two tokens.

use std::sync::Mutex;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::*;

/// What the server does with a request's body: a status, and the events to stream.
type Behaviour = fn(&Value) -> (u16, Vec<Value>);

async fn serve(behaviour: Behaviour) -> (Client, Arc<Mutex<Vec<Value>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let bodies = Arc::new(Mutex::new(Vec::new()));
    let seen = bodies.clone();
    tokio::spawn(async move {
        while let Ok((connection, _)) = listener.accept().await {
            let seen = seen.clone();
            tokio::spawn(async move { answer(connection, behaviour, &seen).await });
        }
    });
    (Client::new(&url, None).unwrap(), bodies)
}

async fn answer(mut connection: TcpStream, behaviour: Behaviour, seen: &Mutex<Vec<Value>>) {
    let mut bytes = Vec::new();
    let body = loop {
        let mut chunk = [0; 4096];
        let got = connection.read(&mut chunk).await.unwrap();
        bytes.extend_from_slice(&chunk[..got]);
        let text = String::from_utf8_lossy(&bytes);
        let json =
            text.split_once("\r\n\r\n").and_then(|(_, body)| serde_json::from_str(body).ok());
        if let Some(json) = json {
            break json;
        }
        assert!(got > 0, "the request ended early: {text}");
    };
    let (status, events) = behaviour(&body);
    seen.lock().unwrap().push(body);
    let head = format!("HTTP/1.1 {status} X\r\nConnection: close\r\n\r\n");
    connection.write_all(head.as_bytes()).await.unwrap();
    for event in events {
        connection.write_all(format!("data: {event}\n\n").as_bytes()).await.unwrap();
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    connection.write_all(b"data: [DONE]\n\n").await.unwrap();
}

/// Answers like a server: three pieces of text, then usage.
fn well_behaved(body: &Value) -> (u16, Vec<Value>) {
    let words = body["prompt"].as_str().unwrap().split(' ').count();
    let piece = |text: &str| json!({"choices": [{"text": text}]});
    let usage = json!({"prompt_tokens": 2 * words, "completion_tokens": body["max_tokens"]});
    (200, vec![piece("a"), piece("b"), piece("c"), json!({"choices": [], "usage": usage})])
}

fn picky(body: &Value) -> (u16, Vec<Value>) {
    if body.get("ignore_eos").is_some() { (400, Vec::new()) } else { well_behaved(body) }
}

fn shape() -> Shape {
    Shape { model: "m".into(), input_tokens: 256, output_tokens: 64, shared_prefix: false }
}

async fn level(target: &Arc<Target>, clients: usize, requests: usize, turns: usize) -> Level {
    let mut rounds = Vec::new();
    for turn in 0..turns {
        rounds.push(target.round(clients, requests, turn).await);
    }
    Level::of(clients, requests, rounds).unwrap()
}

#[tokio::test]
async fn prompts_are_cut_to_the_wanted_length_and_all_differ() {
    let (client, bodies) = serve(well_behaved).await;
    let target = Arc::new(Target::probe(client, shape()).await.unwrap());
    let level = level(&target, 4, 8, 2).await;
    assert_eq!((level.input_tokens_mean, level.output_tokens_mean), (256.0, 64.0));
    assert_eq!((level.clients, level.requests, level.failed), (4, 8, 0));
    assert!(level.ttft_ms.p50 > 0.0 && level.inter_token_ms.p50 >= 1.0, "{level:?}");
    let bodies = bodies.lock().unwrap();
    let mut prompts: Vec<&str> = bodies.iter().map(|b| b["prompt"].as_str().unwrap()).collect();
    prompts.sort_unstable();
    prompts.dedup();
    assert_eq!(prompts.len(), 1 + 2 * 8);
    assert!(bodies.iter().all(|b| b["ignore_eos"] == json!(true) && b["stream"] == json!(true)));
}

#[tokio::test]
async fn a_server_that_knows_no_ignore_eos_is_asked_without() {
    let (client, bodies) = serve(picky).await;
    let target = Arc::new(Target::probe(client, shape()).await.unwrap());
    assert_eq!(level(&target, 1, 1, 1).await.failed, 0);
    assert!(bodies.lock().unwrap().last().unwrap().get("ignore_eos").is_none());
}

#[tokio::test]
async fn a_server_that_refuses_is_quoted() {
    let (client, _) = serve(|_| (404, Vec::new())).await;
    let error = Target::probe(client, shape()).await.err().unwrap();
    assert!(format!("{error:#}").contains("answered 404"), "{error:#}");
}

#[tokio::test]
async fn failures_are_counted_beside_what_worked() {
    let (client, _) = serve(|body| {
        let prompt = body["prompt"].as_str().unwrap();
        // The probe and about half of the rest.
        let works = prompt.split(' ').count() == PROBE_WORDS || prompt.len().is_multiple_of(2);
        if works { well_behaved(body) } else { (500, Vec::new()) }
    })
    .await;
    let target = Arc::new(Target::probe(client, shape()).await.unwrap());
    let level = level(&target, 2, 24, 1).await;
    assert!((1..24).contains(&level.failed), "{level:?}");
    assert!(level.first_failure.unwrap().contains("answered 500"));
}

#[tokio::test]
async fn nobody_there_is_said_plainly() {
    let client = Client::new("http://127.0.0.1:9", None).unwrap();
    let error = Target::probe(client, shape()).await.err().unwrap();
    assert!(format!("{error:#}").contains("is the server running?"), "{error:#}");
}
