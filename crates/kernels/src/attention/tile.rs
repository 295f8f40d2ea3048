//! One tile: its queries, and the loop over runs of blocks.

use std::mem::take;
use std::ops::Range;

use bytemuck::{cast_slice, cast_slice_mut};

use super::integers::{Integers, Queries};
use super::panel::{Panel, panel_len};
use super::partial::{Partial, vectors};
use super::squares;
use super::stored::{Bfloat, Half, Plain, Rows, Run, Widened};
use super::{BLOCK, Cache, Item, Layer, POSITIONS, Problem, RUN, SPLIT};
use crate::isa::{Kernel, Tier};
use crate::lanes::{LANES, Line};
use crate::linear::ActivationBits;
use crate::linear::amx::squares::Squares;

/// Up to so many pairs of one row take keys and values as they are stored: to widen them into
/// memory first would take longer, and reading and computing would take turns.
const STORED_PAIRS: usize = 4;

/// A worker's memory for one tile.
#[derive(Default)]
pub(super) struct Tile {
    head_dim: usize,
    pairs: usize,
    /// Queries `[head_dim, pairs]` of one panel after the other, scaled to powers of two.
    queries: Vec<f32>,
    /// The same as integers, where keys are.
    integers: Queries,
    /// Merged splits.
    pub(super) total: Partial,
    /// The split that is being computed: its sums are still in lanes, one vector for each pair.
    pub(super) part: Partial,
    sums: Vec<Line>,
    /// A run's keys `[head_dim, positions]` and values `[positions, head_dim]`, widened; rows of
    /// values are padded with zeros to whole vectors. On tile registers, a run's 8-bit values.
    keys: Vec<Line>,
    values: Vec<Line>,
}

impl Tile {
    /// Takes an item's queries and forgets what was before.
    #[inline(always)]
    fn start<T: Tier>(&mut self, t: T, problem: &Problem<'_>, item: &Item, on_tiles: bool) {
        let d = problem.head_dim;
        let pairs = item.rows * problem.readers(&item.kv_heads).len();
        (self.head_dim, self.pairs) = (d, pairs);
        self.total.clear(pairs, d);
        let widened = matches!(problem.layer, Layer::Numbers(_));
        let lens = [self.keys.len(), self.values.len()];
        if widened && lens != [RUN * d, POSITIONS * vectors(d)] {
            self.keys = vec![Line::default(); RUN * d];
            self.values = vec![Line::default(); POSITIONS * vectors(d)];
        }
        // Scores are exponents of 2.
        let scale = problem.scale * std::f32::consts::LOG2_E;
        match problem.layer {
            Layer::Numbers(_) => self.queries.resize(pairs * d, 0.0),
            Layer::Integers(_, bits) => self.integers.restart(pairs, d, bits),
        }
        if on_tiles {
            self.values.resize(squares::gathered_bytes(d) / size_of::<Line>(), Line::default());
        }
        for (kv_head, start, group) in item.groups(problem) {
            for (first, len) in cut(start..start + item.rows * group, on_tiles) {
                for p in 0..len {
                    let (row, head) = ((first + p - start) / group, (first + p - start) % group);
                    let at = super::head_at(problem, item, kv_head, row) + head * d;
                    let query = &problem.q[at..][..d];
                    match problem.layer {
                        Layer::Numbers(_) => {
                            let places = self.queries[first * d..][..len * d].iter_mut();
                            let places = places.skip(p).step_by(len);
                            places.zip(query).for_each(|(to, q)| *to = q * scale);
                        }
                        Layer::Integers(_, bits) => {
                            self.integers.set(t, (first, len, p), (query, scale, bits));
                        }
                    }
                }
            }
        }
    }

    /// The `P` pairs from `first` on, to meet a run.
    #[inline(always)]
    fn panel<R, const P: usize>(
        &mut self,
        first: usize,
        run: R,
        seen: Option<impl Fn(usize) -> Range<usize>>,
    ) -> Panel<'_, P, &[[f32; P]], R> {
        let d = self.head_dim;
        let queries = self.queries[first * d..][..P * d].as_chunks().0;
        panel((&mut self.part, &mut self.sums), (first, vectors(d)), (queries, run), seen)
    }
}

/// The `P` pairs from `first` on, of `width` vectors each.
#[inline(always)]
fn panel<'a, Q, R, const P: usize>(
    (part, sums): (&'a mut Partial, &'a mut [Line]),
    (first, width): (usize, usize),
    (queries, run): (Q, R),
    seen: Option<impl Fn(usize) -> Range<usize>>,
) -> Panel<'a, P, Q, R> {
    Panel {
        queries,
        run,
        seen: seen.map(|seen| std::array::from_fn(|p| seen(first + p))),
        base: part.base.as_flattened_mut()[first..].first_chunk_mut().expect("all pairs"),
        sums: cast_slice_mut(sums)[first..].first_chunk_mut().expect("all pairs"),
        acc: cast_slice_mut(&mut part.acc[first * width..][..P * width]),
    }
}

/// A run, and how panels meet it.
trait Meeting<T: Tier>: Copy {
    /// Whether tile registers do, which take [`squares::PAIRS`] at a time.
    fn on_tiles(self) -> bool {
        false
    }
    fn add_square(
        self,
        _: T,
        _: &mut Tile,
        _first: usize,
        _seen: Option<impl Fn(usize) -> Range<usize>>,
    ) {
        unreachable!("tile registers meet integers");
    }
    fn add<const P: usize>(
        self,
        t: T,
        tile: &mut Tile,
        first: usize,
        seen: Option<impl Fn(usize) -> Range<usize>>,
    );
}

impl<T: Tier> Meeting<T> for Widened<'_> {
    #[inline(always)]
    fn add<const P: usize>(
        self,
        t: T,
        tile: &mut Tile,
        first: usize,
        seen: Option<impl Fn(usize) -> Range<usize>>,
    ) {
        tile.panel::<_, P>(first, self, seen).add(t);
    }
}

/// With integers of so many terms.
#[derive(Clone, Copy)]
struct Terms<'a, const TERMS: usize>(Integers<'a>);

impl<T: Tier, const TERMS: usize> Meeting<T> for Terms<'_, TERMS> {
    #[inline(always)]
    fn on_tiles(self) -> bool {
        self.0.gathered.is_some()
    }

    #[inline(always)]
    fn add_square(
        self,
        t: T,
        tile: &mut Tile,
        first: usize,
        seen: Option<impl Fn(usize) -> Range<usize>>,
    ) {
        // No other tier has them: it spares compiling this for all.
        assert!(T::REGISTERS >= 32, "tile registers stand beside the largest vectors");
        Meeting::add::<{ squares::PAIRS }>(self, t, tile, first, seen);
    }

    #[inline(always)]
    fn add<const P: usize>(
        self,
        t: T,
        tile: &mut Tile,
        first: usize,
        seen: Option<impl Fn(usize) -> Range<usize>>,
    ) {
        let queries = tile.integers.panel::<P>(first);
        let states = (&mut tile.part, tile.sums.as_mut_slice());
        panel(states, (first, vectors(tile.head_dim)), (queries, self.0), seen)
            .add_integers::<T, TERMS>(t);
    }
}

/// Cuts pairs into panels: where each starts, and its length.
#[inline(always)]
fn cut(mut pairs: Range<usize>, on_tiles: bool) -> impl Iterator<Item = (usize, usize)> {
    std::iter::from_fn(move || {
        let square = on_tiles && pairs.len() >= squares::PAIRS;
        let len = if square { squares::PAIRS } else { panel_len(pairs.len()) };
        let first = pairs.start;
        pairs.start += len;
        (len > 0).then_some((first, len))
    })
}

/// Computes an item into a tile.
pub(super) struct Compute<'a> {
    pub(super) problem: &'a Problem<'a>,
    pub(super) item: &'a Item,
    pub(super) tile: &'a mut Tile,
    /// Whether there are tile registers.
    pub(super) tiles: bool,
}

impl Kernel for Compute<'_> {
    #[inline(always)]
    fn run<T: Tier>(self, t: T) {
        let Compute { problem, item, tile, tiles } = self;
        let tiles = tiles
            && matches!(problem.layer, Layer::Integers(..))
            && squares::fit(problem.head_dim)
            && item.groups(problem).any(|(_, _, group)| item.rows * group >= squares::PAIRS);
        // SAFETY: they have been found.
        let tiles = tiles.then(|| unsafe { Squares::new() });
        tile.start(t, problem, item, tiles.is_some());
        for split in item.splits.clone() {
            one_split(t, (problem, item), tile, split, tiles.as_ref());
            tile.total.merge(t, &tile.part, tile.head_dim);
        }
    }
}

/// Fills `tile.part` with the sums over one split.
#[inline(always)]
fn one_split<T: Tier>(
    t: T,
    (problem, item): (&Problem<'_>, &Item),
    tile: &mut Tile,
    split: usize,
    tiles: Option<&Squares>,
) {
    tile.part.restart(tile.pairs, tile.head_dim);
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
            let pairs = start..start + item.rows * group;
            let seen = (!all).then_some(|p: usize| seen((p - start) / group));
            let stored = Stored { problem, item, kv_head, first, blocks: from..to };
            match problem.layer {
                Layer::Numbers(layer) => stored.meet(t, layer, tile, pairs, seen),
                Layer::Integers(layer, bits) => {
                    let mut run = Integers::of(layer, stored.rows(), tile.head_dim);
                    let mut values = take(&mut tile.values);
                    if let Some(tiles) = tiles {
                        run = run.gather(tiles, cast_slice_mut(&mut values));
                    }
                    match bits {
                        ActivationBits::Eight => panels(t, tile, pairs, Terms::<1>(run), seen),
                        ActivationBits::Sixteen => panels(t, tile, pairs, Terms::<2>(run), seen),
                    }
                    tile.values = values;
                }
            }
        }
    }
    let sums = tile.part.sum.as_flattened_mut().iter_mut().zip(&tile.sums);
    sums.for_each(|(total, lanes)| *total = t.sum(t.load(&lanes.0)));
}

/// A run of a KV head's blocks, as they lie in memory.
struct Stored<'a> {
    problem: &'a Problem<'a>,
    item: &'a Item,
    kv_head: usize,
    /// The run's first block.
    first: usize,
    /// Those that anybody sees something of.
    blocks: Range<usize>,
}

impl Stored<'_> {
    /// Its blocks that somebody sees something of.
    fn seen(&self) -> Range<usize> {
        self.first.max(self.blocks.start)..(self.first + RUN).min(self.blocks.end)
    }

    /// The number of a block's first row in the cache.
    #[inline(always)]
    fn place(&self, block: usize, kv_head: usize) -> usize {
        let span = &self.problem.spans[self.item.span];
        let block = self.problem.tables[span.table as usize + block];
        (block as usize * self.problem.kv_heads + kv_head) * BLOCK
    }

    /// The same for all blocks of the run, and of what the item meets after it. Of what nobody
    /// sees, a neighbour stands in.
    #[inline(always)]
    fn rows(&self) -> Rows {
        let (seen, heads) = (self.seen(), &self.item.kv_heads);
        let rows = |first: usize, end: usize, kv_head: usize| {
            std::array::from_fn(|i| self.place((first + i).clamp(seen.start, end - 1), kv_head))
        };
        let now = rows(self.first, seen.end, self.kv_head);
        let soon = if self.kv_head + 1 < heads.end {
            now.map(|row: usize| row + BLOCK)
        } else {
            let item = self.item;
            let past = self.problem.spans[item.span].start as usize + item.row + item.rows;
            rows(self.first + RUN, past.min(item.splits.end * SPLIT).div_ceil(BLOCK), heads.start)
        };
        Rows { now, soon }
    }

    /// Adds what is seen of it to the tile's pairs.
    #[inline(always)]
    fn meet<T: Tier>(
        &self,
        t: T,
        layer: [Cache<'_>; 2],
        tile: &mut Tile,
        pairs: Range<usize>,
        seen: Option<impl Fn(usize) -> Range<usize> + Copy>,
    ) {
        if self.item.rows == 1 && self.meet_as_stored(t, layer, tile, &pairs, seen) {
            return;
        }
        self.widen(t, layer, tile);
        let (keys, values) = (take(&mut tile.keys), take(&mut tile.values));
        let (k, v) = (cast_slice(&keys), cast_slice(&values));
        let run = Widened { keys: k, values: v, width: vectors(tile.head_dim) };
        panels(t, tile, pairs, run, seen);
        (tile.keys, tile.values) = (keys, values);
    }

    /// Widens it into a tile's memory.
    #[inline(always)]
    fn widen<T: Tier>(&self, t: T, [k, v]: [Cache<'_>; 2], tile: &mut Tile) {
        let d = self.problem.head_dim;
        for block in self.seen() {
            let (at, i) = (self.place(block, self.kv_head), block - self.first);
            let keys = cast_slice_mut(&mut tile.keys[i..]).iter_mut().step_by(RUN);
            k.widen(t, at * d, keys);
            let values = &mut tile.values[i * BLOCK * vectors(d)..][..BLOCK * vectors(d)];
            v.values(t, at, d, cast_slice_mut(values));
        }
    }

    /// Adds what a row sees of it to the row's pairs, if they are few and take it as it is.
    #[inline(always)]
    fn meet_as_stored<T: Tier>(
        &self,
        t: T,
        layer: [Cache<'_>; 2],
        tile: &mut Tile,
        pairs: &Range<usize>,
        seen: Option<impl Fn(usize) -> Range<usize>>,
    ) -> bool {
        let d = self.problem.head_dim;
        if pairs.len() > STORED_PAIRS || !d.is_multiple_of(4 * LANES) {
            return false;
        }
        let rows = self.rows();
        match layer {
            [Cache::F16(k), Cache::F16(v)] => {
                row(t, tile, pairs, Plain::<Half>::of((k, v), rows, d), seen);
            }
            [Cache::BF16(k), Cache::BF16(v)] => {
                row(t, tile, pairs, Plain::<Bfloat>::of((k, v), rows, d), seen);
            }
            _ => return false,
        }
        true
    }
}

/// Adds what a row sees of a run to its pairs, which are few.
#[inline(always)]
fn row<T: Tier>(
    t: T,
    tile: &mut Tile,
    pairs: &Range<usize>,
    run: impl Run<T>,
    seen: Option<impl Fn(usize) -> Range<usize>>,
) {
    match pairs.len() {
        1 => tile.panel::<_, 1>(pairs.start, run, seen).add_row(t),
        2 => tile.panel::<_, 2>(pairs.start, run, seen).add_row(t),
        3 => tile.panel::<_, 3>(pairs.start, run, seen).add_row(t),
        _ => tile.panel::<_, STORED_PAIRS>(pairs.start, run, seen).add_row(t),
    }
}

/// Adds a run to some pairs, panel by panel; `seen` tells what each sees of it.
#[inline(always)]
fn panels<T: Tier>(
    t: T,
    tile: &mut Tile,
    pairs: Range<usize>,
    run: impl Meeting<T>,
    seen: Option<impl Fn(usize) -> Range<usize>>,
) {
    let seen = || seen.as_ref();
    for (first, len) in cut(pairs, run.on_tiles()) {
        if seen().is_some_and(|seen| (first..first + len).all(|pair| seen(pair).is_empty())) {
            continue;
        }
        match len {
            squares::PAIRS => run.add_square(t, tile, first, seen()),
            6.. => run.add::<6>(t, tile, first, seen()),
            4.. => run.add::<4>(t, tile, first, seen()),
            3 => run.add::<3>(t, tile, first, seen()),
            2 => run.add::<2>(t, tile, first, seen()),
            _ => run.add::<1>(t, tile, first, seen()),
        }
    }
}
