//! The quantised product with AVX-512 and VNNI: four columns of sixteen rows an instruction.
//!
//! # Safety
//! Each unsafe function here needs the instruction sets that its `target_feature` names, which
//! [`Isa::Avx512`](crate::Isa) stands for, and pointers into a group of the format at hand.

mod few;
mod formats;
mod tile;

use std::arch::x86_64::*;
use std::mem::take;
use std::ops::Range;

use few::Few;
use formats::{
    Bytes, FiveBits, GroupScale, GroupScaleAndZero, HalfScales, Integers, Nibbles, OneScale,
    ScaleAndMinimum, ScaledScales, Scales, SixBits,
};
use tile::{Block, Sums, TOKENS};

use super::activations::{ActivationBits, Activations, Scaled};
use super::amx::integers::{TileProducts, TileSums};
use super::jobs::FEW;
use super::packed::{GROUP, STEPS, integer_bytes};
use super::panel::{GROUPS, Panel, Row};
use super::{Sink, Slab, TILE};
use crate::Format;

/// What the first block's products are added to.
static NO_SUMS: Sums = [[Row([0.0; GROUP]); GROUPS]; TOKENS];
/// Blocks of columns that many tokens meet before the next ones are unpacked: with sums and
/// activations of eight tokens, they stay in a first cache of 32 KiB.
const TOGETHER: usize = 8;
/// Up to so many tokens meet all blocks at once: to come back to their sums would cost more.
const AT_ONCE: usize = 64;

/// Computes a slab; with tile registers if `tiles`, which are there then.
pub(super) fn run(slab: &Slab<'_>, activations: &Activations<'_>, panel: &mut Panel, tiles: bool) {
    let panel = (panel, tiles);
    // SAFETY: dispatch chose this tier, which Isa::detect() found.
    unsafe {
        match slab.format {
            Format::Q4_0 => groups::<Nibbles, OneScale<8>>(slab, activations, panel),
            Format::Q4_1 => groups::<Nibbles, ScaleAndMinimum>(slab, activations, panel),
            Format::Q5_0 => groups::<FiveBits, OneScale<16>>(slab, activations, panel),
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
        if slab.all_tokens <= FEW {
            let work = Few { slab, activations };
            return work.groups::<I, S>(slab.groups.clone());
        }
        panel.size(slab.format, slab.cols);
        let width = activations.width();
        let tiles = if tiles { Some(TileProducts::new(S::PARTS, width)) } else { None };
        let two = activations.bits() == ActivationBits::Sixteen;
        let mut sums = take(&mut panel.sums);
        for first in slab.groups.clone().step_by(GROUPS) {
            let groups = first..slab.groups.end.min(first + GROUPS);
            let mut many = Many { slab, activations, panel, groups };
            match &tiles {
                Some(tiles) => many.on_tile_registers::<I, S>(tiles),
                None if two => many.on_vectors::<I, S, true>(&mut sums),
                None => many.on_vectors::<I, S, false>(&mut sums),
            }
        }
        panel.sums = sums;
    }
}

/// A block's integers with their signs.
///
/// # Safety
/// As for [`Integers::steps`].
#[inline(always)]
unsafe fn centred<I: Integers, S: Scales>(at: *const u8) -> [__m512i; STEPS] {
    // SAFETY: by contract.
    unsafe {
        let mut steps = I::steps(at);
        if S::CENTRE != 0 {
            let centre = _mm512_set1_epi8(S::CENTRE);
            for step in &mut steps {
                *step = _mm512_sub_epi8(*step, centre);
            }
        }
        steps
    }
}

/// What sums over some steps begin with, so that they end as if activations, which are 128 more
/// than they should be, had their signs.
///
/// # Safety
/// The machine has this tier.
#[inline(always)]
unsafe fn start(w: &[__m512i; STEPS], steps: Range<usize>) -> __m512i {
    // SAFETY: register operations of the caller's features.
    unsafe {
        let (mut sum, offset) = (_mm512_setzero_si512(), _mm512_set1_epi8(-128));
        for step in steps {
            sum = _mm512_dpbusd_epi32(sum, offset, w[step]);
        }
        _mm512_sub_epi32(_mm512_setzero_si512(), sum)
    }
}

/// Bytes to be sent for, some with each step.
pub(super) struct Fetch {
    at: *const u8,
    /// How far a step goes, and in how many lines: always as many, so that there is nothing to
    /// guess.
    step: usize,
    lines: usize,
}

impl Fetch {
    /// So many bytes in so many steps.
    pub(super) fn new(at: *const u8, bytes: usize, steps: usize) -> Fetch {
        let step = bytes.div_ceil(steps.max(1));
        Fetch { at, step, lines: step.div_ceil(64) }
    }

    #[inline(always)]
    pub(super) fn fetch(&mut self) {
        for line in 0..self.lines {
            // SAFETY: nothing is read: what is not there is not fetched.
            unsafe { _mm_prefetch::<_MM_HINT_T1>(self.at.wrapping_add(line * 64).cast()) };
        }
        self.at = self.at.wrapping_add(self.step);
    }
}

impl Sink<'_> {
    /// Stores the products of some groups with some tokens, which have a row of `sums` each.
    ///
    /// # Safety
    /// Tokens and groups are in bounds, and no other worker stores these groups of these tokens.
    #[inline(always)]
    unsafe fn store_panel(
        &self,
        tokens: Range<usize>,
        groups: Range<usize>,
        sums: &[[Row; GROUPS]],
    ) {
        let first = groups.start * GROUP;
        // Mostly a panel is full, and can be stored without a look at each of its groups.
        let full =
            self.bias.is_none() && groups.len() == GROUPS && first + GROUPS * GROUP <= self.rows;
        for (token, sums) in tokens.zip(sums) {
            if !full {
                for (group, Row(sums)) in groups.clone().zip(sums) {
                    // SAFETY: by contract.
                    unsafe { self.store(token, group, sums) };
                }
                continue;
            }
            // SAFETY: in bounds by contract, and nobody else's.
            let out = unsafe {
                let at = self.places.at(token) * self.rows + first;
                &mut *self.out.add(at).cast::<[[f32; GROUP]; GROUPS]>()
            };
            for (out, Row(sums)) in out.iter_mut().zip(sums) {
                self.put(out, sums);
            }
        }
    }
}

/// Products of a panel with many tokens.
struct Many<'a> {
    slab: &'a Slab<'a>,
    activations: &'a Activations<'a>,
    panel: &'a mut Panel,
    /// Those that the panel has; it may have room for more.
    groups: Range<usize>,
}

impl Many<'_> {
    /// All tokens, eight at a time, which have `sums`.
    ///
    /// # Safety
    /// The machine has this tier; groups and tokens are in bounds, and the panel is sized for them.
    #[inline(always)]
    unsafe fn on_vectors<I: Integers, S: Scales, const TWO: bool>(&mut self, sums: &mut Vec<Sums>) {
        let tokens = self.slab.tokens.clone().step_by(TOKENS);
        sums.resize(tokens.len().max(sums.len()), NO_SUMS);
        let (mut next, blocks) = (self.next_panel(), self.panel.blocks);
        let together = if self.slab.tokens.len() <= AT_ONCE { blocks } else { TOGETHER };
        for first in (0..blocks).step_by(together.max(1)) {
            let blocks = first..blocks.min(first + together);
            for (i, (token, sums)) in tokens.clone().zip(&mut *sums).enumerate() {
                let at = (token, blocks.clone());
                // SAFETY: by contract; the first ones unpack for all.
                unsafe {
                    match i {
                        0 => self.side::<I, S, TWO, true>(at, &mut next, sums),
                        _ => self.side::<I, S, TWO, false>(at, &mut next, sums),
                    }
                }
            }
        }
    }

    /// Unpacks block `b` into place `to`.
    ///
    /// # Safety
    /// As for [`Many::on_vectors`].
    #[inline(always)]
    unsafe fn unpack<I: Integers, S: Scales>(&mut self, b: usize, to: usize) {
        let size = integer_bytes(self.slab.format);
        for (place, group) in self.groups.clone().enumerate() {
            let bytes = self.slab.group(group).as_ptr();
            let at = self.panel.steps(place, to);
            // SAFETY: the caller has the features; the block is within the group and the panel.
            unsafe {
                let w = centred::<I, S>(bytes.add(b * size));
                let scales = S::of(bytes.add(self.panel.blocks * size), b);
                let steps = self.panel.w.as_mut_ptr().add(at);
                for (step, w) in w.iter().enumerate() {
                    _mm512_store_si512(steps.add(step).cast(), *w);
                }
                for (part, [d, m]) in scales[..S::PARTS].iter().enumerate() {
                    let at = self.panel.part(place, to, part);
                    let steps = part * STEPS / S::PARTS..(part + 1) * STEPS / S::PARTS;
                    let start = start(&w, steps);
                    _mm512_store_si512(self.panel.start.as_mut_ptr().add(at).cast(), start);
                    _mm512_store_ps(self.panel.d.as_mut_ptr().add(at).cast(), *d);
                    if S::MINIMA {
                        _mm512_store_ps(self.panel.m.as_mut_ptr().add(at).cast(), *m);
                    }
                }
            }
        }
    }

    /// Some blocks of eight tokens side by side, the first of them `token`. The `FIRST` ones unpack
    /// them to the panel's beginning.
    ///
    /// # Safety
    /// As for [`Many::on_vectors`].
    #[inline(never)]
    #[target_feature(
        enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni"
    )]
    unsafe fn side<I: Integers, S: Scales, const TWO: bool, const FIRST: bool>(
        &mut self,
        (token, blocks): (usize, Range<usize>),
        next: &mut Fetch,
        sums: &mut Sums,
    ) {
        let width = self.activations.width();
        let of_item = if TWO { 2 } else { 1 };
        let terms = self.activations.terms(token, 0).as_ptr();
        let scaled = self.activations.scaled(token, 0).as_ptr();
        // The first block's products are added to zeros, and make the sums.
        let sums: *mut Sums = sums;
        let mut before: *const Sums = if blocks.start == 0 { &NO_SUMS } else { sums };
        for (place, b) in blocks.clone().enumerate() {
            next.fetch();
            if FIRST {
                // SAFETY: by contract.
                unsafe { self.unpack::<I, S>(b, place) };
            }
            let panel = &*self.panel;
            for part in 0..S::PARTS {
                let (step, at) = (part * STEPS / S::PARTS, panel.part(0, place, part));
                // SAFETY: the panel has the block; eight tokens have room side by side, the last
                // ones too.
                unsafe {
                    let block = Block {
                        w: panel.w.as_ptr().add(panel.steps(0, place) + step),
                        start: panel.start.as_ptr().add(at),
                        d: panel.d.as_ptr().add(at),
                        m: panel.m.as_ptr().add(at),
                        terms: terms.add(b * width * of_item).byte_add(4 * step),
                        scaled: scaled.add(b * width),
                    };
                    tile::add::<S, TWO>(&block, before, sums);
                }
                before = sums;
            }
        }
        if blocks.end == self.panel.blocks {
            let tokens = token..self.slab.tokens.end.min(token + TOKENS);
            // SAFETY: the slab's own; nothing else refers to the sums.
            unsafe { self.slab.sink.store_panel(tokens, self.groups.clone(), &*sums) };
        }
    }

    /// The next panel's bytes, to be sent for while this one is used: some with each token, so that
    /// no product waits for them.
    #[inline(always)]
    fn next_panel(&self) -> Fetch {
        let group_bytes = self.slab.group_bytes();
        let steps = self.slab.tokens.len().div_ceil(TOKENS) * self.panel.blocks;
        let at = self.slab.weight.as_ptr().wrapping_add(self.groups.end * group_bytes);
        Fetch::new(at, GROUPS * group_bytes, steps)
    }

    /// All tokens, on tile registers.
    ///
    /// # Safety
    /// The machine has this tier and tile registers; groups and tokens are in bounds.
    #[inline(always)]
    unsafe fn on_tile_registers<I: Integers, S: Scales>(&mut self, tiles: &TileProducts) {
        let width = self.activations.width();
        for b in 0..self.panel.blocks {
            // SAFETY: by contract.
            unsafe { self.unpack::<I, S>(b, b) };
        }
        for token in self.slab.tokens.clone().step_by(width) {
            // SAFETY: by contract.
            unsafe { self.whole_tile::<S>(tiles, token, width) };
        }
    }

    /// All tokens that lie side by side, the first of them `token`.
    ///
    /// # Safety
    /// As for [`Many::on_tile_registers`].
    #[inline(always)]
    unsafe fn whole_tile<S: Scales>(&self, tiles: &TileProducts, token: usize, width: usize) {
        let panel = &*self.panel;
        let two = self.activations.bits() == ActivationBits::Sixteen;
        let count = width.min(self.slab.tokens.end - token);
        // SAFETY: the caller has the features; blocks are the panel's, tokens lie side by side.
        unsafe {
            let zero = _mm512_setzero_ps();
            let mut sums = [[zero; TILE]; GROUPS];
            let mut integers = TileSums::new();
            for b in 0..panel.blocks {
                let scaled = self.activations.scaled(token, b);
                for part in 0..S::PARTS {
                    let terms = self.activations.terms(token, b).as_ptr();
                    tiles.multiply(panel, (b, part), (terms, two), &mut integers);
                    for g in 0..GROUPS {
                        let at = panel.part(g, b, part);
                        let d = _mm512_load_ps(panel.d.as_ptr().add(at).cast());
                        let m = _mm512_load_ps(panel.m.as_ptr().add(at).cast());
                        let start = _mm512_load_si512(panel.start.as_ptr().add(at).cast());
                        for (t, Scaled { scale, sum, .. }) in scaled[..count].iter().enumerate() {
                            let high = _mm512_load_si512(integers.high[g][t].as_ptr().cast());
                            let low = _mm512_load_si512(integers.low[g][t].as_ptr().cast());
                            let value = if two {
                                let high = _mm512_add_epi32(high, start);
                                _mm512_add_epi32(_mm512_slli_epi32(high, 8), low)
                            } else {
                                _mm512_add_epi32(low, start)
                            };
                            let value = _mm512_cvtepi32_ps(value);
                            let value = _mm512_mul_ps(value, _mm512_set1_ps(*scale));
                            sums[g][t] = _mm512_fmadd_ps(value, d, sums[g][t]);
                            if S::MINIMA {
                                sums[g][t] = _mm512_fmadd_ps(m, _mm512_set1_ps(*sum), sums[g][t]);
                            }
                        }
                    }
                }
            }
            for (place, group) in self.groups.clone().enumerate() {
                for t in 0..count {
                    let mut values = [0.0; GROUP];
                    _mm512_storeu_ps(values.as_mut_ptr(), sums[place][t]);
                    self.slab.sink.store(token + t, group, &values);
                }
            }
        }
    }
}
