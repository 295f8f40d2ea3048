//! Truncation and the draw itself, without sorting the vocabulary.

use std::cmp::Ordering;

use pomona_types::{Sampling, TokenId};

use super::nucleus::{Nucleus, peaks};
use super::weights::{NO_WEIGHT, Weights};
use super::{Candidate, argmax, max_of};

/// Candidates looked at first for top-p; eight times as many until they carry enough.
const TOP_P_FIRST: usize = 64;

/// Numbers in [0, 1) from a seed and a counter: the generator SplitMix64 (Steele, Lea, Flood, "Fast
/// splittable pseudorandom number generators", 2014), begun anew for each token by a counter, so
/// that the draw of token `position` needs no state of earlier draws.
#[derive(Clone, Copy, Debug)]
pub struct Uniforms(u64);

impl Uniforms {
    /// Those of a position.
    pub fn new(seed: u64, position: u64) -> Uniforms {
        Uniforms(mix(seed) ^ position.wrapping_mul(0xd134_2543_de82_ef95))
    }
}

impl Iterator for Uniforms {
    type Item = f64;

    fn next(&mut self) -> Option<f64> {
        let bits = mix(self.0);
        self.0 = self.0.wrapping_add(GOLDEN);
        Some((bits >> 11) as f64 / (1u64 << 53) as f64)
    }
}

/// What SplitMix64 counts by.
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

fn mix(z: u64) -> u64 {
    let z = z.wrapping_add(GOLDEN);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// The first of them.
pub fn uniform(seed: u64, position: u64) -> f64 {
    Uniforms::new(seed, position).next().unwrap_or_default()
}

/// Draws a token after min-p, top-k and top-p.
pub(super) fn draw(
    logits: &[f32],
    sampling: &Sampling,
    mut uniforms: Uniforms,
    candidates: &mut Vec<Candidate>,
) -> TokenId {
    let peaks = peaks(logits);
    let best = max_of(&peaks);
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
    if k == 0 {
        return Nucleus::new(logits, peaks, weights, top_p).draw(uniforms);
    }
    weights.cut = weights.cut.max(weights.scaled(reached_by(k, peaks.clone())));
    weights.gather(logits, &peaks, candidates);
    if k < candidates.len() {
        candidates.select_nth_unstable_by(k - 1, likelier_first);
        candidates.truncate(k);
        // Back to token order, so that the result of selection's shuffling never shows.
        candidates.sort_unstable_by_key(|c| c.token);
    }
    for candidate in candidates.iter_mut() {
        candidate.weight = weights.of_scaled(candidate.weight);
    }
    let total: f64 = candidates.iter().map(|c| f64::from(c.weight)).sum();
    let u = uniforms.next().unwrap_or_default();
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
fn reached_by(k: usize, mut peaks: Vec<f32>) -> f32 {
    if k > peaks.len() {
        return f32::NEG_INFINITY;
    }
    *peaks.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a)).1
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
