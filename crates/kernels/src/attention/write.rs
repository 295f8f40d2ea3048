//! How keys and values of new positions come into a cache.

use half::{bf16, f16};

use super::BLOCK;
use super::integers::{MIDDLE, SCALE_BYTES, key_at, quantised_bytes, value_at};
use crate::NO_SLOT;
use crate::isa::{Kernel, Tier};
use crate::lanes::{LANES, ROUND};
use crate::linear::{Shared, scale_of};

/// One head's keys or values of a block: see [`Cache`](super::Cache).
pub(super) enum BlockMut<'a> {
    F32(&'a mut [f32]),
    F16(&'a mut [u16]),
    BF16(&'a mut [u16]),
    I8(&'a mut [u8]),
}

impl BlockMut<'_> {
    /// Stores the head's key at a position of the block.
    #[inline(always)]
    pub(super) fn key<T: Tier>(self, t: T, row: &[f32], position: usize) {
        let integers = (MIDDLE, |i| key_at(position, i));
        self.store(t, row, position, (position, BLOCK), integers);
    }

    /// Stores its value.
    #[inline(always)]
    pub(super) fn value<T: Tier>(self, t: T, row: &[f32], position: usize) {
        let integers = (0, |i| value_at(position, i, row.len()));
        self.store(t, row, position, (position * row.len(), 1), integers);
    }

    /// Stores a row, whose numbers are `stride` apart in the block, from `start` on; integers are
    /// moved by so much, and each has its place.
    #[inline(always)]
    fn store<T: Tier>(
        self,
        t: T,
        row: &[f32],
        position: usize,
        (start, stride): (usize, usize),
        integers: (u8, impl Fn(usize) -> usize),
    ) {
        match self {
            BlockMut::F32(x) => {
                x[start..].iter_mut().step_by(stride).zip(row).for_each(|(to, v)| *to = *v);
            }
            BlockMut::F16(x) => {
                let (vectors, rest) = row.as_chunks();
                for (i, vector) in vectors.iter().enumerate() {
                    let mut halves = [0; LANES];
                    t.store_halves(t.load(vector), &mut halves);
                    let places = &mut x[start + i * LANES * stride..];
                    match stride {
                        1 => places[..LANES].copy_from_slice(&halves),
                        _ => {
                            let places = places.iter_mut().step_by(stride);
                            places.zip(halves).for_each(|(to, half)| *to = half);
                        }
                    }
                }
                let places = x[start..].iter_mut().step_by(stride).skip(vectors.len() * LANES);
                places.zip(rest).for_each(|(to, v)| *to = f16::from_f32(*v).to_bits());
            }
            BlockMut::BF16(x) => {
                let places = x[start..].iter_mut().step_by(stride);
                places.zip(row).for_each(|(to, v)| *to = bf16::from_f32(*v).to_bits());
            }
            BlockMut::I8(x) => quantise(t, x, row, position, integers),
        }
    }
}

/// Stores a row's integers, moved by so much, in their places, and its scale behind them.
#[inline(always)]
fn quantise<T: Tier>(
    t: T,
    block: &mut [u8],
    row: &[f32],
    position: usize,
    (moved, place): (u8, impl Fn(usize) -> usize),
) {
    let (integers, scales) = block.split_at_mut(block.len() - BLOCK * SCALE_BYTES);
    let (vectors, rest) = row.as_chunks();
    let most = rest.iter().fold(t.largest_magnitude(vectors).to_bits(), |most, v| {
        // Without the sign, numbers are ordered as their bits are; what is not finite comes last,
        // and must not be hidden: the scale says so.
        most.max(v.abs().to_bits())
    });
    let (scale, inverse) = scale_of(f32::from_bits(most), 127.0);
    for (i, v) in row.iter().enumerate() {
        let integer = ((v * inverse + ROUND) - ROUND) as i8 as u8;
        integers[place(i)] = integer.wrapping_add(moved);
    }
    scales.as_chunks_mut::<SCALE_BYTES>().0[position] = scale.to_le_bytes();
}

/// A layer's keys or values, of which workers write different blocks.
#[derive(Clone, Copy)]
pub(crate) enum CacheMut {
    F32(Shared<f32>),
    F16(Shared<u16>),
    BF16(Shared<u16>),
    I8(Shared<u8>),
}

impl CacheMut {
    /// One head's block: the `at`th of all heads and blocks.
    ///
    /// # Safety
    /// The cache has it, and nobody else uses it for as long.
    #[inline(always)]
    unsafe fn block<'a>(self, at: usize, head_dim: usize) -> BlockMut<'a> {
        let len = BLOCK * head_dim;
        let bytes = BLOCK * quantised_bytes(head_dim);
        // SAFETY: by contract.
        unsafe {
            use std::slice::from_raw_parts_mut;
            match self {
                CacheMut::F32(x) => BlockMut::F32(from_raw_parts_mut(x.at(at * len), len)),
                CacheMut::F16(x) => BlockMut::F16(from_raw_parts_mut(x.at(at * len), len)),
                CacheMut::BF16(x) => BlockMut::BF16(from_raw_parts_mut(x.at(at * len), len)),
                CacheMut::I8(x) => BlockMut::I8(from_raw_parts_mut(x.at(at * bytes), bytes)),
            }
        }
    }
}

/// One worker's part of what is to be written: whole blocks, so that no two write the same.
pub(crate) struct KvWrite<'a> {
    /// `[tokens, heads, head_dim]`.
    pub(crate) k: &'a [f32],
    pub(crate) v: &'a [f32],
    /// Where each token goes, if anywhere.
    pub(crate) slots: &'a [u32],
    pub(crate) heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) keys: CacheMut,
    pub(crate) values: CacheMut,
    /// Which of how many workers.
    pub(crate) worker: usize,
    pub(crate) workers: usize,
}

impl Kernel for KvWrite<'_> {
    #[inline(always)]
    fn run<T: Tier>(self, t: T) {
        let KvWrite { heads, head_dim, worker, workers, .. } = self;
        let width = heads * head_dim;
        for (token, slot) in self.slots.iter().enumerate() {
            let (block, position) = (*slot as usize / BLOCK, *slot as usize % BLOCK);
            if *slot == NO_SLOT || block % workers != worker {
                continue;
            }
            for head in 0..heads {
                let row = token * width + head * head_dim..token * width + (head + 1) * head_dim;
                // SAFETY: the caches have the slots' blocks; this worker alone writes this one, and
                // keys and values are apart.
                unsafe {
                    let at = block * heads + head;
                    self.keys.block(at, head_dim).key(t, &self.k[row.clone()], position);
                    self.values.block(at, head_dim).value(t, &self.v[row], position);
                }
            }
        }
    }
}
