//! Quantising weights to the group formats: to the nearest integers, for 4 bits with the scale and
//! zero point that serve the group best among a few. Results are kept between runs: whoever changes
//! them raises [`PACKED_LAYOUT`](crate::PACKED_LAYOUT).

use half::f16;

use crate::formats::ZERO_PARTS;
use crate::isa::{Kernel, Tier};
use crate::lanes::{LANES, multiply_add, sum};
use crate::{Format, Int4Group};

/// Largest group.
const GROUP_MAX: usize = 128;
/// Largest 4-bit integer.
const MOST: f32 = 15.0;
/// Spans of integers that the range of a group is first laid over, least and step, as in
/// `make_qkx2_quants` of ggml: with fewer than fifteen steps the ends of the range are cut off, to
/// the gain of what lies between.
const SPANS: usize = 16;
const SPAN_LEAST: f32 = 13.7;
const SPAN_STEP: f32 = 0.1;
/// 1.5 * 2^23: adding it rounds to a whole number, which then stands in the lowest bits.
const ROUND: f32 = 12_582_912.0;

/// Quantises a row.
pub(crate) struct Quantise<'a> {
    /// A group format.
    pub(crate) format: Format,
    /// A whole number of groups.
    pub(crate) values: &'a [f32],
    /// The row as the format stores it, zeroed.
    pub(crate) out: &'a mut [u8],
}

impl Kernel for Quantise<'_> {
    #[inline(always)]
    fn run<T: Tier>(self, _: T) {
        let groups = self.values.chunks_exact(self.format.block_len());
        if self.format.is_int4() {
            for (index, group) in groups.enumerate() {
                int4(group, Int4Group::of(self.format, self.out, index));
            }
        } else {
            let outs = self.out.chunks_exact_mut(self.format.block_bytes());
            groups.zip(outs).for_each(|(group, out)| int8(group, out));
        }
    }
}

/// A group as signed bytes. A number that is not finite makes the scale NaN, and with it all that
/// is read back.
#[inline(always)]
fn int8(x: &[f32], out: &mut [u8]) {
    const MOST: f32 = 127.0;
    // Without the sign, numbers are ordered as their bits are; NaN comes last.
    let largest = x.iter().fold(0, |most, v| u32::max(most, v.abs().to_bits()));
    let largest = f32::from_bits(largest);
    let scale = f16::from_f32(if largest.is_finite() { largest / MOST } else { f32::NAN });
    let (wide, qs) = (scale.to_f32(), &mut out[2..]);
    let inverse = if wide > 0.0 { 1.0 / wide } else { 0.0 };
    for (q, v) in qs.iter_mut().zip(x) {
        let rounded = (v * inverse).clamp(-MOST, MOST) + ROUND;
        *q = rounded.to_bits().wrapping_sub(ROUND.to_bits()) as u8;
    }
    out[..2].copy_from_slice(&scale.to_le_bytes());
}

/// A group as nibbles: of several grids that cover it, the one with the least squared error, where
/// large weights count more.
#[inline(always)]
fn int4(x: &[f32], mut out: Int4Group<'_>) {
    let mut padded = [[0.0; LANES]; GROUP_MAX / LANES];
    for (lanes, x) in padded.iter_mut().zip(x.as_chunks::<LANES>().0) {
        *lanes = *x;
    }
    let x = &padded[..x.len() / LANES];
    let Some(best) = search(x) else {
        // Too small for a scale, or too large: the latter is seen by whoever reads it.
        let small = x.as_flattened().iter().all(|v| v.abs() < 1.0);
        return out.set_scale(if small { 0.0 } else { f32::NAN }, 0);
    };
    out.set_scale_in_parts(best.scale, best.zero);
    for (i, v) in x.as_flattened().iter().enumerate() {
        out.set(i, whole(best.nearest(*v)));
    }
}

/// A whole number as an integer.
#[inline(always)]
fn whole(v: f32) -> u8 {
    (v + ROUND).to_bits().wrapping_sub(ROUND.to_bits()) as u8
}

/// Scale and zero point as they are stored.
#[derive(Clone, Copy)]
struct Grid {
    scale: f16,
    zero: u8,
    inverse: f32,
}

impl Grid {
    /// The grid next to `d * q + m`, `None` when there is no such scale.
    #[inline(always)]
    fn near(d: f32, m: f32) -> Option<Grid> {
        let scale = f16::from_f32(d);
        let wide = scale.to_f32();
        let usable = wide > 0.0 && wide.is_finite();
        let zero = (-m / wide * ZERO_PARTS).round().clamp(0.0, 255.0) as u8;
        usable.then_some(Grid { scale, zero, inverse: 1.0 / wide })
    }

    /// The integer for a number.
    #[inline(always)]
    fn nearest(&self, v: f32) -> f32 {
        let at = v.mul_add(self.inverse, f32::from(self.zero) / ZERO_PARTS);
        (at.clamp(0.0, MOST) + ROUND) - ROUND
    }

    /// The weighted squared error of a group on this grid.
    #[inline(always)]
    fn error(&self, x: &[[f32; LANES]], weights: &[[f32; LANES]]) -> f32 {
        let (d, zero) = (self.scale.to_f32(), f32::from(self.zero) / ZERO_PARTS);
        let mut sums = [0.0; LANES];
        for (x, weights) in x.iter().zip(weights) {
            let error: [f32; LANES] =
                std::array::from_fn(|i| (self.nearest(x[i]) - zero).mul_add(d, -x[i]));
            let weighted = std::array::from_fn(|i| error[i] * weights[i]);
            multiply_add(&mut sums, &error, &weighted);
        }
        sum(sums)
    }
}

/// The best grid, `None` where no 16-bit scale serves: for zeros and for what is not finite.
#[inline(always)]
fn search(x: &[[f32; LANES]]) -> Option<Grid> {
    let (mut least, mut most, mut squares) = ([0.0f32; LANES], [0.0f32; LANES], [0.0; LANES]);
    for x in x {
        for i in 0..LANES {
            least[i] = least[i].min(x[i]);
            most[i] = most[i].max(x[i]);
        }
        multiply_add(&mut squares, x, x);
    }
    // Every grid has zero within its reach, as its zero point is one of its integers.
    let least = least.into_iter().fold(0.0, f32::min);
    let most = most.into_iter().fold(0.0, f32::max);
    let (range, squares) = (most - least, sum(squares));
    if !(range > 0.0 && range.is_finite() && squares.is_finite()) {
        return None;
    }
    let usual = (squares / (x.len() * LANES) as f32).sqrt();
    let mut weights = [[0.0; LANES]; GROUP_MAX / LANES];
    for (weights, x) in weights.iter_mut().zip(x) {
        *weights = x.map(|v| usual + v.abs());
    }
    let mut best = Grid::near(range / MOST, least);
    let mut best_error = best.map_or(f32::INFINITY, |grid| grid.error(x, &weights));
    for span in 0..SPANS {
        let inverse = (SPAN_LEAST + SPAN_STEP * span as f32) / range;
        let Some(grid) = fitted(x, &weights, least, inverse) else { continue };
        let error = grid.error(x, &weights);
        if error < best_error {
            (best, best_error) = (Some(grid), error);
        }
    }
    best
}

/// The grid of least weighted squared error for the integers `(x - least) * inverse`.
#[inline(always)]
fn fitted(x: &[[f32; LANES]], weights: &[[f32; LANES]], least: f32, inverse: f32) -> Option<Grid> {
    let [mut w, mut wx, mut wq, mut wqq, mut wqx] = [[0.0; LANES]; 5];
    for (x, weights) in x.iter().zip(weights) {
        let q: [f32; LANES] =
            std::array::from_fn(|i| ((x[i] - least) * inverse).clamp(0.0, MOST) + ROUND - ROUND);
        let weighted = std::array::from_fn(|i| weights[i] * q[i]);
        for i in 0..LANES {
            w[i] += weights[i];
            wq[i] += weighted[i];
        }
        multiply_add(&mut wx, weights, x);
        multiply_add(&mut wqq, &weighted, &q);
        multiply_add(&mut wqx, &weighted, x);
    }
    let [w, wx, wq, wqq, wqx] = [w, wx, wq, wqq, wqx].map(sum);
    let determinant = w * wqq - wq * wq;
    if determinant <= 0.0 {
        return None;
    }
    let (d, m) = ((w * wqx - wq * wx) / determinant, (wqq * wx - wq * wqx) / determinant);
    // Minima above zero cannot be stored.
    if m > 0.0 { Grid::near(wqx / wqq, 0.0) } else { Grid::near(d, m) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linear::tests::Dice;
    use crate::{Isa, dequantize_row};

    fn quantised(isa: Isa, format: Format, values: &[f32]) -> (Vec<u8>, Vec<f32>) {
        let mut out = vec![0; format.row_bytes(values.len()).unwrap()];
        isa.run(Quantise { format, values, out: &mut out });
        let mut back = vec![0.0; values.len()];
        dequantize_row(format, &out, &mut back);
        (out, back)
    }

    fn grouped() -> impl Iterator<Item = Format> {
        Format::ALL.into_iter().filter(|f| f.is_grouped())
    }

    /// Near to normally distributed, with a few that stand out.
    fn weights(count: usize) -> Vec<f32> {
        let mut dice = Dice(5);
        let mut one = |i: usize| {
            let sum: f32 = (0..6).map(|_| dice.real()).sum();
            sum * if i.is_multiple_of(61) { 0.06 } else { 0.02 }
        };
        (0..count).map(&mut one).collect()
    }

    fn error(values: &[f32], back: &[f32]) -> f64 {
        let squares = values.iter().zip(back).map(|(v, b)| f64::from(v - b).powi(2));
        (squares.sum::<f64>() / values.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>()).sqrt()
    }

    #[test]
    fn every_tier_quantises_to_the_same_bits() {
        let values = weights(1280);
        for format in grouped() {
            let expected = quantised(Isa::Reference, format, &values).0;
            for isa in Isa::available() {
                assert_eq!(quantised(isa, format, &values).0, expected, "{format:?} {isa:?}");
            }
        }
    }

    #[test]
    fn errors_are_of_the_size_that_the_bits_allow() {
        let values = weights(12_800);
        for format in grouped() {
            let found = error(&values, &quantised(Isa::detect(), format, &values).1);
            let most = if format.is_int8() { 0.01 } else { 0.12 };
            assert!(found < most, "{format:?}: {found}");
        }
    }

    #[test]
    fn the_search_is_better_than_the_range_of_each_group() {
        let values = weights(12_800);
        let mut plain = Vec::new();
        for group in values.chunks(64) {
            let least = group.iter().copied().fold(0.0, f32::min);
            let range = group.iter().copied().fold(0.0, f32::max) - least;
            let grid = Grid::near(range / MOST, least).unwrap();
            let (d, zero) = (grid.scale.to_f32(), f32::from(grid.zero) / ZERO_PARTS);
            plain.extend(group.iter().map(|v| d * (grid.nearest(*v) - zero)));
        }
        let found = error(&values, &quantised(Isa::detect(), Format::Int4G64, &values).1);
        assert!(found < 0.95 * error(&values, &plain), "{found}");
    }

    #[test]
    fn odd_groups_keep_what_matters() {
        for format in grouped() {
            let cols = format.block_len();
            let back = |values: &[f32]| quantised(Isa::detect(), format, values).1;
            assert_eq!(back(&vec![0.0; cols]), vec![0.0; cols], "{format:?}");
            for strange in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX] {
                let mut values = vec![0.5; cols];
                values[cols - 1] = strange;
                assert!(back(&values).iter().all(|v| !v.is_finite()), "{format:?} {strange}");
            }
            for same in [0.7, -0.7] {
                let found = back(&vec![same; cols]);
                assert!(found.iter().all(|v| (v - same).abs() < 1e-3), "{format:?} {found:?}");
            }
        }
    }
}
