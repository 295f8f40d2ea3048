//! Activations as integers, in blocks of 32 columns with a scale: 16 bits each, in two 8-bit terms,
//! or 8 bits each.
//!
//! Instructions of x86-64 multiply unsigned bytes by signed ones. For a few tokens weights are the
//! unsigned ones, as they come from memory. For many, weights are unpacked once, to what they are,
//! and activations are moved up until no number is negative; what that adds too much, products
//! begin with. NEON takes signs on both sides, and turns activations as it reads them.

use std::ops::Range;

use bytemuck::{Pod, Zeroable, cast_slice, cast_slice_mut};
use pomona_device::Pool;
use pomona_types::{Collective, GroupError};

use super::packed::BLOCK;
use super::{Input, Inputs, Shared, spread};
use crate::Isa;
use crate::isa::{Kernel, Tier};
use crate::lanes::{LANES, ROUND};

/// Tokens below which quantising is not worth a join.
pub(super) const JOIN_TOKENS: usize = 8;
/// Blocks whose largest number is smaller count as zero: their scale would not be a normal number.
const SMALLEST: f32 = 1e-30;
/// How exact activations are where they meet quantised weights, and those of BF16.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ActivationBits {
    /// Half the instructions of a product, and the errors that engines with 8 bits make. BF16
    /// weights meet activations in bf16.
    Eight,
    /// Two terms: results are those of exact activations to about 1e-4. BF16 weights meet
    /// activations in f32.
    #[default]
    Sixteen,
}

impl ActivationBits {
    /// The largest integer.
    pub(crate) fn largest(self) -> f32 {
        match self {
            ActivationBits::Eight => 127.0,
            ActivationBits::Sixteen => 127.0 * 256.0,
        }
    }

    /// Terms of an item.
    pub(crate) fn terms(self) -> usize {
        match self {
            ActivationBits::Eight => 1,
            ActivationBits::Sixteen => 2,
        }
    }
}

/// Whether terms have signs.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// Both terms have.
    Signed,
    /// They would have, were the number not greater by 128, or by 32,768 where there are two terms.
    Unsigned,
}

/// 8 bits of 32 activations. The terms of an item follow each other: of `256 * high + low`, or of
/// `low` alone.
#[derive(Clone, Copy)]
#[repr(C, align(32))]
pub(super) struct Term(pub(super) [u8; BLOCK]);

impl Term {
    /// The bytes of half of the columns.
    #[inline(always)]
    fn half(&mut self, h: usize) -> &mut [u8; LANES] {
        &mut self.0.as_chunks_mut().0[h]
    }
}

/// A block's scale, the sum of its numbers as they were rounded, and those of the integers of each
/// half.
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub(super) struct Scaled {
    pub(super) scale: f32,
    pub(super) sum: f32,
    pub(super) halves: [i32; 2],
}

// SAFETY: zeros are such a term.
unsafe impl Zeroable for Term {}
// SAFETY: 32 bytes of integers, of which any will do, and nothing between them.
unsafe impl Pod for Term {}
// SAFETY: zeros are such numbers.
unsafe impl Zeroable for Scaled {}
// SAFETY: numbers of which any will do, and nothing between them.
unsafe impl Pod for Scaled {}

/// Memory for quantised activations, kept from call to call.
#[derive(Default)]
pub(crate) struct Memory {
    all: Items,
    /// The columns that a rank has of inputs which are divided.
    own: Items,
}

/// `[tiles, blocks, width]` items for each job.
#[derive(Default)]
struct Items {
    /// One or two for each item.
    terms: Vec<Term>,
    scaled: Vec<Scaled>,
}

/// A job's quantised activations. Up to sixteen tokens lie side by side, so that whoever takes
/// several of them reads memory in order.
#[derive(Clone, Copy)]
pub(super) struct Activations<'a> {
    places: Places,
    terms: &'a [Term],
    scaled: &'a [Scaled],
}

/// Where a token's items lie.
#[derive(Clone, Copy)]
struct Places {
    blocks: usize,
    /// Tokens side by side.
    width: usize,
    bits: ActivationBits,
    form: Form,
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
        all.reserve(count, bits);
        // A rank's blocks lie together in each tile, as its columns do in each row.
        let bytes = |item: usize| -> Vec<usize> {
            widths.iter().map(|columns| columns / BLOCK * width * item).collect()
        };
        let of_item = bits.terms();
        let (terms, scaled) = (bytes(of_item * size_of::<Term>()), bytes(size_of::<Scaled>()));
        let mine = inputs.lanes * (inputs.cols / BLOCK);
        let (from, into) = (&own.terms[..of_item * mine], &mut all.terms[..of_item * count]);
        group.all_gather(tiles, &terms, cast_slice(from), cast_slice_mut(into))?;
        let (from, into) = (&own.scaled[..mine], &mut all.scaled[..count]);
        group.all_gather(tiles, &scaled, cast_slice(from), cast_slice_mut(into))?;
        let places = Places { blocks, width, bits, form: input.form() };
        Ok(Activations { places, terms: &all.terms, scaled: &all.scaled })
    }
}

impl Items {
    /// Makes room. It stays: to shrink and to grow again would fill it again.
    fn reserve(&mut self, items: usize, bits: ActivationBits) {
        self.terms.resize(self.terms.len().max(items * bits.terms()), Term([0; BLOCK]));
        self.scaled.resize(self.scaled.len().max(items), Scaled::default());
    }

    fn quantise(
        &mut self,
        pool: &Pool,
        isa: Isa,
        inputs: &Inputs<'_>,
        bits: ActivationBits,
    ) -> Vec<Activations<'_>> {
        let blocks = inputs.cols / BLOCK;
        self.reserve(inputs.lanes * blocks, bits);
        let places =
            |input: &Input<'_>| Places { blocks, width: input.width(), bits, form: input.form() };
        let (terms, scaled) = (Shared(self.terms.as_mut_ptr()), Shared(self.scaled.as_mut_ptr()));
        spread(pool, JOIN_TOKENS, inputs.jobs.iter().map(|input| input.tokens), &|job, tokens| {
            let input = &inputs.jobs[job];
            let (first, places) = (input.first_lane * blocks, places(input));
            isa.run(Quantise { inputs, job, tokens, first, places, terms, scaled });
        });
        let of = |input: &Input<'_>| {
            let at = input.first_lane * blocks;
            let (terms, scaled) = (&self.terms[at * bits.terms()..], &self.scaled[at..]);
            Activations { places: places(input), terms, scaled }
        };
        inputs.jobs.iter().map(of).collect()
    }
}

impl Activations<'_> {
    /// Bytes that a token takes.
    pub(super) fn token_bytes(&self) -> usize {
        self.places.blocks * (self.bits().terms() * size_of::<Term>() + size_of::<Scaled>())
    }

    pub(super) fn bits(&self) -> ActivationBits {
        self.places.bits
    }

    pub(super) fn form(&self) -> Form {
        self.places.form
    }

    /// Tokens side by side.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn width(&self) -> usize {
        self.places.width
    }

    /// The terms of a token's block: one or two, followed by those of its neighbours.
    #[inline(always)]
    pub(super) fn terms(&self, token: usize, block: usize) -> &[Term] {
        &self.terms[self.places.block(token, block) * self.bits().terms()..]
    }

    /// The scale of a token's block, followed by those of its neighbours.
    #[inline(always)]
    pub(super) fn scaled(&self, token: usize, block: usize) -> &[Scaled] {
        &self.scaled[self.places.block(token, block)..]
    }
}

/// Quantises whole tokens of a job.
struct Quantise<'a> {
    inputs: &'a Inputs<'a>,
    job: usize,
    tokens: Range<usize>,
    /// Where the job's blocks begin.
    first: usize,
    places: Places,
    terms: Shared<Term>,
    scaled: Shared<Scaled>,
}

impl Kernel for Quantise<'_> {
    #[inline(always)]
    fn run<T: Tier>(self, t: T) {
        match self.places.bits {
            ActivationBits::Eight => self.tokens::<T, 1>(t),
            ActivationBits::Sixteen => self.tokens::<T, 2>(t),
        }
    }
}

impl Quantise<'_> {
    #[inline(always)]
    fn tokens<T: Tier, const TERMS: usize>(&self, t: T) {
        let Places { bits, form, .. } = self.places;
        let largest = bits.largest();
        for token in self.tokens.clone() {
            let row = self.inputs.row(self.job, token);
            for (b, x) in row.as_chunks::<BLOCK>().0.iter().enumerate() {
                let at = self.first + self.places.block(token, b);
                // SAFETY: each worker has its own tokens, and these are places within the vectors,
                // which have been sized for all of them.
                unsafe {
                    let terms = &mut *self.terms.at(at * TERMS).cast::<[Term; TERMS]>();
                    *self.scaled.at(at) = quantise(t, x, (largest, form), terms);
                }
            }
        }
    }
}

/// The scale of a block whose largest number this is, and what numbers are multiplied by. A number
/// that is not finite makes the scale NaN, and with it every product.
#[inline(always)]
pub(crate) fn scale_of(largest: f32, integer: f32) -> (f32, f32) {
    if (SMALLEST..=f32::MAX).contains(&largest) {
        (largest / integer, integer / largest)
    } else {
        (if largest < SMALLEST { 0.0 } else { f32::NAN }, 0.0)
    }
}

/// Quantises a block to integers up to `largest`, whose terms take a form.
#[inline(always)]
fn quantise<T: Tier, const TERMS: usize>(
    t: T,
    x: &[f32; BLOCK],
    (largest, form): (f32, Form),
    terms: &mut [Term; TERMS],
) -> Scaled {
    let halves = x.as_chunks::<LANES>().0;
    let (scale, inverse) = scale_of(t.largest_magnitude(halves), largest);
    // Integers of the first term are so much more. A low term with a sign takes from the high one
    // what its sign means.
    let offset = match (TERMS, form) {
        (1, Form::Signed) => 0.0,
        (1, Form::Unsigned) | (_, Form::Signed) => 128.0,
        (_, Form::Unsigned) => 128.0 * 256.0,
    };
    let (inverse_of_all, round) = (t.splat(inverse), t.splat(ROUND));
    let mut sums = [0; 2];
    for (h, half) in halves.iter().enumerate() {
        let mut rounded = t.splat(0.0);
        // Else numbers may not be finite.
        if inverse > 0.0 {
            rounded = t.sub(t.add(t.mul(t.load(half), inverse_of_all), round), round);
        }
        // Integers stand in the lowest bits of what a whole number and ROUND add up to.
        let first = t.add(rounded, t.splat(ROUND + offset));
        if TERMS == 1 {
            t.lowest_bytes(first, terms[0].half(h));
        } else {
            t.second_bytes(first, terms[0].half(h));
            t.lowest_bytes(t.add(rounded, round), terms[1].half(h));
        }
        let signed = form == Form::Signed;
        for term in &mut *terms {
            sums[h] = 256 * sums[h] + t.sum_of_bytes(term.half(h), signed);
        }
        if !signed {
            sums[h] -= offset as i32 * LANES as i32;
        }
    }
    Scaled { scale, sum: scale * (sums[0] + sums[1]) as f32, halves: sums }
}
