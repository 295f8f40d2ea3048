//! F32, F16 and BF16 weights with f32 activations: sixteen rows at a time, column by column.

use super::Slab;
use super::packed::GROUP;
use crate::Format;
use crate::isa::Kernel;
use crate::lanes::widen_half;

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
    fn run(self) {
        match self.slab.format {
            Format::F32 => self.groups::<4>(f32::from_le_bytes),
            Format::F16 => self.groups::<2>(|bytes| widen_half(u16::from_le_bytes(bytes))),
            _ => {
                self.groups::<2>(|bytes| f32::from_bits(u32::from(u16::from_le_bytes(bytes)) << 16))
            }
        }
    }
}

impl Dense<'_> {
    #[inline(always)]
    fn groups<const SIZE: usize>(&self, widen: impl Fn([u8; SIZE]) -> f32 + Copy) {
        let (slab, cols) = (self.slab, self.slab.cols);
        for tokens in slab.token_blocks(cols * size_of::<f32>()) {
            for group in slab.groups.clone() {
                let weights =
                    &slab.group(group).as_chunks::<SIZE>().0.as_chunks::<GROUP>().0[..cols];
                let mut token = tokens.start;
                while token < tokens.end {
                    let x = &self.x[token * cols..];
                    token += match tokens.end - token {
                        TOKENS.. => {
                            self.store(group, token, products::<TOKENS, _>(weights, x, widen))
                        }
                        4.. => self.store(group, token, products::<4, _>(weights, x, widen)),
                        2.. => self.store(group, token, products::<2, _>(weights, x, widen)),
                        _ => self.store(group, token, products::<1, _>(weights, x, widen)),
                    };
                }
            }
        }
    }

    #[inline(always)]
    fn store<const T: usize>(&self, group: usize, token: usize, sums: [[f32; GROUP]; T]) -> usize {
        for (t, sums) in sums.iter().enumerate() {
            // SAFETY: the slab's own groups, and tokens within the output's.
            unsafe { self.slab.sink.store(token + t, group, sums) };
        }
        T
    }
}

/// Sixteen rows with `T` consecutive tokens; the same operations for every `T`.
#[inline(always)]
fn products<const T: usize, B: Copy>(
    weights: &[[B; GROUP]],
    x: &[f32],
    widen: impl Fn(B) -> f32,
) -> [[f32; GROUP]; T] {
    let cols = weights.len();
    let x: [&[f32]; T] = std::array::from_fn(|t| &x[t * cols..][..cols]);
    let mut sums = [[0.0f32; GROUP]; T];
    for (col, bytes) in weights.iter().enumerate() {
        let mut wide = [0.0; GROUP];
        for lane in 0..GROUP {
            wide[lane] = widen(bytes[lane]);
        }
        for t in 0..T {
            for lane in 0..GROUP {
                sums[t][lane] = wide[lane].mul_add(x[t][col], sums[t][lane]);
            }
        }
    }
    sums
}
