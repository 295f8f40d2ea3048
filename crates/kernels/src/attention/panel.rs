//! The inner loops: a panel of (row, head) pairs meets the keys and values of a run.
//!
//! A panel has as many pairs as registers hold the sums of, four vectors each (one where there are
//! few registers). What happens to a pair depends neither on the others nor on these numbers.

use std::ops::Range;

use super::partial::finite_base;
use super::stored::Run;
use super::{POSITIONS, RUN};
use crate::isa::Tier;
use crate::lanes::{Aligned, LANES, exp2};

/// How far scores may be above what weights are relative to, as an exponent of 2: a weight is a
/// floating-point number and as exact at 2^16 as at 1 (the idea is FlashAttention-4's).
const MARGIN: f32 = 16.0;
/// Most pairs of a panel.
const PAIRS: usize = 6;

/// How many of the remaining pairs the next panel takes.
pub(super) fn panel_len(remaining: usize) -> usize {
    match remaining {
        0..=4 => remaining,
        5 => 3,
        7 | 8 => 4,
        _ => PAIRS,
    }
}

/// A panel's queries, what it meets, and its softmax states.
pub(super) struct Panel<'a, const P: usize, Q, R> {
    pub(super) queries: Q,
    pub(super) run: R,
    /// What each pair sees of the run, if not all see all.
    pub(super) seen: Option<[Range<usize>; P]>,
    /// What weights are relative to.
    pub(super) base: &'a mut [f32; P],
    /// Sums, in lanes.
    pub(super) sums: &'a mut [[f32; LANES]; P],
    /// `[P, head_dim]`, rows padded.
    pub(super) acc: &'a mut [[f32; LANES]],
}

/// Scores, then weights, of a pair.
pub(super) type Scores = [[f32; LANES]; RUN];

/// Queries are `[head_dim]`, those of the pairs side by side.
impl<const P: usize, R> Panel<'_, P, &[[f32; P]], R> {
    /// Adds the run to the states, where all pairs see the same of it and heads are of whole
    /// fours of vectors.
    #[inline(always)]
    pub(super) fn add_row<T: Tier>(self, t: T)
    where
        R: Run<T>,
    {
        let scores = &mut self.scores(t).0;
        let seen = match &self.seen {
            Some(seen) => {
                hide(seen, scores, f32::NEG_INFINITY);
                seen[0].clone()
            }
            None => 0..POSITIONS,
        };
        soften(t, scores, self.base, self.sums, self.acc);
        let mut at = 0;
        while at < self.acc.len() / P {
            let place = (at, seen.clone());
            at += match T::REGISTERS {
                32.. => columns::<T, P, 4>(t, self.run, place, scores, self.acc),
                _ => columns::<T, P, 1>(t, self.run, place, scores, self.acc),
            };
        }
    }

    /// All scores.
    #[inline(always)]
    fn scores<T: Tier>(&self, t: T) -> Aligned<[Scores; P]>
    where
        R: Run<T>,
    {
        let mut scores = Aligned([[[0.0; LANES]; RUN]; P]);
        if T::REGISTERS >= 32 {
            self.dots::<T, RUN>(t, 0, &mut scores.0);
        } else {
            (0..RUN).for_each(|block| self.dots::<T, 1>(t, block, &mut scores.0));
        }
        scores
    }

    /// Adds the run to the states.
    #[inline(always)]
    pub(super) fn add<T: Tier>(self, t: T)
    where
        R: Run<T>,
    {
        let scores = &mut self.scores(t).0;
        let Some(seen) = &self.seen else {
            soften(t, scores, self.base, self.sums, self.acc);
            return weigh(t, self.run, 0..POSITIONS, scores, self.acc);
        };
        hide(seen, scores, f32::NEG_INFINITY);
        soften(t, scores, self.base, self.sums, self.acc);
        // What is common is added to all pairs at a time, what only some see to each by itself: a
        // weight of 0 would not keep out what is not finite.
        let common = seen.iter().fold(0..POSITIONS, |common, seen| {
            common.start.max(seen.start)..common.end.min(seen.end)
        });
        let width = self.acc.len() / P;
        for (p, acc) in self.acc.chunks_exact_mut(width).enumerate() {
            let end = if common.is_empty() { seen[p].end } else { common.start };
            if seen[p].start < end {
                weigh(t, self.run, seen[p].start..end, &[scores[p]], acc);
            }
        }
        if common.is_empty() {
            return;
        }
        weigh(t, self.run, common.clone(), scores, self.acc);
        for (p, acc) in self.acc.chunks_exact_mut(width).enumerate() {
            let tail = common.end..seen[p].end;
            if !tail.is_empty() {
                weigh(t, self.run, tail, &[scores[p]], acc);
            }
        }
    }

    /// Scores of all pairs and `G` blocks.
    #[inline(always)]
    fn dots<T: Tier, const G: usize>(&self, t: T, block: usize, scores: &mut [Scores; P])
    where
        R: Run<T>,
    {
        let mut sums = [[t.splat(0.0); G]; P];
        for (i, queries) in self.queries.iter().enumerate() {
            let keys: [T::F; G] = self.run.keys(t, i, block);
            for p in 0..P {
                let q = t.splat(queries[p]);
                for g in 0..G {
                    sums[p][g] = t.mul_add(q, keys[g], sums[p][g]);
                }
            }
        }
        for p in 0..P {
            for g in 0..G {
                t.store(sums[p][g], &mut scores[p][block + g]);
            }
        }
    }
}

/// Puts something in the place of what is not seen.
#[inline(always)]
pub(super) fn hide<const P: usize>(
    seen: &[Range<usize>; P],
    scores: &mut [Scores; P],
    hidden: f32,
) {
    for (scores, seen) in scores.iter_mut().zip(seen) {
        for (i, score) in scores.as_flattened_mut().iter_mut().enumerate() {
            *score = if seen.contains(&i) { *score } else { hidden };
        }
    }
}

/// Turns scores into weights and adds them up. Where a pair's scores are far above what its weights
/// are relative to, that rises to the largest, and what the pair has shrinks: at its first
/// positions, then seldom. Who sees nothing stays as it is.
#[inline(always)]
pub(super) fn soften<T: Tier, const P: usize>(
    t: T,
    scores: &mut [Scores; P],
    base: &mut [f32; P],
    sums: &mut [[f32; LANES]; P],
    acc: &mut [[f32; LANES]],
) {
    let mut above = t.splat(0.0);
    for p in 0..P {
        above = t.larger(above, t.sub(most(t, &scores[p]), t.splat(base[p] + MARGIN)));
    }
    if t.any_positive(above) {
        rise(t, scores, base, sums, acc);
    }
    for p in 0..P {
        let base = t.splat(finite_base(base[p]));
        let mut sum = t.load(&sums[p]);
        for scores in &mut scores[p] {
            let weights = exp2(t, t.sub(t.load(scores), base));
            t.store(weights, scores);
            sum = t.add(sum, weights);
        }
        t.store(sum, &mut sums[p]);
    }
}

/// The largest scores, lane by lane.
#[inline(always)]
fn most<T: Tier>(t: T, scores: &Scores) -> T::F {
    let first = t.load(&scores[0]);
    scores[1..].iter().fold(first, |most, scores| t.larger(most, t.load(scores)))
}

/// Raises what weights are relative to, for those pairs whose scores are far above it.
#[inline(always)]
fn rise<T: Tier, const P: usize>(
    t: T,
    scores: &[Scores; P],
    base: &mut [f32; P],
    sums: &mut [[f32; LANES]; P],
    acc: &mut [[f32; LANES]],
) {
    let width = acc.len() / P;
    for (p, acc) in acc.chunks_exact_mut(width).enumerate() {
        let largest = t.largest(most(t, &scores[p]));
        if largest > base[p] + MARGIN {
            let before = std::mem::replace(&mut base[p], largest);
            if before == f32::NEG_INFINITY {
                // What is there is of another split.
                acc.fill([0.0; LANES]);
                continue;
            }
            let shrink = exp2(t, t.splat(before - largest));
            t.store(t.mul(t.load(&sums[p]), shrink), &mut sums[p]);
            for acc in acc {
                t.store(t.mul(t.load(acc), shrink), acc);
            }
        }
    }
}

/// Adds the weighted values of some positions.
#[inline(always)]
fn weigh<T: Tier, const P: usize>(
    t: T,
    run: impl Run<T>,
    seen: Range<usize>,
    weights: &[Scores; P],
    acc: &mut [[f32; LANES]],
) {
    let width = acc.len() / P;
    let mut at = 0;
    while at < width {
        let place = (at, seen.clone());
        at += match width - at {
            4.. if T::REGISTERS >= 32 => columns::<T, P, 4>(t, run, place, weights, acc),
            2.. if T::REGISTERS >= 32 => columns::<T, P, 2>(t, run, place, weights, acc),
            _ => columns::<T, P, 1>(t, run, place, weights, acc),
        };
    }
}

/// The same for `G` vectors of columns, which it returns.
#[inline(always)]
fn columns<T: Tier, const P: usize, const G: usize>(
    t: T,
    run: impl Run<T>,
    (at, seen): (usize, Range<usize>),
    weights: &[Scores; P],
    acc: &mut [[f32; LANES]],
) -> usize {
    let width = acc.len() / P;
    let accs = &mut acc[at..];
    let mut sums = [[t.splat(0.0); G]; P];
    for p in 0..P {
        for g in 0..G {
            sums[p][g] = t.load(&accs[p * width + g]);
        }
    }
    let weights: [&[f32; POSITIONS]; P] =
        std::array::from_fn(|p| weights[p].as_flattened().first_chunk().expect("a run's"));
    for i in seen {
        // The remainder changes nothing; it spares checks.
        let i = i % POSITIONS;
        let row: [T::F; G] = run.values(t, i, at);
        for p in 0..P {
            let weight = t.splat(weights[p][i]);
            for g in 0..G {
                sums[p][g] = t.mul_add(weight, row[g], sums[p][g]);
            }
        }
    }
    for p in 0..P {
        for g in 0..G {
            t.store(sums[p][g], &mut accs[p * width + g]);
        }
    }
    G
}
