//! Keys and values as they lie in memory.

use half::{bf16, f16};
use pomona_device::DType;

use super::BLOCK;
use crate::isa::Tier;
use crate::lanes::LANES;

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
pub(super) const SCALE_BYTES: usize = size_of::<f32>();

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
    /// Widens a block's keys into rows for each of the head's numbers; `row` is the number of the
    /// block's first position.
    #[inline(always)]
    pub(super) fn keys<'o, T: Tier>(
        &self,
        t: T,
        row: usize,
        out: impl ExactSizeIterator<Item = &'o mut [f32; LANES]>,
    ) {
        let d = out.len();
        let Cache::I8(bytes) = self else { return self.widen(t, row * d, out) };
        let (integers, scales) = block_of(bytes, row, d);
        let scales = t.load(&scales);
        for (out, integers) in out.zip(integers.as_chunks().0) {
            t.store(t.mul(t.bytes(integers), scales), out);
        }
    }

    /// Widens a block's values: rows of `d` numbers, padded to whole vectors.
    #[inline(always)]
    pub(super) fn values<T: Tier>(&self, t: T, row: usize, d: usize, out: &mut [[f32; LANES]]) {
        if d.is_multiple_of(LANES) && !matches!(self, Cache::I8(_)) {
            return self.widen(t, row * d, out.iter_mut());
        }
        for (i, out) in out.chunks_exact_mut(d.div_ceil(LANES)).enumerate() {
            let Cache::I8(bytes) = self else {
                self.widen(t, (row + i) * d, out[..d / LANES].iter_mut());
                let rest = &mut out.as_flattened_mut()[d / LANES * LANES..d];
                rest.iter_mut()
                    .zip((row + i) * d + d / LANES * LANES..)
                    .for_each(|(out, at)| *out = self.number(at));
                continue;
            };
            let (integers, scales) = block_of(bytes, row, d);
            let (integers, rest) = integers[i * d..][..d].as_chunks();
            let (outs, padded) = out.split_at_mut(d / LANES);
            for (out, integers) in outs.iter_mut().zip(integers) {
                t.store(t.mul(t.bytes(integers), t.splat(scales[i])), out);
            }
            for (out, integer) in padded.as_flattened_mut().iter_mut().zip(rest) {
                *out = f32::from(*integer as i8) * scales[i];
            }
        }
    }

    /// Widens numbers that need no scale, from number `at` on.
    #[inline(always)]
    fn widen<'o, T: Tier>(
        &self,
        t: T,
        at: usize,
        outs: impl Iterator<Item = &'o mut [f32; LANES]>,
    ) {
        match self {
            Cache::F32(x) => {
                for (out, x) in outs.zip(x[at..].as_chunks().0) {
                    *out = *x;
                }
            }
            Cache::F16(x) => {
                for (out, x) in outs.zip(x[at..].as_chunks().0) {
                    t.store(t.halves(x), out);
                }
            }
            Cache::BF16(x) => {
                for (out, x) in outs.zip(x[at..].as_chunks().0) {
                    t.store(t.bfloats(x), out);
                }
            }
            Cache::I8(_) => {}
        }
    }

    /// One number that needs no scale.
    fn number(&self, at: usize) -> f32 {
        match self {
            Cache::F32(x) => x[at],
            Cache::F16(x) => f16::from_bits(x[at]).to_f32(),
            Cache::BF16(x) => bf16::from_bits(x[at]).to_f32(),
            Cache::I8(_) => 0.0,
        }
    }
}

/// A quantised block's integers, and the scale of each position.
#[inline(always)]
pub(super) fn block_of(bytes: &[u8], row: usize, d: usize) -> (&[u8], [f32; BLOCK]) {
    let block = &bytes[row * quantised_bytes(d)..][..BLOCK * quantised_bytes(d)];
    let (integers, scales) = block.split_at(BLOCK * d);
    let scales = scales.as_chunks::<SCALE_BYTES>().0;
    (integers, std::array::from_fn(|i| f32::from_le_bytes(scales[i])))
}
