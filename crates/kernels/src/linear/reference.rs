//! The definition of the quantised product, in plain Rust; also what AVX2 is compiled from.

use std::ops::Range;

use super::Slab;
use super::activations::{ActivationBits, Activations, Form};
use super::packed::{self, BLOCK, GROUP, STEPS};
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
        let minima = packed::has_minima(slab.format);
        for group in slab.groups.clone() {
            panel.unpack(slab.format, 0, slab.group(group));
            for token in slab.tokens.clone() {
                let values = products(panel, minima, activations, token);
                // SAFETY: the slab's own groups, and tokens within the output's.
                unsafe { slab.sink.store(token, group, &values) };
            }
        }
    }
}

/// Sixteen rows with one token.
///
/// Sums of integers are exact. Those of a block's parts are scaled by the activations' number and
/// added to the result times the weights' number, by a fused multiply-add; minima, where the format
/// has any, are added by another, times the sum of the block's activations.
#[inline(always)]
fn products(
    panel: &Panel,
    minima: bool,
    activations: &Activations<'_>,
    token: usize,
) -> [f32; GROUP] {
    let mut sums = [0.0f32; GROUP];
    for b in 0..panel.blocks {
        let x = block(activations, token, b);
        let scaled = activations.scaled(token, b)[0];
        for part in 0..panel.parts {
            let steps = part * STEPS / panel.parts..(part + 1) * STEPS / panel.parts;
            let integers = integers(panel, b, &x, steps);
            let at = panel.part(0, b, part);
            let (d, m) = (&panel.d[at].0, &panel.m[at].0);
            for lane in 0..GROUP {
                let value = integers[lane] as f32 * scaled.scale;
                sums[lane] = value.mul_add(d[lane], sums[lane]);
                if minima {
                    sums[lane] = m[lane].mul_add(scaled.sum, sums[lane]);
                }
            }
        }
    }
    sums
}

/// A block's activations, with their signs.
#[inline(always)]
fn block(activations: &Activations<'_>, token: usize, block: usize) -> [i32; BLOCK] {
    let terms = activations.terms(token, block);
    let unsigned = |term: usize, i: usize| i32::from(terms[term].0[i]);
    let signed = |term: usize, i: usize| i32::from(terms[term].0[i] as i8);
    std::array::from_fn(|i| match (activations.bits(), activations.form()) {
        (ActivationBits::Eight, Form::Signed) => signed(0, i),
        (ActivationBits::Eight, Form::Unsigned) => unsigned(0, i) - 128,
        (ActivationBits::Sixteen, Form::Signed) => 256 * signed(0, i) + signed(1, i),
        (ActivationBits::Sixteen, Form::Unsigned) => {
            256 * unsigned(0, i) + unsigned(1, i) - (128 << 8)
        }
    })
}

#[inline(always)]
fn integers(panel: &Panel, b: usize, x: &[i32; BLOCK], steps: Range<usize>) -> [i32; GROUP] {
    let mut integers = [0i32; GROUP];
    for step in steps {
        let (w, x) = (&panel.w[panel.steps(0, b) + step].0, &x.as_chunks::<4>().0[step]);
        for lane in 0..GROUP {
            for i in 0..4 {
                integers[lane] += i32::from(w[lane][i]) * x[i];
            }
        }
    }
    integers
}
