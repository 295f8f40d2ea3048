//! The tiers of AArch64. All machines have NEON: code is compiled for it everywhere.

use std::arch::aarch64::*;
use std::arch::is_aarch64_feature_detected;

use super::{Isa, Kernel, Portable, Tier};
use crate::lanes::{self, LANES};

pub(super) const TIERS: &[Isa] = &[Isa::Reference, Isa::Neon, Isa::NeonDot];

pub(super) fn detect() -> Isa {
    if is_aarch64_feature_detected!("dotprod") { Isa::NeonDot } else { Isa::Neon }
}

pub(super) fn run<K: Kernel>(isa: Isa, kernel: K) {
    match isa {
        Isa::Reference => kernel.run(Portable),
        // Dot products are for products of integers only.
        _ => kernel.run(Neon),
    }
}

/// Four registers of four lanes.
#[derive(Clone, Copy)]
struct Neon;

/// Four registers, of what four of others give.
macro_rules! each {
    ($i:ident => $value:expr) => {
        // SAFETY: all machines have NEON; loads and stores cover sixteen lanes.
        unsafe {
            let of = |$i: usize| $value;
            [of(0), of(1), of(2), of(3)]
        }
    };
}

impl Tier for Neon {
    type F = [float32x4_t; 4];
    type I = [int32x4_t; 4];
    const REGISTERS: usize = 8;
    #[inline(always)]
    fn splat_integer(self, x: i32) -> Self::I {
        each!(_i => vdupq_n_s32(x))
    }
    #[inline(always)]
    fn load_bytes(self, x: &[u8; 4 * LANES]) -> Self::I {
        each!(i => vreinterpretq_s32_u8(vld1q_u8(x.as_ptr().add(16 * i))))
    }
    #[inline(always)]
    fn floats(self, x: Self::I) -> Self::F {
        each!(i => vcvtq_f32_s32(x[i]))
    }
    #[inline(always)]
    fn add_integers(self, a: Self::I, b: Self::I) -> Self::I {
        each!(i => vaddq_s32(a[i], b[i]))
    }
    #[inline(always)]
    fn times_256(self, x: Self::I) -> Self::I {
        each!(i => vshlq_n_s32::<8>(x[i]))
    }
    #[inline(always)]
    fn add_dots(self, sums: Self::I, unsigned: Self::I, signed: Self::I) -> Self::I {
        each!(i => {
            let (u, s) = (vreinterpretq_u8_s32(unsigned[i]), vreinterpretq_s8_s32(signed[i]));
            let low = vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(u)));
            let high = vreinterpretq_s16_u16(vmovl_high_u8(u));
            let (s_low, s_high) = (vmovl_s8(vget_low_s8(s)), vmovl_high_s8(s));
            let a = vpaddq_s32(
                vmull_s16(vget_low_s16(low), vget_low_s16(s_low)),
                vmull_high_s16(low, s_low),
            );
            let b = vpaddq_s32(
                vmull_s16(vget_low_s16(high), vget_low_s16(s_high)),
                vmull_high_s16(high, s_high),
            );
            vaddq_s32(sums[i], vpaddq_s32(a, b))
        })
    }
    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        each!(i => vaddq_f32(a[i], b[i]))
    }
    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        each!(i => vsubq_f32(a[i], b[i]))
    }
    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        each!(i => vmulq_f32(a[i], b[i]))
    }
    #[inline(always)]
    fn mul_add(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        each!(i => vfmaq_f32(c[i], a[i], b[i]))
    }
    #[inline(always)]
    fn larger(self, a: Self::F, b: Self::F) -> Self::F {
        // Not the instruction for maxima, which gives NaN where either is NaN.
        each!(i => vbslq_f32(vcgtq_f32(b[i], a[i]), b[i], a[i]))
    }
    #[inline(always)]
    fn any_positive(self, x: Self::F) -> bool {
        let positive = each!(i => vcgtzq_f32(x[i]));
        // SAFETY: as in `each`.
        positive.iter().any(|lanes| unsafe { vmaxvq_u32(*lanes) } != 0)
    }
    #[inline(always)]
    fn times_power(self, p: Self::F, x: Self::F, _past: Self::F) -> Self::F {
        each!(i => {
            let nearest = vreinterpretq_u32_f32(vaddq_f32(x[i], vdupq_n_f32(lanes::ROUND)));
            let power = vaddq_u32(vshlq_n_u32::<23>(nearest), vdupq_n_u32(lanes::ONE));
            let value = vreinterpretq_u32_f32(vmulq_f32(p[i], vreinterpretq_f32_u32(power)));
            let below = vcltq_f32(x[i], vdupq_n_f32(lanes::LEAST_POWER));
            vreinterpretq_f32_u32(vbicq_u32(value, below))
        })
    }
    #[inline(always)]
    fn splat(self, x: f32) -> Self::F {
        each!(_i => vdupq_n_f32(x))
    }
    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> Self::F {
        each!(i => vld1q_f32(x.as_ptr().add(4 * i)))
    }
    #[inline(always)]
    fn store(self, x: Self::F, to: &mut [f32; LANES]) {
        let to = to.as_mut_ptr();
        each!(i => vst1q_f32(to.add(4 * i), x[i]));
    }
    #[inline(always)]
    fn halves(self, x: &[u16; LANES]) -> Self::F {
        each!(i => vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(x.as_ptr().add(4 * i)))))
    }
    #[inline(always)]
    fn bfloats(self, x: &[u16; LANES]) -> Self::F {
        each!(i => vreinterpretq_f32_u32(vshll_n_u16::<16>(vld1_u16(x.as_ptr().add(4 * i)))))
    }
    #[inline(always)]
    fn store_halves(self, x: Self::F, to: &mut [u16; LANES]) {
        let to = to.as_mut_ptr();
        each!(i => vst1_u16(to.add(4 * i), vreinterpret_u16_f16(vcvt_f16_f32(x[i]))));
    }
    #[inline(always)]
    fn largest(self, x: Self::F) -> f32 {
        // SAFETY: as in `each`; order and operands are those of the definition.
        unsafe {
            let larger = |a, b| vbslq_f32(vcgtq_f32(b, a), b, a);
            let four = larger(larger(x[0], x[2]), larger(x[1], x[3]));
            let two = larger(four, vextq_f32::<2>(four, four));
            lanes::larger(vgetq_lane_f32::<0>(two), vgetq_lane_f32::<1>(two))
        }
    }
    #[inline(always)]
    fn largest_magnitude(self, x: &[[f32; LANES]]) -> f32 {
        let mut most = each!(_i => vdupq_n_u32(0));
        for x in x {
            let x = self.load(x);
            most = each!(i => vmaxq_u32(most[i], vreinterpretq_u32_f32(vabsq_f32(x[i]))));
        }
        // SAFETY: as in `each`.
        let most = unsafe {
            vmaxvq_u32(vmaxq_u32(vmaxq_u32(most[0], most[1]), vmaxq_u32(most[2], most[3])))
        };
        f32::from_bits(most)
    }
    #[inline(always)]
    fn sum(self, x: Self::F) -> f32 {
        // SAFETY: as in `each`; the order is that of the definition.
        unsafe {
            let four = vaddq_f32(vaddq_f32(x[0], x[2]), vaddq_f32(x[1], x[3]));
            vpadds_f32(vadd_f32(vget_low_f32(four), vget_high_f32(four)))
        }
    }
    #[inline(always)]
    fn lowest_bytes(self, x: Self::F, to: &mut [u8; LANES]) {
        let [low, high] = low_pairs(x);
        // SAFETY: as in `each`.
        unsafe { vst1q_u8(to.as_mut_ptr(), vuzp1q_u8(low, high)) };
    }
    #[inline(always)]
    fn second_bytes(self, x: Self::F, to: &mut [u8; LANES]) {
        let [low, high] = low_pairs(x);
        // SAFETY: as in `each`.
        unsafe { vst1q_u8(to.as_mut_ptr(), vuzp2q_u8(low, high)) };
    }
}

/// The lower two bytes of each lane.
#[inline(always)]
fn low_pairs(x: [float32x4_t; 4]) -> [uint8x16_t; 2] {
    let x = each!(i => vreinterpretq_u16_f32(x[i]));
    // SAFETY: as in `each`.
    unsafe { [[x[0], x[1]], [x[2], x[3]]].map(|[a, b]| vreinterpretq_u8_u16(vuzp1q_u16(a, b))) }
}

/// Would send for the line at `at`.
#[inline(always)]
pub(crate) fn fetch(_: *const u8) {}

/// The same, into the second cache.
#[inline(always)]
pub(crate) fn fetch_second(_: *const u8) {}
