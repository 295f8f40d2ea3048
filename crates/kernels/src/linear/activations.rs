//! Activations as integers: 16 bits each, in two 8-bit terms, with a scale for every 128 columns.

use std::ops::Range;

use pomona_device::{Pool, split};

use super::packed::BLOCK;
use crate::isa::{Kernel, Tier};
use crate::lanes::ROUND;
use crate::{Isa, linear};

/// Tokens below which quantising is not worth a join.
const JOIN_TOKENS: usize = 8;
/// Spans whose largest number is smaller count as zero: their scale would not be a normal number.
const SMALLEST: f32 = 1e-30;
/// Blocks that share a scale.
pub(super) const SPAN: usize = 4;
/// Most tokens that lie side by side: as many as a tile register has rows.
pub(super) const TILE: usize = 16;

/// 32 activations: `256 * high + low`.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Terms {
    pub(super) high: [i8; BLOCK],
    pub(super) low: [i8; BLOCK],
}

/// Sums of a block's integers: of each half, and of all. Exact, since they are below 2^24.
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub(super) struct Sums {
    pub(super) halves: [f32; 2],
    pub(super) all: f32,
}

/// Quantised activations of a batch; memory is kept from call to call. Up to sixteen tokens lie
/// side by side, so that whoever takes several of them reads memory in order.
#[derive(Default)]
pub(crate) struct Activations {
    places: Places,
    /// `[tiles, blocks, width]`.
    terms: Vec<Terms>,
    sums: Vec<Sums>,
    /// `[tiles, spans, width]`.
    scales: Vec<f32>,
}

/// Where a token's items lie.
#[derive(Clone, Copy, Default)]
struct Places {
    blocks: usize,
    /// Tokens side by side.
    width: usize,
}

impl Places {
    #[inline(always)]
    fn block(self, token: usize, block: usize) -> usize {
        (token / self.width * self.blocks + block) * self.width + token % self.width
    }

    #[inline(always)]
    fn span(self, token: usize, span: usize) -> usize {
        let spans = self.blocks.div_ceil(SPAN);
        (token / self.width * spans + span) * self.width + token % self.width
    }
}

impl Activations {
    /// Bytes that a block of one token takes.
    pub(super) const BLOCK_BYTES: usize = size_of::<Terms>() + size_of::<Sums>();

    /// Quantises `x: [tokens, cols]`, `cols` a whole number of blocks.
    pub(super) fn quantise(&mut self, pool: &Pool, isa: Isa, x: &[f32], cols: usize) {
        let (tokens, blocks) = (x.len() / cols, cols / BLOCK);
        let places = Places { blocks, width: tokens.min(TILE) };
        self.places = places;
        let lanes = tokens.next_multiple_of(places.width);
        self.terms.resize(lanes * blocks, Terms { high: [0; BLOCK], low: [0; BLOCK] });
        self.sums.resize(lanes * blocks, Sums::default());
        self.scales.resize(lanes * blocks.div_ceil(SPAN), 0.0);
        let (terms, sums) = (self.terms.as_mut_ptr(), self.sums.as_mut_ptr());
        let (terms, sums) = (linear::Shared(terms), linear::Shared(sums));
        let scales = linear::Shared(self.scales.as_mut_ptr());
        let run = |tokens: Range<usize>| {
            isa.run(Quantise { x, cols, tokens, places, terms, sums, scales });
        };
        if tokens < JOIN_TOKENS {
            run(0..tokens);
        } else {
            pool.run(&|worker| run(split(tokens, 1, pool.threads(), worker)));
        }
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
            sums: &self.sums[self.places.block(token, 0)..],
            scales: &self.scales[self.places.span(token, 0)..],
            width: self.places.width,
        }
    }
}

/// One token's quantised activations; its neighbours in the tile follow each item.
#[derive(Clone, Copy)]
pub(super) struct Token<'a> {
    /// Block `b` at `b * width`.
    pub(super) terms: &'a [Terms],
    pub(super) sums: &'a [Sums],
    /// Span `s` at `s * width`.
    pub(super) scales: &'a [f32],
    pub(super) width: usize,
}

/// Quantises whole tokens.
struct Quantise<'a> {
    x: &'a [f32],
    cols: usize,
    tokens: Range<usize>,
    places: Places,
    terms: linear::Shared<Terms>,
    sums: linear::Shared<Sums>,
    scales: linear::Shared<f32>,
}

impl Kernel for Quantise<'_> {
    #[inline(always)]
    fn run<T: Tier>(self, _: T) {
        for token in self.tokens.clone() {
            let row = &self.x[token * self.cols..][..self.cols];
            for (span, x) in row.chunks(SPAN * BLOCK).enumerate() {
                let (scale, inverse) = scale_of(x);
                // SAFETY: each worker has its own tokens, and these are places within the vectors,
                // which have been sized for all of them.
                unsafe { *self.scales.at(self.places.span(token, span)) = scale };
                for (b, x) in x.as_chunks::<BLOCK>().0.iter().enumerate() {
                    let at = self.places.block(token, span * SPAN + b);
                    // SAFETY: as above.
                    unsafe { *self.sums.at(at) = quantise(x, inverse, &mut *self.terms.at(at)) };
                }
            }
        }
    }
}

/// The scale of a span, and what numbers are multiplied by. A number that is not finite makes the
/// scale NaN, and with it every product.
#[inline(always)]
fn scale_of(x: &[f32]) -> (f32, f32) {
    /// High terms span +-127.
    const LARGEST: f32 = 127.0 * 256.0;
    // Without the sign, numbers are ordered as their bits are; NaN comes last.
    let largest = x.iter().fold(0, |most, v| u32::max(most, v.abs().to_bits()));
    let largest = f32::from_bits(largest);
    if (SMALLEST..=f32::MAX).contains(&largest) {
        (largest / LARGEST, LARGEST / largest)
    } else {
        (if largest < SMALLEST { 0.0 } else { f32::NAN }, 0.0)
    }
}

#[inline(always)]
fn quantise(x: &[f32; BLOCK], inverse: f32, terms: &mut Terms) -> Sums {
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
    let (low, high) = q.split_at(BLOCK / 2);
    let [low, high] = [low, high].map(|half| half.iter().sum::<i32>());
    Sums { halves: [low as f32, high as f32], all: (low + high) as f32 }
}
