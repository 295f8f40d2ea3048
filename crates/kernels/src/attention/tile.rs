//! One tile: its softmax state and the loop over runs of blocks.

use std::ops::Range;

use super::{BLOCK, Item, Problem, SPLIT};
use crate::isa::{Kernel, Tier};
use crate::lanes::{LANES, exp, sum};

/// Blocks of a run: weighted values shrink, and maxima change, once for each run.
const RUN: usize = 4;
/// Positions of a run. Runs start at multiples of it, whatever the chunk or the window.
const POSITIONS: usize = RUN * BLOCK;

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

    /// Appends a pair's record: its maximum, its sum, its weighted values.
    pub(super) fn write(&self, pair: usize, head_dim: usize, records: &mut Vec<f32>) {
        records.extend_from_slice(&[self.max[pair], self.sum[pair]]);
        records.extend_from_slice(&self.acc[pair * head_dim..][..head_dim]);
    }

    /// Becomes the pairs of these records.
    #[inline(always)]
    fn read(&mut self, records: &[f32], head_dim: usize) {
        self.clear(records.len() / record_len(head_dim), head_dim);
        let accs = self.acc.chunks_exact_mut(head_dim);
        let sums = self.max.iter_mut().zip(&mut self.sum).zip(accs);
        for (record, ((max, sum), acc)) in records.chunks_exact(record_len(head_dim)).zip(sums) {
            (*max, *sum) = (record[0], record[1]);
            acc.copy_from_slice(&record[2..]);
        }
    }

    /// Divides by the sums.
    #[inline(always)]
    fn finish(&mut self, head_dim: usize) {
        for (acc, sum) in self.acc.chunks_exact_mut(head_dim).zip(&self.sum) {
            let inverse = 1.0 / sum;
            acc.iter_mut().for_each(|a| *a *= inverse);
        }
    }
}

/// Numbers of a record.
pub(super) fn record_len(head_dim: usize) -> usize {
    2 + head_dim
}

/// A worker's memory for one tile.
#[derive(Default)]
pub(super) struct Tile {
    group: usize,
    head_dim: usize,
    rows: usize,
    /// Queries, `[head_dim, rows, heads of the group]`: what meets a row of keys lies together.
    queries: Vec<f32>,
    /// Merged splits.
    total: Partial,
    /// The split that is being computed.
    part: Partial,
    /// A run's keys `[blocks, head_dim, 16]` and values `[positions, head_dim]`, widened.
    keys: Vec<f32>,
    values: Vec<f32>,
}

impl Tile {
    /// Empties the state for an item.
    #[inline(always)]
    pub(super) fn start(&mut self, problem: &Problem<'_>, item: &Item) {
        self.group = problem.group(item).len();
        self.head_dim = problem.head_dim;
        self.rows = item.rows;
        self.total.clear(self.rows * self.group, self.head_dim);
        self.keys.resize(POSITIONS * self.head_dim, 0.0);
        self.values.resize(POSITIONS * self.head_dim, 0.0);
    }

    /// Brings the queries of an item side by side.
    #[inline(always)]
    fn take_queries(&mut self, problem: &Problem<'_>, item: &Item) {
        let (group, d, pairs) = (self.group, self.head_dim, self.rows * self.group);
        self.queries.resize(pairs * d, 0.0);
        for row in 0..self.rows {
            let heads = &problem.q[super::head_at(problem, item, row)..][..group * d];
            for (head, q) in heads.chunks_exact(d).enumerate() {
                let places = self.queries[row * group + head..].iter_mut().step_by(pairs);
                places.zip(q).for_each(|(place, q)| *place = *q);
            }
        }
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
        self.total.finish(self.head_dim);
    }
}

/// Merges splits that came as records, `[pairs, 2 + head_dim]` each, in their order into a result:
/// `[pairs, head_dim]`.
pub(super) struct MergeRecords<'a> {
    pub(super) splits: &'a mut dyn Iterator<Item = &'a [f32]>,
    pub(super) head_dim: usize,
    pub(super) tile: &'a mut Tile,
    pub(super) out: &'a mut [f32],
}

impl Kernel for MergeRecords<'_> {
    #[inline(always)]
    fn run<T: Tier>(self, _: T) {
        let MergeRecords { splits, head_dim, tile: Tile { total, part, .. }, out } = self;
        total.clear(out.len() / head_dim, head_dim);
        for records in splits {
            part.read(records, head_dim);
            merge(total, part, head_dim);
        }
        total.finish(head_dim);
        out.copy_from_slice(&total.acc);
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
        tile.take_queries(problem, &item);
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
    let (d, group) = (tile.head_dim, tile.group);
    tile.part.clear(tile.rows * group, d);
    let span = &problem.spans[item.span];
    let start = span.start as usize + item.row;
    let from = problem.first_seen(start).max(split * SPLIT) / BLOCK;
    let to = (start + item.rows).min((split + 1) * SPLIT).div_ceil(BLOCK);
    let table = &problem.tables[span.table as usize..][..span.table_len as usize];
    for first in (from / RUN * RUN..to).step_by(RUN) {
        let blocks = first.max(from)..(first + RUN).min(to);
        for block in blocks {
            let at = (table[block] as usize * problem.kv_heads + item.kv_head) * BLOCK;
            let place = (block - first) * BLOCK * d;
            problem.k.keys(t, at, &mut tile.keys[place..][..BLOCK * d]);
            problem.v.values(t, at, &mut tile.values[place..][..BLOCK * d]);
        }
        let begin = first * BLOCK;
        let seen = |row: usize| {
            let low = problem.first_seen(start + row).max(begin);
            let high = (start + row + 1).min(begin + POSITIONS);
            low.saturating_sub(begin)..high.saturating_sub(begin)
        };
        let mut row = 0;
        while row < item.rows {
            // Rows that see all of the run go together.
            let all = (row..item.rows).take_while(|row| seen(*row) == (0..POSITIONS)).count();
            let pairs = row * group..(row + all.max(1)) * group;
            let run = Stretch { scale: problem.scale, seen: seen(row) };
            row += all.max(1);
            if !run.seen.is_empty() {
                run.pairs(t, tile, pairs);
            }
        }
    }
}

/// What pairs see of the widened run.
struct Stretch {
    scale: f32,
    seen: Range<usize>,
}

/// Scores, then weights, of pairs.
type Scores<const P: usize> = [[f32; POSITIONS]; P];

impl Stretch {
    /// Adds the seen positions to some pairs, as many at a time as registers hold the sums of.
    #[inline(always)]
    fn pairs<T: Tier>(&self, t: T, tile: &mut Tile, mut pairs: Range<usize>) {
        let all = self.seen == (0..POSITIONS);
        while !pairs.is_empty() {
            let first = pairs.start;
            pairs.start += match pairs.len() {
                8.. if T::REGISTERS >= 32 && all => self.add::<T, 8, 2, true>(t, tile, first),
                8.. if T::REGISTERS >= 32 => self.add::<T, 8, 2, false>(t, tile, first),
                4.. if all => self.add::<T, 4, 4, true>(t, tile, first),
                4.. => self.add::<T, 4, 4, false>(t, tile, first),
                3 if all => self.add::<T, 3, 4, true>(t, tile, first),
                3 => self.add::<T, 3, 4, false>(t, tile, first),
                2 if all => self.add::<T, 2, 4, true>(t, tile, first),
                2 => self.add::<T, 2, 4, false>(t, tile, first),
                _ if all => self.add::<T, 1, 4, true>(t, tile, first),
                _ => self.add::<T, 1, 4, false>(t, tile, first),
            };
        }
    }

    /// Adds the seen positions to `P` pairs, which it returns. What happens to a pair does not
    /// depend on it, nor on `G`, the vectors of keys and values that a pass takes. `ALL`: all
    /// positions are seen.
    #[inline(always)]
    fn add<T: Tier, const P: usize, const G: usize, const ALL: bool>(
        &self,
        t: T,
        tile: &mut Tile,
        first: usize,
    ) -> usize {
        let blocks =
            if ALL { 0..RUN } else { self.seen.start / BLOCK..self.seen.end.div_ceil(BLOCK) };
        let mut scores = [[0.0; POSITIONS]; P];
        let mut block = blocks.start;
        while block < blocks.end {
            block += match blocks.end - block {
                4.. if G >= 4 => dots::<T, P, 4>(t, tile, (first, block), &mut scores),
                2.. => dots::<T, P, 2>(t, tile, (first, block), &mut scores),
                _ => dots::<T, P, 1>(t, tile, (first, block), &mut scores),
            };
        }
        let old = self.soften::<P, ALL>(&mut scores, blocks, first, &mut tile.part);
        let seen = if ALL { 0..POSITIONS } else { self.seen.clone() };
        let (d, mut chunk) = (tile.head_dim, 0);
        while chunk < d / LANES {
            chunk += match d / LANES - chunk {
                4.. if G >= 4 => weigh::<T, P, 4>(t, tile, (first, chunk), &scores, (&old, &seen)),
                2.. => weigh::<T, P, 2>(t, tile, (first, chunk), &scores, (&old, &seen)),
                _ => weigh::<T, P, 1>(t, tile, (first, chunk), &scores, (&old, &seen)),
            };
        }
        for c in d / LANES * LANES..d {
            for p in 0..P {
                let acc = &mut tile.part.acc[(first + p) * d + c];
                *acc *= old[p];
                for i in seen.clone() {
                    *acc = scores[p][i].mul_add(tile.values[i * d + c], *acc);
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
        scores: &mut Scores<P>,
        blocks: Range<usize>,
        first: usize,
        part: &mut Partial,
    ) -> [f32; P] {
        let before: &mut [f32; P] = part.max[first..].first_chunk_mut().expect("all pairs");
        let totals: &mut [f32; P] = part.sum[first..].first_chunk_mut().expect("all pairs");
        let mut old = [0.0; P];
        for (p, scores) in scores.iter_mut().enumerate() {
            let scores = &mut scores.as_chunks_mut::<BLOCK>().0[blocks.clone()];
            let mut most = [f32::NEG_INFINITY; BLOCK];
            for (block, scores) in blocks.clone().zip(scores.iter_mut()) {
                for (i, score) in scores.iter_mut().enumerate() {
                    let seen = ALL || self.seen.contains(&(block * BLOCK + i));
                    *score = if seen { *score * self.scale } else { f32::NEG_INFINITY };
                    most[i] = larger(most[i], *score);
                }
            }
            let max = larger(before[p], largest(most));
            (old[p], before[p]) = (before[p] - max, max);
            let mut sums = [0.0; BLOCK];
            for scores in scores {
                for score in scores.iter_mut() {
                    *score -= max;
                }
                for (sum, score) in sums.iter_mut().zip(scores) {
                    *score = exp(*score);
                    *sum += *score;
                }
            }
            // Nothing seen before is a maximum of minus infinity: it shrinks to 0.
            old[p] = exp(old[p]);
            totals[p] = totals[p] * old[p] + sum(sums);
        }
        old
    }
}

/// Scores of `P` pairs and `G` blocks, which it returns.
#[inline(always)]
fn dots<T: Tier, const P: usize, const G: usize>(
    t: T,
    tile: &Tile,
    (first, block): (usize, usize),
    scores: &mut Scores<P>,
) -> usize {
    let (d, pairs) = (tile.head_dim, tile.rows * tile.group);
    let keys: [&[[f32; BLOCK]]; G] = std::array::from_fn(|g| {
        &tile.keys[(block + g) * BLOCK * d..][..BLOCK * d].as_chunks().0[..d]
    });
    let mut sums = [[t.splat(0.0); G]; P];
    for (i, queries) in tile.queries.chunks_exact(pairs).enumerate() {
        let queries: &[f32; P] = queries[first..].first_chunk().expect("all pairs");
        let keys: [T::F; G] = std::array::from_fn(|g| t.load(&keys[g][i]));
        for p in 0..P {
            let q = t.splat(queries[p]);
            for g in 0..G {
                sums[p][g] = t.mul_add(q, keys[g], sums[p][g]);
            }
        }
    }
    for p in 0..P {
        for g in 0..G {
            t.store(sums[p][g], &mut scores[p].as_chunks_mut().0[block + g]);
        }
    }
    G
}

/// Adds the weighted values of `G` vectors of columns, which it returns, to `P` pairs.
#[inline(always)]
fn weigh<T: Tier, const P: usize, const G: usize>(
    t: T,
    tile: &mut Tile,
    (first, chunk): (usize, usize),
    weights: &Scores<P>,
    (old, seen): (&[f32; P], &Range<usize>),
) -> usize {
    let d = tile.head_dim;
    let accs = &mut tile.part.acc[first * d..][..P * d];
    let place = |p: usize, g: usize| p * d + (chunk + g) * LANES;
    let mut sums = [[t.splat(0.0); G]; P];
    for p in 0..P {
        for g in 0..G {
            sums[p][g] = t.mul(t.load(lanes_at(accs, place(p, g))), t.splat(old[p]));
        }
    }
    for i in seen.clone() {
        let row = &tile.values[i * d + chunk * LANES..][..G * LANES].as_chunks().0[..G];
        let values: [T::F; G] = std::array::from_fn(|g| t.load(&row[g]));
        for p in 0..P {
            let weight = t.splat(weights[p][i]);
            for g in 0..G {
                sums[p][g] = t.mul_add(weight, values[g], sums[p][g]);
            }
        }
    }
    for p in 0..P {
        for g in 0..G {
            t.store(sums[p][g], accs[place(p, g)..].first_chunk_mut().expect("whole chunks"));
        }
    }
    G
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
