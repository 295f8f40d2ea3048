//! Logits to weights, over whole vocabularies. The loops have lanes of a fixed number, so that they
//! become vector instructions and sums are the same on every machine.

use super::Candidate;
use super::exp::exp_nonpositive;
use super::nucleus::STRETCH;

/// Where weights are 0 in f32.
pub(super) const NO_WEIGHT: f32 = -87.0;

/// Lanes of sums and searches.
const LANES: usize = 16;

/// The weight of a logit is `exp((logit - best) * inverse)`, or 0 where that exponent is below
/// `cut`. NaN weighs nothing.
#[derive(Clone, Copy, Debug)]
pub(super) struct Weights {
    /// The largest logit.
    pub(super) best: f32,
    /// One by the temperature.
    pub(super) inverse: f32,
    pub(super) cut: f32,
}

impl Weights {
    /// The exponent of a logit's weight, at most 0.
    pub(super) fn scaled(&self, logit: f32) -> f32 {
        (logit - self.best) * self.inverse
    }

    /// The weight with this exponent.
    pub(super) fn of_scaled(&self, scaled: f32) -> f32 {
        let weight = exp_nonpositive(scaled);
        if scaled >= self.cut { weight } else { 0.0 }
    }

    /// The weight of a logit.
    pub(super) fn of(&self, logit: f32) -> f32 {
        self.of_scaled(self.scaled(logit))
    }

    /// The weight of all together.
    pub(super) fn sum(&self, logits: &[f32]) -> f64 {
        let mut lanes = [0.0f64; LANES];
        let (chunks, rest) = logits.as_chunks::<LANES>();
        for chunk in chunks {
            let weights = chunk.map(|logit| self.of(logit));
            for (lane, weight) in lanes.iter_mut().zip(weights) {
                *lane += f64::from(weight);
            }
        }
        let rest: f64 = rest.iter().map(|logit| f64::from(self.of(*logit))).sum();
        lanes.iter().sum::<f64>() + rest
    }

    /// The weight of all logits that are larger than `limit`.
    pub(super) fn sum_above(&self, logits: &[f32], limit: f32) -> f64 {
        let above = |logit: &f32| if *logit > limit { self.of(*logit) } else { 0.0 };
        match logits.as_array::<LANES>() {
            Some(logits) => logits.each_ref().map(above).iter().map(|w| f64::from(*w)).sum(),
            None => logits.iter().map(|logit| f64::from(above(logit))).sum(),
        }
    }

    /// The tokens that weigh anything, in order, with their exponents. `peaks` has the largest
    /// logit of each stretch.
    pub(super) fn gather(&self, logits: &[f32], peaks: &[f32], candidates: &mut Vec<Candidate>) {
        candidates.clear();
        let weighs = |logit: f32| self.scaled(logit) >= self.cut;
        let stretches = (0..).step_by(STRETCH).zip(logits.chunks(STRETCH)).zip(peaks);
        for ((first, stretch), _) in stretches.filter(|(_, peak)| weighs(**peak)) {
            let tokens = (first..).zip(stretch).filter(|(_, logit)| weighs(**logit));
            candidates.extend(
                tokens.map(|(token, logit)| Candidate { weight: self.scaled(*logit), token }),
            );
        }
    }
}
