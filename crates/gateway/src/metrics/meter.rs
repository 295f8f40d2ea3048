//! One request's clock: what its tokens add to the model's measurements.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use pomona_types::{Finish, FinishReason};

use crate::gateway::Model;

/// How a request ended, in vLLM's words.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Outcome {
    Stop,
    Length,
    Abort,
    Error,
}

impl Outcome {
    /// All of them, in the order of their counters.
    pub(crate) const ALL: [Outcome; 4] =
        [Outcome::Stop, Outcome::Length, Outcome::Abort, Outcome::Error];

    /// The label's value.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Outcome::Stop => "stop",
            Outcome::Length => "length",
            Outcome::Abort => "abort",
            Outcome::Error => "error",
        }
    }
}

/// Lives in the token sink: a few atomic additions per token.
pub(crate) struct Meter {
    model: Arc<Model>,
    prompt_tokens: u32,
    submitted: Instant,
    first: Option<Instant>,
    last: Instant,
    tokens: u32,
    /// Set by the reader when it cancels because of a stop string.
    stopped: Arc<AtomicBool>,
}

impl Meter {
    /// Starts the clock.
    pub(crate) fn start(model: Arc<Model>, prompt_tokens: u32, stopped: Arc<AtomicBool>) -> Meter {
        let submitted = Instant::now();
        Meter { model, prompt_tokens, submitted, first: None, last: submitted, tokens: 0, stopped }
    }

    /// A token has come.
    pub(crate) fn token(&mut self) {
        let metrics = &self.model.metrics;
        let now = Instant::now();
        if self.first.is_none() {
            self.first = Some(now);
            metrics.first_token_s.observe((now - self.submitted).as_secs_f64());
            metrics.prompt_tokens.fetch_add(u64::from(self.prompt_tokens), Ordering::Relaxed);
        } else {
            metrics.inter_token_s.observe((now - self.last).as_secs_f64());
        }
        metrics.generation_tokens.fetch_add(1, Ordering::Relaxed);
        self.last = now;
        self.tokens += 1;
    }

    /// The end has come.
    pub(crate) fn finish(&self, finish: &Finish) {
        let metrics = &self.model.metrics;
        let outcome = match finish.reason {
            FinishReason::Stop(_) => Outcome::Stop,
            FinishReason::Length => Outcome::Length,
            FinishReason::Abort if self.stopped.load(Ordering::Relaxed) => Outcome::Stop,
            FinishReason::Abort => Outcome::Abort,
            FinishReason::Error => Outcome::Error,
        };
        let index = Outcome::ALL.iter().position(|known| *known == outcome).unwrap_or(0);
        metrics.finished[index].fetch_add(1, Ordering::Relaxed);
        metrics.request_s.observe(self.submitted.elapsed().as_secs_f64());
        metrics.request_prompt_tokens.observe(f64::from(self.prompt_tokens));
        metrics.request_generation_tokens.observe(f64::from(self.tokens));
        let queued = finish.queued.0 as f64 / 1e6;
        metrics.queue_s.observe(queued);
        let Some(first) = self.first else { return };
        let to_first = (first - self.submitted).as_secs_f64();
        let decode = (self.last - first).as_secs_f64();
        metrics.prefill_s.observe((to_first - queued).max(0.0));
        metrics.decode_s.observe(decode);
        metrics.inference_s.observe((to_first - queued).max(0.0) + decode);
        if self.tokens > 1 {
            metrics.per_output_token_s.observe(decode / f64::from(self.tokens - 1));
        }
    }
}
