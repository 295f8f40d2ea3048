//! `/v1/completions`, `/tokenize`, `/detokenize`.

use std::time::Duration;

use serde_json::{Value, json};

use crate::client::Server;
use crate::fake::{END, FakeReplica};

async fn server() -> Server {
    // Continues each prompt with its own last letter and a bang.
    let replica = FakeReplica::new(
        Duration::ZERO,
        Box::new(|request| vec![*request.prompt.last().unwrap(), u32::from(b'!'), END]),
    );
    Server::new(replica).await
}

async fn complete(server: &Server, body: Value) -> Value {
    server.post("/v1/completions", &body).await.ok()
}

#[tokio::test]
async fn an_answer_has_the_shape_that_the_openai_client_expects() {
    let server = server().await;
    let answer = complete(&server, json!({ "model": "org/words", "prompt": "ab" })).await;
    assert!(answer["id"].as_str().unwrap().starts_with("cmpl-"));
    assert_eq!(
        (&answer["object"], &answer["model"]),
        (&json!("text_completion"), &json!("org/words"))
    );
    let choice = json!({
        "index": 0, "text": "b!", "logprobs": null, "finish_reason": "stop", "stop_reason": null,
    });
    assert_eq!(answer["choices"], json!([choice]));
    assert_eq!(answer["usage"]["total_tokens"], 5);
}

#[tokio::test]
async fn a_prompt_is_text_or_tokens_or_a_list_of_either() {
    let server = server().await;
    let check = async |prompt: Value, want: &[&str]| {
        let answer = complete(&server, json!({ "prompt": prompt })).await;
        let texts: Vec<_> =
            answer["choices"].as_array().unwrap().iter().map(|choice| &choice["text"]).collect();
        assert_eq!(texts, want, "{prompt}");
        assert!((0..want.len()).all(|i| answer["choices"][i]["index"] == i));
    };
    check(json!("ab"), &["b!"]).await;
    check(json!([97, 98]), &["b!"]).await;
    check(json!(["ab", "cd"]), &["b!", "d!"]).await;
    check(json!([[97], [98, 99]]), &["a!", "c!"]).await;
    check(json!(["ab", [99]]), &["b!", "c!"]).await;
}

#[tokio::test]
async fn choices_of_several_prompts_are_numbered_prompt_by_prompt() {
    let server = server().await;
    let answer = complete(&server, json!({ "prompt": ["a", "b"], "n": 2, "best_of": 2 })).await;
    let texts: Vec<_> = (0..4).map(|i| &answer["choices"][i]["text"]).collect();
    assert_eq!(texts, ["a!", "a!", "b!", "b!"]);
    assert_eq!(answer["usage"]["prompt_tokens"], 2);
    assert_eq!(answer["usage"]["completion_tokens"], 12);
}

#[tokio::test]
async fn sixteen_tokens_are_the_default() {
    let replica = FakeReplica::saying(&"x".repeat(100), Duration::ZERO);
    let server = Server::new(replica).await;
    let answer = complete(&server, json!({ "prompt": "a" })).await;
    assert_eq!(answer["choices"][0]["text"], "x".repeat(16));
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
}

#[tokio::test]
async fn echo_puts_the_prompt_in_front_with_its_logprobs() {
    let server = server().await;
    let body = json!({ "prompt": "aé", "echo": true, "logprobs": 1, "max_tokens": 2 });
    let answer = complete(&server, body.clone()).await;
    let choice = &answer["choices"][0];
    assert_eq!(choice["text"], "aé\u{fffd}!");
    let want = json!({
        // The second half of a letter begins where the letter begins.
        "text_offset": [0, 1, 1, 2, 3],
        "token_logprobs": [null, -0.25, -0.25, -0.25, -0.25],
        "tokens": ["a", "bytes:\\xc3", "bytes:\\xa9", "bytes:\\xa9", "!"],
        "top_logprobs": [
            null, { "bytes:\\xc3": -0.25 }, { "bytes:\\xa9": -0.25 }, { "bytes:\\xa9": -0.25 },
            { "!": -0.25 },
        ],
    });
    assert_eq!(choice["logprobs"], want);
    assert!(choice.get("prompt_logprobs").is_none());
}

#[tokio::test]
async fn echo_alone_costs_no_token() {
    let server = server().await;
    let body = json!({ "prompt": "abc", "echo": true, "logprobs": 0, "max_tokens": 0 });
    let answer = complete(&server, body).await;
    let choice = &answer["choices"][0];
    assert_eq!((&choice["text"], &choice["finish_reason"]), (&json!("abc"), &json!("length")));
    assert_eq!(choice["logprobs"]["tokens"], json!(["a", "b", "c"]));
    assert_eq!(choice["logprobs"]["top_logprobs"][1], json!({ "b": -0.25 }));
    assert_eq!(answer["usage"]["completion_tokens"], 0);
}

#[tokio::test]
async fn the_sampled_token_is_among_its_alternatives_even_with_none_asked_for() {
    let server = server().await;
    let answer = complete(&server, json!({ "prompt": "a", "logprobs": 0 })).await;
    let logprobs = &answer["choices"][0]["logprobs"];
    assert_eq!(logprobs["top_logprobs"], json!([{ "a": -0.25 }, { "!": -0.25 }]));
    assert_eq!(logprobs["text_offset"], json!([0, 1]));
}

#[tokio::test]
async fn a_stream_adds_up_to_the_whole_answer() {
    let server = server().await;
    let mut body = json!({
        "prompt": ["ab", [99]], "echo": true, "logprobs": 1, "stream": true,
        "stream_options": { "include_usage": true },
    });
    let events = server.post("/v1/completions", &body).await.events();
    body["stream"] = json!(false);
    body.as_object_mut().unwrap().remove("stream_options");
    let whole = complete(&server, body).await;
    for index in 0..2 {
        let own: Vec<&Value> = events
            .iter()
            .flat_map(|event| event["choices"].as_array().unwrap())
            .filter(|choice| choice["index"] == index)
            .collect();
        let text: String = own.iter().map(|choice| choice["text"].as_str().unwrap()).collect();
        assert_eq!(text, whole["choices"][index]["text"]);
        let tokens: Vec<Value> = own
            .iter()
            .filter_map(|choice| choice["logprobs"]["tokens"].as_array().cloned())
            .flatten()
            .collect();
        assert_eq!(json!(tokens), whole["choices"][index]["logprobs"]["tokens"]);
        let ends: Vec<_> = own.iter().filter(|choice| !choice["finish_reason"].is_null()).collect();
        assert_eq!(ends.len(), 1);
    }
    assert_eq!(events.last().unwrap()["usage"], whole["usage"]);
    assert_eq!(events[0]["object"], "text_completion");
}

#[tokio::test]
async fn text_becomes_tokens_and_back() {
    let server = server().await;
    let body = json!({ "model": "words", "prompt": "aé", "return_token_strs": true });
    let answer = server.post("/tokenize", &body).await.ok();
    let want = json!({
        "count": 3, "max_model_len": 2048, "tokens": [97, 0xc3, 0xa9],
        "token_strs": ["a", "\u{fffd}", "\u{fffd}"],
    });
    assert_eq!(answer, want);
    let messages = json!([{ "role": "user", "content": "x" }]);
    let answer = server.post("/tokenize", &json!({ "messages": messages })).await.ok();
    assert_eq!((&answer["count"], &answer["token_strs"]), (&json!(20), &Value::Null));
    let answer = server.post("/detokenize", &json!({ "tokens": [97, 0xc3, 0xa9, 257] })).await.ok();
    assert_eq!(answer, json!({ "prompt": "aé<|end|>" }));
    let message = server.post("/detokenize", &json!({ "tokens": [9999] })).await.error(400);
    assert!(message.contains("'tokens'"), "{message}");
}
