//! A draw from a whole vocabulary, perhaps from its nucleus (Holtzman et al., "The Curious Case of
//! Neural Text Degeneration", 2019), that computes few weights and sorts none.
//!
//! Logits are cut into stretches. The largest weight of a stretch bounds its others; a stretch is
//! drawn by its bound, a token by its weight, and what lies between weight and bound is drawn again
//! (von Neumann's rejection). A token that is drawn is in the nucleus if what is likelier weighs
//! less than `top_p` of all. If it is not, nothing is from there on: what is drawn next is
//! likelier.

use super::draw::Uniforms;
use super::weights::Weights;
use super::{argmax, max_of};

/// Logits that share a bound. A draw is taken with a chance of one in twice as many at least.
pub(super) const STRETCH: usize = 16;
/// Stretches whose bounds are added up, so that a draw goes through few numbers.
const PART: usize = 64;
/// Draws before the likeliest token is taken. That many fail with a chance below 10^-100.
const DRAWS_MAX: usize = 10_000;

/// The largest logit of each stretch.
pub(super) fn peaks(logits: &[f32]) -> Vec<f32> {
    let (stretches, rest) = logits.as_chunks::<STRETCH>();
    let mut peaks = Vec::with_capacity(stretches.len() + 1);
    peaks.extend(stretches.iter().map(largest));
    if !rest.is_empty() {
        peaks.push(max_of(rest));
    }
    peaks
}

/// Of a stretch, ignoring NaN; halves become vector instructions.
fn largest(stretch: &[f32; STRETCH]) -> f32 {
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let mut lanes = stretch.map(|logit| larger(f32::NEG_INFINITY, logit));
    for half in [8, 4, 2, 1] {
        for lane in 0..half {
            lanes[lane] = larger(lanes[lane], lanes[lane + half]);
        }
    }
    lanes[0]
}

/// A vocabulary to draw from.
pub(super) struct Nucleus<'a> {
    logits: &'a [f32],
    weights: Weights,
    top_p: f64,
    peaks: Vec<f32>,
    /// The largest weight of each stretch, and their sums by part: of what may be drawn yet.
    bounds: Vec<f32>,
    sums: Vec<f64>,
    /// Of all weights, once it had to be known.
    total: Option<f64>,
}

impl<'a> Nucleus<'a> {
    /// With all of it, or the fewest likeliest tokens that weigh `top_p` of it.
    pub(super) fn new(
        logits: &'a [f32],
        peaks: Vec<f32>,
        weights: Weights,
        top_p: f64,
    ) -> Nucleus<'a> {
        let bounds: Vec<f32> = peaks.iter().map(|peak| weights.of(*peak)).collect();
        let mut nucleus =
            Nucleus { logits, weights, top_p, peaks, bounds, sums: Vec::new(), total: None };
        nucleus.add_up();
        nucleus
    }

    pub(super) fn draw(mut self, uniforms: Uniforms) -> u32 {
        let bound: f64 = self.sums.iter().sum();
        let mut last = None;
        for u in uniforms.take(DRAWS_MAX) {
            let Some(token) = self.propose(u).filter(|token| self.precedes(*token, last)) else {
                continue;
            };
            if self.top_p >= 1.0 || self.keeps(token, bound) {
                return token as u32;
            }
            last = Some(token);
            self.leave_out(token);
        }
        argmax(self.logits)
    }

    /// The token in whose share of all bounds `u` falls, if it is in any's.
    fn propose(&self, u: f64) -> Option<usize> {
        let bound: f64 = self.sums.iter().sum();
        let mut target = u * bound;
        let part = pass(&mut target, self.sums.iter().copied())?;
        let bounds = self.bounds[part * PART..].iter().take(PART);
        let stretch = part * PART + pass(&mut target, bounds.map(|bound| f64::from(*bound)))?;
        // The bound is that of each token: what is left of it goes over all of them.
        target *= STRETCH as f64;
        let first = stretch * STRETCH;
        let logits = self.logits[first..].iter().take(STRETCH);
        let token = pass(&mut target, logits.map(|l| f64::from(self.weights.of(*l))))?;
        Some(first + token)
    }

    /// Whether a token is likelier than another one; of equal ones, the first is.
    fn precedes(&self, token: usize, other: Option<usize>) -> bool {
        other.is_none_or(|other| {
            let (logit, limit) = (self.logits[token], self.logits[other]);
            logit > limit || logit == limit && token < other
        })
    }

    /// Whether what is likelier than a token weighs less than `top_p` of all, `bound` being what
    /// the largest of each stretch weigh: most draws are judged without adding up the rest.
    fn keeps(&mut self, token: usize, bound: f64) -> bool {
        let above = self.above(token);
        if above < self.top_p * bound {
            return true;
        }
        if above >= self.top_p * bound * STRETCH as f64 {
            return false;
        }
        let (weights, logits) = (&self.weights, self.logits);
        above < self.top_p * *self.total.get_or_insert_with(|| weights.sum(logits))
    }

    /// What all tokens weigh that are likelier than this one.
    fn above(&self, token: usize) -> f64 {
        let limit = self.logits[token];
        let stretches = self.logits.chunks(STRETCH).zip(&self.peaks);
        let likelier: f64 = stretches
            .filter(|(_, peak)| **peak > limit)
            .map(|(stretch, _)| self.weights.sum_above(stretch, limit))
            .sum();
        let equal = self.logits[..token].iter().filter(|logit| **logit == limit).count();
        likelier + equal as f64 * f64::from(self.weights.of(limit))
    }

    /// Leaves out the stretches that have nothing likelier than this token.
    fn leave_out(&mut self, token: usize) {
        let limit = self.logits[token];
        for (stretch, bound) in self.bounds.iter_mut().enumerate() {
            let peak = self.peaks[stretch];
            if peak < limit || peak == limit && stretch * STRETCH >= token {
                *bound = 0.0;
            }
        }
        self.add_up();
    }

    fn add_up(&mut self) {
        let sum = |part: &[f32]| part.iter().map(|bound| f64::from(*bound)).sum::<f64>();
        self.sums.clear();
        self.sums.extend(self.bounds.chunks(PART).map(sum));
    }
}

/// Takes shares from `target` until it falls into one; which one, if any.
fn pass(target: &mut f64, shares: impl Iterator<Item = f64>) -> Option<usize> {
    for (index, share) in shares.enumerate() {
        if *target < share {
            return Some(index);
        }
        *target -= share;
    }
    None
}
