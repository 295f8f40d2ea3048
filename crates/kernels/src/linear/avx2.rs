//! The quantised product with AVX2: two columns of eight rows an instruction, as 16-bit integers.
//!
//! Instructions that multiply bytes saturate with 8-bit weights; those for 16-bit integers are
//! exact with weights and activations of any format, and take activations of 16 bits in one term.
//! Even and odd columns are told apart by shifts alone: of four that fill a lane, the first and the
//! third make a pair, and the second and the fourth.
//!
//! # Safety
//! Each unsafe function here needs AVX2, FMA and F16C, which [`Isa::Avx2`](crate::Isa) stands for.

use std::arch::x86_64::*;

use super::Slab;
use super::activations::{ActivationBits, Activations, Form};
use super::packed::{
    self, BLOCK, GROUP, STEPS, SUPER, bits, factors_at, integer_bytes, nibble_step,
};
use super::panel::Panel;
use crate::Format;
use crate::formats::ZERO_PARTS;

/// A block of sixteen rows as pairs of 16-bit integers: `[step][first or second pair][row]`.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Pairs([[[[i16; 2]; GROUP]; 2]; STEPS]);

/// A block of a token: `[first or second pair][step]`.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Words([[[i16; 2]; STEPS]; 2]);

/// A worker's memory.
#[derive(Default)]
pub(super) struct Memory {
    /// Of a group: `[blocks]`.
    w: Vec<Pairs>,
    /// Of the tokens at hand: `[tokens, blocks]`.
    x: Vec<Words>,
}

/// Computes a slab.
pub(super) fn run(slab: &Slab<'_>, activations: &Activations<'_>, panel: &mut Panel) {
    // SAFETY: dispatch chose this tier, which Isa::detect() found.
    unsafe { groups(slab, activations, panel) };
}

/// # Safety
/// The machine has this tier; groups and tokens are in bounds.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn groups(slab: &Slab<'_>, activations: &Activations<'_>, panel: &mut Panel) {
    panel.size(slab.format, slab.cols);
    let blocks = panel.blocks;
    let mut memory = std::mem::take(&mut panel.words);
    memory.x.resize(slab.tokens.len() * blocks, Words([[[0; 2]; STEPS]; 2]));
    for (token, x) in slab.tokens.clone().zip(memory.x.chunks_exact_mut(blocks)) {
        for (b, x) in x.iter_mut().enumerate() {
            // SAFETY: by contract.
            unsafe { *x = words(activations, token, b) };
        }
    }
    memory.w.resize(blocks, Pairs([[[[0; 2]; GROUP]; 2]; STEPS]));
    for group in slab.groups.clone() {
        let (integers, numbers) = slab.group(group).split_at(blocks * integer_bytes(slab.format));
        let integers = integers.chunks_exact(integer_bytes(slab.format));
        for (b, (pairs, integers)) in memory.w.iter_mut().zip(integers).enumerate() {
            // SAFETY: by contract.
            unsafe {
                unpack(slab.format, integers, pairs);
                take_factors(slab.format, numbers.as_ptr(), b, panel);
            }
        }
        let work = One { slab, activations, panel, memory: &memory, group };
        let mut token = slab.tokens.start;
        while token < slab.tokens.end {
            // SAFETY: by contract.
            token += unsafe {
                match slab.tokens.end - token {
                    4.. => work.products::<4>(token),
                    2.. => work.products::<2>(token),
                    _ => work.products::<1>(token),
                }
            };
        }
    }
    panel.words = memory;
}

/// A block's activations with their signs.
///
/// # Safety
/// The machine has this tier.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn words(activations: &Activations<'_>, token: usize, block: usize) -> Words {
    let terms = activations.terms(token, block);
    // SAFETY: there are as many terms as there are bits for.
    unsafe {
        let pairs = |term: usize, signed: bool| {
            let bytes = _mm256_loadu_si256(terms[term].0.as_ptr().cast());
            if signed {
                [_mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 8), _mm256_srai_epi16(bytes, 8)]
            } else {
                [_mm256_and_si256(bytes, _mm256_set1_epi16(255)), _mm256_srli_epi16(bytes, 8)]
            }
        };
        let signed = activations.form() == Form::Signed;
        let words = match activations.bits() {
            ActivationBits::Eight => {
                let moved = _mm256_set1_epi16(if signed { 0 } else { 128 });
                pairs(0, signed).map(|pairs| _mm256_sub_epi16(pairs, moved))
            }
            ActivationBits::Sixteen => {
                // The high term's sign is not looked at: it falls off.
                let (high, low) = (pairs(0, false), pairs(1, signed));
                let moved = _mm256_set1_epi16(if signed { 0 } else { i16::MIN });
                std::array::from_fn(|i| {
                    let high = _mm256_sub_epi16(_mm256_slli_epi16(high[i], 8), moved);
                    _mm256_add_epi16(high, low[i])
                })
            }
        };
        std::mem::transmute(words)
    }
}

/// A group, and what it is multiplied by.
struct One<'a> {
    slab: &'a Slab<'a>,
    activations: &'a Activations<'a>,
    panel: &'a Panel,
    memory: &'a Memory,
    group: usize,
}

impl One<'_> {
    /// Products with `T` tokens; returns `T`.
    ///
    /// # Safety
    /// The machine has this tier; the tokens are in bounds.
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn products<const T: usize>(&self, token: usize) -> usize {
        let (panel, blocks) = (self.panel, self.panel.blocks);
        let minima = packed::has_minima(self.slab.format);
        let first = (token - self.slab.tokens.start) * blocks;
        let mut sums = [[_mm256_setzero_ps(); 2]; T];
        for b in 0..blocks {
            let x: [&Words; T] = std::array::from_fn(|t| &self.memory.x[first + t * blocks + b]);
            for part in 0..panel.parts {
                let at = panel.part(0, b, part);
                // SAFETY: numbers of sixteen rows each.
                let (d, m) = unsafe { (halves(&panel.d[at].0), halves(&panel.m[at].0)) };
                // SAFETY: by contract.
                let integers = unsafe {
                    match panel.parts {
                        1 => integers::<T, 0, STEPS>(&self.memory.w[b], x),
                        _ if part == 0 => integers::<T, 0, { STEPS / 2 }>(&self.memory.w[b], x),
                        _ => integers::<T, { STEPS / 2 }, STEPS>(&self.memory.w[b], x),
                    }
                };
                for t in 0..T {
                    let scaled = self.activations.scaled(token + t, b)[0];
                    let scale = _mm256_set1_ps(scaled.scale);
                    for h in 0..2 {
                        let value = _mm256_mul_ps(_mm256_cvtepi32_ps(integers[t][h]), scale);
                        sums[t][h] = _mm256_fmadd_ps(value, d[h], sums[t][h]);
                        if minima {
                            let sum = _mm256_set1_ps(scaled.sum);
                            sums[t][h] = _mm256_fmadd_ps(m[h], sum, sums[t][h]);
                        }
                    }
                }
            }
        }
        for (t, sums) in sums.iter().enumerate() {
            let mut values = [0.0f32; GROUP];
            // SAFETY: room for sixteen numbers; group and tokens are the slab's.
            unsafe {
                _mm256_storeu_ps(values.as_mut_ptr(), sums[0]);
                _mm256_storeu_ps(values.as_mut_ptr().add(GROUP / 2), sums[1]);
                self.slab.sink.store(token + t, self.group, &values);
            }
        }
        T
    }
}

/// # Safety
/// The machine has this tier.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn halves(row: &[f32; GROUP]) -> [__m256; 2] {
    // SAFETY: sixteen numbers.
    unsafe { [_mm256_loadu_ps(row.as_ptr()), _mm256_loadu_ps(row.as_ptr().add(GROUP / 2))] }
}

/// Integer products of a block over steps `FROM..TO`.
///
/// # Safety
/// The machine has this tier.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn integers<const T: usize, const FROM: usize, const TO: usize>(
    w: &Pairs,
    x: [&Words; T],
) -> [[__m256i; 2]; T] {
    let mut sums = [[_mm256_setzero_si256(); 2]; T];
    for step in FROM..TO {
        for pair in 0..2 {
            let rows = w.0[step][pair].as_ptr().cast::<__m256i>();
            // SAFETY: sixteen pairs fill two registers.
            let w = unsafe { [_mm256_load_si256(rows), _mm256_load_si256(rows.add(1))] };
            for t in 0..T {
                // SAFETY: two numbers, read at once.
                let two = unsafe { x[t].0[pair][step].as_ptr().cast::<i32>().read_unaligned() };
                let two = _mm256_set1_epi32(two);
                for h in 0..2 {
                    sums[t][h] = _mm256_add_epi32(sums[t][h], _mm256_madd_epi16(w[h], two));
                }
            }
        }
    }
    sums
}

/// Widens a block's scales and minima into the panel.
///
/// # Safety
/// The machine has this tier; `at` is a group's numbers, which reach to block `b`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn take_factors(format: Format, at: *const u8, b: usize, panel: &mut Panel) {
    // SAFETY: by contract; see `packed` for where numbers lie.
    unsafe {
        let k = b / SUPER * SUPER;
        let (start, own) = (at.add(factors_at(format, k)), at.add(factors_at(format, b)));
        for h in 0..2 {
            // The half's eight rows.
            let half = |at: *const u8| _mm256_cvtph_ps(_mm_loadu_si128(at.add(h * 16).cast()));
            let bytes = |at: *const u8| _mm_loadl_epi64(at.add(h * 8).cast());
            let unsigned = |at: *const u8| _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes(at)));
            let signed = |at: *const u8| _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes(at)));
            let mut put = |part: usize, d: __m256, m: __m256| {
                let index = panel.part(0, b, part);
                _mm256_storeu_ps(panel.d[index].0.as_mut_ptr().add(h * 8), d);
                _mm256_storeu_ps(panel.m[index].0.as_mut_ptr().add(h * 8), m);
            };
            let none = _mm256_setzero_ps();
            match format {
                Format::Q4_K | Format::Q5_K => {
                    let own = start.add(64 + (b - k) * 32);
                    let minimum = _mm256_mul_ps(half(start.add(32)), unsigned(own.add(16)));
                    let minimum = _mm256_xor_ps(minimum, _mm256_set1_ps(-0.0));
                    put(0, _mm256_mul_ps(half(start), unsigned(own)), minimum);
                }
                Format::Q6_K => {
                    let own = start.add(32 + (b - k) * 32);
                    put(0, _mm256_mul_ps(half(start), signed(own)), none);
                    put(1, _mm256_mul_ps(half(start), signed(own.add(16))), none);
                }
                Format::Q4_1 | Format::Q5_1 => put(0, half(own), half(own.add(32))),
                _ if format.is_int4() => {
                    let zero = unsigned(own.add(32));
                    let zero = _mm256_mul_ps(zero, _mm256_set1_ps(-1.0 / ZERO_PARTS));
                    put(0, half(own), _mm256_mul_ps(half(own), zero));
                }
                _ => put(0, half(own), none),
            }
        }
    }
}

/// Unpacks a block's integers.
///
/// # Safety
/// The machine has this tier; the bytes are those of a block.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn unpack(format: Format, bytes: &[u8], pairs: &mut Pairs) {
    let (bits, centre) = (bits(format), _mm256_set1_epi8(packed::centre(format)));
    let at = bytes.as_ptr();
    for half in 0..2 {
        // SAFETY: a block has these bytes; see `packed`.
        unsafe {
            let vector = |index: usize| _mm256_loadu_si256(at.add(index * 64 + half * 32).cast());
            let mut steps = [_mm256_setzero_si256(); STEPS];
            if bits == 8 {
                for (s, step) in steps.iter_mut().enumerate() {
                    *step = vector(s);
                }
            } else {
                let mask = _mm256_set1_epi8(15);
                for j in 0..4 {
                    let (both, step) = (vector(j), nibble_step(j));
                    steps[step] = _mm256_and_si256(both, mask);
                    steps[step + 2] = _mm256_and_si256(_mm256_srli_epi16(both, 4), mask);
                }
            }
            for (s, step) in steps.iter_mut().enumerate() {
                let upper = match bits {
                    5 => fifth(at.add(256 + s * 8 + half * 4).cast::<i32>().read_unaligned()),
                    6 => {
                        let (two, mask) = (vector(4 + s / 4), _mm256_set1_epi8(48));
                        let shifted = match s % 4 {
                            0 => _mm256_slli_epi16(two, 4),
                            1 => _mm256_slli_epi16(two, 2),
                            2 => two,
                            _ => _mm256_srli_epi16(two, 2),
                        };
                        _mm256_and_si256(shifted, mask)
                    }
                    _ => _mm256_setzero_si256(),
                };
                let w = _mm256_sub_epi8(_mm256_or_si256(*step, upper), centre);
                let even = _mm256_srai_epi16(_mm256_slli_epi16(w, 8), 8);
                let odd = _mm256_srai_epi16(w, 8);
                for (pair, w) in [even, odd].into_iter().enumerate() {
                    let rows = pairs.0[s][pair].as_mut_ptr().cast::<__m256i>();
                    _mm256_store_si256(rows.add(half), w);
                }
            }
        }
    }
}

/// 16 for each bit that is set, a byte for each.
///
/// # Safety
/// The machine has this tier.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn fifth(mask: i32) -> __m256i {
    let byte =
        _mm256_setr_epi64x(0, 0x0101_0101_0101_0101, 0x0202_0202_0202_0202, 0x0303_0303_0303_0303);
    let bit = _mm256_set1_epi64x(0x8040_2010_0804_0201u64 as i64);
    let spread = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(mask), byte), bit);
    _mm256_and_si256(_mm256_cmpeq_epi8(spread, bit), _mm256_set1_epi8(16))
}

const _: () = assert!(size_of::<Pairs>() == 2 * GROUP * BLOCK && size_of::<Words>() == 2 * BLOCK);
