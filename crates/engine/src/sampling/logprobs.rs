//! Log-probabilities of a row of logits.

use pomona_types::{TokenId, TokenLogprobs};

use super::weights::{NO_WEIGHT, Weights};
use super::{Candidate, max_of};

/// The log-probability and rank of `token` and the `top` likeliest tokens, from raw logits.
pub fn token_logprobs(
    logits: &[f32],
    token: TokenId,
    top: u32,
    candidates: &mut Vec<Candidate>,
) -> TokenLogprobs {
    let best = max_of(logits);
    let total = Weights { best, inverse: 1.0, cut: NO_WEIGHT }.sum(logits);
    let log_total = total.ln() as f32;
    let logprob = |logit: f32| finite(logit - best - log_total);
    let own = logits.get(token as usize).copied().unwrap_or(f32::NEG_INFINITY);
    let rank = 1 + logits.iter().filter(|l| **l > own).count() as u32;
    likeliest(logits, top as usize, candidates);
    TokenLogprobs {
        token,
        logprob: logprob(own),
        rank,
        top: candidates.iter().map(|c| (c.token, logprob(c.weight))).collect(),
    }
}

/// Leaves the `count` largest logits in `candidates`, best first, ties by lower token.
fn likeliest(logits: &[f32], count: usize, candidates: &mut Vec<Candidate>) {
    candidates.clear();
    if count == 0 {
        return;
    }
    for (token, logit) in logits.iter().enumerate() {
        let full = candidates.len() == count;
        if full && candidates.last().is_some_and(|last| *logit <= last.weight) {
            continue;
        }
        if full {
            candidates.pop();
        }
        let at = candidates.partition_point(|c| c.weight >= *logit);
        candidates.insert(at, Candidate { weight: *logit, token: token as TokenId });
    }
}

/// JSON has no infinities; OpenAI's API uses -9999 for a token that cannot occur.
fn finite(logprob: f32) -> f32 {
    if logprob.is_finite() { logprob } else { -9999.0 }
}
