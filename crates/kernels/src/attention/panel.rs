//! The inner loops: a panel of (row, head) pairs meets the keys and values of a run.
//!
//! A panel has as many pairs as registers hold the sums of, four vectors each (one where there are
//! few registers). What happens to a pair depends neither on the others nor on these numbers.

use std::ops::Range;

use super::partial::finite_base;
use super::stored::Run;
use super::{POSITIONS, RUN};
use crate::isa::Tier;
use crate::lanes::{Aligned, LANES, exp2, larger};

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
pub(super) struct Panel<'a, const P: usize, R> {
    /// `[head_dim]`, those of the pairs side by side.
    pub(super) queries: &'a [[f32; P]],
    pub(super) run: R,
    /// What each pair sees of the run.
    pub(super) seen: [Range<usize>; P],
    pub(super) max: &'a mut [f32; P],
    /// Sums, in lanes.
    pub(super) sums: &'a mut [[f32; LANES]; P],
    /// `[P, head_dim]`, rows padded.
    pub(super) acc: &'a mut [[f32; LANES]],
}

/// Scores, then weights, of a pair.
type Scores = [[f32; LANES]; RUN];

impl<const P: usize, R> Panel<'_, P, R> {
    /// Adds the run to the states, where all pairs see the same of it and heads are of whole
    /// fours of vectors.
    #[inline(always)]
    pub(super) fn add_row<T: Tier>(self, t: T)
    where
        R: Run<T>,
    {
        let scores = &mut self.scores(t).0;
        let seen = self.seen[0].clone();
        if seen != (0..POSITIONS) {
            self.hide(scores);
        }
        let old = soften(t, scores, self.max, self.sums);
        let mut at = 0;
        while at < self.acc.len() / P {
            let place = (at, seen.clone());
            at += match T::REGISTERS {
                32.. => columns::<T, P, 4>(t, self.run, place, (scores, &old), self.acc),
                _ => columns::<T, P, 1>(t, self.run, place, (scores, &old), self.acc),
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
        let all = self.seen.iter().all(|seen| *seen == (0..POSITIONS));
        if !all {
            self.hide(scores);
        }
        let old = soften(t, scores, self.max, self.sums);
        if all {
            return weigh(t, self.run, 0..POSITIONS, (scores, &old), self.acc);
        }
        // What is common is added to all pairs at a time, what only some see to each by itself: a
        // weight of 0 would not keep out what is not finite.
        let common = self.seen.iter().fold(0..POSITIONS, |common, seen| {
            common.start.max(seen.start)..common.end.min(seen.end)
        });
        let width = self.acc.len() / P;
        for (p, acc) in self.acc.chunks_exact_mut(width).enumerate() {
            let seen = self.seen[p].clone();
            let head = seen.start..if common.is_empty() { seen.end } else { common.start };
            weigh(t, self.run, head, (&[scores[p]], &[old[p]]), acc);
        }
        if common.is_empty() {
            return;
        }
        weigh(t, self.run, common.clone(), (scores, &[1.0; P]), self.acc);
        for (p, acc) in self.acc.chunks_exact_mut(width).enumerate() {
            let tail = common.end..self.seen[p].end;
            if !tail.is_empty() {
                weigh(t, self.run, tail, (&[scores[p]], &[1.0]), acc);
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

    /// Leaves out what is not seen.
    #[inline(always)]
    fn hide(&self, scores: &mut [Scores; P]) {
        for (scores, seen) in scores.iter_mut().zip(&self.seen) {
            for (i, score) in scores.as_flattened_mut().iter_mut().enumerate() {
                *score = if seen.contains(&i) { *score } else { f32::NEG_INFINITY };
            }
        }
    }
}

/// Turns scores into weights and updates maxima and sums; returns what weighted values shrink by.
/// Who sees nothing stays as it is.
#[inline(always)]
fn soften<T: Tier, const P: usize>(
    t: T,
    scores: &mut [Scores; P],
    max: &mut [f32; P],
    sums: &mut [[f32; LANES]; P],
) -> [f32; P] {
    let mut before = [0.0; LANES];
    before[..P].copy_from_slice(max);
    let mut base = [0.0; LANES];
    for p in 0..P {
        let mut most = t.load(&scores[p][0]);
        for scores in &scores[p][1..] {
            most = t.larger(most, t.load(scores));
        }
        max[p] = larger(max[p], t.largest(most));
        base[p] = finite_base(max[p]);
    }
    let mut old = [0.0; LANES];
    t.store(exp2(t, t.sub(t.load(&before), t.load(&base))), &mut old);
    for p in 0..P {
        let base = t.splat(base[p]);
        let mut sum = t.mul(t.load(&sums[p]), t.splat(old[p]));
        for scores in &mut scores[p] {
            let weights = exp2(t, t.sub(t.load(scores), base));
            t.store(weights, scores);
            sum = t.add(sum, weights);
        }
        t.store(sum, &mut sums[p]);
    }
    std::array::from_fn(|p| old[p])
}

/// Shrinks what pairs have, and adds the weighted values of some positions.
#[inline(always)]
fn weigh<T: Tier, const P: usize>(
    t: T,
    run: impl Run<T>,
    seen: Range<usize>,
    (weights, old): (&[Scores; P], &[f32; P]),
    acc: &mut [[f32; LANES]],
) {
    let width = acc.len() / P;
    let mut at = 0;
    while at < width {
        let place = (at, seen.clone());
        at += match width - at {
            4.. if T::REGISTERS >= 32 => columns::<T, P, 4>(t, run, place, (weights, old), acc),
            2.. if T::REGISTERS >= 32 => columns::<T, P, 2>(t, run, place, (weights, old), acc),
            _ => columns::<T, P, 1>(t, run, place, (weights, old), acc),
        };
    }
}

/// The same for `G` vectors of columns, which it returns.
#[inline(always)]
fn columns<T: Tier, const P: usize, const G: usize>(
    t: T,
    run: impl Run<T>,
    (at, seen): (usize, Range<usize>),
    (weights, old): (&[Scores; P], &[f32; P]),
    acc: &mut [[f32; LANES]],
) -> usize {
    let width = acc.len() / P;
    let accs = &mut acc[at..];
    let mut sums = [[t.splat(0.0); G]; P];
    for p in 0..P {
        for g in 0..G {
            sums[p][g] = t.mul(t.load(&accs[p * width + g]), t.splat(old[p]));
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
