//! One tile: its queries, and the loop over runs of blocks.

use std::ops::Range;

use bytemuck::{cast_slice, cast_slice_mut};

use super::panel::{Panel, panel_len};
use super::partial::{Partial, vectors};
use super::{BLOCK, Item, POSITIONS, Problem, RUN, SPLIT};
use crate::isa::{Kernel, Tier};
use crate::lanes::{Line, sum};

/// A worker's memory for one tile.
#[derive(Default)]
pub(super) struct Tile {
    head_dim: usize,
    pairs: usize,
    /// Queries `[head_dim, pairs]` of one panel after the other, scaled to powers of two.
    queries: Vec<f32>,
    /// Merged splits.
    pub(super) total: Partial,
    /// The split that is being computed: its sums are still in lanes, one vector for each pair.
    pub(super) part: Partial,
    sums: Vec<Line>,
    /// A run's keys `[head_dim, positions]` and values `[positions, head_dim]`, widened; rows of
    /// values are padded with zeros to whole vectors.
    keys: Vec<Line>,
    values: Vec<Line>,
}

impl Tile {
    /// Takes an item's queries and forgets what was before.
    #[inline(always)]
    fn start(&mut self, problem: &Problem<'_>, item: &Item) {
        let d = problem.head_dim;
        let pairs = item.rows * problem.readers(&item.kv_heads).len();
        (self.head_dim, self.pairs) = (d, pairs);
        self.total.clear(pairs, d);
        if self.values.len() != POSITIONS * vectors(d) {
            self.keys = vec![Line::default(); RUN * d];
            self.values = vec![Line::default(); POSITIONS * vectors(d)];
        }
        // Scores are exponents of 2.
        let scale = problem.scale * std::f32::consts::LOG2_E;
        self.queries.resize(pairs * d, 0.0);
        for (kv_head, start, group) in item.groups(problem) {
            for (first, len) in panels(start..start + item.rows * group) {
                let panel = &mut self.queries[first * d..][..len * d];
                for p in 0..len {
                    let (row, head) = ((first + p - start) / group, (first + p - start) % group);
                    let at = super::head_at(problem, item, kv_head, row) + head * d;
                    let places = panel.iter_mut().skip(p).step_by(len);
                    places.zip(&problem.q[at..][..d]).for_each(|(to, q)| *to = q * scale);
                }
            }
        }
    }
}

/// Cuts pairs into panels: where each starts, and its length.
#[inline(always)]
fn panels(mut pairs: Range<usize>) -> impl Iterator<Item = (usize, usize)> {
    std::iter::from_fn(move || {
        let (first, len) = (pairs.start, panel_len(pairs.len()));
        pairs.start += len;
        (len > 0).then_some((first, len))
    })
}

/// Computes an item into a tile.
pub(super) struct Run<'a> {
    pub(super) problem: &'a Problem<'a>,
    pub(super) item: &'a Item,
    pub(super) tile: &'a mut Tile,
}

impl Kernel for Run<'_> {
    #[inline(always)]
    fn run<T: Tier>(self, t: T) {
        let Run { problem, item, tile } = self;
        tile.start(problem, item);
        for split in item.splits.clone() {
            one_split(t, problem, item, tile, split);
            tile.total.merge(t, &tile.part, tile.head_dim);
        }
    }
}

/// Fills `tile.part` with the sums over one split.
#[inline(always)]
fn one_split<T: Tier>(t: T, problem: &Problem<'_>, item: &Item, tile: &mut Tile, split: usize) {
    tile.part.clear(tile.pairs, tile.head_dim);
    tile.sums.clear();
    tile.sums.resize(tile.pairs, Line::default());
    let start = problem.spans[item.span].start as usize + item.row;
    let from = problem.first_seen(start).max(split * SPLIT) / BLOCK;
    let to = (start + item.rows).min((split + 1) * SPLIT).div_ceil(BLOCK);
    for first in (from / RUN * RUN..to).step_by(RUN) {
        let begin = first * BLOCK;
        let seen = |row: usize| {
            let low = problem.first_seen(start + row).max(begin);
            let high = (start + row + 1).min(begin + POSITIONS);
            low.saturating_sub(begin)..high.saturating_sub(begin)
        };
        // What is between rows that see all of it sees all of it too.
        let all = [0, item.rows - 1].iter().all(|row| seen(*row) == (0..POSITIONS));
        for (kv_head, start, group) in item.groups(problem) {
            widen(t, problem, (item.span, kv_head), tile, (first, from..to));
            for (first, len) in panels(start..start + item.rows * group) {
                let row = |p: usize| (first + p - start) / group;
                let seen = |p: usize| if all { 0..POSITIONS } else { seen(row(p)) };
                match len {
                    6.. => panel::<T, 6>(t, tile, first, seen),
                    4.. => panel::<T, 4>(t, tile, first, seen),
                    3 => panel::<T, 3>(t, tile, first, seen),
                    2 => panel::<T, 2>(t, tile, first, seen),
                    _ => panel::<T, 1>(t, tile, first, seen),
                }
            }
        }
    }
    let sums = tile.part.sum.as_flattened_mut().iter_mut().zip(&tile.sums);
    sums.for_each(|(total, lanes)| *total = sum(lanes.0));
}

/// Widens the blocks of the run that starts at block `first`, as far as they are among `blocks`.
#[inline(always)]
fn widen<T: Tier>(
    t: T,
    problem: &Problem<'_>,
    (span, kv_head): (usize, usize),
    tile: &mut Tile,
    (first, blocks): (usize, Range<usize>),
) {
    let span = &problem.spans[span];
    let table = &problem.tables[span.table as usize..][..span.table_len as usize];
    let place = |block: usize| (table[block] as usize * problem.kv_heads + kv_head) * BLOCK;
    let d = tile.head_dim;
    for block in first.max(blocks.start)..(first + RUN).min(blocks.end) {
        let keys = cast_slice_mut(&mut tile.keys[block - first..]).iter_mut().step_by(RUN);
        problem.k.keys(t, place(block), keys);
        let values = &mut tile.values[(block - first) * BLOCK * vectors(d)..];
        let values = cast_slice_mut(&mut values[..BLOCK * vectors(d)]);
        problem.v.values(t, place(block), d, values);
    }
}

/// Adds the widened run to the `P` pairs from `first` on; `seen` tells what each sees of it.
#[inline(always)]
fn panel<T: Tier, const P: usize>(
    t: T,
    tile: &mut Tile,
    first: usize,
    seen: impl Fn(usize) -> Range<usize>,
) {
    let (d, width) = (tile.head_dim, vectors(tile.head_dim));
    let panel = Panel::<P> {
        queries: tile.queries[first * d..][..P * d].as_chunks().0,
        keys: cast_slice(&tile.keys),
        values: cast_slice(&tile.values),
        seen: std::array::from_fn(seen),
        max: tile.part.max.as_flattened_mut()[first..].first_chunk_mut().expect("all pairs"),
        sums: cast_slice_mut(&mut tile.sums)[first..].first_chunk_mut().expect("all pairs"),
        acc: cast_slice_mut(&mut tile.part.acc[first * width..][..P * width]),
    };
    panel.add(t);
}
