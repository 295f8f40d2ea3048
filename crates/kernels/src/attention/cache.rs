//! Keys and values as they lie in memory.

use half::{bf16, f16};
use pomona_device::DType;

use super::integers::quantised_bytes;
use crate::isa::Tier;
use crate::lanes::LANES;
use crate::linear::ActivationBits;

/// A layer's keys, and its values.
#[derive(Clone, Copy)]
pub(crate) enum Layer<'a> {
    Numbers([Cache<'a>; 2]),
    /// Blocks `[blocks, kv_heads, 16 * quantised_bytes(head_dim)]`, the scales of a block's 16
    /// positions behind its integers; and how exact the integers are that they meet.
    Integers([&'a [u8]; 2], ActivationBits),
}

/// A layer's keys or values as they lie in memory: `[blocks, kv_heads, 16 * head_dim]`.
#[derive(Clone, Copy)]
pub(crate) enum Cache<'a> {
    F32(&'a [f32]),
    F16(&'a [u16]),
    BF16(&'a [u16]),
}

/// Bytes of a head's key or value of one position in a cache of this type: what the last axis of
/// its views amounts to. `I8` has a scale beside the integers.
pub fn kv_row_bytes(dtype: DType, head_dim: usize) -> usize {
    match dtype {
        DType::I8 => quantised_bytes(head_dim),
        other => head_dim * other.bytes(),
    }
}

impl Cache<'_> {
    /// Widens a block's values: rows of `d` numbers, padded to whole vectors.
    #[inline(always)]
    pub(super) fn values<T: Tier>(&self, t: T, row: usize, d: usize, out: &mut [[f32; LANES]]) {
        if d.is_multiple_of(LANES) {
            return self.widen(t, row * d, out.iter_mut());
        }
        for (i, out) in out.chunks_exact_mut(d.div_ceil(LANES)).enumerate() {
            self.widen(t, (row + i) * d, out[..d / LANES].iter_mut());
            let rest = &mut out.as_flattened_mut()[d / LANES * LANES..d];
            rest.iter_mut()
                .zip((row + i) * d + d / LANES * LANES..)
                .for_each(|(out, at)| *out = self.number(at));
        }
    }

    /// Widens numbers from number `at` on.
    #[inline(always)]
    pub(super) fn widen<'o, T: Tier>(
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
        }
    }

    /// One number.
    fn number(&self, at: usize) -> f32 {
        match self {
            Cache::F32(x) => x[at],
            Cache::F16(x) => f16::from_bits(x[at]).to_f32(),
            Cache::BF16(x) => bf16::from_bits(x[at]).to_f32(),
        }
    }
}
