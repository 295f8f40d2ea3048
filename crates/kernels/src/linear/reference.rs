//! The definition of the quantised product, in plain Rust; also what AVX2 is compiled from.

use super::activations::{TERMS, Token};
use super::chunk::{Chunk, decode};
use super::{Activations, CHUNK, Slab};
use crate::isa::Kernel;
use crate::lanes::{LANES, sum};

/// A worker's rows, one after the other.
pub(super) struct Quantised<'a> {
    pub(super) slab: &'a Slab<'a>,
    pub(super) activations: &'a Activations,
}

impl Kernel for Quantised<'_> {
    #[inline(always)]
    fn run(self) {
        let slab = self.slab;
        let chunks = slab.cols.div_ceil(CHUNK);
        let mut panel = vec![Chunk::ZERO; chunks];
        for row in slab.rows.clone() {
            let bytes = &slab.weight[row * slab.row_bytes..][..slab.row_bytes];
            for (index, chunk) in panel.iter_mut().enumerate() {
                *chunk = decode(slab.format, bytes, index);
            }
            for token in 0..slab.tokens {
                let value = dot(&panel, self.activations.token(token));
                // SAFETY: the slab's own rows, and tokens within the output's.
                unsafe { slab.sink.store(token, row, value) };
            }
        }
    }
}

#[inline(always)]
fn dot(panel: &[Chunk], token: Token<'_>) -> f32 {
    let mut products = [0.0f32; LANES];
    let mut minima = [0.0f32; LANES];
    for ((chunk, terms), lanes) in panel.iter().zip(token.terms).zip(token.lanes) {
        let mut integers = [0i32; LANES];
        for (t, term) in terms.iter().enumerate() {
            let shift = if t + 1 < TERMS { 8 } else { 0 };
            for lane in 0..LANES {
                let mut four = 0i32;
                for i in lane * 4..lane * 4 + 4 {
                    four += i32::from(chunk.w[i]) * i32::from(term[i]);
                }
                integers[lane] += four << shift;
            }
        }
        for lane in 0..LANES {
            let factor = chunk.d[lane] * lanes[0][lane];
            products[lane] = (integers[lane] as f32).mul_add(factor, products[lane]);
            minima[lane] = chunk.m[lane].mul_add(lanes[1][lane], minima[lane]);
        }
    }
    for lane in 0..LANES {
        products[lane] += minima[lane];
    }
    sum(products)
}
