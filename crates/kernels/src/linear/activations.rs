//! Activations as integers, in blocks of 32 columns with a scale: 16 bits each, in two 8-bit terms,
//! or 8 bits each.

use std::ops::Range;

use bytemuck::{Pod, Zeroable, cast_slice, cast_slice_mut};
use pomona_device::Pool;
use pomona_types::{Collective, GroupError};

use super::packed::BLOCK;
use super::{Input, Inputs, Shared, spread};
use crate::Isa;
use crate::isa::{Kernel, Tier};
use crate::lanes::ROUND;

/// Tokens below which quantising is not worth a join.
const JOIN_TOKENS: usize = 8;
/// Blocks whose largest number is smaller count as zero: their scale would not be a normal number.
const SMALLEST: f32 = 1e-30;
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

// SAFETY: zeros are such terms.
unsafe impl Zeroable for Terms {}
// SAFETY: 64 bytes of integers, of which any will do, and nothing between them.
unsafe impl Pod for Terms {}
// SAFETY: zeros are such numbers.
unsafe impl Zeroable for Scaled {}
// SAFETY: four f32, and nothing between them.
unsafe impl Pod for Scaled {}

/// Memory for quantised activations, kept from call to call.
#[derive(Default)]
pub(crate) struct Memory {
    all: Items,
    /// The columns that a rank has of inputs which are divided.
    own: Items,
}

/// `[tiles, blocks, width]` for each job.
#[derive(Default)]
struct Items {
    terms: Vec<Terms>,
    scaled: Vec<Scaled>,
}

/// A job's quantised activations. Up to sixteen tokens lie side by side, so that whoever takes
/// several of them reads memory in order.
#[derive(Clone, Copy)]
pub(super) struct Activations<'a> {
    places: Places,
    terms: &'a [Terms],
    scaled: &'a [Scaled],
}

/// Where a token's items lie.
#[derive(Clone, Copy)]
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

impl Memory {
    /// Quantises all inputs, whose columns are a whole number of blocks.
    pub(super) fn quantise(
        &mut self,
        pool: &Pool,
        isa: Isa,
        inputs: &Inputs<'_>,
        bits: ActivationBits,
    ) -> Vec<Activations<'_>> {
        self.all.quantise(pool, isa, inputs, bits)
    }

    /// The same for a job's columns that are divided over ranks, `widths` of them, each a whole
    /// number of blocks: each rank quantises its own, `inputs`, and gets what the others made.
    pub(super) fn gather(
        &mut self,
        (pool, isa, group): (&Pool, Isa, &dyn Collective),
        inputs: &Inputs<'_>,
        widths: &[usize],
        bits: ActivationBits,
    ) -> Result<Activations<'_>, GroupError> {
        let Memory { all, own } = self;
        own.quantise(pool, isa, inputs, bits);
        let input = &inputs.jobs[0];
        let (tiles, width) = (input.tiles(), input.width());
        let blocks = widths.iter().sum::<usize>() / BLOCK;
        let count = inputs.lanes * blocks;
        all.reserve(count);
        // A rank's blocks lie together in each tile, as its columns do in each row.
        let bytes = |item: usize| -> Vec<usize> {
            widths.iter().map(|columns| columns / BLOCK * width * item).collect()
        };
        let (terms, scaled) = (bytes(size_of::<Terms>()), bytes(size_of::<Scaled>()));
        let mine = inputs.lanes * (inputs.cols / BLOCK);
        let (from, into) = (&own.terms[..mine], &mut all.terms[..count]);
        group.all_gather(tiles, &terms, cast_slice(from), cast_slice_mut(into))?;
        let (from, into) = (&own.scaled[..mine], &mut all.scaled[..count]);
        group.all_gather(tiles, &scaled, cast_slice(from), cast_slice_mut(into))?;
        let places = Places { blocks, width, bits };
        Ok(Activations { places, terms: &all.terms, scaled: &all.scaled })
    }
}

impl Items {
    /// Makes room. It stays: to shrink and to grow again would fill it again.
    fn reserve(&mut self, items: usize) {
        if self.terms.len() < items {
            self.terms.resize(items, Terms { high: [0; BLOCK], low: [0; BLOCK] });
            self.scaled.resize(items, Scaled::default());
        }
    }

    fn quantise(
        &mut self,
        pool: &Pool,
        isa: Isa,
        inputs: &Inputs<'_>,
        bits: ActivationBits,
    ) -> Vec<Activations<'_>> {
        let blocks = inputs.cols / BLOCK;
        self.reserve(inputs.lanes * blocks);
        let places = |input: &Input<'_>| Places { blocks, width: input.width(), bits };
        let (terms, scaled) = (Shared(self.terms.as_mut_ptr()), Shared(self.scaled.as_mut_ptr()));
        spread(pool, JOIN_TOKENS, inputs.jobs.iter().map(|input| input.tokens), &|job, tokens| {
            let input = &inputs.jobs[job];
            let (first, places) = (input.first_lane * blocks, places(input));
            isa.run(Quantise { inputs, job, tokens, first, places, terms, scaled });
        });
        let of = |input: &Input<'_>| {
            let at = input.first_lane * blocks;
            let (terms, scaled) = (&self.terms[at..], &self.scaled[at..]);
            Activations { places: places(input), terms, scaled }
        };
        inputs.jobs.iter().map(of).collect()
    }
}

impl Activations<'_> {
    /// Bytes that a block of one token takes.
    pub(super) const BLOCK_BYTES: usize = size_of::<Terms>() + size_of::<Scaled>();

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

/// Quantises whole tokens of a job.
struct Quantise<'a> {
    inputs: &'a Inputs<'a>,
    job: usize,
    tokens: Range<usize>,
    /// Where the job's blocks begin.
    first: usize,
    places: Places,
    terms: Shared<Terms>,
    scaled: Shared<Scaled>,
}

impl Kernel for Quantise<'_> {
    #[inline(always)]
    fn run<T: Tier>(self, _: T) {
        let largest = self.places.bits.largest();
        for token in self.tokens.clone() {
            let row = self.inputs.row(self.job, token);
            for (b, x) in row.as_chunks::<BLOCK>().0.iter().enumerate() {
                let at = self.first + self.places.block(token, b);
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
