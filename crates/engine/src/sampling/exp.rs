//! `exp` in a form that the compiler vectorises on any target, with the same bits everywhere.

/// `exp(x)` for `x <= 0`, relative error below 2e-7 down to -87, 0 beyond; NaN gives 0.
#[inline]
pub(crate) fn exp_nonpositive(x: f32) -> f32 {
    // exp(x) = 2^n * 2^f, n = round(x / ln 2), |f| <= 1/2; 2^f by its Taylor polynomial.
    const LOG2_E: f32 = std::f32::consts::LOG2_E;
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    // Added to a small number, it leaves the number's nearest integer in the lowest bits: casts
    // from f32 do not become vector instructions.
    const ROUNDER: f32 = 12_582_912.0;
    let inside = x >= -87.0;
    let x = if inside { x.min(0.0) } else { 0.0 };
    let rounded = x * LOG2_E + ROUNDER;
    let n = rounded - ROUNDER;
    let r = x - n * LN_2_HIGH - n * LN_2_LOW;
    let mut p = 1.0 / 5040.0;
    for c in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        p = p * r + c;
    }
    let n = rounded.to_bits().wrapping_sub(ROUNDER.to_bits());
    let scale = f32::from_bits(n.wrapping_add(127) << 23);
    if inside { p * scale } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::exp_nonpositive;

    #[test]
    fn agrees_with_the_library_over_its_range() {
        for i in 0..=87_000 {
            let x = -(i as f32) / 1000.0;
            let expected = f64::from(x).exp();
            let error = (f64::from(exp_nonpositive(x)) - expected).abs() / expected;
            assert!(error < 2e-7, "exp({x}): relative error {error}");
        }
    }

    #[test]
    fn is_zero_far_out_and_for_nan() {
        assert_eq!(exp_nonpositive(-200.0), 0.0);
        assert_eq!(exp_nonpositive(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp_nonpositive(f32::NAN), 0.0);
        assert_eq!(exp_nonpositive(0.0), 1.0);
    }
}
