//! F32, F16 and BF16 weights with activations in f32: sixteen rows at a time, column by column.

use pomona_device::Pool;

use super::jobs::{ABREAST, FEW};
use super::packed::{GROUP, PAIR_BYTES};
use super::{Inputs, Shared, Slab, spread};
use crate::Format;
use crate::isa::{Kernel, Tier, fetch};

/// Tiles below which filling them is not worth a join.
const JOIN_TILES: usize = 2;
/// Columns that are brought side by side at a time.
const COLUMNS: usize = 64;

/// How far ahead of a few tokens' products weights are fetched, in bytes.
const AHEAD: usize = 1024;

/// Memory for activations side by side, kept from call to call: `[tiles, cols, width]` for each
/// job.
#[derive(Default)]
pub(crate) struct Memory(Vec<f32>);

/// A job's activations, up to sixteen tokens side by side: what a column's products need lies
/// together, however long a row is.
#[derive(Clone, Copy)]
pub(super) struct Tiles<'a> {
    values: &'a [f32],
    width: usize,
}

impl Memory {
    /// Brings the tokens of each job side by side, their numbers as `put` puts them.
    pub(super) fn fill(
        &mut self,
        pool: &Pool,
        inputs: &Inputs<'_>,
        put: impl Fn(f32) -> f32 + Sync,
    ) -> Vec<Tiles<'_>> {
        let cols = inputs.cols;
        self.0.resize(self.0.len().max(inputs.lanes * cols), 0.0);
        let values = Shared(self.0.as_mut_ptr());
        spread(pool, JOIN_TILES, inputs.jobs.iter().map(|input| input.tiles()), &|job, tiles| {
            let input = &inputs.jobs[job];
            let width = input.width();
            for tile in tiles {
                let first = (input.first_lane + tile * width) * cols;
                // SAFETY: each worker has its own tiles, within the vector just sized.
                let values =
                    unsafe { std::slice::from_raw_parts_mut(values.at(first), cols * width) };
                // A few columns at a time: their places stay in the first cache.
                for (at, values) in values.chunks_mut(COLUMNS * width).enumerate() {
                    for token in tile * width..input.tokens.min((tile + 1) * width) {
                        let places = values[token % width..].iter_mut().step_by(width);
                        let row = &inputs.row(job, token)[at * COLUMNS..];
                        places.zip(row).for_each(|(place, value)| *place = put(*value));
                    }
                }
            }
        });
        let of = |job: &super::Input<'_>| Tiles {
            values: &self.0[job.first_lane * cols..],
            width: job.width(),
        };
        inputs.jobs.iter().map(of).collect()
    }
}

/// A worker's groups of rows.
pub(super) struct Dense<'a> {
    pub(super) slab: &'a Slab<'a>,
    pub(super) x: Tiles<'a>,
}

impl Kernel for Dense<'_> {
    #[inline(always)]
    fn run<T: Tier>(self, t: T) {
        match self.slab.format {
            Format::F32 => self.all::<T, F32>(t),
            Format::F16 => self.all::<T, F16>(t),
            _ => self.all::<T, BF16>(t),
        }
    }
}

/// A dense format.
trait Number {
    /// Columns that lie together.
    const COLUMNS: usize;
    /// Bytes of sixteen rows of them.
    const BYTES: usize;
    /// One of these columns in f32.
    fn wide<T: Tier>(t: T, bytes: &[u8], column: usize) -> T::F;
}

struct F32;
impl Number for F32 {
    const COLUMNS: usize = 1;
    const BYTES: usize = 4 * GROUP;
    #[inline(always)]
    fn wide<T: Tier>(t: T, bytes: &[u8], _: usize) -> T::F {
        let mut numbers = [0.0; GROUP];
        for (number, word) in numbers.iter_mut().zip(bytes.as_chunks::<4>().0) {
            *number = f32::from_le_bytes(*word);
        }
        t.load(&numbers)
    }
}

struct F16;
impl Number for F16 {
    const COLUMNS: usize = 1;
    const BYTES: usize = 2 * GROUP;
    #[inline(always)]
    fn wide<T: Tier>(t: T, bytes: &[u8], _: usize) -> T::F {
        let mut halves = [0; GROUP];
        for (half, word) in halves.iter_mut().zip(bytes.as_chunks::<2>().0) {
            *half = u16::from_le_bytes(*word);
        }
        t.halves(&halves)
    }
}

struct BF16;
impl Number for BF16 {
    const COLUMNS: usize = 2;
    const BYTES: usize = PAIR_BYTES;
    #[inline(always)]
    fn wide<T: Tier>(t: T, bytes: &[u8], column: usize) -> T::F {
        let mut pairs = [0; GROUP];
        for (pair, word) in pairs.iter_mut().zip(bytes.as_chunks::<4>().0) {
            *pair = u32::from_le_bytes(*word);
        }
        if column == 0 { t.lower_bfloats(&pairs) } else { t.upper_bfloats(&pairs) }
    }
}

impl Dense<'_> {
    #[inline(always)]
    fn all<T: Tier, N: Number>(&self, t: T) {
        let slab = self.slab;
        let mut group = slab.groups.start;
        while group < slab.groups.end {
            group += match slab.groups.end - group {
                // One token: chains of sums, one for each group, are what takes time.
                ABREAST.. if slab.all_tokens == 1 => {
                    self.products::<T, N, ABREAST, 1>(t, group, 0);
                    ABREAST
                }
                2.. if T::REGISTERS >= 32 => self.groups::<T, N, 2>(t, group),
                _ => self.groups::<T, N, 1>(t, group),
            };
        }
    }

    /// Computes `G` groups, and returns `G`.
    #[inline(always)]
    fn groups<T: Tier, N: Number, const G: usize>(&self, t: T, group: usize) -> usize {
        let tokens = self.slab.tokens.clone();
        let mut token = tokens.start;
        while token < tokens.end {
            let side = self.x.width - token % self.x.width;
            token += match side.min(tokens.end - token) {
                // The sums of eight would fill all registers there are where there are eight.
                8.. if T::REGISTERS > 8 => self.products::<T, N, G, 8>(t, group, token),
                4.. => self.products::<T, N, G, 4>(t, group, token),
                2.. => self.products::<T, N, G, 2>(t, group, token),
                _ => self.products::<T, N, G, 1>(t, group, token),
            };
        }
        G
    }

    /// `G` groups with `K` tokens side by side; the same operations for all of either. Returns `K`.
    #[inline(always)]
    fn products<T: Tier, N: Number, const G: usize, const K: usize>(
        &self,
        t: T,
        group: usize,
        token: usize,
    ) -> usize {
        let (cols, width) = (self.slab.cols, self.x.width);
        let weights: [&[u8]; G] = std::array::from_fn(|g| self.slab.group(group + g));
        let tile = &self.x.values[token / width * cols * width..][..cols * width];
        let mut sums = [[t.splat(0.0); G]; K];
        for (together, x) in tile.chunks(width * N::COLUMNS).enumerate() {
            let at = together * N::BYTES;
            if self.slab.all_tokens <= FEW {
                // Past the end: the groups after these.
                let ahead = at + AHEAD;
                let away = if ahead < weights[0].len() { 0 } else { (G - 1) * weights[0].len() };
                for weights in weights {
                    fetch(weights.as_ptr().wrapping_add(ahead + away));
                }
            }
            // The last column first, as instructions that take pairs do.
            for (column, x) in x.chunks_exact(width).enumerate().rev() {
                let x: &[f32; K] = x[token % width..].first_chunk().expect("tokens side by side");
                // Not by a closure: one that is no part of this function lacks the tier's features.
                let mut wide = [t.splat(0.0); G];
                for (wide, weights) in wide.iter_mut().zip(weights) {
                    // SAFETY: a group has as many bytes for columns that lie together.
                    let bytes = unsafe { weights.get_unchecked(at..at + N::BYTES) };
                    *wide = N::wide(t, bytes, column);
                }
                for k in 0..K {
                    let x = t.splat(x[k]);
                    for g in 0..G {
                        sums[k][g] = t.mul_add(wide[g], x, sums[k][g]);
                    }
                }
            }
        }
        for (k, sums) in sums.into_iter().enumerate() {
            for (g, sums) in sums.into_iter().enumerate() {
                let mut values = [0.0; GROUP];
                t.store(sums, &mut values);
                // SAFETY: the slab's own groups, and tokens within the output's.
                unsafe { self.slab.sink.store(token + k, group + g, &values) };
            }
        }
        K
    }
}
