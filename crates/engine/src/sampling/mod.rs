//! From logits to a token. A pure function of one row of logits, the request's parameters, what it
//! has seen so far and a counter: neighbours in the batch cannot change it.
//!
//! The order is that of vLLM: log-probabilities are taken from the raw logits; then bias, minimum
//! length, penalties, temperature, min-p, top-k, top-p, and the draw.

mod draw;
mod exp;
mod logprobs;
mod nucleus;
mod penalties;
mod weights;

pub use draw::{Uniforms, uniform};
pub use logprobs::token_logprobs;
pub use penalties::TokenCounts;

use pomona_types::{Sampling, TokenId};

/// What one request brings to each of its draws.
pub struct Sampler {
    sampling: Sampling,
    seed: u64,
    /// End and stop tokens, held back until `min_tokens`.
    ends: Vec<TokenId>,
    counts: Option<TokenCounts>,
    produced: u32,
}

impl Sampler {
    /// A sampler at the first output token. `seed` serves requests that bring none; `eos` are the
    /// model's end tokens.
    pub fn new(sampling: Sampling, seed: u64, eos: &[TokenId], prompt: &[TokenId]) -> Sampler {
        let ends = eos.iter().chain(&sampling.stop_token_ids).copied().collect();
        let counts = TokenCounts::needed(&sampling).then(|| TokenCounts::new(prompt));
        Sampler { seed: sampling.seed.unwrap_or(seed), sampling, ends, counts, produced: 0 }
    }

    /// The parameters it was made from.
    pub fn sampling(&self) -> &Sampling {
        &self.sampling
    }

    /// Chooses the next token, `logits: [vocab]`, which it overwrites. `candidates` is scratch.
    /// Non-finite logits are never chosen while a finite one exists; with none, token 0 is.
    pub fn sample(&self, logits: &mut [f32], candidates: &mut Vec<Candidate>) -> TokenId {
        self.process(logits);
        if self.sampling.temperature <= 0.0 {
            return argmax(logits);
        }
        let position = u64::from(self.produced);
        let uniforms = Uniforms::new(self.seed, position);
        draw::draw(logits, &self.sampling, uniforms, candidates)
    }

    /// Takes note that `token` was accepted.
    pub fn accept(&mut self, token: TokenId) {
        self.produced += 1;
        if let Some(counts) = &mut self.counts {
            counts.accept(token);
        }
    }

    fn process(&self, logits: &mut [f32]) {
        for (token, bias) in &self.sampling.logit_bias {
            if let Some(logit) = logits.get_mut(*token as usize) {
                *logit += bias;
            }
        }
        if self.produced < self.sampling.min_tokens {
            for end in &self.ends {
                if let Some(logit) = logits.get_mut(*end as usize) {
                    *logit = f32::NEG_INFINITY;
                }
            }
        }
        if let Some(counts) = &self.counts {
            counts.apply(&self.sampling, logits);
        }
    }
}

/// A token that may be drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Candidate {
    /// Its logit, then its weight.
    pub weight: f32,
    /// The token.
    pub token: TokenId,
}

/// The first of the largest finite or infinite values; NaN never wins.
pub fn argmax(logits: &[f32]) -> TokenId {
    // The search for a part's maximum becomes vector instructions, that for its place does not.
    const PART: usize = 512;
    let (mut best, mut found) = (f32::NEG_INFINITY, 0);
    for (part, logits) in logits.chunks(PART).enumerate() {
        let largest = max_of(logits);
        if largest > best {
            (best, found) = (largest, part);
        }
    }
    let place = logits.iter().skip(found * PART).position(|logit| *logit == best);
    place.map_or(0, |place| found * PART + place) as TokenId
}

/// The largest value, ignoring NaN; -inf for none.
fn max_of(logits: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; 16];
    let chunks = logits.chunks_exact(16);
    let rest = chunks.remainder();
    for chunk in chunks {
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            *lane = if *value > *lane { *value } else { *lane };
        }
    }
    lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |a, b| if *b > a { *b } else { a })
}

#[cfg(test)]
mod tests;
