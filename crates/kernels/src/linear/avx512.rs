//! The quantised product with AVX-512 and VNNI: 64 weights an instruction, decoded in registers.
//!
//! # Safety
//! Each unsafe function here needs the instruction sets that its `target_feature` names, which
//! [`Isa::Avx512`](crate::Isa) stands for, and pointers or slices that cover a whole chunk.

use std::arch::x86_64::*;

use super::activations::{TERMS, Token};
use super::chunk::Chunk;
use super::{Activations, CHUNK, Slab};
use crate::Format;
use crate::formats::q4_k_scale_min;
use crate::lanes::{LANES, sum};

/// Tokens from which rows are decoded to memory once instead of in registers each time.
const PANEL_TOKENS: usize = 9;
/// Rows in a panel: what a group of tokens is used for before the next group is read.
const PANEL_ROWS: usize = 4;

/// Computes a slab.
pub(super) fn run(slab: &Slab<'_>, activations: &Activations) {
    // SAFETY: dispatch chose this tier, which Isa::detect() found.
    unsafe {
        match slab.format {
            Format::Q4_0 => rows::<Q4_0>(slab, activations),
            Format::Q4_1 => rows::<Q4_1>(slab, activations),
            Format::Q5_0 => rows::<Q5_0>(slab, activations),
            Format::Q5_1 => rows::<Q5_1>(slab, activations),
            Format::Q8_0 => rows::<Q8_0>(slab, activations),
            Format::Q4_K => rows::<Q4K>(slab, activations),
            Format::Q5_K => rows::<Q5K>(slab, activations),
            Format::Q6_K => rows::<Q6K>(slab, activations),
            Format::F32 | Format::F16 | Format::BF16 => unreachable!("dense formats go elsewhere"),
        }
    }
}

/// 64 weights in registers: `d * w + m` by lane of four.
struct Weights {
    w: __m512i,
    d: __m512,
    m: __m512,
}

/// A block format: decodes chunk `index` of a row.
trait Codec {
    /// # Safety
    /// The row has the chunk, and the tier's features are there.
    unsafe fn chunk(row: &[u8], index: usize) -> Weights;
}

/// Where the weights of a row come from.
trait Source: Copy {
    /// # Safety
    /// As for [`Codec::chunk`].
    unsafe fn chunk(self, index: usize) -> Weights;
}

/// A row as stored.
struct Packed<'a, C>(&'a [u8], std::marker::PhantomData<C>);

impl<C> Clone for Packed<'_, C> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<C> Copy for Packed<'_, C> {}

impl<C: Codec> Source for Packed<'_, C> {
    /// # Safety
    /// As for [`Source::chunk`].
    #[inline(always)]
    unsafe fn chunk(self, index: usize) -> Weights {
        // SAFETY: the caller's contract.
        unsafe { C::chunk(self.0, index) }
    }
}

impl Source for &[Chunk] {
    /// # Safety
    /// As for [`Source::chunk`].
    #[inline(always)]
    unsafe fn chunk(self, index: usize) -> Weights {
        let chunk = &self[index];
        // SAFETY: each array is 64 bytes.
        unsafe {
            Weights {
                w: _mm512_loadu_si512(chunk.w.as_ptr().cast()),
                d: _mm512_loadu_ps(chunk.d.as_ptr()),
                m: _mm512_loadu_ps(chunk.m.as_ptr()),
            }
        }
    }
}

/// # Safety
/// The machine has this tier; rows, chunks and tokens are in bounds.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")]
unsafe fn rows<C: Codec>(slab: &Slab<'_>, activations: &Activations) {
    let chunks = slab.cols.div_ceil(CHUNK);
    let bytes = |row: usize| &slab.weight[row * slab.row_bytes..][..slab.row_bytes];
    if slab.tokens < PANEL_TOKENS {
        for row in slab.rows.clone() {
            let source = Packed::<C>(bytes(row), std::marker::PhantomData);
            // SAFETY: features are those of this function; the row is the slab's own.
            unsafe { tokens(slab, row, source, 0..slab.tokens, activations) };
        }
        return;
    }
    let mut panel = vec![Chunk::ZERO; chunks * PANEL_ROWS];
    let mut first = slab.rows.start;
    while first < slab.rows.end {
        let count = PANEL_ROWS.min(slab.rows.end - first);
        for r in 0..count {
            for (index, chunk) in panel[r * chunks..][..chunks].iter_mut().enumerate() {
                // SAFETY: the row has `chunks` chunks; each array is 64 bytes.
                unsafe {
                    let weights = C::chunk(bytes(first + r), index);
                    _mm512_storeu_si512(chunk.w.as_mut_ptr().cast(), weights.w);
                    _mm512_storeu_ps(chunk.d.as_mut_ptr(), weights.d);
                    _mm512_storeu_ps(chunk.m.as_mut_ptr(), weights.m);
                }
            }
        }
        for start in (0..slab.tokens).step_by(GROUP) {
            let group = start..slab.tokens.min(start + GROUP);
            for r in 0..count {
                let source = &panel[r * chunks..][..chunks];
                // SAFETY: features are those of this function; the row is the slab's own.
                unsafe { tokens(slab, first + r, source, group.clone(), activations) };
            }
        }
        first += count;
    }
}

/// Most tokens that share a pass over a row: two sums each in 32 registers, with room to work.
const GROUP: usize = 8;

/// Products of one row with a range of tokens.
///
/// # Safety
/// The machine has this tier; rows, chunks and tokens are in bounds.
#[inline(always)]
unsafe fn tokens<S: Source>(
    slab: &Slab<'_>,
    row: usize,
    source: S,
    range: std::ops::Range<usize>,
    activations: &Activations,
) {
    let mut token = range.start;
    while token < range.end {
        // SAFETY: the caller has the features; rows and tokens are the slab's.
        token += unsafe {
            match range.end - token {
                GROUP.. => dot::<S, GROUP>(slab, row, source, token, activations),
                4.. => dot::<S, 4>(slab, row, source, token, activations),
                2.. => dot::<S, 2>(slab, row, source, token, activations),
                _ => dot::<S, 1>(slab, row, source, token, activations),
            }
        };
    }
}

/// Products of one row with `T` tokens from `token`; the same operations for every `T`. Returns
/// `T`.
///
/// # Safety
/// The machine has this tier; rows, chunks and tokens are in bounds.
#[inline(always)]
unsafe fn dot<S: Source, const T: usize>(
    slab: &Slab<'_>,
    row: usize,
    source: S,
    token: usize,
    activations: &Activations,
) -> usize {
    let inputs: [Token<'_>; T] = std::array::from_fn(|t| activations.token(token + t));
    let chunks = inputs[0].terms.len();
    // SAFETY: the caller has the features; `index` is below the number of chunks, and each array
    // that is loaded has 64 bytes.
    unsafe {
        let mut products = [_mm512_setzero_ps(); T];
        let mut minima = [_mm512_setzero_ps(); T];
        for index in 0..chunks {
            let weights = source.chunk(index);
            for t in 0..T {
                let terms = inputs[t].terms.get_unchecked(index);
                let lanes = inputs[t].lanes.get_unchecked(index);
                let load = |term: &[i8; CHUNK]| _mm512_loadu_si512(term.as_ptr().cast());
                let zero = _mm512_setzero_si512();
                let mut integers = _mm512_dpbusd_epi32(zero, weights.w, load(&terms[0]));
                if TERMS == 2 {
                    integers = _mm512_slli_epi32(integers, 8);
                    let low = load(&terms[TERMS - 1]);
                    integers = _mm512_dpbusd_epi32(integers, weights.w, low);
                }
                let factor = _mm512_mul_ps(weights.d, _mm512_loadu_ps(lanes[0].as_ptr()));
                let value = _mm512_cvtepi32_ps(integers);
                products[t] = _mm512_fmadd_ps(value, factor, products[t]);
                let sums = _mm512_loadu_ps(lanes[1].as_ptr());
                minima[t] = _mm512_fmadd_ps(weights.m, sums, minima[t]);
            }
        }
        for t in 0..T {
            let mut lanes = [0.0; LANES];
            _mm512_storeu_ps(lanes.as_mut_ptr(), _mm512_add_ps(products[t], minima[t]));
            slab.sink.store(token + t, row, sum(lanes));
        }
    }
    T
}

/// Two blocks of 32: the bytes of each, and zeros for a second one that the row does not have.
#[inline(always)]
fn two_blocks<const BYTES: usize>(row: &[u8], index: usize) -> (&[u8; BYTES], &[u8; BYTES]) {
    let blocks = row.as_chunks::<BYTES>().0;
    (&blocks[index * 2], blocks.get(index * 2 + 1).unwrap_or(&[0; BYTES]))
}

/// One half-precision number per block, spread over its eight lanes.
///
/// # Safety
/// The machine has this tier; rows, chunks and tokens are in bounds.
#[inline(always)]
unsafe fn spread<const BYTES: usize>(a: &[u8; BYTES], b: &[u8; BYTES], at: usize) -> __m512 {
    let half = |block: &[u8; BYTES]| i16::from_le_bytes([block[at], block[at + 1]]);
    // SAFETY: register operations of the caller's features.
    unsafe {
        let both = _mm256_set_m128i(_mm_set1_epi16(half(b)), _mm_set1_epi16(half(a)));
        _mm512_cvtph_ps(both)
    }
}

/// 16 bytes of nibbles from each block: low ones first.
///
/// # Safety
/// The machine has this tier; rows, chunks and tokens are in bounds.
#[inline(always)]
unsafe fn nibbles<const BYTES: usize>(a: &[u8; BYTES], b: &[u8; BYTES], at: usize) -> __m512i {
    let load = |block: &[u8; BYTES]| {
        let bytes: &[u8; 16] = block[at..].first_chunk().expect("blocks end with 16 bytes");
        // SAFETY: 16 bytes.
        unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) }
    };
    // SAFETY: register operations of the caller's features.
    unsafe {
        let (a, b) = (_mm256_broadcastsi128_si256(load(a)), _mm256_broadcastsi128_si256(load(b)));
        let both = _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1);
        let shifted = _mm512_mask_srli_epi16(both, 0xff00_ff00, both, 4);
        _mm512_and_si512(shifted, _mm512_set1_epi8(15))
    }
}

/// Sets bit 4 of each byte whose bit in the blocks' 32-bit words is set.
///
/// # Safety
/// The machine has this tier; rows, chunks and tokens are in bounds.
#[inline(always)]
unsafe fn fifth_bits<const BYTES: usize>(
    w: __m512i,
    a: &[u8; BYTES],
    b: &[u8; BYTES],
    at: usize,
) -> __m512i {
    let word = |block: &[u8; BYTES]| {
        u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]])
    };
    let mask = u64::from(word(a)) | u64::from(word(b)) << 32;
    // SAFETY: register operations of the caller's features.
    unsafe { _mm512_or_si512(w, _mm512_maskz_set1_epi8(mask, 16)) }
}

/// # Safety
/// The machine has this tier; rows, chunks and tokens are in bounds.
#[inline(always)]
unsafe fn scaled(d: __m512, by: f32) -> __m512 {
    // SAFETY: register operations of the caller's features.
    unsafe { _mm512_mul_ps(d, _mm512_set1_ps(by)) }
}

#[allow(non_camel_case_types)]
struct Q4_0;
impl Codec for Q4_0 {
    /// # Safety
    /// As for [`Source::chunk`].
    #[inline(always)]
    unsafe fn chunk(row: &[u8], index: usize) -> Weights {
        let (a, b) = two_blocks::<18>(row, index);
        // SAFETY: register operations of the caller's features.
        unsafe {
            let d = spread(a, b, 0);
            Weights { w: nibbles(a, b, 2), d, m: scaled(d, -8.0) }
        }
    }
}

#[allow(non_camel_case_types)]
struct Q4_1;
impl Codec for Q4_1 {
    /// # Safety
    /// As for [`Source::chunk`].
    #[inline(always)]
    unsafe fn chunk(row: &[u8], index: usize) -> Weights {
        let (a, b) = two_blocks::<20>(row, index);
        // SAFETY: register operations of the caller's features.
        unsafe { Weights { w: nibbles(a, b, 4), d: spread(a, b, 0), m: spread(a, b, 2) } }
    }
}

#[allow(non_camel_case_types)]
struct Q5_0;
impl Codec for Q5_0 {
    /// # Safety
    /// As for [`Source::chunk`].
    #[inline(always)]
    unsafe fn chunk(row: &[u8], index: usize) -> Weights {
        let (a, b) = two_blocks::<22>(row, index);
        // SAFETY: register operations of the caller's features.
        unsafe {
            let d = spread(a, b, 0);
            let w = fifth_bits(nibbles(a, b, 6), a, b, 2);
            Weights { w, d, m: scaled(d, -16.0) }
        }
    }
}

#[allow(non_camel_case_types)]
struct Q5_1;
impl Codec for Q5_1 {
    /// # Safety
    /// As for [`Source::chunk`].
    #[inline(always)]
    unsafe fn chunk(row: &[u8], index: usize) -> Weights {
        let (a, b) = two_blocks::<24>(row, index);
        // SAFETY: register operations of the caller's features.
        unsafe {
            let w = fifth_bits(nibbles(a, b, 8), a, b, 4);
            Weights { w, d: spread(a, b, 0), m: spread(a, b, 2) }
        }
    }
}

#[allow(non_camel_case_types)]
struct Q8_0;
impl Codec for Q8_0 {
    /// # Safety
    /// As for [`Source::chunk`].
    #[inline(always)]
    unsafe fn chunk(row: &[u8], index: usize) -> Weights {
        let (a, b) = two_blocks::<34>(row, index);
        // SAFETY: 32 bytes follow each block's scale.
        unsafe {
            let load = |block: &[u8; 34]| _mm256_loadu_si256(block[2..].as_ptr().cast());
            let both = _mm512_inserti64x4(_mm512_castsi256_si512(load(a)), load(b), 1);
            let w = _mm512_xor_si512(both, _mm512_set1_epi8(-128));
            let d = spread(a, b, 0);
            Weights { w, d, m: scaled(d, -128.0) }
        }
    }
}

/// Lanes of two sub-blocks of 32.
///
/// # Safety
/// The machine has this tier; rows, chunks and tokens are in bounds.
#[inline(always)]
unsafe fn halves(low: f32, high: f32) -> __m512 {
    // SAFETY: register operations of the caller's features.
    unsafe { _mm512_insertf32x8(_mm512_set1_ps(low), _mm256_set1_ps(high), 1) }
}

/// 32 bytes of nibbles: the low ones, then the high ones.
///
/// # Safety
/// The machine has this tier; rows, chunks and tokens are in bounds.
#[inline(always)]
unsafe fn nibbles_of_32(bytes: &[u8; 32]) -> __m512i {
    // SAFETY: 32 bytes are loaded; register operations of the caller's features.
    unsafe {
        let low = _mm256_loadu_si256(bytes.as_ptr().cast());
        let high = _mm256_srli_epi16(low, 4);
        let both = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
        _mm512_and_si512(both, _mm512_set1_epi8(15))
    }
}

/// Factors of sub-blocks `2 * part` and the next of a Q4_K or Q5_K super-block.
///
/// # Safety
/// The machine has this tier; rows, chunks and tokens are in bounds.
#[inline(always)]
unsafe fn k_factors<const BYTES: usize>(block: &[u8; BYTES], part: usize) -> (__m512, __m512) {
    let (d, minimum) = (half_of(block, 0), half_of(block, 2));
    let scales = &block[4..16];
    let (s0, m0) = q4_k_scale_min(scales, 2 * part);
    let (s1, m1) = q4_k_scale_min(scales, 2 * part + 1);
    // SAFETY: register operations of the caller's features.
    unsafe {
        let scale = halves(d * f32::from(s0), d * f32::from(s1));
        let least = halves(-(minimum * f32::from(m0)), -(minimum * f32::from(m1)));
        (scale, least)
    }
}

/// The half-precision number at a byte offset, by the conversion instruction.
#[inline(always)]
fn half_of<const BYTES: usize>(block: &[u8; BYTES], at: usize) -> f32 {
    let bits = i32::from(u16::from_le_bytes([block[at], block[at + 1]]));
    // SAFETY: callers run on this tier, which has F16C.
    unsafe { _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(bits))) }
}

struct Q4K;
impl Codec for Q4K {
    /// # Safety
    /// As for [`Source::chunk`].
    #[inline(always)]
    unsafe fn chunk(row: &[u8], index: usize) -> Weights {
        let block = &row.as_chunks::<144>().0[index / 4];
        let bytes = &block[16..].as_chunks::<32>().0[index % 4];
        // SAFETY: register operations of the caller's features.
        unsafe {
            let (d, m) = k_factors(block, index % 4);
            Weights { w: nibbles_of_32(bytes), d, m }
        }
    }
}

struct Q5K;
impl Codec for Q5K {
    /// # Safety
    /// As for [`Source::chunk`].
    #[inline(always)]
    unsafe fn chunk(row: &[u8], index: usize) -> Weights {
        let block = &row.as_chunks::<176>().0[index / 4];
        let bytes = &block[48..].as_chunks::<32>().0[index % 4];
        // SAFETY: 32 bytes are loaded; register operations of the caller's features.
        unsafe {
            let high = _mm256_loadu_si256(block[16..].as_ptr().cast());
            let low_bit = _mm256_set1_epi8(1 << (2 * (index % 4)));
            let high_bit = _mm256_set1_epi8((2u8 << (2 * (index % 4))) as i8);
            let mask = u64::from(_mm256_test_epi8_mask(high, low_bit))
                | u64::from(_mm256_test_epi8_mask(high, high_bit)) << 32;
            let fifth = _mm512_maskz_set1_epi8(mask, 16);
            let (d, m) = k_factors(block, index % 4);
            Weights { w: _mm512_or_si512(nibbles_of_32(bytes), fifth), d, m }
        }
    }
}

struct Q6K;
impl Codec for Q6K {
    /// # Safety
    /// As for [`Source::chunk`].
    #[inline(always)]
    unsafe fn chunk(row: &[u8], index: usize) -> Weights {
        let block = &row.as_chunks::<210>().0[index / 4];
        let part = index % 4;
        // SAFETY: 64 bytes at 64 * (part / 2), 32 at 128 + 32 * (part / 2) and 4 at 192 + 4 * part
        // lie within the block's 210; register operations of the caller's features.
        unsafe {
            let low = _mm512_loadu_si512(block[part / 2 * 64..].as_ptr().cast());
            let high = _mm256_loadu_si256(block[128 + part / 2 * 32..].as_ptr().cast());
            let shift = _mm_cvtsi32_si128((part % 2 * 4) as i32);
            let low = _mm512_and_si512(_mm512_srl_epi16(low, shift), _mm512_set1_epi8(15));
            let high = _mm256_srl_epi16(high, shift);
            let next = _mm256_srli_epi16(high, 2);
            let pairs = _mm512_inserti64x4(_mm512_castsi256_si512(high), next, 1);
            let pairs = _mm512_and_si512(pairs, _mm512_set1_epi8(3));
            let w = _mm512_or_si512(low, _mm512_slli_epi16(pairs, 4));
            let scales: &[u8; 4] = block[192 + part * 4..].first_chunk().expect("16 scales");
            let four = _mm_cvtepi8_epi32(_mm_cvtsi32_si128(i32::from_le_bytes(*scales)));
            let spread = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
            let four = _mm512_castps128_ps512(_mm_cvtepi32_ps(four));
            let scales = _mm512_permutexvar_ps(spread, four);
            let d = _mm512_mul_ps(scales, _mm512_set1_ps(half_of(block, 208)));
            Weights { w, d, m: scaled(d, -32.0) }
        }
    }
}
