//! The quantised product with AVX-512 and VNNI: four columns of sixteen rows an instruction.
//!
//! # Safety
//! Each unsafe function here needs the instruction sets that its `target_feature` names, which
//! [`Isa::Avx512`](crate::Isa) stands for, and pointers into a group of the format at hand.

use std::arch::x86_64::*;
use std::ops::Range;

use super::activations::{Activations, Scaled, Terms, Token};
use super::amx::integers::{TileProducts, TileSums};
use super::packed::{BLOCK, GROUP, STEPS, integer_bytes, nibble_step};
use super::panel::{GROUPS, Panel, Row};
use super::{Slab, TILE};
use crate::Format;
use crate::formats::ZERO_PARTS;

/// Tokens from which unpacking weights once for all of them pays.
const PANEL_TOKENS: usize = 5;
/// Most tokens that meet a panel at once.
const TOKENS: usize = 8;
/// How far ahead of a single token's products weights are fetched, in bytes.
const AHEAD: usize = 2048;

/// Computes a slab; with tile registers if `tiles`, which are there then.
pub(super) fn run(slab: &Slab<'_>, activations: &Activations<'_>, panel: &mut Panel, tiles: bool) {
    let panel = (panel, tiles);
    // SAFETY: dispatch chose this tier, which Isa::detect() found.
    unsafe {
        match slab.format {
            Format::Q4_0 => groups::<Nibbles, OneScale<-8>>(slab, activations, panel),
            Format::Q4_1 => groups::<Nibbles, ScaleAndMinimum>(slab, activations, panel),
            Format::Q5_0 => groups::<FiveBits, OneScale<-16>>(slab, activations, panel),
            Format::Q5_1 => groups::<FiveBits, ScaleAndMinimum>(slab, activations, panel),
            Format::Q8_0 => groups::<Bytes, OneScale<-128>>(slab, activations, panel),
            Format::Q4_K => groups::<Nibbles, ScaledScales>(slab, activations, panel),
            Format::Q5_K => groups::<FiveBits, ScaledScales>(slab, activations, panel),
            Format::Q6_K => groups::<SixBits, HalfScales>(slab, activations, panel),
            Format::Int8G32 => groups::<Bytes, GroupScale<1>>(slab, activations, panel),
            Format::Int8G64 => groups::<Bytes, GroupScale<2>>(slab, activations, panel),
            Format::Int8G128 => groups::<Bytes, GroupScale<4>>(slab, activations, panel),
            Format::Int4G32 => groups::<Nibbles, GroupScaleAndZero<1>>(slab, activations, panel),
            Format::Int4G64 => groups::<Nibbles, GroupScaleAndZero<2>>(slab, activations, panel),
            Format::Int4G128 => groups::<Nibbles, GroupScaleAndZero<4>>(slab, activations, panel),
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
unsafe fn groups<I: Integers, S: Scales>(
    slab: &Slab<'_>,
    activations: &Activations<'_>,
    (panel, tiles): (&mut Panel, bool),
) {
    // SAFETY: features are those of this function; groups are the slab's own.
    unsafe {
        if slab.tokens < PANEL_TOKENS {
            let work = Few { slab, activations };
            return slab.groups.clone().for_each(|group| work.group::<I, S>(group));
        }
        panel.size(slab.format, slab.cols);
        let width = activations.width();
        let tiles = if tiles { Some(TileProducts::new(S::PARTS, width)) } else { None };
        for tokens in slab.token_blocks(slab.cols / BLOCK * Activations::BLOCK_BYTES) {
            let tiles = tiles.as_ref();
            let mut work = Many { slab, activations, panel, tokens, tiles };
            let mut group = slab.groups.start;
            while group < slab.groups.end {
                group += match slab.groups.end - group {
                    GROUPS.. => work.groups::<I, S, GROUPS>(group),
                    _ => work.groups::<I, S, 1>(group),
                };
            }
        }
    }
}

/// Products with many tokens: weights are unpacked once.
struct Many<'a> {
    slab: &'a Slab<'a>,
    activations: &'a Activations<'a>,
    panel: &'a mut Panel,
    tokens: Range<usize>,
    tiles: Option<&'a TileProducts>,
}

impl Many<'_> {
    /// Computes `G` groups, and returns `G`.
    ///
    /// # Safety
    /// The machine has this tier; groups and tokens are in bounds.
    #[inline(always)]
    unsafe fn groups<I: Integers, S: Scales, const G: usize>(&mut self, group: usize) -> usize {
        // SAFETY: the caller has the features; groups and tokens are the slab's.
        unsafe {
            for place in 0..G {
                self.unpack::<I, S>(place, group + place);
            }
            let mut token = self.tokens.start;
            while token < self.tokens.end {
                if let Some(tiles) = self.tiles {
                    token += self.whole_tile::<S, G>(tiles, group, token);
                    continue;
                }
                let side = self.activations.width() - token % self.activations.width();
                let two = self.activations.two_terms();
                token += match side.min(self.tokens.end - token) {
                    TOKENS.. if two => self.tile::<S, G, TOKENS, true>(group, token),
                    TOKENS.. => self.tile::<S, G, TOKENS, false>(group, token),
                    4.. => self.tile::<S, G, 4, true>(group, token),
                    2.. => self.tile::<S, G, 2, true>(group, token),
                    _ => self.tile::<S, G, 1, true>(group, token),
                };
            }
        }
        G
    }

    /// # Safety
    /// As for [`Many::groups`].
    #[inline(always)]
    unsafe fn unpack<I: Integers, S: Scales>(&mut self, place: usize, group: usize) {
        let (bytes, blocks) = (self.slab.group(group), self.panel.blocks);
        let size = integer_bytes(self.slab.format);
        // SAFETY: the caller has the features; blocks are within the group, and the panel was
        // sized for them.
        unsafe {
            let scales = bytes.as_ptr().add(blocks * size);
            let at = self.panel.at(place, 0);
            let w = self.panel.w.as_mut_ptr().add(at * STEPS);
            let d = self.panel.d.as_mut_ptr().add(at * S::PARTS);
            let m = self.panel.m.as_mut_ptr().add(at * S::PARTS);
            for b in 0..blocks {
                let steps = I::steps(bytes.as_ptr().add(b * size));
                for (s, step) in steps.into_iter().enumerate() {
                    _mm512_store_si512(w.add(b * STEPS + s).cast(), step);
                }
                for (part, [of_w, alone]) in S::of(scales, b)[..S::PARTS].iter().enumerate() {
                    _mm512_store_ps(d.add(b * S::PARTS + part).cast(), *of_w);
                    _mm512_store_ps(m.add(b * S::PARTS + part).cast(), *alone);
                }
            }
        }
    }

    /// Products of the panel's first `G` groups with `T` tokens side by side; returns `T`. An
    /// activation is spread over a register once for all groups: with one from memory in each
    /// product, loads would take longer than products. With `TWO` terms, which is never wrong.
    ///
    /// # Safety
    /// As for [`Many::groups`].
    // A function of its own: within `groups`, there would not be registers for everything.
    #[inline(never)]
    #[target_feature(
        enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni"
    )]
    unsafe fn tile<S: Scales, const G: usize, const T: usize, const TWO: bool>(
        &self,
        group: usize,
        token: usize,
    ) -> usize {
        let (panel, input) = (&*self.panel, self.activations.token(token));
        let (blocks, width) = (panel.blocks, input.width);
        let ahead = self.slab.weight.as_ptr().wrapping_add((group + G) * self.slab.group_bytes());
        let size = if token == self.tokens.start { integer_bytes(self.slab.format) } else { 0 };
        // SAFETY: the caller has the features; blocks are the panel's, tokens lie side by side.
        unsafe {
            let zero = _mm512_setzero_ps();
            let mut sums = [[zero; G]; T];
            for b in 0..blocks {
                for place in 0..G {
                    // The next groups, on their way to the cache while these are in use.
                    let next = ahead.wrapping_add(place * self.slab.group_bytes() + b * size);
                    for line in (0..size).step_by(64) {
                        _mm_prefetch::<_MM_HINT_T1>(next.wrapping_add(line).cast());
                    }
                }
                let terms = input.terms.as_ptr().add(b * width);
                let scaled = input.scaled.as_ptr().add(b * width);
                for part in 0..S::PARTS {
                    let steps = part * STEPS / S::PARTS..(part + 1) * STEPS / S::PARTS;
                    let integers = panel_integers::<G, T, TWO>(panel, b, terms, steps);
                    for t in 0..T {
                        let (scale, sum) = scale_and_sum::<S>(scaled.add(t), part);
                        for g in 0..G {
                            let at = panel.at(g, b) * S::PARTS + part;
                            let d = row(panel.d.as_ptr().add(at));
                            let m = row(panel.m.as_ptr().add(at));
                            let value = _mm512_mul_ps(_mm512_cvtepi32_ps(integers[t][g]), scale);
                            sums[t][g] = _mm512_fmadd_ps(value, d, sums[t][g]);
                            sums[t][g] = _mm512_fmadd_ps(m, sum, sums[t][g]);
                        }
                    }
                }
            }
            for t in 0..T {
                for g in 0..G {
                    let mut values = [0.0; GROUP];
                    _mm512_storeu_ps(values.as_mut_ptr(), sums[t][g]);
                    self.slab.sink.store(token + t, group + g, &values);
                }
            }
        }
        T
    }
}

impl Many<'_> {
    /// Products of the panel's first `G` groups with all tokens that lie side by side with `token`,
    /// the first of them, on tile registers; returns how many they are.
    ///
    /// # Safety
    /// As for [`Many::groups`].
    #[inline(always)]
    unsafe fn whole_tile<S: Scales, const G: usize>(
        &self,
        tiles: &TileProducts,
        group: usize,
        token: usize,
    ) -> usize {
        let (panel, input) = (&*self.panel, self.activations.token(token));
        let (blocks, width) = (panel.blocks, input.width);
        let count = width.min(self.tokens.end - token);
        // SAFETY: the caller has the features; blocks are the panel's, tokens lie side by side.
        unsafe {
            let zero = _mm512_setzero_ps();
            let mut sums = [[zero; TILE]; G];
            let mut integers = TileSums::new();
            for b in 0..blocks {
                for part in 0..S::PARTS {
                    let terms = input.terms.as_ptr().add(b * width);
                    let two = self.activations.two_terms();
                    tiles.multiply(panel, (b, part), (terms, two), &mut integers);
                    let scaled = input.scaled.as_ptr().add(b * width);
                    for g in 0..G {
                        let at = panel.at(g, b) * S::PARTS + part;
                        let d = row(panel.d.as_ptr().add(at));
                        let m = row(panel.m.as_ptr().add(at));
                        for t in 0..count {
                            let high = _mm512_load_si512(integers.high[g][t].as_ptr().cast());
                            let low = _mm512_load_si512(integers.low[g][t].as_ptr().cast());
                            let value = _mm512_add_epi32(_mm512_slli_epi32(high, 8), low);
                            let (scale, sum) = scale_and_sum::<S>(scaled.add(t), part);
                            let value = _mm512_mul_ps(_mm512_cvtepi32_ps(value), scale);
                            sums[g][t] = _mm512_fmadd_ps(value, d, sums[g][t]);
                            sums[g][t] = _mm512_fmadd_ps(m, sum, sums[g][t]);
                        }
                    }
                }
            }
            for g in 0..G {
                for t in 0..count {
                    let mut values = [0.0; GROUP];
                    _mm512_storeu_ps(values.as_mut_ptr(), sums[g][t]);
                    self.slab.sink.store(token + t, group + g, &values);
                }
            }
        }
        count
    }
}

/// Integer products of `G` groups and `T` tokens over some steps of block `b`.
///
/// # Safety
/// The machine has this tier; the panel has block `b` of the groups, `terms` points to as many
/// blocks of tokens side by side.
#[inline(always)]
unsafe fn panel_integers<const G: usize, const T: usize, const TWO: bool>(
    panel: &Panel,
    b: usize,
    terms: *const Terms,
    steps: Range<usize>,
) -> [[__m512i; G]; T] {
    // SAFETY: by contract.
    unsafe {
        let mut sums = [[_mm512_setzero_si512(); G]; T];
        for low in [false, true] {
            if !low && !TWO {
                continue;
            }
            if low && TWO {
                for sums in sums.as_flattened_mut() {
                    *sums = _mm512_slli_epi32(*sums, 8);
                }
            }
            for step in steps.clone() {
                let w: [__m512i; G] = std::array::from_fn(|g| {
                    let at = panel.w.as_ptr().add(panel.at(g, b) * STEPS + step);
                    _mm512_load_si512(at.cast())
                });
                for (t, sums) in sums.iter_mut().enumerate() {
                    let x = _mm512_set1_epi32(four(terms.add(t), low, step));
                    for g in 0..G {
                        sums[g] = _mm512_dpbusd_epi32(sums[g], w[g], x);
                    }
                }
            }
        }
        sums
    }
}

/// Four columns of a token's term.
///
/// # Safety
/// There is a block at `terms`.
#[inline(always)]
unsafe fn four(terms: *const Terms, low: bool, step: usize) -> i32 {
    // SAFETY: by contract; a term has four columns for each step.
    unsafe { terms.cast::<i32>().add(usize::from(low) * STEPS + step).read() }
}

/// A block's scale and the sum of a part's numbers.
///
/// # Safety
/// The machine has this tier, and the block is there.
#[inline(always)]
unsafe fn scale_and_sum<S: Scales>(at: *const Scaled, part: usize) -> (__m512, __m512) {
    // SAFETY: by contract.
    unsafe {
        let sum = if S::PARTS == 1 { (*at).all } else { (*at).halves[part] };
        (_mm512_set1_ps((*at).scale), _mm512_set1_ps(sum))
    }
}

/// # Safety
/// The machine has this tier, and a row is there.
#[inline(always)]
unsafe fn row(at: *const Row) -> __m512 {
    // SAFETY: by contract.
    unsafe { _mm512_load_ps(at.cast()) }
}

/// Products with a few tokens: weights are unpacked in registers, as they come from memory.
struct Few<'a> {
    slab: &'a Slab<'a>,
    activations: &'a Activations<'a>,
}

impl Few<'_> {
    /// # Safety
    /// The machine has this tier; the group is in bounds.
    #[inline(always)]
    unsafe fn group<I: Integers, S: Scales>(&self, group: usize) {
        // SAFETY: the caller has the features; all tokens lie side by side.
        unsafe {
            match self.slab.tokens {
                1 => self.products::<I, S, 1>(group),
                2 => self.products::<I, S, 2>(group),
                3 => self.products::<I, S, 3>(group),
                _ => self.products::<I, S, 4>(group),
            }
        }
    }

    /// Products with `T` tokens: the same operations as for many.
    ///
    /// # Safety
    /// The machine has this tier; the group is in bounds, and there are `T` tokens.
    #[inline(always)]
    unsafe fn products<I: Integers, S: Scales, const T: usize>(&self, group: usize) {
        let slab = self.slab;
        let (bytes, blocks) = (slab.group(group), slab.cols / BLOCK);
        let size = integer_bytes(slab.format);
        let Token { terms, scaled, .. } = self.activations.token(0);
        let two_terms = self.activations.two_terms();
        // SAFETY: the caller has the features; blocks are within the group and the activations,
        // where `T` tokens lie side by side.
        unsafe {
            let scales = bytes.as_ptr().add(blocks * size);
            let mut sums = [_mm512_setzero_ps(); T];
            for b in 0..blocks {
                let at = bytes.as_ptr().add(b * size);
                // Beyond the group's end lies the next one, or nothing that harms.
                for line in (0..size).step_by(64) {
                    _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(AHEAD + line).cast());
                }
                let (w, scales) = (I::steps(at), S::of(scales, b));
                let (terms, scaled) = (terms.as_ptr().add(b * T), scaled.as_ptr().add(b * T));
                for part in 0..S::PARTS {
                    let steps = part * STEPS / S::PARTS..(part + 1) * STEPS / S::PARTS;
                    let integers = integers::<T>(&w, (terms, two_terms), steps);
                    let [d, m] = scales[part];
                    for t in 0..T {
                        let (scale, sum) = scale_and_sum::<S>(scaled.add(t), part);
                        let value = _mm512_mul_ps(_mm512_cvtepi32_ps(integers[t]), scale);
                        sums[t] = _mm512_fmadd_ps(value, d, sums[t]);
                        sums[t] = _mm512_fmadd_ps(m, sum, sums[t]);
                    }
                }
            }
            for (t, sums) in sums.into_iter().enumerate() {
                let mut values = [0.0; GROUP];
                _mm512_storeu_ps(values.as_mut_ptr(), sums);
                slab.sink.store(t, group, &values);
            }
        }
    }
}

/// Integer products of `T` tokens over some steps of a block. With few tokens a chain of sums is
/// what takes time: the terms get one each.
///
/// # Safety
/// The machine has this tier; `terms` points to a block of `T` tokens side by side.
#[inline(always)]
unsafe fn integers<const T: usize>(
    w: &[__m512i; STEPS],
    (terms, two_terms): (*const Terms, bool),
    steps: Range<usize>,
) -> [__m512i; T] {
    // SAFETY: by contract.
    unsafe {
        let term = |low: bool| {
            let mut sums = [_mm512_setzero_si512(); T];
            for step in steps.clone() {
                for (t, sum) in sums.iter_mut().enumerate() {
                    let x = _mm512_set1_epi32(four(terms.add(t), low, step));
                    *sum = _mm512_dpbusd_epi32(*sum, w[step], x);
                }
            }
            sums
        };
        let mut sums = term(true);
        if two_terms {
            for (sum, high) in sums.iter_mut().zip(term(false)) {
                *sum = _mm512_add_epi32(_mm512_slli_epi32(high, 8), *sum);
            }
        }
        sums
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

/// One scale for `BLOCKS` blocks of signed bytes.
struct GroupScale<const BLOCKS: usize>;
impl<const BLOCKS: usize> Scales for GroupScale<BLOCKS> {
    const PARTS: usize = 1;
    /// # Safety
    /// As for [`Scales::of`].
    #[inline(always)]
    unsafe fn of(at: *const u8, b: usize) -> [[__m512; 2]; 2] {
        // SAFETY: those of Q8_0, once for a group.
        unsafe { OneScale::<-128>::of(at, b / BLOCKS) }
    }
}

/// One scale for `BLOCKS` blocks, and a zero point in parts.
struct GroupScaleAndZero<const BLOCKS: usize>;
impl<const BLOCKS: usize> Scales for GroupScaleAndZero<BLOCKS> {
    const PARTS: usize = 1;
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
