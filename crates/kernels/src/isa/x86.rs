//! The tiers of x86-64.

use std::arch::x86_64::*;

use super::{Isa, Kernel, Portable, Tier};
use crate::lanes::{LANES, LEAST_POWER, ONE, ROUND};
use crate::linear::amx;

pub(super) const TIERS: &[Isa] = &[Isa::Reference, Isa::Avx2, Isa::Avx512, Isa::Amx];

pub(super) fn detect() -> Isa {
    let avx2 = is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c");
    let avx512 = is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512vbmi")
        && is_x86_feature_detected!("avx512vnni");
    match (avx2, avx512) {
        (true, true) if amx::detect() => Isa::Amx,
        (true, true) => Isa::Avx512,
        (true, false) => Isa::Avx2,
        _ => Isa::Reference,
    }
}

pub(super) fn run<K: Kernel>(isa: Isa, kernel: K) {
    match isa {
        // SAFETY: Isa::run clamps the tier to what detect() found.
        Isa::Avx2 => unsafe { avx2(kernel) },
        // SAFETY: as above. Tiles are for products only.
        Isa::Avx512 | Isa::Amx => unsafe { avx512(kernel) },
        _ => kernel.run(Portable),
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn avx2<K: Kernel>(kernel: K) {
    kernel.run(Avx2(()));
}

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")]
fn avx512<K: Kernel>(kernel: K) {
    kernel.run(Avx512(()));
}

/// Two registers of eight lanes.
#[derive(Clone, Copy)]
struct Avx2(());

/// One register.
#[derive(Clone, Copy)]
struct Avx512(());

// SAFETY of each block below: a value of the tier exists only within avx2() or avx512(), which
// have the features; loads and stores cover sixteen lanes.
impl Tier for Avx2 {
    type F = [__m256; 2];
    type I = [__m256i; 2];
    const REGISTERS: usize = 8;
    #[inline(always)]
    fn splat_integer(self, x: i32) -> Self::I {
        // SAFETY: see above.
        unsafe { [_mm256_set1_epi32(x); 2] }
    }
    #[inline(always)]
    fn load_bytes(self, x: &[u8; 4 * LANES]) -> Self::I {
        let at: *const __m256i = x.as_ptr().cast();
        // SAFETY: see above.
        unsafe { [_mm256_loadu_si256(at), _mm256_loadu_si256(at.add(1))] }
    }
    #[inline(always)]
    fn floats(self, x: Self::I) -> Self::F {
        // SAFETY: see above.
        unsafe { [_mm256_cvtepi32_ps(x[0]), _mm256_cvtepi32_ps(x[1])] }
    }
    #[inline(always)]
    fn add_integers(self, a: Self::I, b: Self::I) -> Self::I {
        // SAFETY: see above.
        unsafe { [_mm256_add_epi32(a[0], b[0]), _mm256_add_epi32(a[1], b[1])] }
    }
    #[inline(always)]
    fn times_256(self, x: Self::I) -> Self::I {
        // SAFETY: see above.
        unsafe { [_mm256_slli_epi32::<8>(x[0]), _mm256_slli_epi32::<8>(x[1])] }
    }
    #[inline(always)]
    fn add_dots(self, sums: Self::I, unsigned: Self::I, signed: Self::I) -> Self::I {
        let of = |i: usize| (sums[i], unsigned[i], signed[i]);
        [add_dots(of(0)), add_dots(of(1))]
    }
    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: see above.
        unsafe { [_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])] }
    }
    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: see above.
        unsafe { [_mm256_sub_ps(a[0], b[0]), _mm256_sub_ps(a[1], b[1])] }
    }
    #[inline(always)]
    fn larger(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: see above. The instruction gives its second operand unless the first is greater.
        unsafe { [_mm256_max_ps(b[0], a[0]), _mm256_max_ps(b[1], a[1])] }
    }
    #[inline(always)]
    fn any_positive(self, x: Self::F) -> bool {
        // SAFETY: see above.
        unsafe {
            let zero = _mm256_setzero_ps();
            let low = _mm256_cmp_ps::<_CMP_GT_OQ>(x[0], zero);
            let high = _mm256_cmp_ps::<_CMP_GT_OQ>(x[1], zero);
            _mm256_movemask_ps(_mm256_or_ps(low, high)) != 0
        }
    }
    #[inline(always)]
    fn times_power(self, p: Self::F, x: Self::F, _past: Self::F) -> Self::F {
        [times_power(p[0], x[0]), times_power(p[1], x[1])]
    }
    #[inline(always)]
    fn splat(self, x: f32) -> Self::F {
        // SAFETY: see above.
        unsafe { [_mm256_set1_ps(x); 2] }
    }
    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> Self::F {
        // SAFETY: see above.
        unsafe { [_mm256_loadu_ps(x.as_ptr()), _mm256_loadu_ps(x[8..].as_ptr())] }
    }
    #[inline(always)]
    fn store(self, x: Self::F, to: &mut [f32; LANES]) {
        // SAFETY: see above.
        unsafe {
            _mm256_storeu_ps(to.as_mut_ptr(), x[0]);
            _mm256_storeu_ps(to[8..].as_mut_ptr(), x[1]);
        }
    }
    #[inline(always)]
    fn halves(self, x: &[u16; LANES]) -> Self::F {
        // SAFETY: see above.
        unsafe {
            let at: *const __m128i = x.as_ptr().cast();
            [_mm256_cvtph_ps(_mm_loadu_si128(at)), _mm256_cvtph_ps(_mm_loadu_si128(at.add(1)))]
        }
    }
    #[inline(always)]
    fn sum_of_bytes(self, x: &[u8; LANES], signed: bool) -> i32 {
        // SAFETY: every x86-64 machine has SSE2.
        unsafe { sum_of_bytes(x, signed) }
    }
    #[inline(always)]
    fn store_halves(self, x: Self::F, to: &mut [u16; LANES]) {
        // SAFETY: see above.
        unsafe {
            let at: *mut __m128i = to.as_mut_ptr().cast();
            _mm_storeu_si128(at, _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x[0]));
            _mm_storeu_si128(at.add(1), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x[1]));
        }
    }
    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: see above.
        unsafe { [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])] }
    }
    #[inline(always)]
    fn mul_add(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        // SAFETY: see above.
        unsafe { [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])] }
    }
}

/// [`Tier::times_power`] of eight lanes. Not a closure: it would not have the instructions.
#[inline(always)]
fn times_power(p: __m256, x: __m256) -> __m256 {
    // SAFETY: only the tier calls it.
    unsafe {
        let nearest = _mm256_castps_si256(_mm256_add_ps(x, _mm256_set1_ps(ROUND)));
        let one = _mm256_set1_epi32(ONE as i32);
        let power = _mm256_add_epi32(_mm256_slli_epi32::<23>(nearest), one);
        let within = _mm256_cmp_ps::<_CMP_NLT_UQ>(x, _mm256_set1_ps(LEAST_POWER));
        _mm256_and_ps(within, _mm256_mul_ps(p, _mm256_castsi256_ps(power)))
    }
}

/// [`Tier::add_dots`] of eight lanes: products of bytes by `vpmaddubsw` would not fit its sums.
#[inline(always)]
fn add_dots((sums, unsigned, signed): (__m256i, __m256i, __m256i)) -> __m256i {
    // SAFETY: only the tier calls it.
    unsafe {
        let even = _mm256_and_si256(unsigned, _mm256_set1_epi16(0xff));
        let odd = _mm256_srli_epi16::<8>(unsigned);
        let even_signed = _mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(signed));
        let odd_signed = _mm256_srai_epi16::<8>(signed);
        let sums = _mm256_add_epi32(sums, _mm256_madd_epi16(even, even_signed));
        _mm256_add_epi32(sums, _mm256_madd_epi16(odd, odd_signed))
    }
}

impl Tier for Avx512 {
    type F = __m512;
    type I = __m512i;
    const REGISTERS: usize = 32;
    #[inline(always)]
    fn splat_integer(self, x: i32) -> Self::I {
        // SAFETY: see above.
        unsafe { _mm512_set1_epi32(x) }
    }
    #[inline(always)]
    fn load_bytes(self, x: &[u8; 4 * LANES]) -> Self::I {
        // SAFETY: see above.
        unsafe { _mm512_loadu_si512(x.as_ptr().cast()) }
    }
    #[inline(always)]
    fn floats(self, x: Self::I) -> Self::F {
        // SAFETY: see above.
        unsafe { _mm512_cvtepi32_ps(x) }
    }
    #[inline(always)]
    fn add_integers(self, a: Self::I, b: Self::I) -> Self::I {
        // SAFETY: see above.
        unsafe { _mm512_add_epi32(a, b) }
    }
    #[inline(always)]
    fn times_256(self, x: Self::I) -> Self::I {
        // SAFETY: see above.
        unsafe { _mm512_slli_epi32::<8>(x) }
    }
    #[inline(always)]
    fn add_dots(self, sums: Self::I, unsigned: Self::I, signed: Self::I) -> Self::I {
        // SAFETY: see above.
        unsafe { _mm512_dpbusd_epi32(sums, unsigned, signed) }
    }
    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: see above.
        unsafe { _mm512_add_ps(a, b) }
    }
    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: see above.
        unsafe { _mm512_sub_ps(a, b) }
    }
    #[inline(always)]
    fn larger(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: see above. The instruction gives its second operand unless the first is greater.
        unsafe { _mm512_max_ps(b, a) }
    }
    #[inline(always)]
    fn largest(self, x: Self::F) -> f32 {
        // SAFETY: see above; order and operands are those of the definition.
        unsafe {
            let x = _mm256_max_ps(_mm512_extractf32x8_ps::<1>(x), _mm512_castps512_ps256(x));
            let x = _mm_max_ps(_mm256_extractf128_ps::<1>(x), _mm256_castps256_ps128(x));
            let x = _mm_max_ps(_mm_movehl_ps(x, x), x);
            _mm_cvtss_f32(_mm_max_ss(_mm_movehdup_ps(x), x))
        }
    }
    #[inline(always)]
    fn any_positive(self, x: Self::F) -> bool {
        // SAFETY: see above.
        unsafe { _mm512_cmp_ps_mask::<_CMP_GT_OQ>(x, _mm512_setzero_ps()) != 0 }
    }
    #[inline(always)]
    fn past_nearest(self, x: Self::F) -> Self::F {
        // SAFETY: see above.
        unsafe { _mm512_reduce_ps::<_MM_FROUND_TO_NEAREST_INT>(x) }
    }
    #[inline(always)]
    fn times_power(self, p: Self::F, x: Self::F, past: Self::F) -> Self::F {
        // SAFETY: see above. The difference is the whole number.
        unsafe {
            let within = _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(x, _mm512_set1_ps(LEAST_POWER));
            _mm512_maskz_scalef_ps(within, p, _mm512_sub_ps(x, past))
        }
    }
    #[inline(always)]
    fn splat(self, x: f32) -> Self::F {
        // SAFETY: see above.
        unsafe { _mm512_set1_ps(x) }
    }
    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> Self::F {
        // SAFETY: see above.
        unsafe { _mm512_loadu_ps(x.as_ptr()) }
    }
    #[inline(always)]
    fn store(self, x: Self::F, to: &mut [f32; LANES]) {
        // SAFETY: see above.
        unsafe { _mm512_storeu_ps(to.as_mut_ptr(), x) }
    }
    #[inline(always)]
    fn halves(self, x: &[u16; LANES]) -> Self::F {
        // SAFETY: see above.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(x.as_ptr().cast())) }
    }
    #[inline(always)]
    fn bfloats(self, x: &[u16; LANES]) -> Self::F {
        // SAFETY: see above.
        unsafe {
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(x.as_ptr().cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))
        }
    }
    #[inline(always)]
    fn lower_bfloats(self, x: &[u32; LANES]) -> Self::F {
        // SAFETY: see above.
        unsafe { _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(x.as_ptr().cast()), 16)) }
    }
    #[inline(always)]
    fn upper_bfloats(self, x: &[u32; LANES]) -> Self::F {
        // SAFETY: see above.
        unsafe {
            let upper = _mm512_set1_epi32(0xffff_0000_u32 as i32);
            _mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(x.as_ptr().cast()), upper))
        }
    }
    #[inline(always)]
    fn largest_magnitude(self, x: &[[f32; LANES]]) -> f32 {
        // SAFETY: see above.
        unsafe {
            let mut most = _mm512_setzero_si512();
            for x in x {
                let bits = _mm512_loadu_si512(x.as_ptr().cast());
                let bits = _mm512_and_si512(bits, _mm512_set1_epi32(0x7fff_ffff));
                most = _mm512_max_epu32(most, bits);
            }
            let half = _mm512_extracti32x8_epi32::<1>(most);
            let most = _mm256_max_epu32(half, _mm512_castsi512_si256(most));
            let half = _mm256_extracti128_si256::<1>(most);
            let most = _mm_max_epu32(half, _mm256_castsi256_si128(most));
            let most = _mm_max_epu32(most, _mm_unpackhi_epi64(most, most));
            let most = _mm_max_epu32(most, _mm_srli_epi64::<32>(most));
            f32::from_bits(_mm_cvtsi128_si32(most) as u32)
        }
    }
    #[inline(always)]
    fn sum(self, x: Self::F) -> f32 {
        // SAFETY: see above; the order is that of the definition.
        unsafe {
            let x = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps::<1>(x));
            let x = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
            let x = _mm_add_ps(x, _mm_movehl_ps(x, x));
            _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)))
        }
    }
    #[inline(always)]
    fn lowest_bytes(self, x: Self::F, to: &mut [u8; LANES]) {
        // SAFETY: see above.
        unsafe {
            let bytes = _mm512_cvtepi32_epi8(_mm512_castps_si512(x));
            _mm_storeu_si128(to.as_mut_ptr().cast(), bytes);
        }
    }
    #[inline(always)]
    fn second_bytes(self, x: Self::F, to: &mut [u8; LANES]) {
        // SAFETY: see above.
        unsafe {
            let bytes = _mm512_cvtepi32_epi8(_mm512_srli_epi32::<8>(_mm512_castps_si512(x)));
            _mm_storeu_si128(to.as_mut_ptr().cast(), bytes);
        }
    }
    #[inline(always)]
    fn sum_of_bytes(self, x: &[u8; LANES], signed: bool) -> i32 {
        // SAFETY: every x86-64 machine has SSE2.
        unsafe { sum_of_bytes(x, signed) }
    }
    #[inline(always)]
    fn store_halves(self, x: Self::F, to: &mut [u16; LANES]) {
        // SAFETY: see above.
        unsafe {
            let halves = _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x);
            _mm256_storeu_si256(to.as_mut_ptr().cast(), halves);
        }
    }
    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: see above.
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    fn mul_add(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        // SAFETY: see above.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
}

/// Sends for the line at `at`, which need not be there.
#[inline(always)]
pub(crate) fn fetch(at: *const u8) {
    // SAFETY: nothing is read: what is not there is not fetched.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) };
}

/// The same, into the second cache: where several streams are sent for at once, a first cache has
/// too few places for what is on its way.
#[inline(always)]
pub(crate) fn fetch_second(at: *const u8) {
    // SAFETY: as above.
    unsafe { _mm_prefetch::<_MM_HINT_T1>(at.cast()) };
}

/// The sum of bytes, as [`Tier::sum_of_bytes`] has it.
///
/// # Safety
/// The machine has SSE2.
#[inline(always)]
unsafe fn sum_of_bytes(x: &[u8; LANES], signed: bool) -> i32 {
    // SAFETY: by contract.
    unsafe {
        // Bytes are added as if they had no sign: those that have one are moved up by 128.
        let (flip, moved) = if signed { (-128, 128 * LANES as i32) } else { (0, 0) };
        let bytes = _mm_xor_si128(_mm_loadu_si128(x.as_ptr().cast()), _mm_set1_epi8(flip));
        let sums = _mm_sad_epu8(bytes, _mm_setzero_si128());
        _mm_cvtsi128_si32(_mm_add_epi32(sums, _mm_unpackhi_epi64(sums, sums))) - moved
    }
}
