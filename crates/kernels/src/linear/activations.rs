//! Activations as integers, in blocks of 32 columns with a scale: 16 bits each, in two 8-bit terms,
//! or 8 bits each.

use std::ops::Range;

use pomona_device::{Pool, split};

use super::packed::BLOCK;
use crate::isa::{Kernel, Tier};
use crate::lanes::ROUND;
use crate::{Isa, linear};

/// Tokens below which quantising is not worth a join.
const JOIN_TOKENS: usize = 8;
/// Blocks whose largest number is smaller count as zero: their scale would not be a normal number.
const SMALLEST: f32 = 1e-30;
/// Most tokens that lie side by side: as many as a tile register has rows.
pub(super) const TILE: usize = 16;

/// How exact activations are where they meet quantised weights.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ActivationBits {
    /// Half the instructions of a product, and the errors that engines with 8 bits make.
    Eight,
    /// Two terms: results are those of exact activations to about 1e-4.
    #[default]
    Sixteen,
}

impl ActivationBits {
    /// The largest integer.
    fn largest(self) -> f32 {
        match self {
            ActivationBits::Eight => 127.0,
            // High terms span +-127.
            ActivationBits::Sixteen => 127.0 * 256.0,
        }
    }
}

/// 32 activations: `256 * high + low`; high terms are zero where there are 8 bits.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Terms {
    pub(super) high: [i8; BLOCK],
    pub(super) low: [i8; BLOCK],
}

/// A block's scale, and the sums of its numbers as they were rounded: of each half, and of all.
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub(super) struct Scaled {
    pub(super) scale: f32,
    pub(super) all: f32,
    pub(super) halves: [f32; 2],
}

/// Quantised activations of a batch; memory is kept from call to call. Up to sixteen tokens lie
/// side by side, so that whoever takes several of them reads memory in order.
#[derive(Default)]
pub(crate) struct Activations {
    places: Places,
    /// `[tiles, blocks, width]`.
    terms: Vec<Terms>,
    scaled: Vec<Scaled>,
}

/// Where a token's items lie.
#[derive(Clone, Copy, Default)]
struct Places {
    blocks: usize,
    /// Tokens side by side.
    width: usize,
    bits: ActivationBits,
}

impl Places {
    #[inline(always)]
    fn block(self, token: usize, block: usize) -> usize {
        (token / self.width * self.blocks + block) * self.width + token % self.width
    }
}

impl Activations {
    /// Bytes that a block of one token takes.
    pub(super) const BLOCK_BYTES: usize = size_of::<Terms>() + size_of::<Scaled>();

    /// Quantises `x: [tokens, cols]`, `cols` a whole number of blocks.
    pub(super) fn quantise(
        &mut self,
        pool: &Pool,
        isa: Isa,
        (x, cols): (&[f32], usize),
        bits: ActivationBits,
    ) {
        let (tokens, blocks) = (x.len() / cols, cols / BLOCK);
        let places = Places { blocks, width: tokens.min(TILE), bits };
        self.places = places;
        let lanes = tokens.next_multiple_of(places.width);
        self.terms.resize(lanes * blocks, Terms { high: [0; BLOCK], low: [0; BLOCK] });
        self.scaled.resize(lanes * blocks, Scaled::default());
        let (terms, scaled) = (self.terms.as_mut_ptr(), self.scaled.as_mut_ptr());
        let (terms, scaled) = (linear::Shared(terms), linear::Shared(scaled));
        let run = |tokens: Range<usize>| {
            isa.run(Quantise { x, cols, tokens, places, terms, scaled });
        };
        if tokens < JOIN_TOKENS {
            run(0..tokens);
        } else {
            pool.run(&|worker| run(split(tokens, 1, pool.threads(), worker)));
        }
    }

    /// Whether there are high terms other than zero.
    pub(super) fn two_terms(&self) -> bool {
        self.places.bits == ActivationBits::Sixteen
    }

    /// Tokens side by side.
    pub(super) fn width(&self) -> usize {
        self.places.width
    }

    /// A token's activations.
    #[inline(always)]
    pub(super) fn token(&self, token: usize) -> Token<'_> {
        Token {
            terms: &self.terms[self.places.block(token, 0)..],
            scaled: &self.scaled[self.places.block(token, 0)..],
            width: self.places.width,
        }
    }
}

/// One token's quantised activations; its neighbours in the tile follow each item.
#[derive(Clone, Copy)]
pub(super) struct Token<'a> {
    /// Block `b` at `b * width`.
    pub(super) terms: &'a [Terms],
    pub(super) scaled: &'a [Scaled],
    pub(super) width: usize,
}

/// Quantises whole tokens.
struct Quantise<'a> {
    x: &'a [f32],
    cols: usize,
    tokens: Range<usize>,
    places: Places,
    terms: linear::Shared<Terms>,
    scaled: linear::Shared<Scaled>,
}

impl Kernel for Quantise<'_> {
    #[inline(always)]
    fn run<T: Tier>(self, _: T) {
        let largest = self.places.bits.largest();
        for token in self.tokens.clone() {
            let row = &self.x[token * self.cols..][..self.cols];
            for (b, x) in row.as_chunks::<BLOCK>().0.iter().enumerate() {
                let at = self.places.block(token, b);
                // SAFETY: each worker has its own tokens, and these are places within the vectors,
                // which have been sized for all of them.
                unsafe { *self.scaled.at(at) = quantise(x, largest, &mut *self.terms.at(at)) };
            }
        }
    }
}

/// The scale of a block, and what numbers are multiplied by. A number that is not finite makes the
/// scale NaN, and with it every product.
#[inline(always)]
fn scale_of(x: &[f32; BLOCK], integer: f32) -> (f32, f32) {
    // Without the sign, numbers are ordered as their bits are; NaN comes last.
    let largest = x.iter().fold(0, |most, v| u32::max(most, v.abs().to_bits()));
    let largest = f32::from_bits(largest);
    if (SMALLEST..=f32::MAX).contains(&largest) {
        (largest / integer, integer / largest)
    } else {
        (if largest < SMALLEST { 0.0 } else { f32::NAN }, 0.0)
    }
}

#[inline(always)]
fn quantise(x: &[f32; BLOCK], largest: f32, terms: &mut Terms) -> Scaled {
    let (scale, inverse) = scale_of(x, largest);
    let mut q = [0i32; BLOCK];
    if inverse > 0.0 {
        for (q, v) in q.iter_mut().zip(x) {
            *q = (v * inverse + ROUND).to_bits().wrapping_sub(ROUND.to_bits()) as i32;
        }
    }
    for i in 0..BLOCK {
        let high = (q[i] + 128) >> 8;
        (terms.high[i], terms.low[i]) = (high as i8, (q[i] - (high << 8)) as i8);
    }
    // Sums are exact: they are below 2^24.
    let (low, high) = q.split_at(BLOCK / 2);
    let [low, high] = [low, high].map(|half| half.iter().sum::<i32>());
    let scaled = |sum: i32| scale * sum as f32;
    Scaled { scale, all: scaled(low + high), halves: [scaled(low), scaled(high)] }
}
