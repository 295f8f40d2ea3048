//! Truncation and the draw itself, without sorting the vocabulary.

use std::cmp::Ordering;

use pomona_types::{Sampling, TokenId};

use super::exp::exp_nonpositive;
use super::{Candidate, argmax, max_of};

/// Candidates sorted at first when only top-p truncates; grown eightfold until they carry enough.
const TOP_P_FIRST: usize = 64;

/// A number in [0, 1) from a seed and a counter: the counter-based generator SplitMix64 (Steele,
/// Lea, Flood, "Fast splittable pseudorandom number generators", 2014), so that the draw of token
/// `position` needs no state of earlier draws.
pub fn uniform(seed: u64, position: u64) -> f64 {
    let mix = |mut z: u64| {
        z = z.wrapping_add(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    let bits = mix(mix(seed) ^ position.wrapping_mul(0xd134_2543_de82_ef95));
    (bits >> 11) as f64 / (1u64 << 53) as f64
}

/// Draws a token by `u` in [0, 1) after min-p, top-k and top-p.
pub(super) fn draw(
    logits: &[f32],
    sampling: &Sampling,
    u: f64,
    candidates: &mut Vec<Candidate>,
) -> TokenId {
    let best = max_of(logits);
    if !best.is_finite() {
        return argmax(logits);
    }
    let inverse = 1.0 / sampling.temperature;
    // Below -87 the weight is 0 in f32; min-p may cut far higher.
    let cut = if sampling.min_p > 0.0 { sampling.min_p.ln() } else { -87.0 };
    candidates.clear();
    for (token, logit) in logits.iter().enumerate() {
        let scaled = (logit - best) * inverse;
        if scaled >= cut {
            candidates.push(Candidate { weight: scaled, token: token as TokenId });
        }
    }
    let k = sampling.top_k as usize;
    if k > 0 && k < candidates.len() {
        candidates.select_nth_unstable_by(k - 1, likelier_first);
        candidates.truncate(k);
        // Back to token order, so that the result of selection's shuffling never shows.
        candidates.sort_unstable_by_key(|c| c.token);
    }
    for candidate in candidates.iter_mut() {
        candidate.weight = exp_nonpositive(candidate.weight);
    }
    let mut total: f64 = candidates.iter().map(|c| f64::from(c.weight)).sum();
    if sampling.top_p < 1.0 {
        total = keep_top_p(candidates, f64::from(sampling.top_p) * total);
    }
    pick(candidates, u * total)
}

/// Keeps the likeliest candidates, in order, until their weights reach `mass`; returns their sum.
fn keep_top_p(candidates: &mut Vec<Candidate>, mass: f64) -> f64 {
    let mut sorted = 0;
    let mut sum = 0.0;
    let mut batch = TOP_P_FIRST;
    while sorted < candidates.len() {
        let rest = &mut candidates[sorted..];
        let batch_len = batch.min(rest.len());
        if batch_len < rest.len() {
            rest.select_nth_unstable_by(batch_len - 1, likelier_first);
        }
        rest[..batch_len].sort_unstable_by(likelier_first);
        for i in 0..batch_len {
            sum += f64::from(candidates[sorted + i].weight);
            if sum >= mass {
                candidates.truncate(sorted + i + 1);
                return sum;
            }
        }
        sorted += batch_len;
        batch *= 8;
    }
    sum
}

/// The candidate in whose share of the weights `target` falls.
fn pick(candidates: &[Candidate], target: f64) -> TokenId {
    let mut sum = 0.0;
    let mut last = 0;
    for candidate in candidates.iter().filter(|c| c.weight > 0.0) {
        sum += f64::from(candidate.weight);
        last = candidate.token;
        if target < sum {
            break;
        }
    }
    last
}

/// Larger weight first, then the lower token: a total order, so that results do not depend on how
/// selection shuffles.
fn likelier_first(a: &Candidate, b: &Candidate) -> Ordering {
    b.weight.total_cmp(&a.weight).then(a.token.cmp(&b.token))
}
