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
//! one multiply-add serves 16 keys.

mod context;
mod tile;

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use half::{bf16, f16};
use pomona_device::{DType, Pool};
use pomona_types::{BLOCK_TOKENS, SPLIT_BLOCKS};

use crate::isa::Tier;
use crate::lanes::LANES;
use crate::{HeadGroups, Isa};
pub(crate) use context::{Shares, shared_attention};
use tile::{Merge, Partial, Tile};

/// Positions in a block.
pub(crate) const BLOCK: usize = BLOCK_TOKENS as usize;
/// Positions in a split: where partial sums end.
const SPLIT: usize = BLOCK * SPLIT_BLOCKS as usize;
/// Rows of a tile: how often a widened block is used per query head.
const TILE_ROWS: usize = 16;

/// A layer's keys or values as they lie in memory: `[blocks, kv_heads, 16 * head_dim]`. Bytes are
/// signed integers, with 16 scales behind each block's: one for each position.
#[derive(Clone, Copy)]
pub(crate) enum Cache<'a> {
    F32(&'a [f32]),
    F16(&'a [u16]),
    BF16(&'a [u16]),
    I8(&'a [u8]),
}

/// Bytes of a position's scale.
const SCALE_BYTES: usize = size_of::<f32>();

/// Bytes of a head's key or value of one position in a cache of this type: what the last axis of
/// its views amounts to. `I8` has a scale beside the integers.
pub fn kv_row_bytes(dtype: DType, head_dim: usize) -> usize {
    match dtype {
        DType::I8 => quantised_bytes(head_dim),
        other => head_dim * other.bytes(),
    }
}

/// Bytes that `head_dim` integers and their scale take.
pub(crate) fn quantised_bytes(head_dim: usize) -> usize {
    head_dim + SCALE_BYTES
}

impl Cache<'_> {
    /// Widens a block's keys `[head_dim, 16]`; `row` is the number of its first position.
    #[inline(always)]
    fn keys<T: Tier>(&self, t: T, row: usize, out: &mut [f32]) {
        let Cache::I8(bytes) = self else { return self.widen(t, row, out) };
        let (integers, scales) = block_of(bytes, row, out.len());
        let scales = t.load(&scales);
        let rows = integers.as_chunks::<LANES>().0;
        for (out, integers) in out.as_chunks_mut::<LANES>().0.iter_mut().zip(rows) {
            t.store(t.mul(t.bytes(integers), scales), out);
        }
    }

    /// Widens a block's values `[16, head_dim]`.
    #[inline(always)]
    fn values<T: Tier>(&self, t: T, row: usize, out: &mut [f32]) {
        let Cache::I8(bytes) = self else { return self.widen(t, row, out) };
        let (integers, scales) = block_of(bytes, row, out.len());
        let d = out.len() / BLOCK;
        let rows = out.chunks_exact_mut(d).zip(integers.chunks_exact(d));
        for ((out, integers), scale) in rows.zip(scales) {
            let (outs, rest) = out.as_chunks_mut::<LANES>();
            for (out, integers) in outs.iter_mut().zip(integers.as_chunks().0) {
                t.store(t.mul(t.bytes(integers), t.splat(scale)), out);
            }
            for (out, integer) in rest.iter_mut().zip(&integers[d / LANES * LANES..]) {
                *out = f32::from(*integer as i8) * scale;
            }
        }
    }

    /// Widens numbers that need no scale.
    #[inline(always)]
    fn widen<T: Tier>(&self, t: T, row: usize, out: &mut [f32]) {
        let at = row * (out.len() / BLOCK);
        let outs = out.as_chunks_mut::<LANES>().0;
        match self {
            Cache::F32(x) => out.copy_from_slice(&x[at..][..out.len()]),
            Cache::F16(x) => {
                let halves = x[at..].as_chunks::<LANES>().0;
                outs.iter_mut().zip(halves).for_each(|(out, x)| t.store(t.halves(x), out));
            }
            Cache::BF16(x) => {
                let bfloats = x[at..].as_chunks::<LANES>().0;
                outs.iter_mut().zip(bfloats).for_each(|(out, x)| t.store(t.bfloats(x), out));
            }
            Cache::I8(_) => {}
        }
    }
}

/// A quantised block's integers, and the scale of each position.
#[inline(always)]
fn block_of(bytes: &[u8], row: usize, len: usize) -> (&[u8], [f32; BLOCK]) {
    let d = len / BLOCK;
    let block = &bytes[row * quantised_bytes(d)..][..BLOCK * quantised_bytes(d)];
    let (integers, scales) = block.split_at(len);
    let scales = scales.as_chunks::<SCALE_BYTES>().0;
    (integers, std::array::from_fn(|i| f32::from_le_bytes(scales[i])))
}

/// The same, to be written.
pub(crate) enum CacheMut<'a> {
    F32(&'a mut [f32]),
    F16(&'a mut [u16]),
    BF16(&'a mut [u16]),
    I8(&'a mut [u8]),
}

impl CacheMut<'_> {
    /// Stores one head's row at a position of a block: the block's first position is number `block`
    /// of the cache, and the row's elements are `stride` apart in it, from `start` on.
    #[inline(always)]
    fn store(
        &mut self,
        row: &[f32],
        (block, position): (usize, usize),
        (start, stride): (usize, usize),
    ) {
        let places = (block * row.len() + start..).step_by(stride);
        match self {
            CacheMut::F32(x) => places.zip(row).for_each(|(i, v)| x[i] = *v),
            CacheMut::F16(x) => {
                places.zip(row).for_each(|(i, v)| x[i] = f16::from_f32(*v).to_bits())
            }
            CacheMut::BF16(x) => {
                places.zip(row).for_each(|(i, v)| x[i] = bf16::from_f32(*v).to_bits());
            }
            CacheMut::I8(x) => {
                let bytes = BLOCK * quantised_bytes(row.len());
                let x = &mut x[block / BLOCK * bytes..][..bytes];
                let largest = row.iter().fold(0.0, |most, v| f32::max(most, v.abs()));
                // What is not finite must not be hidden: its scale says so.
                let finite = row.iter().all(|v| v.is_finite());
                let scale = if finite { largest / 127.0 } else { f32::NAN };
                let inverse = if largest > 0.0 && finite { 127.0 / largest } else { 0.0 };
                for (i, v) in (start..).step_by(stride).zip(row) {
                    x[i] = (v * inverse).round_ties_even() as i8 as u8;
                }
                let scales = x[BLOCK * row.len()..].as_chunks_mut::<SCALE_BYTES>().0;
                scales[position] = scale.to_le_bytes();
            }
        }
    }

    /// Stores a head's key at `offset` of the block that starts at position `block`.
    #[inline(always)]
    pub(crate) fn key(&mut self, row: &[f32], block: usize, offset: usize) {
        self.store(row, (block, offset), (offset, BLOCK));
    }

    /// Stores a head's value, likewise.
    #[inline(always)]
    pub(crate) fn value(&mut self, row: &[f32], block: usize, offset: usize) {
        self.store(row, (block, offset), (offset * row.len(), 1));
    }
}

/// Shapes and inputs of one attention call.
#[derive(Clone, Copy)]
pub(crate) struct Problem<'a> {
    /// `[tokens, heads, head_dim]`.
    pub(crate) q: &'a [f32],
    pub(crate) k: Cache<'a>,
    pub(crate) v: Cache<'a>,
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) groups: HeadGroups,
    pub(crate) head_dim: usize,
    pub(crate) scale: f32,
    pub(crate) window: Option<u32>,
    pub(crate) tables: &'a [u32],
    pub(crate) spans: &'a [crate::Span],
}

/// A piece of work: rows of a span, a KV head, and one split or all.
#[derive(Clone, Copy, Debug)]
struct Item {
    span: usize,
    row: usize,
    rows: usize,
    kv_head: usize,
    /// Which split, and where its partial result goes; `None` computes all and stores the output.
    split: Option<(usize, usize)>,
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
    /// The query heads of an item.
    fn group(&self, item: &Item) -> Range<usize> {
        self.groups.of(item.kv_head, self.heads)
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
        for row in 0..item.rows {
            let at = head_at(problem, item, row);
            let len = tile.group_len();
            // SAFETY: this item's own rows and heads, within `out`, which has q's size.
            let out = unsafe { std::slice::from_raw_parts_mut(sink.0.add(at), len) };
            out.copy_from_slice(tile.output(row));
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
            isa.run(tile::Run { problem, item: *item, tile: &mut tile });
            match item.split {
                None => whole(item, &tile),
                Some((_, slot)) => {
                    let mut partial = partials[slot].lock().unwrap_or_else(PoisonError::into_inner);
                    tile.swap_total(&mut partial);
                }
            }
        }
    };
    if items.len() == 1 { run(0) } else { pool.run(&run) }
}

/// Where a row's group of heads starts in `q` and `out`.
fn head_at(problem: &Problem<'_>, item: &Item, row: usize) -> usize {
    let row = problem.spans[item.span].first_row as usize + item.row + row;
    (row * problem.heads + problem.group(item).start) * problem.head_dim
}

/// Lists the work; returns the number of partial results.
fn plan(problem: &Problem<'_>, threads: usize, items: &mut Vec<Item>) -> usize {
    items.clear();
    let tiles: usize = problem.spans.iter().map(|s| (s.rows as usize).div_ceil(TILE_ROWS)).sum();
    // With work for all, splitting only adds merging.
    let splitting = tiles * problem.kv_heads < 4 * threads && threads > 1;
    let mut partials = 0;
    for (span, s) in problem.spans.iter().enumerate() {
        for row in (0..s.rows as usize).step_by(TILE_ROWS) {
            let rows = TILE_ROWS.min(s.rows as usize - row);
            let position = s.start as usize + row;
            let first = problem.first_seen(position) / SPLIT;
            let splits = first..(position + rows - 1) / SPLIT + 1;
            for kv_head in 0..problem.kv_heads {
                let item = Item { span, row, rows, kv_head, split: None };
                if splitting && rows == 1 && splits.len() > 1 {
                    for split in splits.clone() {
                        items.push(Item { split: Some((split, partials)), ..item });
                        partials += 1;
                    }
                } else {
                    items.push(item);
                }
            }
        }
    }
    partials
}

/// Adds up partial results in order of splits.
fn merge_splits(isa: Isa, problem: &Problem<'_>, work: &mut Workspace, out: &mut [f32]) {
    let Some(tile) = work.tiles.first_mut() else { return };
    let tile = tile.get_mut().unwrap_or_else(PoisonError::into_inner);
    let mut at = 0;
    while at < work.items.len() {
        let item = work.items[at];
        let Some((_, first)) = item.split else {
            at += 1;
            continue;
        };
        let same = |i: &Item| (i.span, i.row, i.kv_head) == (item.span, item.row, item.kv_head);
        let count = work.items[at..].iter().take_while(|i| same(i)).count();
        tile.start(problem, &item);
        for slot in first..first + count {
            let part = work.partials[slot].get_mut().unwrap_or_else(PoisonError::into_inner);
            isa.run(Merge { tile, part });
        }
        tile.finish();
        let start = head_at(problem, &item, 0);
        out[start..start + tile.group_len()].copy_from_slice(tile.output(0));
        at += count;
    }
}

#[cfg(test)]
mod tests;
