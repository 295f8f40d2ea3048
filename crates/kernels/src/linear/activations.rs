//! Activations as integers: blocks of 32 with a scale, in one or two 8-bit terms.

use std::ops::Range;

use pomona_device::{Pool, split};

use super::packed::BLOCK;
use crate::isa::{Kernel, Tier};
use crate::{Isa, linear};

/// Tokens below which quantising is not worth a join.
const JOIN_TOKENS: usize = 8;
/// Blocks whose largest number is smaller count as zero: their scale would not be a normal number.
const SMALLEST: f32 = 1e-30;

/// 8-bit terms per activation. Two terms carry 16 bits: the error of an activation falls from
/// 1/254 to 1/65,024 of its block's largest, for twice the integer products, which decoding hides
/// behind memory.
pub(crate) const TERMS: usize = 2;

/// Quantised activations of a batch; memory is kept from call to call.
#[derive(Default)]
pub(crate) struct Activations {
    blocks: usize,
    /// `[tokens, blocks, TERMS, 32]`: `256 * term 0 + term 1`, or one term.
    terms: Vec<i8>,
    /// `[tokens, blocks]`.
    factors: Vec<Factors>,
}

/// What the integers of a block are multiplied by.
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub(super) struct Factors {
    pub(super) scale: f32,
    /// Sums of the activations, as quantised: each half of the block, and all of it.
    pub(super) halves: [f32; 2],
    pub(super) sum: f32,
}

/// One token's quantised activations.
#[derive(Clone, Copy)]
pub(super) struct Token<'a> {
    pub(super) terms: &'a [[[i8; BLOCK]; TERMS]],
    pub(super) factors: &'a [Factors],
}

impl Activations {
    /// Bytes that a block of one token takes.
    pub(super) const BLOCK_BYTES: usize = TERMS * BLOCK + size_of::<Factors>();

    /// Quantises `x: [tokens, cols]`, `cols` a whole number of blocks.
    pub(super) fn quantise(&mut self, pool: &Pool, isa: Isa, x: &[f32], cols: usize) {
        let (tokens, blocks) = (x.len() / cols, cols / BLOCK);
        self.blocks = blocks;
        self.terms.resize(tokens * blocks * TERMS * BLOCK, 0);
        self.factors.resize(tokens * blocks, Factors::default());
        let terms = linear::Shared(self.terms.as_mut_ptr());
        let factors = linear::Shared(self.factors.as_mut_ptr());
        let run = |range: Range<usize>| {
            let (at, count) = (range.start * blocks, range.len() * blocks);
            // SAFETY: each worker has its own tokens, within the vectors just sized, which are not
            // touched otherwise until the join ends.
            let (terms, factors) = unsafe {
                (
                    std::slice::from_raw_parts_mut(
                        terms.at(at * TERMS * BLOCK),
                        count * TERMS * BLOCK,
                    ),
                    std::slice::from_raw_parts_mut(factors.at(at), count),
                )
            };
            isa.run(Quantise { x: &x[range.start * cols..range.end * cols], terms, factors });
        };
        if tokens < JOIN_TOKENS {
            run(0..tokens);
        } else {
            pool.run(&|worker| run(split(tokens, 1, pool.threads(), worker)));
        }
    }

    #[inline(always)]
    pub(super) fn token(&self, token: usize) -> Token<'_> {
        let at = token * self.blocks;
        let terms = &self.terms[at * TERMS * BLOCK..][..self.blocks * TERMS * BLOCK];
        Token {
            terms: terms.as_chunks::<BLOCK>().0.as_chunks::<TERMS>().0,
            factors: &self.factors[at..][..self.blocks],
        }
    }
}

/// Quantises whole tokens.
struct Quantise<'a> {
    x: &'a [f32],
    terms: &'a mut [i8],
    factors: &'a mut [Factors],
}

impl Kernel for Quantise<'_> {
    #[inline(always)]
    fn run<T: Tier>(self, _: T) {
        let blocks = self.x.as_chunks::<BLOCK>().0;
        let terms = self.terms.as_chunks_mut::<BLOCK>().0.as_chunks_mut::<TERMS>().0;
        for ((x, terms), factors) in blocks.iter().zip(terms).zip(self.factors) {
            *factors = quantise(x, terms);
        }
    }
}

/// Quantises a block. A number that is not finite makes the block's scale NaN, and with it every
/// product.
#[inline(always)]
fn quantise(x: &[f32; BLOCK], terms: &mut [[i8; BLOCK]; TERMS]) -> Factors {
    // One term spans +-127, two span +-127 * 256.
    const SPAN: f32 = if TERMS == 1 { 127.0 } else { 127.0 * 256.0 };
    /// 1.5 * 2^23: adding it rounds to a whole number, which then stands in the lowest bits.
    const ROUND: f32 = 12_582_912.0;
    // Without the sign, numbers are ordered as their bits are; NaN comes last.
    let largest = x.iter().fold(0, |most, v| u32::max(most, v.abs().to_bits()));
    let largest = f32::from_bits(largest);
    if !(SMALLEST..=f32::MAX).contains(&largest) {
        *terms = [[0; BLOCK]; TERMS];
        let value = if largest < SMALLEST { 0.0 } else { f32::NAN };
        return Factors { scale: value, halves: [value; 2], sum: value };
    }
    let (scale, inverse) = (largest / SPAN, SPAN / largest);
    let mut q = [0i32; BLOCK];
    for (q, v) in q.iter_mut().zip(x) {
        *q = (v * inverse + ROUND).to_bits().wrapping_sub(ROUND.to_bits()) as i32;
    }
    for i in 0..BLOCK {
        if TERMS == 1 {
            terms[0][i] = q[i] as i8;
        } else {
            let high = (q[i] + 128) >> 8;
            terms[0][i] = high as i8;
            terms[TERMS - 1][i] = (q[i] - (high << 8)) as i8;
        }
    }
    let (low, high) = q.split_at(BLOCK / 2);
    let sums = [low.iter().sum::<i32>(), high.iter().sum::<i32>()];
    let sum = (sums[0] + sums[1]) as f32 * scale;
    Factors { scale, halves: sums.map(|sum| sum as f32 * scale), sum }
}
