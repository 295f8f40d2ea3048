//! Truncation and the draw itself, without sorting the vocabulary.

use std::cmp::Ordering;

use pomona_types::{Sampling, TokenId};

use super::weights::{NO_WEIGHT, Weights};
use super::{Candidate, argmax, max_of};

/// Logits of which only the largest is looked at to find what top-k cannot keep.
const STRETCH: usize = 16;
/// Candidates looked at first for top-p; eight times as many until they carry enough.
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
    let mut weights = Weights {
        best,
        // Finite, so that the best keeps its weight.
        inverse: (1.0 / sampling.temperature).min(f32::MAX),
        cut: if sampling.min_p > 0.0 { sampling.min_p.ln() } else { NO_WEIGHT },
    };
    let (k, top_p) = (sampling.top_k as usize, f64::from(sampling.top_p));
    if k == 0 && top_p >= 1.0 {
        return weights.pick(logits, u);
    }
    let mut total = 0.0;
    if k > 0 {
        weights.cut = weights.cut.max(weights.scaled(reached_by(k, logits)));
    } else {
        total = weights.sum(logits);
        // What lies below it has, even all together, less than the share 1 - top_p of a total that
        // is at least 1: top-p keeps none of it.
        let spare = (1.0 - top_p) / logits.len() as f64;
        weights.cut = weights.cut.max(spare.ln() as f32 - 1.0);
    }
    weights.gather(logits, candidates);
    if k > 0 && k < candidates.len() {
        candidates.select_nth_unstable_by(k - 1, likelier_first);
        candidates.truncate(k);
        // Back to token order, so that the result of selection's shuffling never shows.
        candidates.sort_unstable_by_key(|c| c.token);
    }
    for candidate in candidates.iter_mut() {
        candidate.weight = weights.of_scaled(candidate.weight);
    }
    if k > 0 {
        total = candidates.iter().map(|c| f64::from(c.weight)).sum();
    }
    if top_p >= 1.0 {
        return pick(candidates, u * total);
    }
    let (kept, sum) = reaching(candidates, top_p * total);
    candidates.truncate(kept);
    let (drawn, _) = reaching(candidates, u * sum);
    candidates[..drawn].last().map_or(0, |drawn| drawn.token)
}

/// A logit that at least `k` reach, so that no smaller one is among the `k` largest: the `k`-th of
/// the largest ones of each stretch.
fn reached_by(k: usize, logits: &[f32]) -> f32 {
    let mut largest: Vec<f32> = logits.chunks(STRETCH).map(max_of).collect();
    if k > largest.len() {
        return f32::NEG_INFINITY;
    }
    *largest.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a)).1
}

/// Brings the likeliest candidates to the front, as few as together weigh `mass`; how many, and
/// what they weigh. The last of them is at their end. Halves what it looks at instead of sorting
/// it.
fn reaching(candidates: &mut [Candidate], mass: f64) -> (usize, f64) {
    // So many are certainly among them, and so many are certainly enough.
    let (mut among, mut enough) = (0, candidates.len());
    let mut sum = 0.0;
    let mut step = TOP_P_FIRST;
    while enough - among > 1 {
        let middle = among + step.min((enough - among) / 2);
        candidates[among..enough].select_nth_unstable_by(middle - among - 1, likelier_first);
        let part = candidates[among..middle].iter().map(|c| f64::from(c.weight)).sum::<f64>();
        if sum + part >= mass {
            enough = middle;
        } else {
            (among, sum) = (middle, sum + part);
            step *= 8;
        }
    }
    let last = candidates[among..enough].iter().map(|c| f64::from(c.weight)).sum::<f64>();
    (enough, sum + last)
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
