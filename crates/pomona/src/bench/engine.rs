//! Speed of the engine alone: one request at a time, no HTTP, no text.

use anyhow::{Context, Result};
use pomona_types::{Replica, Sampling, TokenId};

use super::prompts::Numbers;
use super::report::{Facts, Machine, Speed};
use super::stats::Spread;
use crate::generate::{Generated, Pending, submit};

/// Tokens whose decoding is timed.
const DECODE_TOKENS: u32 = 128;

/// What to time, and how often.
pub struct Options<'a> {
    /// Tokens of the prompts whose prefill is timed, and that decoding starts after.
    pub prompts: &'a [u32],
    /// Repetitions of each.
    pub repeats: usize,
}

/// KV bytes that a decode step reads at a sequence length.
pub type KvRead<'a> = &'a dyn Fn(f64) -> f64;

/// Times decode of 128 tokens after one token, then for each of `prompts` the prefill of so many
/// tokens, or as many as leave room for an answer, and decode after them.
pub fn measure(
    replica: &dyn Replica,
    machine: &Machine,
    facts: &Facts,
    kv_read: KvRead<'_>,
    options: &Options<'_>,
) -> Result<Vec<Speed>> {
    let prompts = fitting(options.prompts, replica.info().max_model_len);
    let mut runs = Runs::new(replica);
    // Once without looking, so that weights are in memory and the pool is awake.
    runs.once(prompts.iter().copied().min().unwrap_or(1), 8)?;
    let row = |what: String, rates: &[f64], gb: f64, gflop: f64| {
        let tokens_per_s = Spread::of(rates);
        let rate = tokens_per_s.median;
        Speed { what, tokens_per_s, limits: machine.limits(gb * rate, gflop * rate) }
    };
    let layer_gflop = 2.0 * facts.layer_weights as f64 / 1e9;
    let output_gflop = 2.0 * facts.output_weights as f64 / 1e9;
    let decode_row = |what: String, rates: &[f64], start: f64| {
        let mean = start + f64::from(DECODE_TOKENS) / 2.0;
        let gb = (facts.step_bytes as f64 + kv_read(mean)) / 1e9;
        row(what, rates, gb, layer_gflop + output_gflop)
    };
    let mut shallow = Vec::new();
    for _ in 0..options.repeats {
        shallow.push(decode_rate(&runs.once(1, DECODE_TOKENS + 1)?));
    }
    let mut rows = vec![decode_row(format!("decode {DECODE_TOKENS}"), &shallow, 1.0)];
    for prompt_tokens in prompts {
        let (mut prefill, mut deep) = (Vec::new(), Vec::new());
        for _ in 0..options.repeats {
            let long = runs.once(prompt_tokens, DECODE_TOKENS + 1)?;
            prefill.push(prefill_rate(prompt_tokens, &long)?);
            deep.push(decode_rate(&long));
        }
        let tokens = f64::from(prompt_tokens);
        // A step reads the weights once for all its tokens.
        let gb = facts.bytes_of_step(tokens) / 1e9 / tokens;
        let gflop = output_gflop / tokens;
        rows.push(row(format!("prefill {prompt_tokens}"), &prefill, gb, layer_gflop + gflop));
        rows.push(decode_row(format!("decode at {prompt_tokens}"), &deep, tokens));
    }
    Ok(rows)
}

/// The lengths, cut so that an answer fits behind them; where none does, half of what fits.
pub fn fitting(prompts: &[u32], max_model_len: u32) -> Vec<u32> {
    let room = max_model_len.saturating_sub(DECODE_TOKENS + 1).max(max_model_len / 2).max(1);
    let mut cut: Vec<u32> = prompts.iter().map(|n| (*n).clamp(1, room)).collect();
    cut.dedup();
    cut
}

/// Tokens of the prompt per second until the first token came.
pub fn prefill_rate(prompt_tokens: u32, generated: &Generated) -> Result<f64> {
    let first = generated.times.first().context("no token came")?;
    Ok(f64::from(prompt_tokens) / (*first - generated.submitted).as_secs_f64())
}

/// Tokens per second after the first.
pub fn decode_rate(generated: &Generated) -> f64 {
    match (generated.times.first(), generated.times.last()) {
        (Some(first), Some(last)) if last > first => {
            (generated.times.len() - 1) as f64 / (*last - *first).as_secs_f64()
        }
        _ => 0.0,
    }
}

/// Requests of a measurement: greedy, of random tokens.
pub struct Runs<'a> {
    replica: &'a dyn Replica,
    next_id: u64,
}

impl<'a> Runs<'a> {
    /// On a replica that nobody else uses.
    pub fn new(replica: &'a dyn Replica) -> Runs<'a> {
        Runs { replica, next_id: 0 }
    }

    /// One request with a prompt that no other one shares.
    pub fn once(&mut self, prompt_tokens: u32, output_tokens: u32) -> Result<Generated> {
        self.submit(prompt_tokens, output_tokens)?.wait()
    }

    /// The same, which goes on beside others.
    pub fn submit(&mut self, prompt_tokens: u32, output_tokens: u32) -> Result<Pending> {
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
        submit(self.replica, self.next_id, prompt, sampling)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_leave_room_for_the_answer() {
        assert_eq!(fitting(&[512, 8192], 16_384), [512, 8192]);
        assert_eq!(fitting(&[512, 8192], 8192), [512, 8192 - 129]);
        assert_eq!(fitting(&[512, 8192], 64), [32]);
    }
}
