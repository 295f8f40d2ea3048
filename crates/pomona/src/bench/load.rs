//! Load on an OpenAI-compatible server over HTTP: a number of clients, each sending one streaming
//! completion after another, and what they saw.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use serde::Serialize;
use serde_json::{Value, json};
use tokio::task::JoinSet;

use super::prompts;
use super::stats::{Percentiles, Spread};
use crate::http::{Client, Refused};

/// Most words of the request that finds out how many tokens a word is.
const PROBE_WORDS: usize = 200;

/// What every request asks for.
#[derive(Clone, Debug)]
pub struct Shape {
    /// The model's name at the server.
    pub model: String,
    /// Tokens of each prompt, about.
    pub input_tokens: u32,
    /// Tokens to generate.
    pub output_tokens: u32,
    /// Whether prompts share their first three quarters.
    pub shared_prefix: bool,
}

/// A server that has been asked how it counts.
pub struct Target {
    client: Client,
    shape: Shape,
    words: usize,
    ignore_eos: bool,
}

/// What was seen at one number of clients.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Level {
    /// Concurrent clients.
    pub clients: usize,
    /// Requests in each repetition.
    pub requests: usize,
    /// Requests that failed, in all repetitions.
    pub failed: usize,
    /// What the first of them said.
    pub first_failure: Option<String>,
    /// Prompt tokens of a request, as the server counted them.
    pub input_tokens_mean: f64,
    /// Generated tokens of a request, as the server counted them.
    pub output_tokens_mean: f64,
    /// Generated tokens per second, all clients together.
    pub output_tokens_per_s: Spread,
    /// Prompt and generated tokens per second.
    pub total_tokens_per_s: Spread,
    /// Requests per second.
    pub requests_per_s: Spread,
    /// Time to the first piece of text, ms.
    pub ttft_ms: Percentiles,
    /// Time between two pieces of text of a stream, ms.
    pub inter_token_ms: Percentiles,
}

/// One finished request.
struct Sample {
    first: Duration,
    gaps: Vec<Duration>,
    input_tokens: u64,
    output_tokens: u64,
}

/// What one repetition brought.
pub struct Round {
    samples: Vec<Sample>,
    failures: Vec<anyhow::Error>,
    /// Generated tokens per second.
    pub output_tokens_per_s: f64,
    total_tokens_per_s: f64,
    requests_per_s: f64,
}

impl Round {
    /// Time to the first piece of text, ms: the middle of all requests.
    pub fn ttft_ms(&self) -> f64 {
        Percentiles::of(self.samples.iter().map(|s| ms(&s.first)).collect()).p50
    }
}

fn ms(time: &Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

impl Level {
    /// All repetitions at one number of clients together.
    ///
    /// # Errors
    /// When not one request worked; the first failure.
    pub fn of(clients: usize, requests: usize, rounds: Vec<Round>) -> Result<Level> {
        let spread =
            |rate: fn(&Round) -> f64| Spread::of(&rounds.iter().map(rate).collect::<Vec<f64>>());
        let [output, total, all_requests] = [
            spread(|r| r.output_tokens_per_s),
            spread(|r| r.total_tokens_per_s),
            spread(|r| r.requests_per_s),
        ];
        let (mut samples, mut failures) = (Vec::new(), Vec::new());
        for round in rounds {
            samples.extend(round.samples);
            failures.extend(round.failures);
        }
        if samples.is_empty() {
            let first = failures.into_iter().next();
            return Err(first.unwrap_or_else(|| anyhow!("no request was made")))
                .context(format!("every request of {clients} clients failed"));
        }
        let mean = |f: fn(&Sample) -> u64| {
            samples.iter().map(f).sum::<u64>() as f64 / samples.len() as f64
        };
        let gaps = samples.iter().flat_map(|s| s.gaps.iter().map(ms)).collect();
        Ok(Level {
            clients,
            requests,
            failed: failures.len(),
            first_failure: failures.first().map(|e| format!("{e:#}")),
            input_tokens_mean: mean(|s| s.input_tokens),
            output_tokens_mean: mean(|s| s.output_tokens),
            output_tokens_per_s: output,
            total_tokens_per_s: total,
            requests_per_s: all_requests,
            ttft_ms: Percentiles::of(samples.iter().map(|s| ms(&s.first)).collect()),
            inter_token_ms: Percentiles::of(gaps),
        })
    }
}

impl Target {
    /// Asks the server once, to learn how many words make a prompt of the wanted length and
    /// whether it understands `ignore_eos`.
    pub async fn probe(client: Client, shape: Shape) -> Result<Target> {
        // No longer than the prompts themselves, which are known to fit.
        let words = PROBE_WORDS.min(shape.input_tokens as usize).max(1);
        let mut target = Target { client, shape, words, ignore_eos: true };
        let first = target.ask(prompts::words(words, 1)).await;
        let sample = match first {
            // Not part of OpenAI's API; without it answers may be shorter than asked for.
            Err(error) if error.downcast_ref::<Refused>().is_some_and(|r| r.status < 500) => {
                target.ignore_eos = false;
                let again = target.ask(prompts::words(words, 1)).await;
                again.map_err(|_| error).context("the server refuses a plain completion")?
            }
            other => other?,
        };
        if sample.input_tokens == 0 {
            bail!("the server reports no usage; tokens cannot be counted");
        }
        let wanted = f64::from(target.shape.input_tokens);
        target.words = (wanted * words as f64 / sample.input_tokens as f64).round() as usize;
        Ok(target)
    }

    /// Runs `clients` clients until `requests` requests are done; the `turn`-th time.
    pub async fn round(self: &Arc<Self>, clients: usize, requests: usize, turn: usize) -> Round {
        let begun = Instant::now();
        let (samples, failures) = self.run(clients, requests, turn as u64).await;
        let seconds = begun.elapsed().as_secs_f64();
        let output: u64 = samples.iter().map(|s| s.output_tokens).sum();
        let input: u64 = samples.iter().map(|s| s.input_tokens).sum();
        Round {
            output_tokens_per_s: output as f64 / seconds,
            total_tokens_per_s: (input + output) as f64 / seconds,
            requests_per_s: samples.len() as f64 / seconds,
            samples,
            failures,
        }
    }

    async fn run(
        self: &Arc<Self>,
        clients: usize,
        requests: usize,
        repeat: u64,
    ) -> (Vec<Sample>, Vec<anyhow::Error>) {
        let next = Arc::new(AtomicUsize::new(0));
        let mut tasks = JoinSet::new();
        for _ in 0..clients {
            let (target, next) = (self.clone(), next.clone());
            tasks.spawn(async move {
                let mut results = Vec::new();
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    if index >= requests {
                        return results;
                    }
                    // Distinct across repetitions and levels as well.
                    let seed = (repeat + 1) << 40 | (clients as u64) << 20 | index as u64;
                    results.push(target.ask(target.prompt(seed)).await);
                }
            });
        }
        let mut done = Vec::new();
        let mut failed = Vec::new();
        while let Some(results) = tasks.join_next().await {
            for result in results.unwrap_or_else(|e| vec![Err(e.into())]) {
                match result {
                    Ok(sample) => done.push(sample),
                    Err(error) => failed.push(error),
                }
            }
        }
        (done, failed)
    }

    fn prompt(&self, seed: u64) -> String {
        if self.shape.shared_prefix {
            prompts::words_with_shared_prefix(self.words, 0, seed)
        } else {
            prompts::words(self.words, seed)
        }
    }

    async fn ask(&self, prompt: String) -> Result<Sample> {
        let mut body = json!({
            "model": self.shape.model,
            "prompt": prompt,
            "max_tokens": self.shape.output_tokens,
            "temperature": 0,
            "stream": true,
            "stream_options": {"include_usage": true},
        });
        if self.ignore_eos {
            body["ignore_eos"] = json!(true);
        }
        let begun = Instant::now();
        let mut events = self.client.stream("/v1/completions", &body).await?;
        let mut last: Option<Instant> = None;
        let mut first = None;
        let mut gaps = Vec::new();
        let mut usage = (0, 0);
        while let Some(event) = events.next().await? {
            let now = Instant::now();
            let text = event.pointer("/choices/0/text").and_then(Value::as_str);
            if text.is_some_and(|text| !text.is_empty()) {
                match last {
                    None => first = Some(now - begun),
                    Some(last) => gaps.push(now - last),
                }
                last = Some(now);
            }
            let count = |field: &str| event.pointer(field).and_then(Value::as_u64);
            usage.0 = count("/usage/prompt_tokens").unwrap_or(usage.0);
            usage.1 = count("/usage/completion_tokens").unwrap_or(usage.1);
        }
        let first = first.ok_or_else(|| anyhow!("a stream ended without any text"))?;
        Ok(Sample { first, gaps, input_tokens: usage.0, output_tokens: usage.1 })
    }
}

#[cfg(test)]
mod tests;
