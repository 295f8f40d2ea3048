//! Products with a few tokens: weights are unpacked in registers, as they come from memory.

use std::arch::x86_64::*;
use std::ops::Range;

use super::super::Slab;
use super::super::activations::{ActivationBits, Activations, Scaled, Term};
use super::super::jobs::{ABREAST, COUNTED, FEW};
use super::super::packed::{BLOCK, GROUP, STEPS, integer_bytes};
use super::formats::{Integers, Scales};
use crate::isa::{fetch, fetch_second};

/// How far ahead of products weights are fetched, in bytes.
const AHEAD: usize = 2048;

/// Products with a few tokens: weights are unpacked in registers, as they come from memory.
pub(super) struct Few<'a> {
    pub(super) slab: &'a Slab<'a>,
    pub(super) activations: &'a Activations<'a>,
}

impl Few<'_> {
    /// # Safety
    /// The machine has this tier; groups are in bounds.
    #[inline(always)]
    pub(super) unsafe fn groups<I: Integers, S: Scales>(&self, groups: Range<usize>) {
        let mut first = groups.start;
        while first < groups.end {
            let abreast = groups.end - first >= ABREAST;
            // SAFETY: the caller has the features; groups are in bounds, and all tokens lie side by
            // side.
            first += unsafe {
                match self.slab.all_tokens {
                    1 if abreast => self.products::<I, S, 1, ABREAST>(first),
                    1 => self.products::<I, S, 1, 1>(first),
                    2 if abreast => self.products::<I, S, 2, ABREAST>(first),
                    2 => self.products::<I, S, 2, 1>(first),
                    3 => self.products::<I, S, 3, 1>(first),
                    COUNTED => self.products::<I, S, COUNTED, 1>(first),
                    _ => self.products::<I, S, FEW, 1>(first),
                }
            };
        }
    }

    /// Products of `G` groups with room for `T` tokens, the same operations as for many; `G`.
    ///
    /// # Safety
    /// The machine has this tier; groups are in bounds, and `T` tokens have room.
    #[inline(always)]
    unsafe fn products<I: Integers, S: Scales, const T: usize, const G: usize>(
        &self,
        first: usize,
    ) -> usize {
        let slab = self.slab;
        let blocks = slab.cols / BLOCK;
        let bytes: [*const u8; G] = std::array::from_fn(|g| slab.group(first + g).as_ptr());
        let size = integer_bytes(slab.format);
        let (whole, factors) = (blocks * size, slab.group_bytes() - blocks * size);
        let (ahead_by, factor) = (AHEAD / size, factors / blocks.max(1));
        // The next groups, or where the slab ends the next slab's: it is often the same worker's.
        let next = G * slab.group_bytes();
        let send = |at| if G > 1 { fetch_second(at) } else { fetch(at) };
        let two = self.activations.bits() == ActivationBits::Sixteen;
        let (terms, scaled) = (self.activations.terms(0, 0), self.activations.scaled(0, 0));
        // SAFETY: the caller has the features; blocks are within the groups and the activations,
        // where `T` tokens lie side by side.
        unsafe {
            let mut sums = [[_mm512_setzero_ps(); T]; G];
            for b in 0..blocks {
                let terms = terms.as_ptr().add(b * T * if two { 2 } else { 1 });
                let scaled = scaled.as_ptr().add(b * T);
                let ahead = b + ahead_by;
                let (away, ahead) =
                    if ahead < blocks { (0, ahead) } else { (next, ahead - blocks) };
                for g in 0..G {
                    let soon = bytes[g].wrapping_add(away);
                    for line in (0..size).step_by(64) {
                        send(soon.wrapping_add(ahead * size + line));
                    }
                    send(soon.wrapping_add(whole + ahead * factor));
                    let at = bytes[g].add(b * size);
                    let (w, scales) = (I::steps(at), S::of(bytes[g].add(whole), b));
                    let sums = &mut sums[g];
                    for part in 0..S::PARTS {
                        let steps = part * STEPS / S::PARTS..(part + 1) * STEPS / S::PARTS;
                        // Loops, not closures: not all of these would become part of this
                        // function, and with it get the tier's instructions.
                        let mut integers = [_mm512_setzero_si512(); T];
                        for t in 0..T {
                            integers[t] = start::<S>(&*scaled.add(t), part);
                        }
                        if two {
                            add::<T>(&w, (terms.add(1), 2), steps.clone(), &mut integers);
                            let mut high = [_mm512_setzero_si512(); T];
                            add::<T>(&w, (terms, 2), steps, &mut high);
                            for t in 0..T {
                                let high = _mm512_slli_epi32(high[t], 8);
                                integers[t] = _mm512_add_epi32(high, integers[t]);
                            }
                        } else {
                            add::<T>(&w, (terms, 1), steps, &mut integers);
                        }
                        let [d, m] = scales[part];
                        for t in 0..T {
                            let Scaled { scale, sum, .. } = *scaled.add(t);
                            let value = _mm512_cvtepi32_ps(integers[t]);
                            let value = _mm512_mul_ps(value, _mm512_set1_ps(scale));
                            sums[t] = _mm512_fmadd_ps(value, d, sums[t]);
                            if S::MINIMA {
                                sums[t] = _mm512_fmadd_ps(m, _mm512_set1_ps(sum), sums[t]);
                            }
                        }
                    }
                }
            }
            for g in 0..G {
                for t in 0..T.min(slab.all_tokens) {
                    let mut values = [0.0; GROUP];
                    _mm512_storeu_ps(values.as_mut_ptr(), sums[g][t]);
                    slab.sink.store(t, first + g, &values);
                }
            }
        }
        G
    }
}

/// What integer products of a part of a block begin with, so that they end as if the centre had
/// been taken from each weight.
///
/// # Safety
/// The machine has this tier.
#[inline(always)]
unsafe fn start<S: Scales>(scaled: &Scaled, part: usize) -> __m512i {
    let [low, high] = scaled.halves;
    let sum = if S::PARTS == 1 { low + high } else { scaled.halves[part] };
    // SAFETY: a register operation of the caller's features.
    unsafe { _mm512_set1_epi32(sum * -i32::from(S::CENTRE as u8)) }
}

/// Adds the products of a term of `T` tokens, which are `apart`, over some steps of a block.
///
/// # Safety
/// The machine has this tier; `terms` points to a block of `T` tokens side by side.
#[inline(always)]
unsafe fn add<const T: usize>(
    w: &[__m512i; STEPS],
    (terms, apart): (*const Term, usize),
    steps: Range<usize>,
    sums: &mut [__m512i; T],
) {
    // SAFETY: by contract.
    unsafe {
        for step in steps {
            for t in 0..T {
                let four = terms.add(t * apart).cast::<i32>().add(step).read();
                sums[t] = _mm512_dpbusd_epi32(sums[t], w[step], _mm512_set1_epi32(four));
            }
        }
    }
}
