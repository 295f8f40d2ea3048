//! Products of BF16 weights with activations in bf16 (AVX512_BF16): two columns of sixteen rows an
//! instruction.
//!
//! An instruction adds the product of the upper numbers, then that of the lower ones, each fused:
//! the operations of the multiply-adds that other machines make of it, and the same bits, but that
//! numbers below 2^-126 count as zero. (Intel's manual, volume 2, VDPBF16PS; tried on a Zen 4.)

use std::arch::x86_64::*;
use std::sync::OnceLock;

use super::Slab;
use super::avx512::Fetch;
use super::bfloats::Bfloats;
use super::jobs::{ABREAST, COUNTED, FEW, SIDE};
use super::packed::{BLOCK, GROUP, PAIR_BYTES, PAIRS_AT_ONCE};
use super::panel::GROUPS;
use crate::isa::fetch_second;

/// How far ahead of a few tokens' products weights are fetched, in bytes.
const AHEAD: usize = 2048;
/// Bytes of a group's block.
const BLOCK_BYTES: usize = PAIRS_AT_ONCE * PAIR_BYTES;

/// Tests take the instruction wherever it is.
const ANYWHERE: bool = cfg!(test);

/// Whether the machine has the instruction, and it is worth taking: on a Zen 4 it does twice the
/// products of an f32 multiply-add in the same time, on Intel's Xeons without tile registers half
/// of them.
pub(super) fn detect() -> bool {
    static FOUND: OnceLock<bool> = OnceLock::new();
    *FOUND.get_or_init(|| is_x86_feature_detected!("avx512bf16") && (ANYWHERE || is_amd()))
}

fn is_amd() -> bool {
    let maker = __cpuid(0);
    let name = [maker.ebx, maker.edx, maker.ecx].map(u32::to_le_bytes);
    name.as_flattened() == b"AuthenticAMD"
}

/// Computes a slab of BF16 weights.
///
/// # Safety
/// The machine has the tier of AVX-512, and the instruction ([`detect`]).
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
pub(super) unsafe fn run(slab: &Slab<'_>, x: Bfloats<'_>) {
    let work = Products { slab, x, blocks: slab.cols.div_ceil(BLOCK) };
    let mut group = slab.groups.start;
    while group < slab.groups.end {
        let left = slab.groups.end - group;
        // SAFETY: features are those of this function; groups are the slab's own, and so many
        // tokens lie side by side.
        group += unsafe {
            match (slab.all_tokens, left) {
                (1, ABREAST..) => work.few::<ABREAST, 1>(group),
                (1, _) => work.few::<1, 1>(group),
                (2, ABREAST..) => work.few::<ABREAST, 2>(group),
                (2, _) => work.few::<1, 2>(group),
                (3, ABREAST..) => work.few::<ABREAST, 3>(group),
                (3, _) => work.few::<1, 3>(group),
                (COUNTED, ABREAST..) => work.few::<ABREAST, COUNTED>(group),
                (COUNTED, _) => work.few::<1, COUNTED>(group),
                (..=FEW, GROUPS..) => work.few::<GROUPS, SIDE>(group),
                (..=FEW, _) => work.few::<1, SIDE>(group),
                (_, GROUPS..) => work.many::<GROUPS>(group),
                (_, 2) => work.many::<2>(group),
                _ => work.many::<1>(group),
            }
        };
    }
}

struct Products<'a> {
    slab: &'a Slab<'a>,
    x: Bfloats<'a>,
    blocks: usize,
}

impl Products<'_> {
    /// `G` groups with all tokens, for which there is room for `T`; `G`.
    ///
    /// # Safety
    /// As for [`run`].
    #[inline(always)]
    unsafe fn few<const G: usize, const T: usize>(&self, group: usize) -> usize {
        let len = self.slab.group_bytes();
        let groups: [*const u8; G] = std::array::from_fn(|g| self.slab.group(group + g).as_ptr());
        let send = |block: usize| {
            let ahead = block * BLOCK_BYTES + AHEAD;
            // Past the end: the groups after these.
            let away = if ahead < len { 0 } else { (G - 1) * len };
            for at in groups {
                for line in (0..BLOCK_BYTES).step_by(64) {
                    fetch_second(at.wrapping_add(ahead + away + line));
                }
            }
        };
        // SAFETY: by contract.
        unsafe { self.products::<G, T>(group, 0, send) };
        G
    }

    /// `G` groups with all tokens, eight at a time; `G`.
    ///
    /// # Safety
    /// As for [`run`].
    #[inline(always)]
    unsafe fn many<const G: usize>(&self, group: usize) -> usize {
        let tokens = &self.slab.tokens;
        let steps = tokens.len().div_ceil(SIDE) * self.blocks;
        let next = self.slab.weight.as_ptr().wrapping_add((group + G) * self.slab.group_bytes());
        let mut next = Fetch::new(next, G * self.slab.group_bytes(), steps);
        for token in tokens.clone().step_by(SIDE) {
            // SAFETY: by contract.
            unsafe { self.products::<G, SIDE>(group, token, |_| next.fetch()) };
        }
        G
    }

    /// `G` groups with room for `T` tokens, the first of them `token`, which lie side by side; the
    /// same operations for all of either. With each block, `send` sends for what is next.
    ///
    /// # Safety
    /// As for [`run`].
    #[inline(always)]
    unsafe fn products<const G: usize, const T: usize>(
        &self,
        group: usize,
        token: usize,
        mut send: impl FnMut(usize),
    ) {
        let (slab, width) = (self.slab, self.x.width);
        let first = token / width * width * self.blocks + token % width;
        let x = self.x.values[first * BLOCK..].as_ptr();
        let weights: [*const u8; G] = std::array::from_fn(|g| slab.group(group + g).as_ptr());
        // SAFETY: the caller has the features; blocks are within the groups and the activations.
        unsafe {
            let mut sums = [[_mm512_setzero_ps(); G]; T];
            for block in 0..self.blocks {
                send(block);
                let x = x.add(block * width * BLOCK);
                for pair in 0..PAIRS_AT_ONCE {
                    let at = block * BLOCK_BYTES + pair * PAIR_BYTES;
                    let mut w = [bfloats(_mm512_setzero_si512()); G];
                    for g in 0..G {
                        w[g] = bfloats(_mm512_loadu_si512(weights[g].add(at).cast()));
                    }
                    for t in 0..T {
                        let two = x.add(t * BLOCK).cast::<i32>().add(pair).read_unaligned();
                        let x = bfloats(_mm512_set1_epi32(two));
                        for g in 0..G {
                            sums[t][g] = _mm512_dpbf16_ps(sums[t][g], w[g], x);
                        }
                    }
                }
            }
            for t in 0..T.min(slab.tokens.end - token) {
                for g in 0..G {
                    let mut values = [0.0; GROUP];
                    _mm512_storeu_ps(values.as_mut_ptr(), sums[t][g]);
                    slab.sink.store(token + t, group + g, &values);
                }
            }
        }
    }
}

/// The same bits.
///
/// # Safety
/// The machine has this tier.
#[inline(always)]
unsafe fn bfloats(x: __m512i) -> __m512bh {
    // SAFETY: any bits are numbers of bf16.
    unsafe { std::mem::transmute::<__m512i, __m512bh>(x) }
}
