//! Causal attention over a paged cache.
//!
//! Work is cut into tiles: a few rows of one sequence, one KV head, and (when one row must keep all
//! threads busy) one split of the past. A tile widens each block of keys and values to f32 once and
//! uses it for all its rows and all query heads of the group, with an online softmax (Milakov and
//! Gimelshein, 2018; Dao et al., FlashAttention, 2022).
//!
//! Exactness: a row's result is built from partial sums over splits of 256 positions, each built
//! block by block, merged in order. Splits and blocks are cut at absolute positions, so the result
//! does not depend on chunking, batch, tiles or threads.
//!
//! Within a cache block of one KV head, keys are `[head_dim, 16]` and values `[16, head_dim]`: then
//! one multiply-add serves 16 keys. Those of 8 bits are met as integers (`integers.rs`), on tile
//! registers by sixteen pairs at a time (`squares.rs`).

mod cache;
mod context;
mod integers;
mod panel;
mod partial;
mod squares;
mod stored;
mod tile;
mod write;

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use pomona_device::Pool;
use pomona_types::{BLOCK_TOKENS, SPLIT_BLOCKS};

use crate::{HeadGroups, Isa};
pub use cache::kv_row_bytes;
pub(crate) use cache::{Cache, Layer};
pub(crate) use context::{Shares, shared_attention};
pub(crate) use integers::HEAD_DIM_MAX;
use partial::{Merge, Partial};
use tile::Tile;
pub(crate) use write::{CacheMut, KvWrite};

/// Positions in a block.
pub(crate) const BLOCK: usize = BLOCK_TOKENS as usize;
/// Positions in a split: where partial sums end.
const SPLIT: usize = BLOCK * SPLIT_BLOCKS as usize;
/// Blocks of a run: weighted values shrink once for each run at most.
const RUN: usize = 4;
/// Positions of a run. Runs start at multiples of it, whatever the chunk or the window.
const POSITIONS: usize = RUN * BLOCK;
/// Numbers of a tile's queries, about: what a widened block serves before the next one comes. With
/// as many weighted values they take 384 KiB, which come round once for each run: they should fit a
/// core's own cache.
const TILE_NUMBERS: usize = 768 * 64;
/// Rows of a tile times heads of a group, at least where there are few rows: fewer pairs would be
/// busy widening.
const TILE_PAIRS_MIN: usize = 48;
/// Most pairs that take all heads of a block at a time.
const SHARED_PAIRS: usize = 192;
/// How many items a thread should have, so that all are done at about the same time.
const ITEMS_PER_THREAD: usize = 4;

/// Shapes and inputs of one attention call.
#[derive(Clone, Copy)]
pub(crate) struct Problem<'a> {
    /// `[tokens, heads, head_dim]`.
    pub(crate) q: &'a [f32],
    pub(crate) layer: Layer<'a>,
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) groups: HeadGroups,
    pub(crate) head_dim: usize,
    pub(crate) scale: f32,
    pub(crate) window: Option<u32>,
    pub(crate) tables: &'a [u32],
    pub(crate) spans: &'a [crate::Span],
}

/// A piece of work: rows of a span, some KV heads, and splits of what they see.
#[derive(Clone, Debug)]
struct Item {
    span: usize,
    row: usize,
    rows: usize,
    kv_heads: Range<usize>,
    splits: Range<usize>,
    /// Where its partial result goes; `None` has all splits and stores the output.
    partial: Option<usize>,
}

impl Item {
    /// About how long it takes.
    fn cost(&self) -> usize {
        self.rows * self.kv_heads.len() * self.splits.len()
    }

    /// Its KV heads, with the first pair that reads each, and how many query heads of a row do.
    /// Pairs lie by KV head, row and query head.
    fn groups(&self, problem: &Problem<'_>) -> impl Iterator<Item = (usize, usize, usize)> {
        let first = problem.readers(&self.kv_heads).start;
        let (rows, groups, heads) = (self.rows, problem.groups, problem.heads);
        self.kv_heads.clone().map(move |kv_head| {
            let group = groups.of(kv_head, heads);
            (kv_head, rows * (group.start - first), group.len())
        })
    }
}

/// Reused memory: work lists, partial results, one tile per worker.
#[derive(Default)]
pub(crate) struct Workspace {
    items: Vec<Item>,
    partials: Vec<Mutex<Partial>>,
    tiles: Vec<Mutex<Tile>>,
}

/// Where outputs go; tiles write disjoint rows and heads.
#[derive(Clone, Copy)]
struct Out(*mut f32);

// SAFETY: each item stores its own rows and heads.
unsafe impl Sync for Out {}
// SAFETY: as above.
unsafe impl Send for Out {}

impl Problem<'_> {
    /// The query heads that read some KV heads.
    fn readers(&self, kv_heads: &Range<usize>) -> Range<usize> {
        let first = self.groups.of(kv_heads.start, self.heads).start;
        first..self.groups.of(kv_heads.end - 1, self.heads).end
    }

    /// First position that `position` sees.
    fn first_seen(&self, position: usize) -> usize {
        self.window.map_or(0, |w| (position + 1).saturating_sub(w as usize))
    }
}

/// Computes `out` (like `q`). Bounds of spans and tables are the caller's responsibility.
pub(crate) fn attention(
    pool: &Pool,
    isa: Isa,
    problem: &Problem<'_>,
    work: &mut Workspace,
    out: &mut [f32],
) {
    let partials = plan(problem, pool.threads(), &mut work.items);
    let sink = Out(out.as_mut_ptr());
    compute(pool, isa, problem, (work, partials), &|item, tile| {
        let sink = &sink;
        for (kv_head, first, group) in item.groups(problem) {
            for row in 0..item.rows {
                let (at, len) = (head_at(problem, item, kv_head, row), group * problem.head_dim);
                // SAFETY: this item's own rows and heads, within `out`, which has q's size.
                let out = unsafe { std::slice::from_raw_parts_mut(sink.0.add(at), len) };
                tile.total.finish(first + row * group, problem.head_dim, out);
            }
        }
    });
    merge_splits(isa, problem, work, out);
}

/// Computes the items of a workspace, which have so many partial results; `whole` takes those of
/// all splits.
fn compute(
    pool: &Pool,
    isa: Isa,
    problem: &Problem<'_>,
    (work, partials): (&mut Workspace, usize),
    whole: &(dyn Fn(&Item, &Tile) + Sync),
) {
    work.partials.resize_with(partials.max(work.partials.len()), Mutex::default);
    work.tiles.resize_with(pool.threads(), Mutex::default);
    let next = AtomicUsize::new(0);
    let (items, partials, tiles) = (&work.items, &work.partials, &work.tiles);
    let run = |worker: usize| {
        let mut tile = tiles[worker].lock().unwrap_or_else(PoisonError::into_inner);
        while let Some(item) = items.get(next.fetch_add(1, Ordering::Relaxed)) {
            isa.run(tile::Compute { problem, item, tile: &mut tile, tiles: isa == Isa::Amx });
            match item.partial {
                None => whole(item, &tile),
                Some(slot) => {
                    let mut partial = partials[slot].lock().unwrap_or_else(PoisonError::into_inner);
                    std::mem::swap(&mut tile.total, &mut partial);
                }
            }
        }
    };
    if items.len() == 1 { run(0) } else { pool.run(&run) }
}

/// Where the query heads of a row that read a KV head start in `q` and `out`.
fn head_at(problem: &Problem<'_>, item: &Item, kv_head: usize, row: usize) -> usize {
    let row = problem.spans[item.span].first_row as usize + item.row + row;
    let head = problem.groups.of(kv_head, problem.heads).start;
    (row * problem.heads + head) * problem.head_dim
}

/// Lists the work, what takes longest first; returns the number of partial results.
fn plan(problem: &Problem<'_>, threads: usize, items: &mut Vec<Item>) -> usize {
    items.clear();
    // As many as there would be were all rows of one span: single rows are soon done.
    let rows: usize = problem.spans.iter().map(|span| span.rows as usize).sum();
    let tiles = |of: usize| rows.div_ceil(of) * problem.kv_heads;
    // One thread has no one to share with.
    let enough = if threads > 1 { ITEMS_PER_THREAD * threads } else { 1 };
    let mut tile_rows = (TILE_NUMBERS / (problem.groups.size * problem.head_dim)).max(1);
    while tile_rows * problem.groups.size > TILE_PAIRS_MIN && tiles(tile_rows) < enough {
        tile_rows = tile_rows.div_ceil(2);
    }
    for (span, s) in problem.spans.iter().enumerate() {
        for row in (0..s.rows as usize).step_by(tile_rows) {
            let rows = tile_rows.min(s.rows as usize - row);
            let position = s.start as usize + row;
            let splits = problem.first_seen(position) / SPLIT..(position + rows - 1) / SPLIT + 1;
            let kv_heads = 0..problem.kv_heads;
            items.push(Item { span, row, rows, kv_heads, splits, partial: None });
        }
    }
    // Few rows take all heads of a block at a time, as they lie in memory, if cuts between splits
    // leave enough items; else each head is an item.
    let splits: usize = items.iter().map(|item| item.splits.len()).sum();
    let many = |item: &Item| item.rows * problem.heads > SHARED_PAIRS;
    for at in 0..items.len() {
        if splits < enough || many(&items[at]) {
            for kv_head in 1..problem.kv_heads {
                items.push(Item { kv_heads: kv_head..kv_head + 1, ..items[at].clone() });
            }
            items[at].kv_heads = 0..1;
        }
    }
    // What would keep one thread busy while others have nothing left is cut where sums end.
    let most = items.iter().map(Item::cost).sum::<usize>() / enough;
    let mut partials = 0;
    for at in 0..items.len() {
        let item = items[at].clone();
        if threads > 1 && item.splits.len() > 1 && item.cost() > most {
            for split in item.splits.clone() {
                let part =
                    Item { splits: split..split + 1, partial: Some(partials), ..item.clone() };
                if split == item.splits.start {
                    items[at] = part;
                } else {
                    items.push(part);
                }
                partials += 1;
            }
        }
    }
    items.sort_by_key(|item| std::cmp::Reverse(item.cost()));
    partials
}

/// Adds up partial results in order of splits.
fn merge_splits(isa: Isa, problem: &Problem<'_>, work: &mut Workspace, out: &mut [f32]) {
    let Some(tile) = work.tiles.first_mut() else { return };
    let total = &mut tile.get_mut().unwrap_or_else(PoisonError::into_inner).total;
    let head_dim = problem.head_dim;
    work.items.retain(|item| item.partial.is_some());
    work.items.sort_by_key(|item| item.partial);
    let same = |a: &Item, b: &Item| (a.span, a.row, &a.kv_heads) == (b.span, b.row, &b.kv_heads);
    for splits in work.items.chunk_by(same) {
        let item = &splits[0];
        total.clear(item.rows * problem.readers(&item.kv_heads).len(), head_dim);
        for slot in splits.iter().filter_map(|split| split.partial) {
            let part = work.partials[slot].get_mut().unwrap_or_else(PoisonError::into_inner);
            isa.run(Merge { total, part, head_dim });
        }
        for (kv_head, first, group) in item.groups(problem) {
            for row in 0..item.rows {
                let at = head_at(problem, item, kv_head, row);
                total.finish(first + row * group, head_dim, &mut out[at..][..group * head_dim]);
            }
        }
    }
}

#[cfg(test)]
mod tests;
