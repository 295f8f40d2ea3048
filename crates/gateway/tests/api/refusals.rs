//! Everything that is said no to, and how.

use std::time::Duration;

use pomona_gateway::{Config, Limits};
use pomona_types::{Refusal, Replica};
use serde_json::{Value, json};

use crate::client::Server;
use crate::fake::FakeReplica;

async fn server() -> Server {
    Server::new(FakeReplica::saying("ok", Duration::ZERO)).await
}

#[tokio::test]
async fn a_field_that_is_not_implemented_is_refused_unless_it_asks_for_nothing() {
    let server = server().await;
    let refused = [
        ("tools", json!([{ "type": "function", "function": { "name": "f" } }])),
        ("tool_choice", json!("required")),
        ("functions", json!([{ "name": "f" }])),
        ("response_format", json!({ "type": "json_object" })),
        ("audio", json!({ "voice": "alloy", "format": "wav" })),
        ("modalities", json!(["text", "audio"])),
        ("prediction", json!({ "type": "content", "content": "x" })),
        ("reasoning_effort", json!("low")),
        ("service_tier", json!("flex")),
        ("store", json!(true)),
        ("web_search_options", json!({})),
        ("best_of", json!(2)),
        ("logits_processors", json!(["x"])),
        ("guided_json", json!({})),
        ("use_beam_search", json!(true)),
        ("bad_words", json!(["x"])),
        ("chat_template", json!("{{ messages }}")),
        ("continue_final_message", json!(true)),
        ("stream_options", json!({ "include_usage": true })),
    ];
    for (name, value) in refused {
        let mut body = json!({ "messages": [{ "role": "user", "content": "Hi" }] });
        body[name] = value;
        let reply = server.post("/v1/chat/completions", &body).await;
        let message = reply.error(400);
        assert!(message.contains(name), "{name}: {message}");
        assert_eq!(reply.json()["error"]["param"], name);
    }
    let accepted = json!({
        "messages": [{ "role": "user", "content": "Hi" }],
        "tools": [], "tool_choice": "none", "functions": null, "audio": null, "store": false,
        "response_format": { "type": "text" }, "modalities": ["text"], "service_tier": "auto",
        "metadata": { "a": "b" }, "user": "u", "safety_identifier": "s", "n": 1, "best_of": 1,
        "parallel_tool_calls": true, "verbosity": "medium", "prompt_cache_key": "k",
        "use_beam_search": false, "length_penalty": 1.0, "echo": false, "logprobs": false,
        "top_logprobs": null, "stop": null, "stream": false, "stream_options": null, "seed": null,
    });
    server.post("/v1/chat/completions", &accepted).await.ok();
}

#[tokio::test]
async fn a_wrong_value_is_refused_by_name() {
    let server = server().await;
    let wrong = [
        ("temperature", json!("hot")),
        ("temperature", json!(2.5)),
        ("temperature", json!(-0.1)),
        ("top_p", json!(0)),
        ("top_k", json!(1.5)),
        ("n", json!(0)),
        ("n", json!(1_000_000)),
        ("seed", json!(1.5)),
        ("seed", json!(1e30)),
        ("max_tokens", json!(0)),
        ("max_tokens", json!(-1)),
        ("max_completion_tokens", json!("many")),
        ("min_tokens", json!(true)),
        ("logit_bias", json!({ "9999999": 1 })),
        ("logit_bias", json!({ "a": 1 })),
        ("logit_bias", json!({ "1": 101 })),
        ("stop", json!([""])),
        ("stop", json!([1])),
        ("stop", json!(vec!["x"; 100])),
        ("stop_token_ids", json!([-1])),
        ("stop_token_ids", json!([100_000])),
        ("top_logprobs", json!(3)),
        ("logprobs", json!(3)),
        ("prompt_logprobs", json!(1000)),
        ("stream", json!("yes")),
        ("messages", json!([])),
        ("messages", json!("Hi")),
        ("messages[0]", json!("Hi")),
        ("messages[0].role", json!("robot")),
        ("messages[0].role", json!("tool")),
        ("messages[0].content", json!(3)),
        ("messages[0].content", json!(null)),
        ("messages[0].content[0].type", json!("image_url")),
        ("messages[0].tool_calls", json!([{}])),
        ("messages[0].contents", json!("x")),
        ("chat_template_kwargs", json!([])),
        ("model", json!(7)),
    ];
    for (path, value) in wrong {
        let mut body = json!({ "messages": [{ "role": "user", "content": "Hi" }] });
        match path.split_once("messages[0]") {
            None => body[path] = value,
            Some((_, "")) => body["messages"][0] = value,
            Some((_, ".content[0].type")) => {
                body["messages"][0]["content"] = json!([{ "type": value, "image_url": {} }]);
            }
            Some((_, field)) => body["messages"][0][&field[1..]] = value,
        }
        let reply = server.post("/v1/chat/completions", &body).await;
        let message = reply.error(400);
        assert!(message.contains(path), "{path}: {message}");
        assert_eq!(reply.json()["error"]["param"], path, "{body}");
    }
}

#[tokio::test]
async fn a_completions_field_is_refused_by_name() {
    let server = server().await;
    let wrong = [
        json!({ "prompt": "" }),
        json!({ "prompt": [] }),
        json!({ "prompt": [[]] }),
        json!({ "prompt": [[-1]] }),
        json!({ "prompt": 3 }),
        json!({ "prompt": [100_000] }),
        json!({ "prompt": [["a"]] }),
        json!({}),
        json!({ "prompt": vec!["a"; 100], "n": 2 }),
    ];
    for body in wrong {
        let reply = server.post("/v1/completions", &body).await;
        assert!(reply.error(400).contains("prompt"), "{body}");
        assert_eq!(reply.json()["error"]["param"], "prompt");
    }
    let wrong = [("suffix", json!("x")), ("best_of", json!(2)), ("max_tokens", json!(0))];
    for (name, value) in wrong {
        let mut body = json!({ "prompt": "a" });
        body[name] = value;
        assert!(server.post("/v1/completions", &body).await.error(400).contains(name));
    }
}

#[tokio::test]
async fn an_unknown_field_is_refused_with_a_hint() {
    let server = server().await;
    let body = json!({ "messages": [{ "role": "user", "content": "Hi" }], "temprature": 1 });
    let reply = server.post("/v1/chat/completions", &body).await;
    assert!(reply.error(400).contains("did you mean 'temperature'?"));
    assert_eq!(reply.json()["error"]["code"], "unknown_parameter");
}

#[tokio::test]
async fn a_context_that_is_too_long_is_refused_with_the_numbers() {
    let server = server().await;
    let body = json!({ "prompt": "x".repeat(2040), "max_tokens": 9 });
    let reply = server.post("/v1/completions", &body).await;
    let message = reply.error(400);
    assert!(["2048", "2049", "2040", "9 for"].iter().all(|n| message.contains(n)), "{message}");
    assert_eq!(reply.json()["error"]["code"], "context_length_exceeded");
    let body = json!({ "prompt": "x".repeat(2040), "max_tokens": 8 });
    server.post("/v1/completions", &body).await.ok();
    let messages = json!([{ "role": "user", "content": "x".repeat(100_000) }]);
    server.post("/v1/chat/completions", &json!({ "messages": messages })).await.error(400);
}

#[tokio::test]
async fn bodies_that_are_no_json_objects_are_refused() {
    let server = server().await;
    let deep = "[".repeat(1_000_000);
    let bomb = format!("{{\"messages\":{deep}");
    let kwargs = format!(
        "{{\"messages\":[{{\"role\":\"user\",\"content\":\"x\"}}],\"chat_template_kwargs\":\
         {{\"a\":{}{}}}}}",
        "[".repeat(10_000),
        "]".repeat(10_000)
    );
    for body in ["", "null", "[]", "\"x\"", "{", "{\"a\":}", "{\"a\" 1}", &deep, &bomb, &kwargs] {
        let reply = server.post_text("/v1/chat/completions", body).await;
        assert!(!reply.error(400).is_empty());
    }
    let twice = "{\"prompt\":\"a\",\"prompt\":\"b\"}";
    let message = server.post_text("/v1/completions", twice).await.error(400);
    assert!(message.contains("twice"), "{message}");
}

#[tokio::test]
async fn invalid_utf8_and_other_content_types_are_refused() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let server = server().await;
    let mut socket = tokio::net::TcpStream::connect(server.address).await.unwrap();
    let head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\
                content-type: application/json\r\ncontent-length: 15\r\n\r\n";
    socket.write_all(head.as_bytes()).await.unwrap();
    socket.write_all(b"{\"prompt\":\"\xff\"}\n").await.unwrap();
    let mut reply = String::new();
    socket.read_to_string(&mut reply).await.unwrap();
    assert!(reply.starts_with("HTTP/1.1 400") && reply.contains("UTF-8: byte 11"), "{reply}");

    let plain = [("content-type", "text/plain")];
    let reply = server.open("POST", "/v1/completions", &plain, "{\"prompt\":\"a\"}").await;
    assert!(reply.read().await.error(415).contains("application/json"));
}

#[tokio::test]
async fn a_body_above_the_limit_is_refused() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let limits = Limits { body_bytes: 1000, ..Limits::default() };
    let config = Config { limits, ..Config::default() };
    let server = Server::with(config, FakeReplica::saying("ok", Duration::ZERO)).await;
    let body = json!({ "prompt": "x".repeat(1000) });
    assert!(server.post("/v1/completions", &body).await.error(413).contains("1000 bytes"));
    server.post("/v1/completions", &json!({ "prompt": "x".repeat(900) })).await.ok();

    // The same for a body that does not say how long it is.
    let mut socket = tokio::net::TcpStream::connect(server.address).await.unwrap();
    let head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\
                content-type: application/json\r\n\r\n";
    socket.write_all(head.as_bytes()).await.unwrap();
    let chunk = format!("400\r\n{}\r\n0\r\n\r\n", " ".repeat(1024));
    socket.write_all(chunk.as_bytes()).await.unwrap();
    let mut reply = String::new();
    socket.read_to_string(&mut reply).await.unwrap();
    assert!(reply.starts_with("HTTP/1.1 413"), "{reply}");
}

#[tokio::test]
async fn a_body_that_dawdles_is_refused() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let limits = Limits { body_timeout: Duration::from_millis(50), ..Limits::default() };
    let config = Config { limits, ..Config::default() };
    let server = Server::with(config, FakeReplica::saying("ok", Duration::ZERO)).await;
    let mut socket = tokio::net::TcpStream::connect(server.address).await.unwrap();
    let head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\n\
                content-type: application/json\r\ncontent-length: 100\r\n\r\n{";
    socket.write_all(head.as_bytes()).await.unwrap();
    let mut reply = String::new();
    socket.read_to_string(&mut reply).await.unwrap();
    assert!(reply.starts_with("HTTP/1.1 408"), "{reply}");
}

#[tokio::test]
async fn unknown_models_paths_and_methods_have_the_same_shape() {
    let server = server().await;
    let reply = server.post("/v1/completions", &json!({ "model": "gpt", "prompt": "a" })).await;
    let message = reply.error(404);
    assert!(message.contains("'gpt'") && message.contains("'words' or 'org/words'"), "{message}");
    assert_eq!(reply.json()["error"]["code"], "model_not_found");
    server.get("/v1/models/gpt").await.error(404);
    server.get("/v1/models/%ff").await.error(400);
    assert!(server.get("/v1/embeddings").await.error(404).contains("/v1/embeddings"));
    let reply = server.get("/v1/completions").await;
    assert!(reply.error(405).contains("GET"));
    assert_eq!(reply.headers["allow"], "POST");
}

#[tokio::test]
async fn without_a_key_only_probes_and_the_page_are_open() {
    let config = Config { api_keys: vec!["one".into(), "two".into()], ..Config::default() };
    let server = Server::with(config, FakeReplica::saying("ok", Duration::ZERO)).await;
    for path in ["/v1/models", "/v1/models/words"] {
        let reply = server.get(path).await;
        reply.error(401);
        assert_eq!(reply.headers["www-authenticate"], "Bearer");
    }
    for path in ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"] {
        server.post(path, &json!({})).await.error(401);
    }
    for path in ["/", "/page.js", "/health", "/ready", "/version", "/metrics"] {
        assert_eq!(server.get(path).await.status, 200, "{path}");
    }
    let body = json!({ "prompt": "a" }).to_string();
    for key in ["one", "two"] {
        let bearer = format!("Bearer {key}");
        let headers = [("authorization", bearer.as_str())];
        server.open("POST", "/v1/completions", &headers, &body).await.read().await.ok();
    }
    let wrong = [("authorization", "Bearer three")];
    server.open("POST", "/v1/completions", &wrong, &body).await.read().await.error(401);
    let tenants: Vec<u64> = server.replica.seen().iter().map(|request| request.tenant.0).collect();
    assert_eq!(tenants, [1, 2], "keys do not share a cache");
}

#[tokio::test]
async fn overload_says_when_to_come_back() {
    let server = server().await;
    server.replica.refuse(Refusal::Overloaded { waiting: 7, retry_after_s: 3 });
    let body = json!({ "prompt": "a" });
    let reply = server.post("/v1/completions", &body).await;
    assert!(reply.error(429).contains('7'));
    assert_eq!(reply.headers["retry-after"], "3");
    server.replica.refuse(Refusal::Invalid("never".into()));
    server.post("/v1/completions", &body).await.error(400);
    server.replica.refuse(Refusal::Unavailable("gone".into()));
    assert!(server.post("/v1/completions", &body).await.error(503).contains("gone"));
}

#[tokio::test]
async fn choices_are_accepted_all_or_none() {
    let replica = FakeReplica::saying(&"x".repeat(1000), Duration::from_millis(1));
    let server = Server::new(replica).await;
    server.replica.refuse_after(2, Refusal::Overloaded { waiting: 9, retry_after_s: 1 });
    let body = json!({ "prompt": "a", "n": 3, "max_tokens": 1000 });
    server.post("/v1/completions", &body).await.error(429);
    assert_eq!(server.replica.seen().len(), 2);
    server.settled().await;
    assert!(server.replica.load().generation_tokens < 500);
}

#[tokio::test]
async fn a_full_house_refuses_and_takes_in_again_when_someone_leaves() {
    let limits = Limits { generations: 1, ..Limits::default() };
    let config = Config { limits, ..Config::default() };
    let replica = FakeReplica::saying(&"x".repeat(2000), Duration::from_millis(1));
    let server = Server::with(config, replica).await;
    let body = json!({ "prompt": "a", "max_tokens": 2000, "stream": true }).to_string();
    let mut first = server.open("POST", "/v1/completions", &[], &body).await;
    first.piece().await.unwrap();
    let reply = server.post_text("/v1/completions", &body).await;
    reply.error(429);
    assert_eq!(reply.headers["retry-after"], "1");
    drop(first);
    server.settled().await;
    server.post("/v1/completions", &json!({ "prompt": "a", "max_tokens": 1 })).await.ok();
}

#[tokio::test]
async fn only_allowed_origins_get_the_headers_that_browsers_ask_for() {
    let config =
        Config { allowed_origins: vec!["https://chat.example".into()], ..Config::default() };
    let server = Server::with(config, FakeReplica::saying("ok", Duration::ZERO)).await;
    let origin = |origin| [("origin", origin), ("access-control-request-method", "POST")];
    let reply = server.open("OPTIONS", "/v1/models", &origin("https://chat.example"), "").await;
    let reply = reply.read().await;
    assert_eq!(reply.status, 200);
    assert_eq!(reply.headers["access-control-allow-origin"], "https://chat.example");
    let reply = server.open("GET", "/v1/models", &origin("https://evil.example"), "").await;
    let reply = reply.read().await;
    assert!(reply.headers.get("access-control-allow-origin").is_none());
}

#[tokio::test]
async fn no_body_makes_the_server_fail() {
    // Seeded cuts, flips and repetitions of a good body: always an answer, never a 5xx.
    let server = server().await;
    let good = json!({
        "model": "words",
        "messages": [{ "role": "user", "content": [{ "type": "text", "text": "é" }] }],
        "temperature": 0.5, "stop": ["a", "b"], "logit_bias": { "1": 2 }, "max_tokens": 4,
        "stream_options": { "include_usage": true }, "stream": true, "top_logprobs": 2,
        "logprobs": true, "chat_template_kwargs": { "a": [1, { "b": null }] },
    })
    .to_string();
    let mut state = 1u64;
    let mut random = move |below: usize| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) as usize % below
    };
    for _ in 0..1000 {
        let mut bytes = good.clone().into_bytes();
        for _ in 0..=random(3) {
            let at = random(bytes.len());
            match random(4) {
                0 => bytes.truncate(at.max(1)),
                1 => bytes[at] = b"{}[]\",:0-.eE\\nutf"[random(17)],
                2 => drop(bytes.remove(at)),
                _ => {
                    let end = (at + random(40)).min(bytes.len());
                    let piece = bytes[at..end].to_vec();
                    bytes.splice(at..at, piece);
                }
            }
            if bytes.is_empty() {
                bytes.push(b'{');
            }
        }
        let Ok(body) = String::from_utf8(bytes) else { continue };
        let reply = server.post_text("/v1/chat/completions", &body).await;
        assert!(reply.status.as_u16() < 500, "{body}: {reply:?}");
    }
    server.settled().await;
    let good: Value = serde_json::from_str(&good).unwrap();
    assert_eq!(server.post("/v1/chat/completions", &good).await.status, 200);
}
