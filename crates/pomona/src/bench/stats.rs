//! Medians, spreads and percentiles of repeated measurements.

use serde::Serialize;

/// A measurement that was repeated: the middle value and how far the others lay.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Spread {
    /// The middle value.
    pub median: f64,
    /// The smallest.
    pub min: f64,
    /// The largest.
    pub max: f64,
}

impl Spread {
    /// Of at least one value; zeros for none.
    pub fn of(values: &[f64]) -> Spread {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        Spread {
            median: quantile(&sorted, 0.5),
            min: sorted.first().copied().unwrap_or(0.0),
            max: sorted.last().copied().unwrap_or(0.0),
        }
    }
}

/// The middle and the tail of a distribution.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Percentiles {
    /// Half lie below.
    pub p50: f64,
    /// One in a hundred lies above.
    pub p99: f64,
}

impl Percentiles {
    /// Of any number of values; zeros for none.
    pub fn of(mut values: Vec<f64>) -> Percentiles {
        values.sort_by(f64::total_cmp);
        Percentiles { p50: quantile(&values, 0.5), p99: quantile(&values, 0.99) }
    }
}

/// The value below which a share `q` of `sorted` lies, interpolated linearly between neighbours
/// (type 7 of Hyndman and Fan, "Sample Quantiles in Statistical Packages", 1996).
fn quantile(sorted: &[f64], q: f64) -> f64 {
    let Some(last) = sorted.len().checked_sub(1) else { return 0.0 };
    let at = q * last as f64;
    let below = at.floor() as usize;
    let above = (below + 1).min(last);
    sorted[below] + (sorted[above] - sorted[below]) * (at - below as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_middle_of_an_even_number_lies_between() {
        assert_eq!(Spread::of(&[4.0, 1.0, 2.0, 3.0]), Spread { median: 2.5, min: 1.0, max: 4.0 });
    }

    #[test]
    fn no_values_are_zeros() {
        assert_eq!(Spread::of(&[]), Spread::default());
        assert_eq!(Percentiles::of(Vec::new()), Percentiles::default());
    }

    #[test]
    fn the_tail_is_near_the_largest() {
        let p = Percentiles::of((0..=100).rev().map(f64::from).collect());
        assert_eq!((p.p50, p.p99), (50.0, 99.0));
    }
}
