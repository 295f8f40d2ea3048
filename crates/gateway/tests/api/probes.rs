//! `/v1/models`, `/version`, `/metrics`, the page.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::json;

use crate::client::Server;
use crate::fake::FakeReplica;

async fn server(says: &str) -> Server {
    Server::new(FakeReplica::saying(says, Duration::from_millis(1))).await
}

#[tokio::test]
async fn models_are_listed_under_all_their_names() {
    let server = server("ok").await;
    let list = server.get("/v1/models").await.ok();
    let ids: Vec<_> = list["data"].as_array().unwrap().iter().map(|card| &card["id"]).collect();
    assert_eq!(ids, ["words", "org/words"]);
    assert_eq!(list["object"], "list");
    let card = server.get("/v1/models/org/words").await.ok();
    assert_eq!((&card["id"], &card["object"]), (&json!("org/words"), &json!("model")));
    assert_eq!((&card["max_model_len"], &card["owned_by"]), (&json!(2048), &json!("pomona")));
    assert_eq!(card["chat"], true);
    server.get("/v1/models/org%2Fwords").await.ok();
}

#[tokio::test]
async fn the_version_is_the_crates() {
    let version = server("ok").await.get("/version").await.ok();
    assert_eq!(version, json!({ "version": env!("CARGO_PKG_VERSION") }));
}

async fn scrape(server: &Server) -> BTreeMap<String, f64> {
    let reply = server.get("/metrics").await;
    assert_eq!(reply.headers["content-type"], "text/plain; version=0.0.4; charset=utf-8");
    let samples = reply.body.lines().filter(|line| !line.starts_with('#'));
    samples
        .map(|line| {
            let (name, value) = line.rsplit_once(' ').unwrap();
            let name = name.replace("model_name=\"words\",engine=\"0\"", "");
            (name, value.parse().unwrap())
        })
        .collect()
}

#[tokio::test]
async fn metrics_have_vllms_names_and_count_what_happened() {
    let server = server("one two").await;
    let complete = async |body| server.post("/v1/completions", &body).await.ok();
    complete(json!({ "prompt": "x".repeat(20) })).await;
    complete(json!({ "prompt": "abc", "max_tokens": 2 })).await;
    complete(json!({ "prompt": "abc", "stop": "ne" })).await;
    let body = json!({ "prompt": "abc", "ignore_eos": true, "max_tokens": 2000, "stream": true });
    let mut opened = server.open("POST", "/v1/completions", &[], &body.to_string()).await;
    opened.piece().await.unwrap();
    assert_eq!(scrape(&server).await["vllm:num_requests_running{}"], 1.0);
    assert!(scrape(&server).await["vllm:kv_cache_usage_perc{}"] > 0.0);
    drop(opened);
    server.settled().await;

    let now = scrape(&server).await;
    let check = |name: &str, want: f64| assert_eq!(now.get(name), Some(&want), "{name}");
    check("vllm:num_requests_running{}", 0.0);
    check("vllm:num_requests_waiting{}", 0.0);
    check("vllm:kv_cache_usage_perc{}", 0.0);
    check("vllm:prefix_cache_queries_total{}", 29.0);
    check("vllm:prefix_cache_hits_total{}", 16.0);
    check("vllm:num_preemptions_total{}", 0.0);
    check("vllm:spec_decode_num_drafts_total{}", 2.0);
    check("vllm:spec_decode_num_draft_tokens_total{}", 8.0);
    check("vllm:spec_decode_num_accepted_tokens_total{}", 6.0);
    check("pomona:step_seconds_total{,phase=\"sample\"}", 1.5);
    check("pomona:step_seconds_total{,phase=\"deliver\"}", 0.0);
    check("vllm:prompt_tokens_total{}", 29.0);
    check("vllm:request_success_total{,finished_reason=\"stop\"}", 2.0);
    check("vllm:request_success_total{,finished_reason=\"length\"}", 1.0);
    check("vllm:request_success_total{,finished_reason=\"abort\"}", 1.0);
    check("vllm:request_success_total{,finished_reason=\"error\"}", 0.0);
    check("vllm:time_to_first_token_seconds_count{}", 4.0);
    check("vllm:e2e_request_latency_seconds_count{}", 4.0);
    check("vllm:request_queue_time_seconds_count{}", 4.0);
    check("vllm:request_prompt_tokens_sum{}", 29.0);
    check("vllm:request_params_n_count{}", 4.0);
    assert!(now["http_requests_total{status=\"200\"}"] >= 6.0);
    let tokens = now["vllm:generation_tokens_total{}"];
    check("vllm:request_generation_tokens_sum{}", tokens);
    // All but the first of each request.
    check("vllm:inter_token_latency_seconds_count{}", tokens - 4.0);
    check("vllm:request_prompt_tokens_bucket{,le=\"10.0\"}", 3.0);
}

#[tokio::test]
async fn each_metric_is_described_once() {
    let server = server("ok").await;
    let text = server.get("/metrics").await.body;
    let mut described: Vec<&str> =
        text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next()).collect();
    let count = described.len();
    described.sort_unstable();
    described.dedup();
    assert_eq!(described.len(), count);
    assert!(count > 20);
}

#[tokio::test]
async fn the_page_comes_with_a_policy_and_is_small() {
    let server = server("ok").await;
    let mut bytes = 0;
    for (path, kind) in [
        ("/", "text/html"),
        ("/page.css", "text/css"),
        ("/page.js", "text/javascript"),
        ("/markdown.js", "text/javascript"),
        ("/icon.svg", "image/svg+xml"),
    ] {
        let reply = server.get(path).await;
        assert_eq!(reply.status, 200, "{path}");
        assert!(reply.headers["content-type"].to_str().unwrap().starts_with(kind), "{path}");
        let policy = reply.headers["content-security-policy"].to_str().unwrap();
        assert!(policy.contains("default-src 'none'") && !policy.contains("unsafe"), "{policy}");
        // The name of a namespace is no address.
        let text = reply.body.replace("http://www.w3.org/2000/svg", "");
        assert!(!text.contains("http://") && !text.contains("https://"), "{path} loads from afar");
        bytes += reply.body.len();
    }
    assert!(bytes < 60_000, "{bytes}");
}
