//! Penalties for tokens that have occurred: repetition (Keskar et al., CTRL, 2019), frequency and
//! presence (OpenAI's API reference).

use std::collections::BTreeMap;

use pomona_types::{Sampling, TokenId};

/// How often each token has occurred.
pub struct TokenCounts {
    /// Occurrences in the output; 0 for tokens of the prompt only.
    seen: BTreeMap<TokenId, u32>,
}

impl TokenCounts {
    /// Whether any penalty is on.
    pub fn needed(sampling: &Sampling) -> bool {
        sampling.repetition_penalty != 1.0
            || sampling.frequency_penalty != 0.0
            || sampling.presence_penalty != 0.0
    }

    /// Counts before the first output token.
    pub fn new(prompt: &[TokenId]) -> TokenCounts {
        TokenCounts { seen: prompt.iter().map(|t| (*t, 0)).collect() }
    }

    /// Counts an output token.
    pub fn accept(&mut self, token: TokenId) {
        *self.seen.entry(token).or_insert(0) += 1;
    }

    /// Repetition looks at prompt and output, frequency and presence at the output alone.
    pub fn apply(&self, sampling: &Sampling, logits: &mut [f32]) {
        for (token, count) in &self.seen {
            let Some(logit) = logits.get_mut(*token as usize) else { continue };
            *logit = if *logit > 0.0 {
                *logit / sampling.repetition_penalty
            } else {
                *logit * sampling.repetition_penalty
            };
            if *count > 0 {
                *logit -= *count as f32 * sampling.frequency_penalty + sampling.presence_penalty;
            }
        }
    }
}
