//! Sixteen lanes of f32: the width in which sums are kept, the same on every tier, and the
//! functions that must give the same bits everywhere.

use crate::isa::Tier;

/// Lanes of a sum.
pub(crate) const LANES: usize = 16;

/// 1.5 * 2^23: adding it rounds to a whole number, which then stands in the lowest bits. A
/// conversion would not become vector instructions.
pub(crate) const ROUND: f32 = 12_582_912.0;

/// Powers of 2 to less count as 0: soon they would not be normal numbers.
pub(crate) const LEAST_POWER: f32 = -125.0;

/// The bits of 1.
pub(crate) const ONE: u32 = 1.0f32.to_bits();

/// What starts with a cache line, so that no vector of it lies on two.
#[derive(Clone, Copy, Default)]
#[repr(C, align(64))]
pub(crate) struct Aligned<T>(pub(crate) T);

/// A vector in memory.
pub(crate) type Line = Aligned<[f32; LANES]>;

// SAFETY: a line is sixteen numbers and no padding; all zeros are a line.
unsafe impl bytemuck::Zeroable for Line {}
// SAFETY: as above; any bits are a line.
unsafe impl bytemuck::Pod for Line {}

/// Adds up lanes in a fixed order: halves onto each other.
#[inline(always)]
pub(crate) fn sum(mut lanes: [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// `b` where it is greater, else `a`.
#[inline(always)]
pub(crate) fn larger(a: f32, b: f32) -> f32 {
    if b > a { b } else { a }
}

/// The largest lane, halves against each other.
#[inline(always)]
pub(crate) fn largest(mut lanes: [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] = larger(lanes[i], lanes[i + width]);
        }
        width /= 2;
    }
    lanes[0]
}

/// `2^x`, relative error below 2e-7 for -125 <= x <= 127; 0 below, 1 for 0, NaN for NaN. What it
/// gives above 127 means nothing.
#[inline(always)]
pub(crate) fn exp2<T: Tier>(t: T, x: T::F) -> T::F {
    // 2^x = 2^n * 2^r, n = round(x), |r| <= 1/2; 2^r is a polynomial, 1 for 0 and else of the least
    // relative error, 1e-7 (by linear programming).
    let r = t.past_nearest(x);
    let mut p = t.splat(0.001_326_472_7);
    let linear = std::f32::consts::LN_2 - 1.788e-7;
    for c in [0.009_671_513, 0.055_507_336, 0.240_222_42, linear, 1.0] {
        p = t.mul_add(p, r, t.splat(c));
    }
    t.times_power(p, x, r)
}

/// `lanes[i] += a[i] * b[i]`, fused.
#[inline(always)]
pub(crate) fn multiply_add(lanes: &mut [f32; LANES], a: &[f32; LANES], b: &[f32; LANES]) {
    for i in 0..LANES {
        lanes[i] = a[i].mul_add(b[i], lanes[i]);
    }
}

/// A half-precision number, from its bits; in operations that compilers turn into vectors.
#[inline(always)]
pub(crate) fn widen_half(bits: u16) -> f32 {
    /// The difference of the exponents' biases, as a factor: exact for subnormal numbers too.
    const REBIAS: f32 = f32::from_bits((127 + 127 - 15) << 23);
    let (sign, rest) = (u32::from(bits & 0x8000) << 16, u32::from(bits & 0x7fff));
    let finite = (f32::from_bits(rest << 13) * REBIAS).to_bits();
    // Infinities and NaN keep the largest exponent.
    let special = if rest >= 0x7c00 { 0x7f80_0000 } else { 0 };
    f32::from_bits(finite | special | sign)
}

/// Sum of squares.
#[inline(always)]
pub(crate) fn sum_of_squares(x: &[f32]) -> f32 {
    let mut lanes = [0.0; LANES];
    let (chunks, rest) = x.as_chunks::<LANES>();
    for chunk in chunks {
        multiply_add(&mut lanes, chunk, chunk);
    }
    for (lane, value) in lanes.iter_mut().zip(rest) {
        *lane = value.mul_add(*value, *lane);
    }
    sum(lanes)
}

/// `exp(x)`, relative error below 3e-7 for -87 <= x <= 88; 0 below, infinite above, NaN for NaN.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    // exp(x) = 2^n * exp(r), n = round(x / ln 2), |r| <= ln 2 / 2, exp(r) by its Taylor series.
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    let clamped = x.clamp(-87.0, 88.0);
    let rounded = clamped * std::f32::consts::LOG2_E + ROUND;
    let n = rounded - ROUND;
    let r = n.mul_add(-LN_2_LOW, n.mul_add(-LN_2_HIGH, clamped));
    let mut p = 1.0f32 / 5040.0;
    for c in [1.0f32 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        p = p.mul_add(r, c);
    }
    // Of NaN the bits mean nothing; the polynomial carries it on.
    let n = rounded.to_bits().wrapping_sub(ROUND.to_bits());
    let scale = f32::from_bits(n.wrapping_add(127) << 23);
    let value = p * scale;
    let value = if x < -87.0 { 0.0 } else { value };
    if x > 88.0 { f32::INFINITY } else { value }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Isa;
    use crate::isa::Kernel;

    #[test]
    fn exp_agrees_with_the_library() {
        for i in -87_000..=88_000 {
            let x = i as f32 / 1000.0;
            let expected = f64::from(x).exp();
            let error = (f64::from(exp(x)) - expected).abs() / expected;
            assert!(error < 3e-7, "exp({x}): relative error {error}");
        }
        assert_eq!((exp(-1e9), exp(1e9), exp(0.0)), (0.0, f32::INFINITY, 1.0));
        assert!(exp(f32::NAN).is_nan());
    }

    /// `2^x` of sixteen numbers on a tier.
    struct Powers<'a>(&'a mut [f32; LANES]);

    impl Kernel for Powers<'_> {
        #[inline(always)]
        fn run<T: Tier>(self, t: T) {
            t.store(exp2(t, t.load(self.0)), self.0);
        }
    }

    #[test]
    fn exp2_agrees_with_the_library_and_is_the_same_on_every_tier() {
        let powers = |isa: Isa, mut x: [f32; LANES]| {
            isa.run(Powers(&mut x));
            x
        };
        for i in (-125_000..=127_000).step_by(LANES) {
            let x: [f32; LANES] = std::array::from_fn(|lane| (i + lane as i32) as f32 / 1000.0);
            let found = powers(Isa::Reference, x);
            for (x, found) in x.iter().zip(found) {
                let expected = f64::from(*x).exp2();
                let error = (f64::from(found) - expected).abs() / expected;
                assert!(error < 2e-7, "exp2({x}): relative error {error}");
            }
            Isa::available().iter().for_each(|isa| assert_eq!(powers(*isa, x), found));
        }
        let near_zero = std::array::from_fn(|lane| -(2f32.powi(-3 * lane as i32 - 20)));
        let found = powers(Isa::Reference, near_zero);
        assert!(found.iter().all(|found| (found - 1.0).abs() < 1e-6), "{found:?}");
        Isa::available().iter().for_each(|isa| assert_eq!(powers(*isa, near_zero), found));
        for isa in Isa::available() {
            for (x, expected) in [(0.0, 1.0), (-1e9, 0.0), (f32::NEG_INFINITY, 0.0), (-125.1, 0.0)]
            {
                assert_eq!(powers(isa, [x; LANES]), [expected; LANES], "{isa:?}: exp2({x})");
            }
            assert!(powers(isa, [f32::NAN; LANES]).iter().all(|x| x.is_nan()));
        }
    }

    #[test]
    fn the_largest_lane_is_found_on_every_tier() {
        struct Largest<'a>([f32; LANES], &'a mut f32);
        impl Kernel for Largest<'_> {
            #[inline(always)]
            fn run<T: Tier>(self, t: T) {
                *self.1 = t.largest(t.load(&self.0));
            }
        }
        for isa in Isa::available() {
            for at in 0..LANES {
                let lanes = std::array::from_fn(|i| if i == at { -1.0 } else { -2.0 - i as f32 });
                let mut found = 0.0;
                isa.run(Largest(lanes, &mut found));
                assert_eq!(found, -1.0, "{isa:?}: lane {at}");
            }
        }
    }

    #[test]
    fn dots_of_bytes_are_exact_on_every_tier() {
        struct Dots<'a>(i32, &'a [[u8; 4 * LANES]; 2], &'a mut [f32; LANES]);
        impl Kernel for Dots<'_> {
            #[inline(always)]
            fn run<T: Tier>(self, t: T) {
                let Dots(start, bytes, out) = self;
                let [unsigned, signed] = bytes.each_ref().map(|bytes| t.load_bytes(bytes));
                let start = t.times_256(t.splat_integer(start));
                let sums = t.add_dots(start, unsigned, signed);
                t.store(t.floats(t.add_integers(sums, t.splat_integer(-1))), out);
            }
        }
        // The first lanes have the extremes.
        let bytes = [
            std::array::from_fn(|i| if i < 8 { 255 } else { (i * 37) as u8 }),
            std::array::from_fn(|i| [128, 127, (i * 91) as u8][(i / 4).min(2)]),
        ];
        for isa in Isa::available() {
            let mut found = [0.0; LANES];
            isa.run(Dots(-300, &bytes, &mut found));
            for (lane, found) in found.iter().enumerate() {
                let at = 4 * lane..4 * lane + 4;
                let product = |i| i32::from(bytes[0][i]) * i32::from(bytes[1][i] as i8);
                let expected = -300 * 256 - 1 + at.map(product).sum::<i32>();
                assert_eq!(*found, expected as f32, "{isa:?}: lane {lane}");
            }
        }
    }

    #[test]
    fn every_half_widens_as_the_library_says() {
        for bits in 0..=u16::MAX {
            let expected = half::f16::from_bits(bits).to_f32();
            let found = widen_half(bits);
            assert!(found.to_bits() == expected.to_bits() || found.is_nan() && expected.is_nan());
        }
    }

    #[test]
    fn sums_are_right() {
        let x: Vec<f32> = (0..37).map(|i| i as f32).collect();
        assert_eq!(sum_of_squares(&x), (0..37).map(|i| (i * i) as f32).sum());
    }
}
