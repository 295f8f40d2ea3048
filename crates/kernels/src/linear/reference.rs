//! The definition of the quantised product, in plain Rust; also what AVX2 is compiled from.

use std::ops::Range;

use super::Slab;
use super::activations::{Activations, Terms, Token};
use super::packed::{BLOCK, GROUP, STEPS};
use super::panel::Panel;
use crate::isa::{Kernel, Tier};

/// A worker's groups of rows, one after the other.
pub(super) struct Quantised<'a> {
    pub(super) slab: &'a Slab<'a>,
    pub(super) activations: &'a Activations<'a>,
    pub(super) panel: &'a mut Panel,
}

impl Kernel for Quantised<'_> {
    #[inline(always)]
    fn run<T: Tier>(self, _: T) {
        let Quantised { slab, activations, panel } = self;
        panel.size(slab.format, slab.cols);
        for tokens in slab.token_blocks(slab.cols / BLOCK * Activations::BLOCK_BYTES) {
            for group in slab.groups.clone() {
                panel.unpack(slab.format, 0, slab.group(group));
                for token in tokens.clone() {
                    let values = products(panel, activations.token(token));
                    // SAFETY: the slab's own groups, and tokens within the output's.
                    unsafe { slab.sink.store(token, group, &values) };
                }
            }
        }
    }
}

/// Sixteen rows with one token.
///
/// Sums of integers are exact. Those of a block's parts are scaled by the activations' number and
/// added to the result by the weights' numbers, with a fused multiply-add each.
#[inline(always)]
fn products(panel: &Panel, token: Token<'_>) -> [f32; GROUP] {
    let mut sums = [0.0f32; GROUP];
    for b in 0..panel.blocks {
        let (terms, scaled) = (&token.terms[b * token.width], &token.scaled[b * token.width]);
        for part in 0..panel.parts {
            let steps = part * STEPS / panel.parts..(part + 1) * STEPS / panel.parts;
            let integers = integers(panel, b, terms, steps);
            let sum = if panel.parts == 1 { scaled.all } else { scaled.halves[part] };
            let at = b * panel.parts + part;
            let (d, m) = (&panel.d[at].0, &panel.m[at].0);
            for lane in 0..GROUP {
                let value = integers[lane] as f32 * scaled.scale;
                sums[lane] = value.mul_add(d[lane], sums[lane]);
                sums[lane] = m[lane].mul_add(sum, sums[lane]);
            }
        }
    }
    sums
}

#[inline(always)]
fn integers(panel: &Panel, b: usize, terms: &Terms, steps: Range<usize>) -> [i32; GROUP] {
    let mut integers = [0i32; GROUP];
    for term in [&terms.high, &terms.low] {
        for integer in &mut integers {
            *integer <<= 8;
        }
        for step in steps.clone() {
            let (w, x) = (&panel.w[b * STEPS + step].0, &term.as_chunks::<4>().0[step]);
            for lane in 0..GROUP {
                for i in 0..4 {
                    integers[lane] += i32::from(w[lane][i]) * i32::from(x[i]);
                }
            }
        }
    }
    integers
}
