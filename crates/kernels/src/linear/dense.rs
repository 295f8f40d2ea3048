//! F32, F16 and BF16 weights with f32 activations: sixteen rows at a time, column by column.

use super::Slab;
use super::packed::GROUP;
use crate::Format;
use crate::isa::{Kernel, Tier};

/// Most tokens that share a pass over a group: their sums stay in registers.
const TOKENS: usize = 8;

pub(super) fn is_dense(format: Format) -> bool {
    matches!(format, Format::F32 | Format::F16 | Format::BF16)
}

/// A worker's groups of rows.
pub(super) struct Dense<'a> {
    pub(super) slab: &'a Slab<'a>,
    pub(super) x: &'a [f32],
}

impl Kernel for Dense<'_> {
    #[inline(always)]
    fn run<T: Tier>(self, t: T) {
        match self.slab.format {
            Format::F32 => self.groups::<T, F32>(t),
            Format::F16 => self.groups::<T, F16>(t),
            _ => self.groups::<T, BF16>(t),
        }
    }
}

/// A dense format.
trait Number {
    const BYTES: usize;
    /// Sixteen of them in f32.
    fn wide<T: Tier>(t: T, bytes: &[u8]) -> T::F;
}

struct F32;
impl Number for F32 {
    const BYTES: usize = 4;
    #[inline(always)]
    fn wide<T: Tier>(t: T, bytes: &[u8]) -> T::F {
        let words = bytes.as_chunks::<4>().0;
        t.load(&std::array::from_fn(|i| f32::from_le_bytes(words[i])))
    }
}

struct F16;
impl Number for F16 {
    const BYTES: usize = 2;
    #[inline(always)]
    fn wide<T: Tier>(t: T, bytes: &[u8]) -> T::F {
        let words = bytes.as_chunks::<2>().0;
        t.halves(&std::array::from_fn(|i| u16::from_le_bytes(words[i])))
    }
}

struct BF16;
impl Number for BF16 {
    const BYTES: usize = 2;
    #[inline(always)]
    fn wide<T: Tier>(t: T, bytes: &[u8]) -> T::F {
        let words = bytes.as_chunks::<2>().0;
        t.bfloats(&std::array::from_fn(|i| u16::from_le_bytes(words[i])))
    }
}

impl Dense<'_> {
    #[inline(always)]
    fn groups<T: Tier, N: Number>(&self, t: T) {
        let slab = self.slab;
        for tokens in slab.token_blocks(slab.cols * size_of::<f32>()) {
            for group in slab.groups.clone() {
                let mut token = tokens.start;
                while token < tokens.end {
                    token += match tokens.end - token {
                        TOKENS.. => self.products::<T, N, TOKENS>(t, group, token),
                        4.. => self.products::<T, N, 4>(t, group, token),
                        2.. => self.products::<T, N, 2>(t, group, token),
                        _ => self.products::<T, N, 1>(t, group, token),
                    };
                }
            }
        }
    }

    /// A group with `K` tokens from `token`; the same operations for every `K`, which it returns.
    #[inline(always)]
    fn products<T: Tier, N: Number, const K: usize>(
        &self,
        t: T,
        group: usize,
        token: usize,
    ) -> usize {
        let cols = self.slab.cols;
        let weights = &self.slab.group(group)[..cols * GROUP * N::BYTES];
        let x: [&[f32]; K] = std::array::from_fn(|k| &self.x[(token + k) * cols..][..cols]);
        let mut sums = [t.splat(0.0); K];
        for (col, bytes) in weights.chunks_exact(GROUP * N::BYTES).enumerate() {
            let wide = N::wide(t, bytes);
            for k in 0..K {
                // SAFETY: there are `cols` chunks, and each token has `cols` activations.
                let x = unsafe { *x[k].get_unchecked(col) };
                sums[k] = t.mul_add(wide, t.splat(x), sums[k]);
            }
        }
        for (k, sums) in sums.into_iter().enumerate() {
            let mut values = [0.0; GROUP];
            t.store(sums, &mut values);
            // SAFETY: the slab's own groups, and tokens within the output's.
            unsafe { self.slab.sink.store(token + k, group, &values) };
        }
        K
    }
}
