//! The quantised product with AVX-512 and VNNI: four columns of sixteen rows an instruction.
//!
//! # Safety
//! Each unsafe function here needs the instruction sets that its `target_feature` names, which
//! [`Isa::Avx512`](crate::Isa) stands for, and pointers into a group of the format at hand.

use std::arch::x86_64::*;
use std::ops::Range;

use super::activations::{Factors, TERMS};
use super::packed::{BLOCK, GROUP, STEPS, integer_bytes, nibble_step};
use super::{Activations, Slab};
use crate::Format;

/// Most tokens that share the integers of a block: their sums stay in registers.
const TOKENS: usize = 8;
/// How far ahead of a single token's products weights are fetched, in bytes.
const AHEAD: usize = 2048;

/// Computes a slab.
pub(super) fn run(slab: &Slab<'_>, activations: &Activations) {
    // SAFETY: dispatch chose this tier, which Isa::detect() found.
    unsafe {
        match slab.format {
            Format::Q4_0 => groups::<Nibbles, OneScale<-8>>(slab, activations),
            Format::Q4_1 => groups::<Nibbles, ScaleAndMinimum>(slab, activations),
            Format::Q5_0 => groups::<FiveBits, OneScale<-16>>(slab, activations),
            Format::Q5_1 => groups::<FiveBits, ScaleAndMinimum>(slab, activations),
            Format::Q8_0 => groups::<Bytes, OneScale<-128>>(slab, activations),
            Format::Q4_K => groups::<Nibbles, ScaledScales>(slab, activations),
            Format::Q5_K => groups::<FiveBits, ScaledScales>(slab, activations),
            Format::Q6_K => groups::<SixBits, HalfScales>(slab, activations),
            Format::F32 | Format::F16 | Format::BF16 => unreachable!("dense formats go elsewhere"),
        }
    }
}

/// How integers lie in a block.
trait Integers {
    /// # Safety
    /// `at` is a block of such integers; the tier's features are there.
    unsafe fn steps(at: *const u8) -> [__m512i; STEPS];
}

/// How `d` and `m` lie behind the integers.
trait Scales {
    /// Parts of a block with scales of their own: one or two.
    const PARTS: usize;
    /// `d` and `m` of each part of block `b`; those of the first part in both where there is one.
    ///
    /// # Safety
    /// `at` is a group's scales, which reach to block `b`; the tier's features are there.
    unsafe fn of(at: *const u8, b: usize) -> [[__m512; 2]; 2];
}

/// # Safety
/// The machine has this tier; groups and tokens are in bounds.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")]
unsafe fn groups<I: Integers, S: Scales>(slab: &Slab<'_>, activations: &Activations) {
    for tokens in slab.token_blocks(slab.cols / BLOCK * Activations::BLOCK_BYTES) {
        for group in slab.groups.clone() {
            let work = Group { slab, group, activations };
            // SAFETY: features are those of this function; the group is the slab's own.
            unsafe { work.tokens::<I, S>(tokens.clone()) };
        }
    }
}

/// Sixteen rows.
struct Group<'a> {
    slab: &'a Slab<'a>,
    group: usize,
    activations: &'a Activations,
}

impl Group<'_> {
    /// # Safety
    /// The machine has this tier; groups and tokens are in bounds.
    #[inline(always)]
    unsafe fn tokens<I: Integers, S: Scales>(&self, tokens: Range<usize>) {
        let mut token = tokens.start;
        while token < tokens.end {
            // SAFETY: the caller has the features; groups and tokens are the slab's.
            token += unsafe {
                match tokens.end - token {
                    TOKENS.. => self.products::<I, S, TOKENS>(token),
                    4.. => self.products::<I, S, 4>(token),
                    2.. => self.products::<I, S, 2>(token),
                    _ => self.products::<I, S, 1>(token),
                }
            };
        }
    }

    /// Products with `T` tokens from `token`, which it returns; the same result for every `T`:
    /// sums of integers are exact, and those of scaled ones have one order.
    ///
    /// # Safety
    /// The machine has this tier; groups and tokens are in bounds.
    #[inline(always)]
    unsafe fn products<I: Integers, S: Scales, const T: usize>(&self, token: usize) -> usize {
        let slab = self.slab;
        let (bytes, blocks) = (slab.group(self.group), slab.cols / BLOCK);
        let size = integer_bytes(slab.format);
        let inputs: [Input<'_>; T] = std::array::from_fn(|t| {
            let input = self.activations.token(token + t);
            Input { terms: input.terms.as_ptr().cast(), factors: &input.factors[..blocks] }
        });
        // SAFETY: the caller has the features; blocks are within the group and the activations.
        unsafe {
            let scales = bytes.as_ptr().add(blocks * size);
            let mut sums = [_mm512_setzero_ps(); T];
            for b in 0..blocks {
                let at = bytes.as_ptr().add(b * size);
                if T == 1 {
                    // Beyond the group's end lies the next one, or nothing that harms.
                    for line in (0..size).step_by(64) {
                        _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(AHEAD + line).cast());
                    }
                }
                let (w, scales) = (I::steps(at), S::of(scales, b));
                for part in 0..S::PARTS {
                    let steps = part * STEPS / S::PARTS..(part + 1) * STEPS / S::PARTS;
                    let integers = integers::<T>(&w, &inputs, b, steps);
                    let [d, m] = scales[part];
                    for t in 0..T {
                        let factors = inputs[t].factors.get_unchecked(b);
                        let sum = if S::PARTS == 1 { factors.sum } else { factors.halves[part] };
                        let factor = _mm512_mul_ps(d, _mm512_set1_ps(factors.scale));
                        let value = _mm512_cvtepi32_ps(integers[t]);
                        sums[t] = _mm512_fmadd_ps(value, factor, sums[t]);
                        sums[t] = _mm512_fmadd_ps(m, _mm512_set1_ps(sum), sums[t]);
                    }
                }
            }
            for t in 0..T {
                let mut values = [0.0; GROUP];
                _mm512_storeu_ps(values.as_mut_ptr(), sums[t]);
                slab.sink.store(token + t, self.group, &values);
            }
        }
        T
    }
}

/// A token's activations: `[blocks, TERMS, 32]` integers, and what they are multiplied by.
#[derive(Clone, Copy)]
struct Input<'a> {
    terms: *const i8,
    factors: &'a [Factors],
}

/// Integer products of `T` tokens over some steps of block `b`.
///
/// # Safety
/// The machine has this tier; the inputs have block `b`.
#[inline(always)]
unsafe fn integers<const T: usize>(
    w: &[__m512i; STEPS],
    inputs: &[Input<'_>; T],
    b: usize,
    steps: Range<usize>,
) -> [__m512i; T] {
    // SAFETY: the caller has the features; four columns are loaded, of block `b`.
    unsafe {
        let four = |t: usize, term: usize, step: usize| {
            let at = inputs[t].terms.add((b * TERMS + term) * BLOCK + step * 4);
            at.cast::<i32>().read_unaligned()
        };
        let mut sums = [_mm512_setzero_si512(); T];
        for step in steps.clone() {
            for t in 0..T {
                sums[t] =
                    _mm512_dpbusd_epi32(sums[t], w[step], _mm512_set1_epi32(four(t, 0, step)));
            }
        }
        if TERMS == 1 {
            return sums;
        }
        // With few tokens a chain of sums is what takes time: the terms get one each.
        let mut low = [_mm512_setzero_si512(); T];
        if T > 2 {
            for t in 0..T {
                low[t] = _mm512_slli_epi32(sums[t], 8);
            }
        }
        for step in steps {
            for t in 0..T {
                let x = _mm512_set1_epi32(four(t, TERMS - 1, step));
                low[t] = _mm512_dpbusd_epi32(low[t], w[step], x);
            }
        }
        if T <= 2 {
            for t in 0..T {
                low[t] = _mm512_add_epi32(low[t], _mm512_slli_epi32(sums[t], 8));
            }
        }
        low
    }
}

/// Loads vector `index` at `at`.
///
/// # Safety
/// The machine has this tier, and the vector is there.
#[inline(always)]
unsafe fn vector(at: *const u8, index: usize) -> __m512i {
    // SAFETY: by contract.
    unsafe { _mm512_loadu_si512(at.add(index * 64).cast()) }
}

struct Nibbles;
impl Integers for Nibbles {
    /// # Safety
    /// As for [`Integers::steps`].
    #[inline(always)]
    unsafe fn steps(at: *const u8) -> [__m512i; STEPS] {
        // SAFETY: four vectors of nibbles.
        unsafe {
            let mask = _mm512_set1_epi8(15);
            let mut steps = [mask; STEPS];
            for j in 0..4 {
                let both = vector(at, j);
                let step = nibble_step(j);
                steps[step] = _mm512_and_si512(both, mask);
                steps[step + 2] = _mm512_and_si512(_mm512_srli_epi16(both, 4), mask);
            }
            steps
        }
    }
}

struct FiveBits;
impl Integers for FiveBits {
    /// # Safety
    /// As for [`Integers::steps`].
    #[inline(always)]
    unsafe fn steps(at: *const u8) -> [__m512i; STEPS] {
        // SAFETY: nibbles, then eight masks.
        unsafe {
            let (mut steps, sixteen) = (Nibbles::steps(at), _mm512_set1_epi8(16));
            for (s, step) in steps.iter_mut().enumerate() {
                let mask = at.add(256 + s * 8).cast::<u64>().read_unaligned();
                *step = with_bit(*step, mask, sixteen);
            }
            steps
        }
    }
}

/// Adds `bit` to the bytes whose mask bit is set; they do not have it yet.
///
/// # Safety
/// The machine has this tier.
#[inline(always)]
unsafe fn with_bit(w: __m512i, mask: u64, bit: __m512i) -> __m512i {
    // SAFETY: register operations of the caller's features.
    unsafe { _mm512_mask_add_epi8(w, mask, w, bit) }
}

struct SixBits;
impl Integers for SixBits {
    /// # Safety
    /// As for [`Integers::steps`].
    #[inline(always)]
    unsafe fn steps(at: *const u8) -> [__m512i; STEPS] {
        // SAFETY: nibbles, then two vectors of bit pairs.
        unsafe {
            let (mut steps, mask) = (Nibbles::steps(at), _mm512_set1_epi8(48));
            for half in 0..2 {
                let pairs = vector(at, 4 + half);
                let upper = [
                    _mm512_slli_epi16(pairs, 4),
                    _mm512_slli_epi16(pairs, 2),
                    pairs,
                    _mm512_srli_epi16(pairs, 2),
                ];
                for (s, upper) in upper.into_iter().enumerate() {
                    let step = &mut steps[half * 4 + s];
                    *step = _mm512_or_si512(*step, _mm512_and_si512(upper, mask));
                }
            }
            steps
        }
    }
}

struct Bytes;
impl Integers for Bytes {
    /// # Safety
    /// As for [`Integers::steps`].
    #[inline(always)]
    unsafe fn steps(at: *const u8) -> [__m512i; STEPS] {
        // SAFETY: eight vectors.
        unsafe {
            let mut steps = [_mm512_setzero_si512(); STEPS];
            for (s, step) in steps.iter_mut().enumerate() {
                *step = vector(at, s);
            }
            steps
        }
    }
}

/// Sixteen half-precision numbers.
///
/// # Safety
/// The machine has this tier, and 32 bytes are there.
#[inline(always)]
unsafe fn halves(at: *const u8) -> __m512 {
    // SAFETY: by contract.
    unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(at.cast())) }
}

struct OneScale<const CENTRE: i32>;
impl<const CENTRE: i32> Scales for OneScale<CENTRE> {
    const PARTS: usize = 1;
    /// # Safety
    /// As for [`Scales::of`].
    #[inline(always)]
    unsafe fn of(at: *const u8, b: usize) -> [[__m512; 2]; 2] {
        // SAFETY: 32 bytes a block.
        unsafe {
            let d = halves(at.add(b * 32));
            [[d, _mm512_mul_ps(d, _mm512_set1_ps(CENTRE as f32))]; 2]
        }
    }
}

struct ScaleAndMinimum;
impl Scales for ScaleAndMinimum {
    const PARTS: usize = 1;
    /// # Safety
    /// As for [`Scales::of`].
    #[inline(always)]
    unsafe fn of(at: *const u8, b: usize) -> [[__m512; 2]; 2] {
        // SAFETY: 64 bytes a block.
        unsafe { [[halves(at.add(b * 64)), halves(at.add(b * 64 + 32))]; 2] }
    }
}

struct ScaledScales;
impl Scales for ScaledScales {
    const PARTS: usize = 1;
    /// # Safety
    /// As for [`Scales::of`].
    #[inline(always)]
    unsafe fn of(at: *const u8, b: usize) -> [[__m512; 2]; 2] {
        // SAFETY: 64 bytes for eight blocks, then 32 for each.
        unsafe {
            let start = at.add(b / 8 * (64 + 8 * 32));
            let own = start.add(64 + b % 8 * 32);
            let scale = _mm512_cvtepu8_epi32(_mm_loadu_si128(own.cast()));
            let minimum = _mm512_cvtepu8_epi32(_mm_loadu_si128(own.add(16).cast()));
            let d = _mm512_mul_ps(halves(start), _mm512_cvtepi32_ps(scale));
            let minimum = _mm512_mul_ps(halves(start.add(32)), _mm512_cvtepi32_ps(minimum));
            [[d, _mm512_xor_ps(minimum, _mm512_set1_ps(-0.0))]; 2]
        }
    }
}

struct HalfScales;
impl Scales for HalfScales {
    const PARTS: usize = 2;
    /// # Safety
    /// As for [`Scales::of`].
    #[inline(always)]
    unsafe fn of(at: *const u8, b: usize) -> [[__m512; 2]; 2] {
        // SAFETY: 32 bytes for eight blocks, then 32 for each.
        unsafe {
            let start = at.add(b / 8 * (32 + 8 * 32));
            let (own, scale) = (start.add(32 + b % 8 * 32), halves(start));
            let mut scales = [[scale; 2]; 2];
            for (half, scales) in scales.iter_mut().enumerate() {
                let bytes = _mm_loadu_si128(own.add(half * 16).cast());
                let d = _mm512_mul_ps(scale, _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)));
                *scales = [d, _mm512_mul_ps(d, _mm512_set1_ps(-32.0))];
            }
            scales
        }
    }
}
