//! The definition of the quantised product, in plain Rust; also what AVX2 is compiled from.

use std::ops::Range;

use super::activations::{TERMS, Token};
use super::packed::{BLOCK, Block, GROUP, STEPS};
use super::{Activations, Slab};
use crate::Format;
use crate::isa::{Kernel, Tier};

/// A worker's groups of rows, one after the other.
pub(super) struct Quantised<'a> {
    pub(super) slab: &'a Slab<'a>,
    pub(super) activations: &'a Activations,
}

impl Kernel for Quantised<'_> {
    #[inline(always)]
    fn run<T: Tier>(self, _: T) {
        let slab = self.slab;
        for tokens in slab.token_blocks(slab.cols / BLOCK * Activations::BLOCK_BYTES) {
            for group in slab.groups.clone() {
                self.group(group, tokens.clone());
            }
        }
    }
}

impl Quantised<'_> {
    #[inline(always)]
    fn group(&self, group: usize, tokens: Range<usize>) {
        let slab = self.slab;
        let bytes = slab.group(group);
        let block = |b| Block::of(slab.format, bytes, slab.cols, b);
        let panel: Vec<Block> = (0..slab.cols / BLOCK).map(block).collect();
        for token in tokens {
            let input = self.activations.token(token);
            let values = match slab.format {
                Format::Q6_K => products::<2>(&panel, input),
                _ => products::<1>(&panel, input),
            };
            // SAFETY: the slab's own groups, and tokens within the output's.
            unsafe { slab.sink.store(token, group, &values) };
        }
    }
}

/// Sixteen rows with one token. Scales are those of `1 / PARTS` of a block.
#[inline(always)]
fn products<const PARTS: usize>(panel: &[Block], token: Token<'_>) -> [f32; GROUP] {
    let mut sums = [0.0f32; GROUP];
    for ((block, terms), factors) in panel.iter().zip(token.terms).zip(token.factors) {
        for part in 0..PARTS {
            let steps = part * STEPS / PARTS..(part + 1) * STEPS / PARTS;
            let integers = integers(block, terms, steps);
            let sum = if PARTS == 1 { factors.sum } else { factors.halves[part] };
            for lane in 0..GROUP {
                let factor = block.d[part][lane] * factors.scale;
                sums[lane] = (integers[lane] as f32).mul_add(factor, sums[lane]);
                sums[lane] = block.m[part][lane].mul_add(sum, sums[lane]);
            }
        }
    }
    sums
}

#[inline(always)]
fn integers(block: &Block, terms: &[[i8; BLOCK]; TERMS], steps: Range<usize>) -> [i32; GROUP] {
    let mut integers = [0i32; GROUP];
    for (t, term) in terms.iter().enumerate() {
        let mut sums = [0i32; GROUP];
        for step in steps.clone() {
            let x = &term.as_chunks::<4>().0[step];
            for lane in 0..GROUP {
                let w = &block.w[step][lane];
                for i in 0..4 {
                    sums[lane] += i32::from(w[i]) * i32::from(x[i]);
                }
            }
        }
        let shift = if t + 1 < TERMS { 8 } else { 0 };
        for lane in 0..GROUP {
            integers[lane] += sums[lane] << shift;
        }
    }
    integers
}
