//! How each format's blocks become integers and scales in registers.
//!
//! # Safety
//! Each unsafe function here needs the instruction sets that [`Isa::Avx512`](crate::Isa) stands
//! for, and pointers into a group of the format at hand.

use std::arch::x86_64::*;

use super::super::packed::{STEPS, nibble_step};
use crate::formats::ZERO_PARTS;

/// How integers lie in a block.
pub(super) trait Integers {
    /// As they are stored.
    ///
    /// # Safety
    /// `at` is a block of such integers; the tier's features are there.
    unsafe fn steps(at: *const u8) -> [__m512i; STEPS];
}

/// How `d` and `m` lie behind the integers, and what these are counted from.
pub(super) trait Scales {
    /// Parts of a block with scales of their own: one or two.
    const PARTS: usize;
    /// What is taken from integers as they are stored.
    const CENTRE: i8;
    /// Whether `m` counts.
    const MINIMA: bool;
    /// `d` and `m` of each part of block `b`; those of the first part in both where there is one.
    ///
    /// # Safety
    /// `at` is a group's scales, which reach to block `b`; the tier's features are there.
    unsafe fn of(at: *const u8, b: usize) -> [[__m512; 2]; 2];
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

pub(super) struct Nibbles;
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

pub(super) struct FiveBits;
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

pub(super) struct SixBits;
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

pub(super) struct Bytes;
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

pub(super) struct OneScale<const CENTRE: i8>;
impl<const CENTRE: i8> Scales for OneScale<CENTRE> {
    const PARTS: usize = 1;
    const CENTRE: i8 = CENTRE;
    const MINIMA: bool = false;
    /// # Safety
    /// As for [`Scales::of`].
    #[inline(always)]
    unsafe fn of(at: *const u8, b: usize) -> [[__m512; 2]; 2] {
        // SAFETY: 32 bytes a block.
        unsafe { [[halves(at.add(b * 32)), _mm512_setzero_ps()]; 2] }
    }
}

pub(super) struct ScaleAndMinimum;
impl Scales for ScaleAndMinimum {
    const PARTS: usize = 1;
    const CENTRE: i8 = 0;
    const MINIMA: bool = true;
    /// # Safety
    /// As for [`Scales::of`].
    #[inline(always)]
    unsafe fn of(at: *const u8, b: usize) -> [[__m512; 2]; 2] {
        // SAFETY: 64 bytes a block.
        unsafe { [[halves(at.add(b * 64)), halves(at.add(b * 64 + 32))]; 2] }
    }
}

pub(super) struct ScaledScales;
impl Scales for ScaledScales {
    const PARTS: usize = 1;
    const CENTRE: i8 = 0;
    const MINIMA: bool = true;
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

pub(super) struct HalfScales;
impl Scales for HalfScales {
    const PARTS: usize = 2;
    const CENTRE: i8 = 32;
    const MINIMA: bool = false;
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
                *scales = [d, _mm512_setzero_ps()];
            }
            scales
        }
    }
}

/// One scale for `BLOCKS` blocks of signed bytes.
pub(super) struct GroupScale<const BLOCKS: usize>;
impl<const BLOCKS: usize> Scales for GroupScale<BLOCKS> {
    const PARTS: usize = 1;
    const CENTRE: i8 = -128;
    const MINIMA: bool = false;
    /// # Safety
    /// As for [`Scales::of`].
    #[inline(always)]
    unsafe fn of(at: *const u8, b: usize) -> [[__m512; 2]; 2] {
        // SAFETY: those of Q8_0, once for a group.
        unsafe { OneScale::<-128>::of(at, b / BLOCKS) }
    }
}

/// One scale for `BLOCKS` blocks, and a zero point in parts.
pub(super) struct GroupScaleAndZero<const BLOCKS: usize>;
impl<const BLOCKS: usize> Scales for GroupScaleAndZero<BLOCKS> {
    const PARTS: usize = 1;
    const CENTRE: i8 = 0;
    const MINIMA: bool = true;
    /// # Safety
    /// As for [`Scales::of`].
    #[inline(always)]
    unsafe fn of(at: *const u8, b: usize) -> [[__m512; 2]; 2] {
        // SAFETY: 48 bytes a group.
        unsafe {
            let own = at.add(b / BLOCKS * 48);
            let (d, zero) = (halves(own), _mm_loadu_si128(own.add(32).cast()));
            let zero = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(zero));
            let zero = _mm512_mul_ps(zero, _mm512_set1_ps(-1.0 / ZERO_PARTS));
            [[d, _mm512_mul_ps(d, zero)]; 2]
        }
    }
}
