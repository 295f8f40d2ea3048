//! Activations as integers: blocks of 32 with a scale, in one or two 8-bit terms.

use pomona_device::{Pool, split};

use super::CHUNK;
use crate::isa::Kernel;
use crate::lanes::LANES;
use crate::{Isa, linear};

/// Activations that share a scale.
const BLOCK: usize = 32;
/// Tokens below which quantising is not worth a join.
const JOIN_TOKENS: usize = 8;

/// 8-bit terms per activation. Two terms carry 16 bits: the error of an activation falls from
/// 1/254 to 1/65,024 of its block's largest, for twice the integer products, which decoding hides
/// behind memory.
pub(crate) const TERMS: usize = 2;

/// Quantised activations of a batch; memory is kept from call to call.
#[derive(Default)]
pub(crate) struct Activations {
    chunks: usize,
    /// `[tokens, chunks, TERMS, 64]`: `256 * term 0 + term 1`, or one term.
    terms: Vec<i8>,
    /// `[tokens, chunks, 2, 16]`: for each lane of 4 activations, the scale, and the scale times
    /// the sum of the four.
    lanes: Vec<f32>,
}

/// One token's quantised activations.
#[derive(Clone, Copy)]
pub(super) struct Token<'a> {
    pub(super) terms: &'a [[[i8; CHUNK]; TERMS]],
    pub(super) lanes: &'a [[[f32; LANES]; 2]],
}

impl Activations {
    /// Quantises `x: [tokens, cols]`. Columns are padded with zeros to whole chunks.
    pub(super) fn quantise(&mut self, pool: &Pool, isa: Isa, x: &[f32], cols: usize) {
        let tokens = x.len() / cols;
        self.chunks = cols.div_ceil(CHUNK);
        self.terms.resize(tokens * self.chunks * TERMS * CHUNK, 0);
        self.lanes.resize(tokens * self.chunks * 2 * LANES, 0.0);
        let (chunks, grain) = (self.chunks, self.chunks * TERMS * CHUNK);
        let terms = linear::Shared(self.terms.as_mut_ptr());
        let lanes = linear::Shared(self.lanes.as_mut_ptr());
        let run = |range: std::ops::Range<usize>| {
            for token in range {
                // SAFETY: each token's pieces are handed out once, within the vectors just sized,
                // which are not touched otherwise until the join ends.
                let (terms, lanes) = unsafe {
                    (
                        std::slice::from_raw_parts_mut(terms.at(token * grain), grain),
                        std::slice::from_raw_parts_mut(
                            lanes.at(token * chunks * 2 * LANES),
                            chunks * 2 * LANES,
                        ),
                    )
                };
                isa.run(Quantise { x: &x[token * cols..][..cols], terms, lanes });
            }
        };
        if tokens < JOIN_TOKENS {
            run(0..tokens);
        } else {
            pool.run(&|worker| run(split(tokens, 1, pool.threads(), worker)));
        }
    }

    #[inline(always)]
    pub(super) fn token(&self, token: usize) -> Token<'_> {
        let terms = &self.terms[token * self.chunks * TERMS * CHUNK..];
        let lanes = &self.lanes[token * self.chunks * 2 * LANES..];
        Token {
            terms: &terms.as_chunks::<CHUNK>().0.as_chunks::<TERMS>().0[..self.chunks],
            lanes: &lanes.as_chunks::<LANES>().0.as_chunks::<2>().0[..self.chunks],
        }
    }
}

/// Quantises one token.
struct Quantise<'a> {
    x: &'a [f32],
    terms: &'a mut [i8],
    lanes: &'a mut [f32],
}

impl Kernel for Quantise<'_> {
    #[inline(always)]
    fn run(self) {
        let terms = self.terms.as_chunks_mut::<CHUNK>().0.as_chunks_mut::<TERMS>().0;
        let lanes = self.lanes.as_chunks_mut::<LANES>().0.as_chunks_mut::<2>().0;
        for ((x, terms), lanes) in self.x.chunks(CHUNK).zip(terms).zip(lanes) {
            *terms = [[0; CHUNK]; TERMS];
            *lanes = [[0.0; LANES]; 2];
            for (b, block) in x.chunks(BLOCK).enumerate() {
                let mut padded = [0.0; BLOCK];
                padded[..block.len()].copy_from_slice(block);
                quantise_block(&padded, b * BLOCK, terms, lanes);
            }
        }
    }
}

#[inline(always)]
fn quantise_block(
    x: &[f32; BLOCK],
    at: usize,
    terms: &mut [[i8; CHUNK]; TERMS],
    lanes: &mut [[f32; LANES]; 2],
) {
    // One term spans +-127, two span +-127 * 256.
    const SPAN: f32 = if TERMS == 1 { 127.0 } else { 127.0 * 256.0 };
    let largest = x.iter().fold(0.0f32, |m, v| if v.abs() > m { v.abs() } else { m });
    let scale = largest / SPAN;
    let inverse = if largest > 0.0 { SPAN / largest } else { 0.0 };
    let mut q = [0i32; BLOCK];
    for (q, v) in q.iter_mut().zip(x) {
        *q = (v * inverse).round_ties_even().clamp(-SPAN, SPAN) as i32;
    }
    for i in 0..BLOCK {
        if TERMS == 1 {
            terms[0][at + i] = q[i] as i8;
        } else {
            let high = (q[i] + 128) >> 8;
            terms[0][at + i] = high as i8;
            terms[TERMS - 1][at + i] = (q[i] - (high << 8)) as i8;
        }
    }
    for (i, four) in q.as_chunks::<4>().0.iter().enumerate() {
        let sum = four[0] + four[1] + four[2] + four[3];
        lanes[0][at / 4 + i] = scale;
        lanes[1][at / 4 + i] = sum as f32 * scale;
    }
}
