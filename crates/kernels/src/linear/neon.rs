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
use super::packed::{self, GROUP, STEPS, SUPER, bits, factors_at, integer_bytes};
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
/// `d` and `m` of four rows.
type Numbers = [float32x4_t; 2];

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
    let (format, few) = (slab.format, slab.all_tokens <= FEW);
    panel.size(format, slab.cols);
    for first in slab.groups.clone().step_by(GROUPS) {
        let groups = first..slab.groups.end.min(first + GROUPS);
        for (place, group) in groups.clone().enumerate() {
            let bytes = slab.group(group);
            take_numbers(format, bytes, place, panel);
            if !few {
                unpack(format, bytes, place, panel);
            }
        }
        let work = Work { slab, activations, panel, groups };
        // SAFETY: by contract.
        unsafe {
            match (bits(format), activations.bits()) {
                (4, _) if few => work.few::<D, 4, 1>(),
                (5, _) if few => work.few::<D, 5, 1>(),
                (6, _) if few => work.few::<D, 6, 2>(),
                (_, _) if few => work.few::<D, 8, 1>(),
                (6, ActivationBits::Eight) => work.many::<D, 2, 4, 1>(),
                (6, ActivationBits::Sixteen) => work.many::<D, 2, 4, 2>(),
                (_, ActivationBits::Eight) => work.many::<D, 1, 4, 1>(),
                (_, ActivationBits::Sixteen) => work.many::<D, 1, 4, 2>(),
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
struct Block {
    /// Its integers: packed, or the panel's.
    w: *const u8,
    /// The panel's numbers, those of a second part `GROUPS` further.
    d: *const Row,
    m: *const Row,
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
    block: &Block,
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
                let row = part * GROUPS;
                let d = vld1q_f32(&(*block.d.add(row)).0[4 * quarter]);
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
                    let m = vld1q_f32(&(*block.m.add(row)).0[4 * quarter]);
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

/// The centre that [`weights`] have still.
fn centre_left(format: Format) -> i8 {
    if bits(format) == 8 { 0 } else { packed::centre(format) }
}

/// Widens a group's scales and minima into place `place` of the panel.
fn take_numbers(format: Format, group: &[u8], place: usize, panel: &mut Panel) {
    let at = group[panel.blocks * integer_bytes(format)..].as_ptr();
    // SAFETY: a group has numbers for the panel's blocks; see `packed` for where they lie.
    unsafe {
        let own = |b: usize| at.add(factors_at(format, b));
        // Of a K format: where its superblock starts, and the block's own bytes.
        let k = |b: usize, head: usize| {
            let start = own(b / SUPER * SUPER);
            (start, start.add(head + b % SUPER * 32))
        };
        let none = vdupq_n_f32(0.0);
        match format {
            Format::Q4_K | Format::Q5_K => fill(panel, place, |b, _, q| {
                let (start, own) = k(b, 64);
                let minimum = vmulq_f32(halves(start.add(32), q), bytes(own.add(16), q));
                [vmulq_f32(halves(start, q), bytes(own, q)), vnegq_f32(minimum)]
            }),
            Format::Q6_K => fill(panel, place, |b, part, q| {
                let (start, own) = k(b, 32);
                let scale = vmovl_s8(vreinterpret_s8_u8(four(own.add(16 * part), q)));
                let scale = vcvtq_f32_s32(vmovl_s16(vget_low_s16(scale)));
                [vmulq_f32(halves(start, q), scale), none]
            }),
            Format::Q4_1 | Format::Q5_1 => fill(panel, place, |b, _, q| {
                let own = own(b);
                [halves(own, q), halves(own.add(32), q)]
            }),
            _ if format.is_int4() => fill(panel, place, |b, _, q| {
                let own = own(b);
                let zero = vmulq_n_f32(bytes(own.add(32), q), -1.0 / ZERO_PARTS);
                [halves(own, q), vmulq_f32(halves(own, q), zero)]
            }),
            _ => fill(panel, place, |b, _, q| [halves(own(b), q), none]),
        }
    }
}

/// Fills a place of the panel with what `of` gives for blocks, parts and quarters.
#[inline(always)]
fn fill(panel: &mut Panel, place: usize, of: impl Fn(usize, usize, usize) -> Numbers) {
    for b in 0..panel.blocks {
        for part in 0..panel.parts {
            let at = panel.part(place, b, part);
            let (Row(ds), Row(ms)) = (&mut panel.d[at], &mut panel.m[at]);
            for (q, (d, m)) in
                ds.as_chunks_mut::<4>().0.iter_mut().zip(ms.as_chunks_mut::<4>().0).enumerate()
            {
                let numbers = of(b, part, q);
                // SAFETY: all machines have NEON; four numbers each.
                unsafe {
                    vst1q_f32(d.as_mut_ptr(), numbers[0]);
                    vst1q_f32(m.as_mut_ptr(), numbers[1]);
                }
            }
        }
    }
}

/// Half-precision numbers of a quarter.
///
/// # Safety
/// Those of sixteen rows are at `at`.
#[inline(always)]
unsafe fn halves(at: *const u8, quarter: usize) -> float32x4_t {
    // SAFETY: by contract.
    unsafe { vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(at.add(8 * quarter).cast()))) }
}

/// Bytes of a quarter; the upper half is zero.
///
/// # Safety
/// Those of sixteen rows are at `at`.
#[inline(always)]
unsafe fn four(at: *const u8, quarter: usize) -> uint8x8_t {
    // SAFETY: by contract.
    unsafe { vcreate_u8(u64::from(at.add(4 * quarter).cast::<u32>().read_unaligned())) }
}

/// Unsigned bytes of a quarter.
///
/// # Safety
/// As for [`four`].
#[inline(always)]
unsafe fn bytes(at: *const u8, quarter: usize) -> float32x4_t {
    // SAFETY: by contract.
    unsafe { vcvtq_f32_u32(vmovl_u16(vget_low_u16(vmovl_u8(four(at, quarter))))) }
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

/// Some groups of rows, and what they meet.
struct Work<'a> {
    slab: &'a Slab<'a>,
    activations: &'a Activations<'a>,
    /// Has the groups' numbers, and for many tokens their weights.
    panel: &'a Panel,
    groups: Range<usize>,
}

impl Work<'_> {
    /// A block of the group at `place`, whose weights are at `w`.
    #[inline(always)]
    fn block(&self, place: usize, b: usize, w: *const u8, centre: i8) -> Block {
        let minima = packed::has_minima(self.slab.format);
        let (d, m) = (&self.panel.d, &self.panel.m);
        let (parts, centre) = (self.panel.part(place, b, 0).., i32::from(centre));
        Block { w, d: d[parts.clone()].as_ptr(), m: m[parts].as_ptr(), minima, centre }
    }

    /// Products with a few tokens.
    ///
    /// # Safety
    /// The machine has this tier; groups and tokens are in bounds.
    #[inline(always)]
    unsafe fn few<D: Dot, const BITS: usize, const PARTS: usize>(&self) {
        // SAFETY: by contract.
        unsafe {
            match (self.slab.all_tokens, self.activations.bits()) {
                (1, ActivationBits::Eight) => self.packed::<D, BITS, PARTS, 1, 1>(),
                (2, ActivationBits::Eight) => self.packed::<D, BITS, PARTS, 2, 1>(),
                (3, ActivationBits::Eight) => self.packed::<D, BITS, PARTS, 3, 1>(),
                (_, ActivationBits::Eight) => self.packed::<D, BITS, PARTS, 4, 1>(),
                (1, ActivationBits::Sixteen) => self.packed::<D, BITS, PARTS, 1, 2>(),
                (2, ActivationBits::Sixteen) => self.packed::<D, BITS, PARTS, 2, 2>(),
                (3, ActivationBits::Sixteen) => self.packed::<D, BITS, PARTS, 3, 2>(),
                (_, ActivationBits::Sixteen) => self.packed::<D, BITS, PARTS, 4, 2>(),
            }
        }
    }

    /// Products of weights as they come from memory with `T` tokens, which lie side by side.
    ///
    /// # Safety
    /// As for [`Work::few`].
    #[inline(always)]
    unsafe fn packed<
        D: Dot,
        const BITS: usize,
        const PARTS: usize,
        const T: usize,
        const TERMS: usize,
    >(
        &self,
    ) {
        let (size, centre) = (integer_bytes(self.slab.format), centre_left(self.slab.format));
        for (place, group) in self.groups.clone().enumerate() {
            let bytes = self.slab.group(group).as_ptr();
            // SAFETY: by contract; blocks are within the group and the activations.
            unsafe {
                let mut sums = [[vdupq_n_f32(0.0); QUARTERS]; T];
                for b in 0..self.panel.blocks {
                    let block = self.block(place, b, bytes.add(b * size), centre);
                    let x = signed::<T, TERMS, false>(self.activations.terms(0, b).as_ptr());
                    let scaled = self.activations.scaled(0, b).as_ptr();
                    add::<D, BITS, PARTS, T, TERMS>(&block, &x, scaled, &mut sums);
                }
                for (t, sums) in sums.iter().enumerate() {
                    store(self.slab, t, group, sums);
                }
            }
        }
    }

    /// Products of the panel's weights with all tokens, `T` at a time: beyond the last are others
    /// that are not looked at.
    ///
    /// # Safety
    /// The machine has this tier; groups and tokens are in bounds, and the panel has the groups.
    #[inline(always)]
    unsafe fn many<D: Dot, const PARTS: usize, const T: usize, const TERMS: usize>(&self) {
        for token in self.slab.tokens.clone().step_by(T) {
            // SAFETY: by contract; the tokens lie side by side.
            unsafe {
                let mut sums = [[[vdupq_n_f32(0.0); QUARTERS]; T]; GROUPS];
                for b in 0..self.panel.blocks {
                    let x = signed::<T, TERMS, true>(self.activations.terms(token, b).as_ptr());
                    let scaled = self.activations.scaled(token, b).as_ptr();
                    for (place, sums) in sums[..self.groups.len()].iter_mut().enumerate() {
                        let w = self.panel.w[self.panel.steps(place, b)..].as_ptr().cast();
                        let block = self.block(place, b, w, 0);
                        add::<D, UNPACKED, PARTS, T, TERMS>(&block, &x, scaled, sums);
                    }
                }
                for (group, sums) in self.groups.clone().zip(&sums) {
                    for (token, sums) in (token..self.slab.tokens.end).zip(sums) {
                        store(self.slab, token, group, sums);
                    }
                }
            }
        }
    }
}

/// Unpacks a group's integers into place `place` of the panel.
fn unpack(format: Format, group: &[u8], place: usize, panel: &mut Panel) {
    let size = integer_bytes(format);
    for (b, bytes) in group.chunks_exact(size).enumerate().take(panel.blocks) {
        let at = panel.steps(place, b);
        let steps = panel.w[at..].first_chunk_mut().expect("the panel has all blocks");
        // SAFETY: these are a block's bytes.
        unsafe {
            match bits(format) {
                4 => unpack_block::<4>(format, bytes.as_ptr(), steps),
                5 => unpack_block::<5>(format, bytes.as_ptr(), steps),
                6 => unpack_block::<6>(format, bytes.as_ptr(), steps),
                _ => unpack_block::<8>(format, bytes.as_ptr(), steps),
            }
        }
    }
}

/// # Safety
/// A block of such weights is at `at`.
#[inline(always)]
unsafe fn unpack_block<const BITS: usize>(format: Format, at: *const u8, to: &mut [Step; STEPS]) {
    for (step, Step(to)) in to.iter_mut().enumerate() {
        let to = to.as_flattened_mut().as_chunks_mut::<16>().0;
        for (quarter, to) in to.iter_mut().enumerate() {
            // SAFETY: by contract; sixteen bytes each.
            unsafe {
                let w = weights::<BITS>(at, step, quarter);
                vst1q_s8(to.as_mut_ptr(), vsubq_s8(w, vdupq_n_s8(centre_left(format))));
            }
        }
    }
}
