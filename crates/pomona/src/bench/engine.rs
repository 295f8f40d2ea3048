//! Speed of the engine alone: one request at a time, no HTTP, no text.

use anyhow::{Context, Result};
use pomona_types::{Replica, Sampling, TokenId};

use super::prompts::Numbers;
use super::report::{Facts, Machine, Speed};
use super::stats::Spread;
use crate::generate::{Generated, generate};

/// Tokens of the prompt whose prefill is timed.
const PROMPT_TOKENS: u32 = 512;
/// Tokens whose decoding is timed.
const DECODE_TOKENS: u32 = 128;

/// KV bytes that a decode step reads at a sequence length.
pub type KvRead<'a> = &'a dyn Fn(f64) -> f64;

/// Times prefill of 512 tokens, and decode of 128 after one token and after those 512.
pub fn measure(
    replica: &dyn Replica,
    machine: &Machine,
    facts: &Facts,
    kv_read: KvRead<'_>,
    repeats: usize,
) -> Result<Vec<Speed>> {
    let prompt_tokens = PROMPT_TOKENS.min(replica.info().max_model_len / 2).max(1);
    let mut runs = Runs { replica, next_id: 0 };
    // Once without looking, so that weights are in memory and the pool is awake.
    runs.once(prompt_tokens, 8)?;
    let (mut prefill, mut shallow, mut deep) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..repeats {
        let long = runs.once(prompt_tokens, DECODE_TOKENS + 1)?;
        let first = long.times.first().context("no token came")?;
        prefill.push(f64::from(prompt_tokens) / (*first - long.submitted).as_secs_f64());
        deep.push(decode_rate(&long));
        shallow.push(decode_rate(&runs.once(1, DECODE_TOKENS + 1)?));
    }
    let row = |what: String, rates: &[f64], gb: f64, gflop: f64| {
        let tokens_per_s = Spread::of(rates);
        let rate = tokens_per_s.median;
        Speed { what, tokens_per_s, limits: machine.limits(gb * rate, gflop * rate) }
    };
    let tokens = f64::from(prompt_tokens);
    let layer_gflop = 2.0 * facts.layer_weights as f64 / 1e9;
    let output_gflop = 2.0 * facts.output_weights as f64 / 1e9;
    let decode_gb = |start: f64| {
        let mean = start + f64::from(DECODE_TOKENS) / 2.0;
        (facts.step_bytes as f64 + kv_read(mean)) / 1e9
    };
    Ok(vec![
        row(
            format!("prefill {prompt_tokens}"),
            &prefill,
            // A step reads the weights once for all its tokens.
            facts.step_bytes as f64 / 1e9 / tokens,
            layer_gflop + output_gflop / tokens,
        ),
        row(
            format!("decode {DECODE_TOKENS}"),
            &shallow,
            decode_gb(1.0),
            layer_gflop + output_gflop,
        ),
        row(
            format!("decode at {prompt_tokens}"),
            &deep,
            decode_gb(tokens),
            layer_gflop + output_gflop,
        ),
    ])
}

/// Tokens per second after the first.
fn decode_rate(generated: &Generated) -> f64 {
    match (generated.times.first(), generated.times.last()) {
        (Some(first), Some(last)) if last > first => {
            (generated.times.len() - 1) as f64 / (*last - *first).as_secs_f64()
        }
        _ => 0.0,
    }
}

struct Runs<'a> {
    replica: &'a dyn Replica,
    next_id: u64,
}

impl Runs<'_> {
    /// One request with a prompt that no other one shares.
    fn once(&mut self, prompt_tokens: u32, output_tokens: u32) -> Result<Generated> {
        self.next_id += 1;
        let mut numbers = Numbers::new(self.next_id);
        let vocab = u64::from(self.replica.info().vocab_size.max(1));
        let prompt: Vec<TokenId> =
            (0..prompt_tokens).map(|_| numbers.below(vocab) as TokenId).collect();
        let room = self.replica.info().max_model_len.saturating_sub(prompt_tokens);
        let sampling = Sampling {
            temperature: 0.0,
            max_tokens: output_tokens.min(room.max(1)),
            ignore_eos: true,
            ..Sampling::default()
        };
        generate(self.replica, self.next_id, prompt, sampling)
    }
}
