//! One tile: its softmax state and the loop over blocks.

use std::ops::Range;

use super::{BLOCK, Item, Problem, SPLIT};
use crate::isa::{Kernel, Tier};
use crate::lanes::{LANES, exp, sum};

/// Most (row, head) pairs that share a pass over a block: their sums stay in registers.
const PAIRS: usize = 8;

/// Online softmax of a set of (row, head) pairs: maxima, sums, weighted values.
#[derive(Default)]
pub(super) struct Partial {
    max: Vec<f32>,
    sum: Vec<f32>,
    /// `[rows, heads of the group, head_dim]`.
    acc: Vec<f32>,
}

impl Partial {
    #[inline(always)]
    fn clear(&mut self, pairs: usize, head_dim: usize) {
        self.max.clear();
        self.max.resize(pairs, f32::NEG_INFINITY);
        self.sum.clear();
        self.sum.resize(pairs, 0.0);
        self.acc.clear();
        self.acc.resize(pairs * head_dim, 0.0);
    }
}

/// A worker's memory for one tile.
#[derive(Default)]
pub(super) struct Tile {
    group: usize,
    head_dim: usize,
    rows: usize,
    /// Merged splits.
    total: Partial,
    /// The split that is being computed.
    part: Partial,
    /// One block of keys `[head_dim, 16]` and values `[16, head_dim]`, widened.
    keys: Vec<f32>,
    values: Vec<f32>,
}

impl Tile {
    /// Empties the state for an item.
    #[inline(always)]
    pub(super) fn start(&mut self, problem: &Problem<'_>, item: &Item) {
        self.group = problem.heads / problem.kv_heads;
        self.head_dim = problem.head_dim;
        self.rows = item.rows;
        self.total.clear(self.rows * self.group, self.head_dim);
        self.keys.resize(BLOCK * self.head_dim, 0.0);
        self.values.resize(BLOCK * self.head_dim, 0.0);
    }

    /// Elements of one row's group of heads.
    pub(super) fn group_len(&self) -> usize {
        self.group * self.head_dim
    }

    /// One row's result, after [`Tile::finish`].
    pub(super) fn output(&self, row: usize) -> &[f32] {
        &self.total.acc[row * self.group_len()..][..self.group_len()]
    }

    /// Hands out the merged state of a split.
    pub(super) fn swap_total(&mut self, other: &mut Partial) {
        std::mem::swap(&mut self.total, other);
    }

    /// Divides by the sums.
    #[inline(always)]
    pub(super) fn finish(&mut self) {
        for (acc, sum) in self.total.acc.chunks_exact_mut(self.head_dim).zip(&self.total.sum) {
            let inverse = 1.0 / sum;
            acc.iter_mut().for_each(|a| *a *= inverse);
        }
    }
}

/// Merges `part` into the tile's total.
pub(super) struct Merge<'a> {
    pub(super) tile: &'a mut Tile,
    pub(super) part: &'a Partial,
}

impl Kernel for Merge<'_> {
    #[inline(always)]
    fn run<T: Tier>(self, _: T) {
        merge(&mut self.tile.total, self.part, self.tile.head_dim);
    }
}

#[inline(always)]
fn merge(total: &mut Partial, part: &Partial, head_dim: usize) {
    for pair in 0..total.max.len() {
        if part.sum[pair] == 0.0 {
            continue;
        }
        let range = pair * head_dim..(pair + 1) * head_dim;
        let (acc, more) = (&mut total.acc[range.clone()], &part.acc[range]);
        if total.sum[pair] == 0.0 {
            total.max[pair] = part.max[pair];
            total.sum[pair] = part.sum[pair];
            acc.copy_from_slice(more);
            continue;
        }
        let max = larger(total.max[pair], part.max[pair]);
        let (old, new) = (exp(total.max[pair] - max), exp(part.max[pair] - max));
        total.max[pair] = max;
        total.sum[pair] = total.sum[pair] * old + part.sum[pair] * new;
        for (a, m) in acc.iter_mut().zip(more) {
            *a = *a * old + m * new;
        }
    }
}

#[inline(always)]
fn larger(a: f32, b: f32) -> f32 {
    if b > a { b } else { a }
}

/// Computes an item into a tile.
pub(super) struct Run<'a> {
    pub(super) problem: &'a Problem<'a>,
    pub(super) item: Item,
    pub(super) tile: &'a mut Tile,
}

impl Kernel for Run<'_> {
    #[inline(always)]
    fn run<T: Tier>(self, t: T) {
        let Run { problem, item, tile } = self;
        tile.start(problem, &item);
        let start = problem.spans[item.span].start as usize + item.row;
        let first = problem.first_seen(start) / SPLIT;
        let splits = match item.split {
            Some((split, _)) => split..split + 1,
            None => first..(start + item.rows - 1) / SPLIT + 1,
        };
        for split in splits {
            one_split(t, problem, &item, tile, split);
            merge(&mut tile.total, &tile.part, tile.head_dim);
        }
        if item.split.is_none() {
            tile.finish();
        }
    }
}

/// Fills `tile.part` with the sums over one split.
#[inline(always)]
fn one_split<T: Tier>(t: T, problem: &Problem<'_>, item: &Item, tile: &mut Tile, split: usize) {
    let d = tile.head_dim;
    tile.part.clear(tile.rows * tile.group, d);
    let span = &problem.spans[item.span];
    let start = span.start as usize + item.row;
    let from = problem.first_seen(start).max(split * SPLIT) / BLOCK;
    let to = (start + item.rows).min((split + 1) * SPLIT).div_ceil(BLOCK);
    let table = &problem.tables[span.table as usize..][..span.table_len as usize];
    for block in from..to {
        let at = (table[block] as usize * problem.kv_heads + item.kv_head) * BLOCK * d;
        problem.k.widen(t, at, &mut tile.keys);
        problem.v.widen(t, at, &mut tile.values);
        let seen = |row: usize| {
            let low = problem.first_seen(start + row).max(block * BLOCK);
            let high = (start + row + 1).min((block + 1) * BLOCK);
            low.saturating_sub(block * BLOCK)..high.saturating_sub(block * BLOCK)
        };
        let mut row = 0;
        while row < item.rows {
            // Rows that see all of the block go together.
            let all = (row..item.rows).take_while(|row| seen(*row) == (0..BLOCK)).count();
            let rows = row..row + all.max(1);
            let seen = seen(row);
            row = rows.end;
            if !seen.is_empty() {
                some_rows(t, problem, item, tile, rows, seen);
            }
        }
    }
}

/// Adds the seen positions of the widened block to all heads of some rows.
#[inline(always)]
fn some_rows<T: Tier>(
    t: T,
    problem: &Problem<'_>,
    item: &Item,
    tile: &mut Tile,
    rows: Range<usize>,
    seen: Range<usize>,
) {
    let (group, d) = (tile.group, tile.head_dim);
    let query = |pair: usize| {
        let at = super::head_at(problem, item, pair / group) + pair % group * d;
        &problem.q[at..][..d]
    };
    let (mut pair, end) = (rows.start * group, rows.end * group);
    let all = seen == (0..BLOCK);
    while pair < end {
        let block = Block { scale: problem.scale, first: pair, seen: seen.clone() };
        pair += match end - pair {
            PAIRS.. if all => block.add::<T, PAIRS, true>(t, tile, &query),
            4.. if all => block.add::<T, 4, true>(t, tile, &query),
            2.. if all => block.add::<T, 2, true>(t, tile, &query),
            _ if all => block.add::<T, 1, true>(t, tile, &query),
            _ => block.add::<T, 1, false>(t, tile, &query),
        };
    }
}

/// What pairs see of the widened block.
struct Block {
    scale: f32,
    /// The first pair.
    first: usize,
    seen: Range<usize>,
}

impl Block {
    /// Adds the seen positions to `P` pairs, which it returns; what happens to a pair does not
    /// depend on it. `ALL`: all positions are seen.
    #[inline(always)]
    fn add<'q, T: Tier, const P: usize, const ALL: bool>(
        &self,
        t: T,
        tile: &mut Tile,
        query: &impl Fn(usize) -> &'q [f32],
    ) -> usize {
        let (d, first) = (tile.head_dim, self.first);
        let mut queries: [&[f32]; P] = [&[]; P];
        for p in 0..P {
            queries[p] = &query(first + p)[..d];
        }
        let mut sums = [t.splat(0.0); P];
        for (i, keys) in tile.keys[..d * BLOCK].as_chunks::<BLOCK>().0.iter().enumerate() {
            let keys = t.load(keys);
            for p in 0..P {
                // SAFETY: there are `d` chunks of keys, and each query has `d` elements.
                let q = unsafe { *queries[p].get_unchecked(i) };
                sums[p] = t.mul_add(t.splat(q), keys, sums[p]);
            }
        }
        let mut weights = [[0.0; BLOCK]; P];
        for p in 0..P {
            t.store(sums[p], &mut weights[p]);
        }
        let old = self.soften::<P, ALL>(&mut weights, &mut tile.part);
        let seen = if ALL { 0..BLOCK } else { self.seen.clone() };
        let values = &tile.values[..BLOCK * d];
        let accs = &mut tile.part.acc[first * d..][..P * d];
        for c in (0..d / LANES * LANES).step_by(LANES) {
            let mut sums = [t.splat(0.0); P];
            for p in 0..P {
                sums[p] = t.mul(t.load(lanes_at(accs, p * d + c)), t.splat(old[p]));
            }
            for i in seen.clone() {
                let v = t.load(lanes_at(values, i * d + c));
                for p in 0..P {
                    sums[p] = t.mul_add(t.splat(weights[p][i]), v, sums[p]);
                }
            }
            for p in 0..P {
                let acc = accs[p * d + c..].first_chunk_mut().expect("whole chunks");
                t.store(sums[p], acc);
            }
        }
        for c in d / LANES * LANES..d {
            for p in 0..P {
                let acc = &mut accs[p * d + c];
                *acc *= old[p];
                for i in seen.clone() {
                    *acc = weights[p][i].mul_add(values[i * d + c], *acc);
                }
            }
        }
        P
    }

    /// Turns scores into weights and updates maxima and sums; returns what weighted values shrink
    /// by.
    #[inline(always)]
    fn soften<const P: usize, const ALL: bool>(
        &self,
        scores: &mut [[f32; BLOCK]; P],
        part: &mut Partial,
    ) -> [f32; P] {
        let before: &mut [f32; P] = part.max[self.first..].first_chunk_mut().expect("all pairs");
        let totals: &mut [f32; P] = part.sum[self.first..].first_chunk_mut().expect("all pairs");
        let mut old = [0.0; P];
        for (p, scores) in scores.iter_mut().enumerate() {
            for (i, score) in scores.iter_mut().enumerate() {
                let seen = ALL || self.seen.contains(&i);
                *score = if seen { *score * self.scale } else { f32::NEG_INFINITY };
            }
            let max = larger(before[p], largest(*scores));
            scores.iter_mut().for_each(|score| *score -= max);
            (old[p], before[p]) = (before[p] - max, max);
        }
        // Nothing seen before is a maximum of minus infinity: it shrinks to 0.
        old.iter_mut().for_each(|x| *x = exp(*x));
        for (p, scores) in scores.iter_mut().enumerate() {
            scores.iter_mut().for_each(|score| *score = exp(*score));
            totals[p] = totals[p] * old[p] + sum(*scores);
        }
        old
    }
}

/// The largest of a block's scores, halves against each other.
#[inline(always)]
fn largest(mut scores: [f32; BLOCK]) -> f32 {
    let mut width = BLOCK / 2;
    while width > 0 {
        for i in 0..width {
            scores[i] = larger(scores[i], scores[i + width]);
        }
        width /= 2;
    }
    scores[0]
}

#[inline(always)]
fn lanes_at(x: &[f32], at: usize) -> &[f32; LANES] {
    x[at..].first_chunk().expect("whole chunks")
}
