//! Layers of experts (Shazeer et al., 2017): each token meets the few that a router chose for it.
//!
//! A pair is a token and one of its experts; pair `t * k + i` is token `t` with its `i`-th. Pairs
//! are brought together by expert, and the products of all experts that have any are one join of
//! [`linear`], whose bits do not depend on what else is in it. So a token's result is the same
//! whatever the batch, and whoever computes which experts. Weights that no token needs are not
//! read.

mod placement;
#[cfg(test)]
mod tests;

use std::ops::Range;

use pomona_device::Pool;

use crate::isa::{Kernel, Tier};
use crate::lanes::{LANES, exp, sum};
use crate::linear::{Job, Out, Part, Rows, Workspace, linear};
use crate::{ActivationBits, Format, Isa, RouteWeights, Write};
pub(crate) use placement::Exchange;
pub use placement::Placement;

/// Chooses experts by logits: the largest first, of equals the one with the lower index.
pub(crate) struct Route<'a> {
    /// `[tokens, experts]`.
    pub(crate) logits: &'a [f32],
    pub(crate) experts: usize,
    pub(crate) weights_of: RouteWeights,
    /// `[tokens, k]`, as are the weights.
    pub(crate) ids: &'a mut [u32],
    pub(crate) weights: &'a mut [f32],
    pub(crate) k: usize,
}

impl Kernel for Route<'_> {
    #[inline(always)]
    fn run<T: Tier>(self, _: T) {
        let places = self.ids.chunks_exact_mut(self.k).zip(self.weights.chunks_exact_mut(self.k));
        for (logits, (ids, weights)) in self.logits.chunks_exact(self.experts).zip(places) {
            choose(logits, ids);
            let largest = logits[ids[0] as usize];
            for (weight, id) in weights.iter_mut().zip(&*ids) {
                *weight = exp(logits[*id as usize] - largest);
            }
            let total = match self.weights_of {
                RouteWeights::Chosen => weights.iter().sum(),
                RouteWeights::All => sum_of_exponentials(logits, largest),
            };
            // What is not a number has no order, and is not hidden either.
            let strange = logits.iter().any(|logit| logit.is_nan());
            let scale = if strange { f32::NAN } else { 1.0 / total };
            weights.iter_mut().for_each(|weight| *weight *= scale);
        }
    }
}

/// The indices of the largest logits, in order. Each is the largest of those that come after the
/// one before.
#[inline(always)]
fn choose(logits: &[f32], ids: &mut [u32]) {
    let mut last = None;
    for (place, id) in ids.iter_mut().enumerate() {
        let mut best = None;
        for (i, logit) in logits.iter().enumerate() {
            let comes_after =
                last.is_none_or(|(at, value)| *logit < value || (*logit == value && i > at));
            if comes_after && best.is_none_or(|(_, value)| *logit > value) {
                best = Some((i, *logit));
            }
        }
        // There is none where logits are not numbers.
        *id = best.map_or(place, |(i, _)| i) as u32;
        last = best.or(last);
    }
}

/// Sum of `exp(logit - largest)`.
#[inline(always)]
fn sum_of_exponentials(logits: &[f32], largest: f32) -> f32 {
    let mut lanes = [0.0; LANES];
    for logits in logits.chunks(LANES) {
        lanes.iter_mut().zip(logits).for_each(|(lane, logit)| *lane += exp(logit - largest));
    }
    sum(lanes)
}

/// `out[t] (+)= sum of weights[t, i] * rows[t * k + i]`, from the first `i` to the last.
pub(crate) struct Combine<'a> {
    /// The result of each pair: as wide as a row of `out`.
    pub(crate) rows: &'a [&'a [f32]],
    /// By pair.
    pub(crate) weights: &'a [f32],
    /// Pairs of a token.
    pub(crate) k: usize,
    pub(crate) width: usize,
    pub(crate) write: Write,
    pub(crate) out: &'a mut [f32],
}

impl Kernel for Combine<'_> {
    #[inline(always)]
    fn run<T: Tier>(self, _: T) {
        let Combine { rows, weights, k, width, write, out } = self;
        let pairs = rows.chunks_exact(k).zip(weights.chunks_exact(k));
        for (out, (rows, weights)) in out.chunks_exact_mut(width).zip(pairs) {
            for (chunk, out) in out.chunks_mut(LANES).enumerate() {
                let mut sums = [0.0; LANES];
                for (row, weight) in rows.iter().zip(weights) {
                    let row = &row[chunk * LANES..][..out.len()];
                    sums.iter_mut().zip(row).for_each(|(sum, x)| *sum = weight.mul_add(*x, *sum));
                }
                for (out, sum) in out.iter_mut().zip(sums) {
                    *out = if write == Write::Add { *out + sum } else { sum };
                }
            }
        }
    }
}

/// Pairs by expert; memory is kept from call to call.
#[derive(Default)]
pub(crate) struct Pairs {
    /// Those of the first expert, of the second and so on; of each in the order of tokens.
    pairs: Vec<u32>,
    /// Their tokens.
    tokens: Vec<u32>,
    /// The experts that have any, counted from the first, and where their pairs are.
    pub(crate) active: Vec<(usize, Range<usize>)>,
    /// Where the next pair of each expert goes.
    next: Vec<usize>,
}

impl Pairs {
    /// Sorts the pairs of so many experts among `ids: [tokens, k]`; the others are left out.
    pub(crate) fn sort(&mut self, ids: &[u32], k: usize, experts: usize) {
        let local = |id: &u32| Some(*id as usize).filter(|id| *id < experts);
        self.next.clear();
        self.next.resize(experts, 0);
        ids.iter().filter_map(local).for_each(|expert| self.next[expert] += 1);
        self.active.clear();
        let mut start = 0;
        for (expert, next) in self.next.iter_mut().enumerate() {
            let range = start..start + *next;
            (start, *next) = (range.end, range.start);
            if !range.is_empty() {
                self.active.push((expert, range));
            }
        }
        self.pairs.resize(start, 0);
        self.tokens.resize(start, 0);
        for (pair, id) in ids.iter().enumerate() {
            if let Some(expert) = local(id) {
                let at = self.next[expert];
                (self.pairs[at], self.tokens[at]) = (pair as u32, (pair / k) as u32);
                self.next[expert] += 1;
            }
        }
    }

    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.pairs.len()
    }
}

/// A packed matrix.
#[derive(Clone, Copy)]
pub(crate) struct Weight<'a> {
    pub(crate) format: Format,
    pub(crate) bytes: &'a [u8],
    pub(crate) rows: usize,
}

/// What products of experts run on.
pub(crate) struct Means<'a> {
    pub(crate) pool: &'a Pool,
    pub(crate) isa: Isa,
    pub(crate) bits: ActivationBits,
    pub(crate) workspace: &'a mut Workspace,
}

impl Means<'_> {
    /// Gate and up of each pair, in the pairs' order. `weights` has both for each active expert.
    pub(crate) fn widen(
        &mut self,
        x: (&[f32], usize),
        pairs: &Pairs,
        weights: &[[Weight<'_>; 2]],
        [gate, up]: [&mut [f32]; 2],
    ) {
        let rows = |range: &Range<usize>| {
            (Rows::Listed(&pairs.tokens[range.clone()]), Rows::From(range.start))
        };
        let outs = [Out::new(gate), Out::new(up)];
        // SAFETY: each job writes its own range of rows.
        let jobs = unsafe { jobs(pairs, weights, &outs, &rows) };
        linear(self.pool, self.isa, x, &jobs, (Write::Set, self.bits, self.workspace));
    }

    /// Down of each pair, whose result goes where the pair is.
    pub(crate) fn narrow(
        &mut self,
        x: (&[f32], usize),
        pairs: &Pairs,
        weights: &[[Weight<'_>; 1]],
        out: &mut [f32],
    ) {
        let rows = |range: &Range<usize>| {
            (Rows::From(range.start), Rows::Listed(&pairs.pairs[range.clone()]))
        };
        // SAFETY: a pair has one expert, so each job has rows of its own.
        let jobs = unsafe { jobs(pairs, weights, &[Out::new(out)], &rows) };
        linear(self.pool, self.isa, x, &jobs, (Write::Set, self.bits, self.workspace));
    }
}

/// A job for each active expert: `rows` says where its inputs are and where results go.
///
/// # Safety
/// Results of different experts go to different rows.
unsafe fn jobs<'a, const N: usize>(
    pairs: &Pairs,
    weights: &[[Weight<'a>; N]],
    outs: &[Out<'a>; N],
    rows: &dyn Fn(&Range<usize>) -> (Rows<'a>, Rows<'a>),
) -> Vec<Job<'a>> {
    let part = |weight: &Weight<'a>, out: &Out<'a>| {
        let Weight { format, bytes: weight, rows } = *weight;
        // SAFETY: by contract.
        let out = unsafe { out.share() };
        Part { format, weight, rows, bias: None, out }
    };
    let active = pairs.active.iter().zip(weights);
    active
        .map(|((_, range), weights)| {
            let parts = weights.iter().zip(outs).map(|(weight, out)| part(weight, out)).collect();
            let (inputs, outputs) = rows(range);
            Job { tokens: range.len(), inputs, outputs, parts }
        })
        .collect()
}
