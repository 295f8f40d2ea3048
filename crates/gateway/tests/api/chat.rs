//! `/v1/chat/completions`.

use std::time::Duration;

use pomona_types::Replica;
use serde_json::{Value, json};

use crate::client::Server;
use crate::fake::{END, FakeReplica, MAX_MODEL_LEN, tokenizer};

const STEP: Duration = Duration::ZERO;

async fn server(says: &str) -> Server {
    Server::new(FakeReplica::saying(says, STEP)).await
}

fn request(extra: Value) -> Value {
    let mut request = json!({
        "model": "words", "messages": [{ "role": "user", "content": "Hi" }],
    });
    request.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    request
}

async fn chat(server: &Server, extra: Value) -> Value {
    server.post("/v1/chat/completions", &request(extra)).await.ok()
}

/// The events of a stream.
async fn stream(server: &Server, mut extra: Value) -> Vec<Value> {
    extra["stream"] = json!(true);
    server.post("/v1/chat/completions", &request(extra)).await.events()
}

fn texts(events: &[Value], index: u64) -> String {
    let choices = events.iter().flat_map(|event| event["choices"].as_array().unwrap());
    let own = choices.filter(|choice| choice["index"] == index);
    own.filter_map(|choice| choice["delta"]["content"].as_str()).collect()
}

#[tokio::test]
async fn an_answer_has_the_shape_that_the_openai_client_expects() {
    let server = server("Hello 🍎").await;
    let answer = chat(&server, json!({})).await;
    assert!(answer["id"].as_str().unwrap().starts_with("chatcmpl-"));
    assert_eq!(answer["object"], "chat.completion");
    assert_eq!(answer["model"], "words");
    assert!(answer["created"].as_u64().unwrap() > 1_600_000_000);
    let choice = json!({
        "index": 0,
        "message": { "role": "assistant", "content": "Hello 🍎", "refusal": null },
        "logprobs": null,
        "finish_reason": "stop",
        "stop_reason": null,
    });
    assert_eq!(answer["choices"], json!([choice]));
    // "<|start|>user\nHi<|end|>\n<|start|>assistant\n", of which one block is in the cache; ten
    // bytes and the end.
    let usage = json!({
        "prompt_tokens": 21, "completion_tokens": 11, "total_tokens": 32,
        "prompt_tokens_details": { "cached_tokens": 16 },
    });
    assert_eq!(answer["usage"], usage);
    assert!(answer.get("prompt_logprobs").is_none());
}

#[tokio::test]
async fn the_template_sees_roles_and_joined_parts() {
    let server = server("ok").await;
    let parts = json!([{ "type": "text", "text": "a" }, { "type": "text", "text": "b" }]);
    let messages = json!([
        { "role": "developer", "content": "Be kind" },
        { "role": "user", "content": parts, "name": "ann" },
        { "role": "assistant", "content": null, "refusal": null, "tool_calls": [] },
    ]);
    chat(&server, json!({ "messages": messages, "add_generation_prompt": false })).await;
    let prompt = tokenizer().decode(&server.replica.seen()[0].prompt, false);
    let want = "<|start|>system\nBe kind<|end|>\n<|start|>user\na\nb<|end|>\n\
                <|start|>assistant\n<|end|>\n";
    assert_eq!(prompt, want);
}

#[tokio::test]
async fn sampling_fields_reach_the_replica() {
    let server = server("ok").await;
    let fields = json!({
        "temperature": 0.5, "top_p": 0.25, "top_k": -1, "min_p": 0.125, "seed": -1,
        "repetition_penalty": 1.5, "frequency_penalty": -1, "presence_penalty": 2,
        "logit_bias": { "65": -100, "7": 1.5 }, "max_completion_tokens": 9, "max_tokens": 3,
        "min_tokens": 2, "ignore_eos": true, "stop_token_ids": [66], "priority": -3,
        "logprobs": true, "top_logprobs": 2, "user": "someone",
    });
    chat(&server, fields).await;
    let seen = &server.replica.seen()[0];
    let s = &seen.sampling;
    assert_eq!((s.temperature, s.top_p, s.top_k, s.min_p), (0.5, 0.25, 0, 0.125));
    assert_eq!((s.repetition_penalty, s.frequency_penalty, s.presence_penalty), (1.5, -1.0, 2.0));
    assert_eq!(s.logit_bias, [(7, 1.5), (65, -100.0)]);
    assert_eq!((s.seed, s.max_tokens, s.min_tokens), (Some(u64::MAX), 9, 2));
    assert_eq!((s.ignore_eos, &s.stop_token_ids[..], s.logprobs), (true, &[66][..], Some(2)));
    assert_eq!(seen.priority, -3);
}

#[tokio::test]
async fn without_fields_the_models_recommendations_and_the_context_hold() {
    let server = server("ok").await;
    chat(&server, json!({})).await;
    let sampling = &server.replica.seen()[0].sampling;
    assert_eq!((sampling.temperature, sampling.top_k), (1.0, 40));
    assert_eq!((sampling.seed, sampling.max_tokens), (None, MAX_MODEL_LEN - 21));
}

#[tokio::test]
async fn a_stream_tells_role_text_reason_and_usage_in_this_order() {
    let server = server("Hi 🍎!").await;
    let events = stream(&server, json!({ "stream_options": { "include_usage": true } })).await;
    let first = &events[0]["choices"][0];
    assert_eq!(first["delta"], json!({ "role": "assistant", "content": "" }));
    assert_eq!(first["finish_reason"], Value::Null);
    assert_eq!(texts(&events, 0), "Hi 🍎!");
    assert!(events.iter().all(|event| event["object"] == "chat.completion.chunk"));
    assert!(events.iter().all(|event| event["id"] == events[0]["id"]));
    let [.., end, usage] = &events[..] else { panic!("too few events") };
    assert_eq!(end["choices"][0]["delta"], json!({}));
    assert_eq!(end["choices"][0]["finish_reason"], "stop");
    assert_eq!(usage["choices"], json!([]));
    assert_eq!(usage["usage"]["completion_tokens"], 9);
    assert_eq!(usage["usage"]["prompt_tokens_details"]["cached_tokens"], 16);
    let before = &events[..events.len() - 1];
    assert!(before.iter().all(|event| event.get("usage") == Some(&Value::Null)));
}

#[tokio::test]
async fn usage_is_absent_unless_asked_for_and_can_be_continuous() {
    let server = server("abc").await;
    let events = stream(&server, json!({})).await;
    assert!(events.iter().all(|event| event.get("usage").is_none()));
    let options = json!({ "include_usage": true, "continuous_usage_stats": true });
    let events = stream(&server, json!({ "stream_options": options })).await;
    let counts: Vec<_> =
        events.iter().map(|event| event["usage"]["completion_tokens"].as_u64().unwrap()).collect();
    assert!(counts.is_sorted() && counts[0] >= 1, "{counts:?}");
    assert_eq!(counts.last(), Some(&4));
}

#[tokio::test]
async fn no_piece_of_a_stream_holds_half_a_character() {
    let server = server("🍎é漢").await;
    let events = stream(&server, json!({})).await;
    let pieces: Vec<_> = events
        .iter()
        .filter_map(|event| event["choices"][0]["delta"]["content"].as_str())
        .filter(|text| !text.is_empty())
        .collect();
    assert_eq!(pieces, ["🍎", "é", "漢"]);
}

#[tokio::test]
async fn an_answer_that_breaks_off_within_a_character_ends_with_the_replacement_character() {
    let server = server("a🍎").await;
    let answer = chat(&server, json!({ "max_tokens": 3 })).await;
    assert_eq!(answer["choices"][0]["message"]["content"], "a\u{fffd}");
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
    assert_eq!(answer["usage"]["completion_tokens"], 3);
}

#[tokio::test]
async fn a_stop_string_ends_the_answer_and_the_replicas_work() {
    let server =
        Server::new(FakeReplica::saying("one two three four", Duration::from_millis(1))).await;
    let fields = json!({ "stop": ["x", " thr"], "max_tokens": 1000, "ignore_eos": true });
    let answer = chat(&server, fields.clone()).await;
    let choice = &answer["choices"][0];
    assert_eq!(choice["message"]["content"], "one two");
    assert_eq!(
        (&choice["finish_reason"], &choice["stop_reason"]),
        (&json!("stop"), &json!(" thr"))
    );
    assert!(server.replica.load().generation_tokens < 500, "the replica went on");
    // Up to and with the letter that completed it, although the replica may have been further.
    assert_eq!(answer["usage"]["completion_tokens"], 11);
    assert_eq!(answer["usage"]["prompt_tokens_details"]["cached_tokens"], 16);
    server.settled().await;

    let events = stream(&server, fields).await;
    assert_eq!(texts(&events, 0), "one two");
    assert_eq!(events.last().unwrap()["choices"][0]["stop_reason"], " thr");

    let answer = chat(&server, json!({ "stop": "two", "include_stop_str_in_output": true })).await;
    assert_eq!(answer["choices"][0]["message"]["content"], "one two");
}

#[tokio::test]
async fn a_stop_string_does_not_count_before_min_tokens() {
    let server = server("abcabc").await;
    let answer = chat(&server, json!({ "stop": "c", "min_tokens": 4 })).await;
    assert_eq!(answer["choices"][0]["message"]["content"], "abcab");
}

#[tokio::test]
async fn a_stop_token_is_not_shown_unless_asked_for() {
    let server = server("abc").await;
    let fields = json!({ "stop_token_ids": [98] });
    let choice = &chat(&server, fields).await["choices"][0];
    assert_eq!((&choice["message"]["content"], &choice["stop_reason"]), (&json!("a"), &json!(98)));
    let fields = json!({ "stop_token_ids": [98], "include_stop_str_in_output": true });
    assert_eq!(chat(&server, fields).await["choices"][0]["message"]["content"], "ab");
}

#[tokio::test]
async fn special_tokens_are_left_out_unless_asked_for() {
    let server = server("a<|pad|>b").await;
    assert_eq!(chat(&server, json!({})).await["choices"][0]["message"]["content"], "ab");
    let answer = chat(&server, json!({ "skip_special_tokens": false })).await;
    assert_eq!(answer["choices"][0]["message"]["content"], "a<|pad|>b");
}

#[tokio::test]
async fn going_past_the_end_token_shows_what_follows() {
    let script = vec![97, END, 98, END];
    let replica = FakeReplica::new(STEP, Box::new(move |_| script.clone()));
    let server = Server::new(replica).await;
    let answer = chat(&server, json!({ "ignore_eos": true, "max_tokens": 3 })).await;
    assert_eq!(answer["choices"][0]["message"]["content"], "ab");
    assert_eq!(answer["usage"]["completion_tokens"], 3);
}

#[tokio::test]
async fn logprobs_cover_the_text_and_carry_bytes() {
    let server = server("aé!").await;
    let fields = json!({ "logprobs": true, "top_logprobs": 2 });
    let answer = chat(&server, fields.clone()).await;
    let content = answer["choices"][0]["logprobs"]["content"].as_array().unwrap();
    let bytes: Vec<u64> = content.iter().map(|token| token["bytes"][0].as_u64().unwrap()).collect();
    assert_eq!(bytes, [97, 0xc3, 0xa9, 33], "one entry per token, without the end");
    let first = json!({
        "token": "a", "logprob": -0.25, "bytes": [97],
        "top_logprobs": [
            { "token": "a", "logprob": -0.25, "bytes": [97] },
            { "token": "b", "logprob": -1.25, "bytes": [98] },
        ],
    });
    assert_eq!(content[0], first);
    assert_eq!(answer["choices"][0]["logprobs"]["refusal"], Value::Null);

    let streamed: Vec<Value> = stream(&server, fields)
        .await
        .iter()
        .filter_map(|event| event["choices"][0]["logprobs"]["content"].as_array().cloned())
        .flatten()
        .collect();
    assert_eq!(&streamed, content);
}

#[tokio::test]
async fn logprobs_without_alternatives_and_cut_by_a_stop_string() {
    let server = server("one two").await;
    let answer = chat(&server, json!({ "logprobs": true, "stop": " tw" })).await;
    let content = answer["choices"][0]["logprobs"]["content"].as_array().unwrap();
    let tokens: String = content.iter().map(|token| token["token"].as_str().unwrap()).collect();
    assert_eq!(tokens, "one");
    assert_eq!(content[0]["top_logprobs"], json!([]));
}

#[tokio::test]
async fn choices_have_seeds_of_their_own_and_share_the_prompt() {
    let replica = FakeReplica::new(
        STEP,
        Box::new(|request| {
            let digit = u32::from(b'0') + (request.sampling.seed.unwrap_or(0) % 10) as u32;
            vec![digit, digit, END]
        }),
    );
    let server = Server::new(replica).await;
    let answer = chat(&server, json!({ "n": 3, "seed": 5 })).await;
    let texts_of: Vec<_> = (0..3).map(|i| &answer["choices"][i]["message"]["content"]).collect();
    assert_eq!(texts_of, ["55", "66", "77"]);
    assert_eq!(answer["usage"]["prompt_tokens"], 21, "a prompt counts once");
    assert_eq!(answer["usage"]["completion_tokens"], 9);
    let ids: std::collections::BTreeSet<_> = server.replica.seen().iter().map(|r| r.id).collect();
    assert_eq!(ids.len(), 3);

    let events = stream(&server, json!({ "n": 2, "seed": 1 })).await;
    assert_eq!((texts(&events, 0), texts(&events, 1)), ("11".to_owned(), "22".to_owned()));
    let ends = events.iter().filter(|event| event["choices"][0]["finish_reason"] == "stop");
    assert_eq!(ends.count(), 2);
}

#[tokio::test]
async fn prompt_logprobs_have_vllms_shape() {
    let server = server("x").await;
    let answer = chat(&server, json!({ "prompt_logprobs": 1 })).await;
    let list = answer["prompt_logprobs"].as_array().unwrap();
    assert_eq!((list.len(), &list[0]), (21, &Value::Null));
    let entry = json!({ "117": { "logprob": -0.25, "rank": 1, "decoded_token": "u" } });
    assert_eq!(list[1], entry);
}

#[tokio::test]
async fn a_model_without_a_template_refuses_chat_and_says_what_to_do() {
    let replica = FakeReplica::saying("x", STEP);
    let model = pomona_gateway::ServedModel {
        names: vec!["base".to_owned()],
        replica: replica.clone(),
        tokenizer: tokenizer(),
        template: None,
        defaults: Default::default(),
    };
    let server = Server::of(Default::default(), replica, model).await;
    let body = json!({ "messages": [{ "role": "user", "content": "Hi" }] });
    let message = server.post("/v1/chat/completions", &body).await.error(400);
    assert!(message.contains("/v1/completions"), "{message}");
    assert_eq!(server.get("/v1/models/base").await.ok()["chat"], false);
}
