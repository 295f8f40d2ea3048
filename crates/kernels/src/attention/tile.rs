//! One tile: its softmax state and the loop over blocks.

use super::{BLOCK, Item, Problem, SPLIT};
use crate::isa::Kernel;
use crate::lanes::{LANES, exp};

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
    fn run(self) {
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
    fn run(self) {
        let Run { problem, item, tile } = self;
        tile.start(problem, &item);
        let start = problem.spans[item.span].start as usize + item.row;
        let first = problem.first_seen(start) / SPLIT;
        let splits = match item.split {
            Some((split, _)) => split..split + 1,
            None => first..(start + item.rows - 1) / SPLIT + 1,
        };
        for split in splits {
            one_split(problem, &item, tile, split);
            merge(&mut tile.total, &tile.part, tile.head_dim);
        }
        if item.split.is_none() {
            tile.finish();
        }
    }
}

/// Fills `tile.part` with the sums over one split.
#[inline(always)]
fn one_split(problem: &Problem<'_>, item: &Item, tile: &mut Tile, split: usize) {
    let d = tile.head_dim;
    tile.part.clear(tile.rows * tile.group, d);
    let span = &problem.spans[item.span];
    let start = span.start as usize + item.row;
    let from = problem.first_seen(start).max(split * SPLIT) / BLOCK;
    let to = (start + item.rows).min((split + 1) * SPLIT).div_ceil(BLOCK);
    let table = &problem.tables[span.table as usize..][..span.table_len as usize];
    let first_query = super::head_at(problem, item, 0);
    for block in from..to {
        let at = (table[block] as usize * problem.kv_heads + item.kv_head) * BLOCK * d;
        problem.k.widen(at, &mut tile.keys);
        problem.v.widen(at, &mut tile.values);
        for row in 0..item.rows {
            let position = start + row;
            let low = problem.first_seen(position).max(block * BLOCK);
            let high = (position + 1).min((block + 1) * BLOCK);
            if low >= high {
                continue;
            }
            let seen = low - block * BLOCK..high - block * BLOCK;
            let query = first_query + row * problem.heads * d;
            let queries = &problem.q[query..][..tile.group * d];
            for (head, q) in queries.chunks_exact(d).enumerate() {
                let pair = row * tile.group + head;
                one_block(q, problem.scale, tile, pair, seen.clone());
            }
        }
    }
}

/// Adds the seen positions of the widened block to one (row, head) pair.
#[inline(always)]
fn one_block(q: &[f32], scale: f32, tile: &mut Tile, pair: usize, seen: std::ops::Range<usize>) {
    let d = q.len();
    let mut scores = [0.0f32; BLOCK];
    for (q, keys) in q.iter().zip(tile.keys.as_chunks::<BLOCK>().0) {
        for (score, key) in scores.iter_mut().zip(keys) {
            *score = q.mul_add(*key, *score);
        }
    }
    let part = &mut tile.part;
    let mut max = part.max[pair];
    for (i, score) in scores.iter_mut().enumerate() {
        *score = if seen.contains(&i) { *score * scale } else { f32::NEG_INFINITY };
        max = larger(max, *score);
    }
    let old = if part.sum[pair] == 0.0 { 0.0 } else { exp(part.max[pair] - max) };
    let mut weights = [0.0f32; BLOCK];
    for (weight, score) in weights.iter_mut().zip(scores) {
        *weight = exp(score - max);
    }
    let mut sum = 0.0;
    for i in seen.clone() {
        sum += weights[i];
    }
    part.max[pair] = max;
    part.sum[pair] = part.sum[pair] * old + sum;
    let acc = &mut part.acc[pair * d..][..d];
    let values = &tile.values[..BLOCK * d];
    let (chunks, rest) = acc.as_chunks_mut::<LANES>();
    let done = d - rest.len();
    for (c, acc) in chunks.iter_mut().enumerate() {
        let mut lanes = *acc;
        lanes.iter_mut().for_each(|a| *a *= old);
        for i in seen.clone() {
            let v = &values[i * d + c * LANES..][..LANES];
            for (lane, v) in lanes.iter_mut().zip(v) {
                *lane = weights[i].mul_add(*v, *lane);
            }
        }
        *acc = lanes;
    }
    for (c, acc) in rest.iter_mut().enumerate() {
        *acc *= old;
        for i in seen.clone() {
            *acc = weights[i].mul_add(values[i * d + done + c], *acc);
        }
    }
}
