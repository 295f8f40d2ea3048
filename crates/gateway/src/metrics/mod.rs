//! What is counted, under vLLM's names, so that dashboards made for it work here. Queues and KV
//! come from the replica's [`Load`](pomona_types::Load) at the time of asking; latencies and
//! tokens are counted where a request's tokens pass.

mod experts;
mod exposition;
mod histogram;
mod meter;
mod responses;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use pomona_types::{ExpertLoads, Load};

use exposition::{Exposition, Labels};
use histogram::Histogram;
pub(crate) use meter::{Meter, Outcome};
pub(crate) use responses::Responses;

/// Bounds for the first token, as vLLM has them.
const FIRST_TOKEN_S: [f64; 22] = [
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
];
/// Bounds between tokens: vLLM's, and finer ones in front for small models.
const INTER_TOKEN_S: [f64; 22] = [
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5,
    5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
];
/// Bounds for a request as a whole and its parts: vLLM's, and finer ones in front.
const REQUEST_S: [f64; 23] = [
    0.01, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0,
    120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0,
];
/// Bounds for `n`.
const CHOICES: [f64; 5] = [1.0, 2.0, 5.0, 10.0, 20.0];

/// The measurements of one model.
pub(crate) struct ModelMetrics {
    prompt_tokens: AtomicU64,
    generation_tokens: AtomicU64,
    finished: [AtomicU64; Outcome::ALL.len()],
    first_token_s: Histogram,
    inter_token_s: Histogram,
    per_output_token_s: Histogram,
    request_s: Histogram,
    queue_s: Histogram,
    prefill_s: Histogram,
    decode_s: Histogram,
    inference_s: Histogram,
    request_prompt_tokens: Histogram,
    request_generation_tokens: Histogram,
    params_max_tokens: Histogram,
    params_n: Histogram,
}

impl ModelMetrics {
    /// All zero, for a model with that context.
    pub(crate) fn new(max_model_len: u32) -> ModelMetrics {
        ModelMetrics {
            prompt_tokens: AtomicU64::new(0),
            generation_tokens: AtomicU64::new(0),
            finished: Outcome::ALL.map(|_| AtomicU64::new(0)),
            first_token_s: Histogram::new(&FIRST_TOKEN_S),
            inter_token_s: Histogram::new(&INTER_TOKEN_S),
            per_output_token_s: Histogram::new(&INTER_TOKEN_S),
            request_s: Histogram::new(&REQUEST_S),
            queue_s: Histogram::new(&REQUEST_S),
            prefill_s: Histogram::new(&REQUEST_S),
            decode_s: Histogram::new(&REQUEST_S),
            inference_s: Histogram::new(&REQUEST_S),
            request_prompt_tokens: Histogram::tokens(max_model_len),
            request_generation_tokens: Histogram::tokens(max_model_len),
            params_max_tokens: Histogram::tokens(max_model_len),
            params_n: Histogram::new(&CHOICES),
        }
    }

    /// Takes note of what a request asks for.
    pub(crate) fn asked(&self, n: u32, max_tokens: u32) {
        self.params_n.observe(f64::from(n));
        self.params_max_tokens.observe(f64::from(max_tokens));
    }

    fn histograms(&self) -> [(&'static str, &'static str, &Histogram); 12] {
        [
            (
                "vllm:time_to_first_token_seconds",
                "Time from arrival to the first token.",
                &self.first_token_s,
            ),
            (
                "vllm:inter_token_latency_seconds",
                "Time between one token and the next.",
                &self.inter_token_s,
            ),
            (
                "vllm:request_time_per_output_token_seconds",
                "Mean time per token after a request's first.",
                &self.per_output_token_s,
            ),
            (
                "vllm:e2e_request_latency_seconds",
                "Time from arrival to the end of a request.",
                &self.request_s,
            ),
            ("vllm:request_queue_time_seconds", "Time spent waiting.", &self.queue_s),
            (
                "vllm:request_prefill_time_seconds",
                "Time from the first step to the first token.",
                &self.prefill_s,
            ),
            (
                "vllm:request_decode_time_seconds",
                "Time from the first token to the last.",
                &self.decode_s,
            ),
            (
                "vllm:request_inference_time_seconds",
                "Time from the first step to the last token.",
                &self.inference_s,
            ),
            (
                "vllm:request_prompt_tokens",
                "Tokens in a request's prompt.",
                &self.request_prompt_tokens,
            ),
            (
                "vllm:request_generation_tokens",
                "Tokens that a request produced.",
                &self.request_generation_tokens,
            ),
            (
                "vllm:request_params_max_tokens",
                "The limit on output tokens of a request.",
                &self.params_max_tokens,
            ),
            ("vllm:request_params_n", "The choices asked for by a request.", &self.params_n),
        ]
    }
}

/// What a scrape reads of one model.
pub(crate) struct Scrape<'a> {
    pub(crate) name: &'a str,
    pub(crate) load: Load,
    pub(crate) experts: Option<Arc<ExpertLoads>>,
    pub(crate) metrics: &'a ModelMetrics,
}

type Read = fn(&Scrape<'_>) -> f64;

/// Name, kind, help and where the number comes from.
const NUMBERS: [(&str, &str, &str, Read); 13] = [
    ("vllm:num_requests_running", "gauge", "Requests in the current step.", |s| {
        f64::from(s.load.running)
    }),
    ("vllm:num_requests_waiting", "gauge", "Requests queued.", |s| f64::from(s.load.waiting)),
    ("vllm:kv_cache_usage_perc", "gauge", "Share of KV blocks in use, 0 to 1.", |s| {
        f64::from(s.load.blocks_used) / f64::from(s.load.blocks_total.max(1))
    }),
    (
        "vllm:prefix_cache_queries_total",
        "counter",
        "Prompt tokens looked up in the prefix cache.",
        |s| s.load.prefix_queries as f64,
    ),
    ("vllm:prefix_cache_hits_total", "counter", "Prompt tokens found in the prefix cache.", |s| {
        s.load.prefix_hits as f64
    }),
    ("vllm:num_preemptions_total", "counter", "Requests preempted.", |s| s.load.preemptions as f64),
    (
        "vllm:prompt_tokens_total",
        "counter",
        "Prompt tokens of requests that got to their first token.",
        |s| s.metrics.prompt_tokens.load(Ordering::Relaxed) as f64,
    ),
    ("vllm:generation_tokens_total", "counter", "Tokens produced.", |s| {
        s.metrics.generation_tokens.load(Ordering::Relaxed) as f64
    }),
    ("vllm:spec_decode_num_drafts_total", "counter", "Times that a request got drafts.", |s| {
        s.load.drafts as f64
    }),
    ("vllm:spec_decode_num_draft_tokens_total", "counter", "Tokens drafted.", |s| {
        s.load.draft_tokens as f64
    }),
    (
        "vllm:spec_decode_num_accepted_tokens_total",
        "counter",
        "Tokens drafted and accepted.",
        |s| s.load.accepted_tokens as f64,
    ),
    ("pomona:steps_total", "counter", "Steps that the engine has completed.", |s| {
        s.load.steps as f64
    }),
    ("pomona:stalled_seconds", "gauge", "Time since the engine was last seen well.", |s| {
        s.load.stalled_for.0 as f64 / 1e6
    }),
];

/// The answer to a scrape.
pub(crate) fn expose(models: &[Scrape<'_>], responses: &Responses) -> String {
    let mut out = Exposition::default();
    let name = "http_requests_total";
    out.metric(name, "counter", "Requests answered, by HTTP status.");
    for (status, count) in responses.seen() {
        out.sample(name, &[("status", &status.to_string())], count);
    }
    for (name, kind, help, read) in NUMBERS {
        out.metric(name, kind, help);
        for model in models {
            out.sample(name, &labels(model), read(model));
        }
    }
    let name = "pomona:step_seconds_total";
    out.metric(name, "counter", "Time that the engine spent on steps, by what it did.");
    for model in models {
        let times = &model.load.step_times;
        let phases = [
            ("plan", times.plan),
            ("forward", times.forward),
            ("sample", times.sample),
            ("deliver", times.deliver),
        ];
        for (phase, time) in phases {
            let [model_name, engine] = labels(model);
            out.sample(name, &[model_name, engine, ("phase", phase)], time.0 as f64 / 1e6);
        }
    }
    experts::expose(&mut out, models);
    let name = "vllm:request_success_total";
    out.metric(name, "counter", "Requests finished, by reason.");
    for model in models {
        for (outcome, count) in Outcome::ALL.iter().zip(&model.metrics.finished) {
            let [model_name, engine] = labels(model);
            let labels: Labels<'_> = &[model_name, engine, ("finished_reason", outcome.name())];
            out.sample(name, labels, count.load(Ordering::Relaxed));
        }
    }
    // Every model has the same histograms; go through them name by name.
    let all: Vec<_> = models.iter().map(|model| model.metrics.histograms()).collect();
    let Some(first) = all.first() else { return out.finish() };
    for (index, (name, help, _)) in first.iter().enumerate() {
        out.metric(name, "histogram", help);
        for (model, histograms) in models.iter().zip(&all) {
            out.histogram(name, &labels(model), histograms[index].2);
        }
    }
    out.finish()
}

/// vLLM labels each sample with the number of the engine; there is one here.
fn labels<'a>(model: &Scrape<'a>) -> [(&'a str, &'a str); 2] {
    [("model_name", model.name), ("engine", "0")]
}
