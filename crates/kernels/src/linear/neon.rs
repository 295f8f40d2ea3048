//! The quantised product with NEON: four columns of four rows an instruction.
//!
//! Four registers hold a step of a block, and one holds sixteen columns of a token, of which a dot
//! product takes any four. Both sides have signs: bytes of few tokens come so, those of many are
//! turned once for all groups of rows of a panel. With a few tokens, weights are unpacked in
//! registers as they come from memory, and what is the centre of formats without minima is taken
//! from sums, not from weights.
//!
//! # Safety
//! Each unsafe function here needs what [`Isa::Neon`](crate::Isa) stands for, which all machines of
//! the kind have, and dot products where [`Sdot`] is named; pointers are into a group of the format
//! at hand.

use std::arch::aarch64::*;
use std::arch::asm;
use std::array::from_fn;
use std::ops::Range;

use super::Slab;
use super::activations::{ActivationBits, Activations, Scaled, Term};
use super::jobs::FEW;
use super::packed::{self, BLOCK, GROUP, SUPER, bits, factors_at, integer_bytes};
use super::panel::{GROUPS, Panel, Row, Step};
use crate::Format;
use crate::formats::ZERO_PARTS;

/// Registers that a step fills: four rows each.
const QUARTERS: usize = GROUP / 4;
/// In place of the bits of packed weights: those of a panel are bytes with signs.
const UNPACKED: usize = 0;

/// Activations of `T` tokens as signed bytes: `[token][term][half of the block]`.
type Signed<const T: usize, const TERMS: usize> = [[[int8x16_t; 2]; TERMS]; T];
/// Sums of `T` tokens.
type Sums<const T: usize> = [[float32x4_t; QUARTERS]; T];
/// `d` and `m` of each part of a block; those of the first part alone where there is one.
type Numbers = [[Row; 2]; 2];

/// Computes a slab; with instructions for dot products if `dots`, which are there then.
pub(super) fn run(slab: &Slab<'_>, activations: &Activations<'_>, panel: &mut Panel, dots: bool) {
    // SAFETY: dispatch chose this tier, which Isa::detect() found.
    unsafe {
        match dots {
            true => with_dots(slab, activations, panel),
            false => groups::<Smull>(slab, activations, panel),
        }
    }
}

/// # Safety
/// The machine has dot products; groups and tokens are in bounds.
#[target_feature(enable = "neon,dotprod")]
unsafe fn with_dots(slab: &Slab<'_>, activations: &Activations<'_>, panel: &mut Panel) {
    // SAFETY: by contract.
    unsafe { groups::<Sdot>(slab, activations, panel) };
}

/// # Safety
/// The machine has this tier; groups and tokens are in bounds.
#[inline(always)]
unsafe fn groups<D: Dot>(slab: &Slab<'_>, activations: &Activations<'_>, panel: &mut Panel) {
    // SAFETY: by contract.
    unsafe {
        if slab.all_tokens <= FEW {
            let few = Few { slab, activations };
            return match bits(slab.format) {
                4 => few.groups::<D, 4, 1>(),
                5 => few.groups::<D, 5, 1>(),
                6 => few.groups::<D, 6, 2>(),
                _ => few.groups::<D, 8, 1>(),
            };
        }
        panel.size(slab.format, slab.cols);
        for first in slab.groups.clone().step_by(GROUPS) {
            let groups = first..slab.groups.end.min(first + GROUPS);
            match bits(slab.format) {
                4 => unpack::<4>(slab, &groups, panel),
                5 => unpack::<5>(slab, &groups, panel),
                6 => unpack::<6>(slab, &groups, panel),
                _ => unpack::<8>(slab, &groups, panel),
            }
            let many = Many { slab, activations, panel, groups };
            match (panel.parts, activations.bits()) {
                (1, ActivationBits::Eight) => many.tokens::<D, 1, 4, 1>(),
                (1, ActivationBits::Sixteen) => many.tokens::<D, 1, 4, 2>(),
                (_, ActivationBits::Eight) => many.tokens::<D, 2, 4, 1>(),
                (_, ActivationBits::Sixteen) => many.tokens::<D, 2, 4, 2>(),
            }
        }
    }
}

/// Sums of products of bytes.
trait Dot {
    /// Adds four steps of four rows with sixteen columns of a token.
    ///
    /// # Safety
    /// The machine has the instructions.
    unsafe fn add(sums: int32x4_t, w: [int8x16_t; 4], x: int8x16_t) -> int32x4_t;
}

/// Four products and their sum an instruction. Stable Rust has no name for it.
struct Sdot;

impl Dot for Sdot {
    /// # Safety
    /// As for [`Dot::add`].
    #[inline(always)]
    unsafe fn add(mut sums: int32x4_t, w: [int8x16_t; 4], x: int8x16_t) -> int32x4_t {
        // SAFETY: register operations, which the machine has by contract.
        unsafe {
            asm!(
                "sdot {sums:v}.4s, {a:v}.16b, {x:v}.4b[0]",
                "sdot {sums:v}.4s, {b:v}.16b, {x:v}.4b[1]",
                "sdot {sums:v}.4s, {c:v}.16b, {x:v}.4b[2]",
                "sdot {sums:v}.4s, {d:v}.16b, {x:v}.4b[3]",
                sums = inout(vreg) sums,
                a = in(vreg) w[0],
                b = in(vreg) w[1],
                c = in(vreg) w[2],
                d = in(vreg) w[3],
                x = in(vreg) x,
                options(pure, nomem, nostack, preserves_flags)
            );
        }
        sums
    }
}

/// Products of 16 bits, added in pairs: two of them would not fit.
struct Smull;

impl Dot for Smull {
    /// # Safety
    /// As for [`Dot::add`].
    #[inline(always)]
    unsafe fn add(sums: int32x4_t, w: [int8x16_t; 4], x: int8x16_t) -> int32x4_t {
        // SAFETY: register operations that all machines have.
        unsafe {
            let x = vreinterpretq_s32_s8(x);
            let x = [
                vdupq_laneq_s32::<0>(x),
                vdupq_laneq_s32::<1>(x),
                vdupq_laneq_s32::<2>(x),
                vdupq_laneq_s32::<3>(x),
            ];
            // Two sums of two columns for each row.
            let (mut low, mut high) = (vdupq_n_s32(0), vdupq_n_s32(0));
            for (w, x) in w.into_iter().zip(x) {
                let x = vreinterpretq_s8_s32(x);
                low = vpadalq_s16(low, vmull_s8(vget_low_s8(w), vget_low_s8(x)));
                high = vpadalq_s16(high, vmull_high_s8(w, x));
            }
            vaddq_s32(sums, vpaddq_s32(low, high))
        }
    }
}

/// A block of sixteen rows.
struct Block<'a> {
    /// Its integers: packed, or a panel's.
    w: *const u8,
    /// `d` and `m` of each part.
    numbers: [[&'a Row; 2]; 2],
    minima: bool,
    /// What is to be taken from each weight still.
    centre: i32,
}

/// Adds the products of a block of `PARTS` parts with `T` tokens to sums; weights have `BITS`.
///
/// # Safety
/// The machine has this tier; the block is there, and so are the scales of `T` tokens.
#[inline(always)]
unsafe fn add<D: Dot, const BITS: usize, const PARTS: usize, const T: usize, const TERMS: usize>(
    block: &Block<'_>,
    x: &Signed<T, TERMS>,
    scaled: *const Scaled,
    sums: &mut Sums<T>,
) {
    for quarter in 0..QUARTERS {
        for part in 0..PARTS {
            // SAFETY: by contract.
            unsafe {
                let mut integers = [vdupq_n_s32(0); T];
                for term in 0..TERMS {
                    if term > 0 {
                        // The high term came first.
                        integers = integers.map(|high| vshlq_n_s32::<8>(high));
                    }
                    for half in part * 2 / PARTS..(part + 1) * 2 / PARTS {
                        let w = from_fn(|s| weights::<BITS>(block.w, half * 4 + s, quarter));
                        for t in 0..T {
                            integers[t] = D::add(integers[t], w, x[t][term][half]);
                        }
                    }
                }
                let [d, m] = block.numbers[part].map(|row| vld1q_f32(&row.0[4 * quarter]));
                for t in 0..T {
                    let scaled = &*scaled.add(t);
                    if BITS != UNPACKED {
                        let [low, high] = scaled.halves;
                        let sum = if PARTS == 1 { low + high } else { scaled.halves[part] };
                        let centre = vdupq_n_s32(sum * block.centre);
                        integers[t] = vsubq_s32(integers[t], centre);
                    }
                    let value = vmulq_n_f32(vcvtq_f32_s32(integers[t]), scaled.scale);
                    sums[t][quarter] = vfmaq_f32(sums[t][quarter], value, d);
                }
                if block.minima {
                    for t in 0..T {
                        let sum = vdupq_n_f32((*scaled.add(t)).sum);
                        sums[t][quarter] = vfmaq_f32(sums[t][quarter], m, sum);
                    }
                }
            }
        }
    }
}

/// Four rows of a step, less the centre where they would not be signed bytes otherwise.
///
/// # Safety
/// The machine has this tier; `at` is a block of such weights.
#[inline(always)]
unsafe fn weights<const BITS: usize>(at: *const u8, step: usize, quarter: usize) -> int8x16_t {
    // SAFETY: a block has these bytes; see `packed`.
    unsafe {
        let vector = |index: usize| vld1q_u8(at.add(index * 64 + quarter * 16));
        let nibbles = || {
            let both = vector(step / 4 * 2 + step % 2);
            if step % 4 < 2 { vandq_u8(both, vdupq_n_u8(15)) } else { vshrq_n_u8::<4>(both) }
        };
        vreinterpretq_s8_u8(match BITS {
            4 => nibbles(),
            5 => {
                // A bit for each byte, of the two bytes that have the quarter's.
                let bytes = vcombine_u8(vdup_n_u8(0), vdup_n_u8(1));
                let bit = vreinterpretq_u8_u64(vdupq_n_u64(0x8040_2010_0804_0201));
                let two = at.add(256 + step * 8 + quarter * 2).cast::<u16>().read_unaligned();
                let spread = vqtbl1q_u8(vreinterpretq_u8_u16(vdupq_n_u16(two)), bytes);
                vorrq_u8(nibbles(), vandq_u8(vtstq_u8(spread, bit), vdupq_n_u8(16)))
            }
            6 => {
                let four = vector(4 + step / 4);
                let upper = match step % 4 {
                    0 => vshlq_n_u8::<4>(four),
                    1 => vshlq_n_u8::<2>(four),
                    2 => four,
                    _ => vshrq_n_u8::<2>(four),
                };
                vorrq_u8(nibbles(), vandq_u8(upper, vdupq_n_u8(48)))
            }
            8 => veorq_u8(vector(step), vdupq_n_u8(128)),
            _ => vector(step),
        })
    }
}

/// What [`weights`] of these bits have not had taken from them.
fn centre_left(format: Format) -> i8 {
    if bits(format) == 8 { 0 } else { packed::centre(format) }
}

/// A block's scales and minima.
///
/// # Safety
/// The machine has this tier; `at` is a group's numbers, which reach to block `b`.
#[inline(always)]
unsafe fn numbers(format: Format, at: *const u8, b: usize) -> Numbers {
    let mut numbers = [[Row([0.0; GROUP]); 2]; 2];
    for q in 0..QUARTERS {
        // SAFETY: by contract; see `packed` for where numbers lie.
        unsafe {
            let k = b / SUPER * SUPER;
            let (start, own) = (at.add(factors_at(format, k)), at.add(factors_at(format, b)));
            let half = |at: *const u8| {
                vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(at.add(8 * q).cast())))
            };
            let four = |at: *const u8| {
                vcreate_u8(u64::from(at.add(4 * q).cast::<u32>().read_unaligned()))
            };
            let unsigned = |at: *const u8| {
                vcvtq_f32_u32(vmovl_u16(vget_low_u16(vmovl_u8(four(at)))))
            };
            let signed = |at: *const u8| {
                let wide = vmovl_s8(vreinterpret_s8_u8(four(at)));
                vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide)))
            };
            let mut put = |part: usize, which: usize, value: float32x4_t| {
                vst1q_f32(&mut numbers[part][which].0[4 * q], value);
            };
            match format {
                Format::Q4_K | Format::Q5_K => {
                    let own = start.add(64 + (b - k) * 32);
                    put(0, 0, vmulq_f32(half(start), unsigned(own)));
                    put(0, 1, vnegq_f32(vmulq_f32(half(start.add(32)), unsigned(own.add(16)))));
                }
                Format::Q6_K => {
                    let own = start.add(32 + (b - k) * 32);
                    put(0, 0, vmulq_f32(half(start), signed(own)));
                    put(1, 0, vmulq_f32(half(start), signed(own.add(16))));
                }
                Format::Q4_1 | Format::Q5_1 => {
                    put(0, 0, half(own));
                    put(0, 1, half(own.add(32)));
                }
                _ if format.is_int4() => {
                    let zero = vmulq_n_f32(unsigned(own.add(32)), -1.0 / ZERO_PARTS);
                    put(0, 0, half(own));
                    put(0, 1, vmulq_f32(half(own), zero));
                }
                _ => put(0, 0, half(own)),
            }
        }
    }
    numbers
}

/// A block's activations of `T` tokens that lie side by side, with their signs. They lack them if
/// `MANY`: then each number is greater by 128, or by 32,768 where there are two terms.
///
/// # Safety
/// The machine has this tier; `terms` points to as many.
#[inline(always)]
unsafe fn signed<const T: usize, const TERMS: usize, const MANY: bool>(
    terms: *const Term,
) -> Signed<T, TERMS> {
    // SAFETY: by contract.
    unsafe {
        let load = |t: usize, term: usize, half: usize| {
            vld1q_u8(terms.add(t * TERMS + term).cast::<u8>().add(16 * half))
        };
        from_fn(|t| {
            from_fn(|term| {
                from_fn(|half| {
                    let mut x = load(t, term, half);
                    if MANY && term == 0 {
                        x = veorq_u8(x, vdupq_n_u8(128));
                        if TERMS == 2 {
                            // A low term with a sign takes from the high one what its sign means.
                            x = vsraq_n_u8::<7>(x, load(t, 1, half));
                        }
                    }
                    vreinterpretq_s8_u8(x)
                })
            })
        })
    }
}

/// Stores a group's sums.
///
/// # Safety
/// The machine has this tier; group and tokens are the slab's.
#[inline(always)]
unsafe fn store(slab: &Slab<'_>, token: usize, group: usize, sums: &[float32x4_t; QUARTERS]) {
    let mut values = [0.0; GROUP];
    // SAFETY: by contract; room for sixteen numbers.
    unsafe {
        for (values, sums) in values.as_chunks_mut::<4>().0.iter_mut().zip(sums) {
            vst1q_f32(values.as_mut_ptr(), *sums);
        }
        slab.sink.store(token, group, &values);
    }
}

/// Products with a few tokens: weights are unpacked in registers, as they come from memory.
struct Few<'a> {
    slab: &'a Slab<'a>,
    activations: &'a Activations<'a>,
}

impl Few<'_> {
    /// # Safety
    /// The machine has this tier; groups and tokens are in bounds.
    #[inline(always)]
    unsafe fn groups<D: Dot, const BITS: usize, const PARTS: usize>(&self) {
        for group in self.slab.groups.clone() {
            // SAFETY: by contract.
            unsafe {
                match (self.slab.all_tokens, self.activations.bits()) {
                    (1, ActivationBits::Eight) => self.group::<D, BITS, PARTS, 1, 1>(group),
                    (2, ActivationBits::Eight) => self.group::<D, BITS, PARTS, 2, 1>(group),
                    (3, ActivationBits::Eight) => self.group::<D, BITS, PARTS, 3, 1>(group),
                    (_, ActivationBits::Eight) => self.group::<D, BITS, PARTS, 4, 1>(group),
                    (1, ActivationBits::Sixteen) => self.group::<D, BITS, PARTS, 1, 2>(group),
                    (2, ActivationBits::Sixteen) => self.group::<D, BITS, PARTS, 2, 2>(group),
                    (3, ActivationBits::Sixteen) => self.group::<D, BITS, PARTS, 3, 2>(group),
                    (_, ActivationBits::Sixteen) => self.group::<D, BITS, PARTS, 4, 2>(group),
                }
            }
        }
    }

    /// # Safety
    /// As for [`Few::groups`]; there are `T` tokens, which lie side by side.
    #[inline(always)]
    unsafe fn group<
        D: Dot,
        const BITS: usize,
        const PARTS: usize,
        const T: usize,
        const TERMS: usize,
    >(
        &self,
        group: usize,
    ) {
        let (slab, format) = (self.slab, self.slab.format);
        let (blocks, size) = (slab.cols / BLOCK, integer_bytes(format));
        let (minima, centre) = (packed::has_minima(format), i32::from(centre_left(format)));
        let bytes = slab.group(group).as_ptr();
        // SAFETY: by contract; blocks are within the group and the activations.
        unsafe {
            let mut sums = [[vdupq_n_f32(0.0); QUARTERS]; T];
            for b in 0..blocks {
                let numbers = numbers(format, bytes.add(blocks * size), b);
                let numbers = numbers.each_ref().map(|part| part.each_ref());
                let block = Block { w: bytes.add(b * size), numbers, minima, centre };
                let x = signed::<T, TERMS, false>(self.activations.terms(0, b).as_ptr());
                let scaled = self.activations.scaled(0, b).as_ptr();
                add::<D, BITS, PARTS, T, TERMS>(&block, &x, scaled, &mut sums);
            }
            for (t, sums) in sums.iter().enumerate() {
                store(slab, t, group, sums);
            }
        }
    }
}

/// Unpacks groups.
///
/// # Safety
/// The machine has this tier; the groups are the slab's, and the panel is sized for them.
#[inline(always)]
unsafe fn unpack<const BITS: usize>(slab: &Slab<'_>, groups: &Range<usize>, panel: &mut Panel) {
    let size = integer_bytes(slab.format);
    for (place, group) in groups.clone().enumerate() {
        let bytes = slab.group(group).as_ptr();
        for b in 0..panel.blocks {
            let at = panel.steps(place, b);
            // SAFETY: by contract.
            unsafe {
                let centre = vdupq_n_s8(centre_left(slab.format));
                for (step, Step(w)) in panel.w[at..].iter_mut().enumerate().take(BLOCK / 4) {
                    let to = w.as_mut_ptr().cast::<i8>();
                    for quarter in 0..QUARTERS {
                        let w = weights::<BITS>(bytes.add(b * size), step, quarter);
                        vst1q_s8(to.add(16 * quarter), vsubq_s8(w, centre));
                    }
                }
                let numbers = numbers(slab.format, bytes.add(panel.blocks * size), b);
                for (part, [d, m]) in numbers[..panel.parts].iter().enumerate() {
                    let at = panel.part(place, b, part);
                    (panel.d[at], panel.m[at]) = (*d, *m);
                }
            }
        }
    }
}

/// Products of a panel with many tokens.
struct Many<'a> {
    slab: &'a Slab<'a>,
    activations: &'a Activations<'a>,
    panel: &'a Panel,
    /// Those that the panel has; it may have room for more.
    groups: Range<usize>,
}

impl Many<'_> {
    /// All of them, `T` at a time: beyond the last are others that are not looked at.
    ///
    /// # Safety
    /// The machine has this tier; groups and tokens are in bounds.
    #[inline(always)]
    unsafe fn tokens<D: Dot, const PARTS: usize, const T: usize, const TERMS: usize>(&self) {
        let (slab, panel) = (self.slab, self.panel);
        let minima = packed::has_minima(slab.format);
        for token in slab.tokens.clone().step_by(T) {
            // SAFETY: by contract; the panel has the blocks, and the tokens lie side by side.
            unsafe {
                let mut sums = [[[vdupq_n_f32(0.0); QUARTERS]; T]; GROUPS];
                for b in 0..panel.blocks {
                    let x = signed::<T, TERMS, true>(self.activations.terms(token, b).as_ptr());
                    let scaled = self.activations.scaled(token, b).as_ptr();
                    for (place, sums) in sums[..self.groups.len()].iter_mut().enumerate() {
                        let numbers = from_fn(|part| {
                            let at = panel.part(place, b, part % PARTS);
                            [&panel.d[at], &panel.m[at]]
                        });
                        let w = panel.w[panel.steps(place, b)..].as_ptr().cast();
                        let block = Block { w, numbers, minima, centre: 0 };
                        add::<D, UNPACKED, PARTS, T, TERMS>(&block, &x, scaled, sums);
                    }
                }
                for (group, sums) in self.groups.clone().zip(&sums) {
                    for (token, sums) in (token..slab.tokens.end).zip(sums) {
                        store(slab, token, group, sums);
                    }
                }
            }
        }
    }
}
