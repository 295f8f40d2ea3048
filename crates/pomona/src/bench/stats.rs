//! Medians, spreads and percentiles of repeated measurements; perplexity.

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

/// The middle of a distribution, and where most of it lies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Deciles {
    /// One in ten lies below.
    pub p10: f64,
    /// Half lie below.
    pub p50: f64,
    /// One in ten lies above.
    pub p90: f64,
}

impl Deciles {
    /// Of any number of values; zeros for none.
    pub fn of(mut values: Vec<f64>) -> Deciles {
        values.sort_by(f64::total_cmp);
        let [p10, p50, p90] = [0.1, 0.5, 0.9].map(|q| quantile(&values, q));
        Deciles { p10, p50, p90 }
    }
}

/// How likely a model found the tokens of a text.
#[derive(Default)]
pub struct Likelihood {
    count: u64,
    sum: f64,
    squares: f64,
}

impl Likelihood {
    /// Takes note of a token's negative log-probability.
    pub fn add(&mut self, nll: f64) {
        self.count += 1;
        self.sum += nll;
        self.squares += nll * nll;
    }

    /// Tokens so far.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// The exponential of the mean.
    pub fn perplexity(&self) -> f64 {
        (self.sum / self.count as f64).exp()
    }

    /// Of the perplexity, by the delta method, from the spread of the tokens' log-probabilities.
    pub fn standard_error(&self) -> f64 {
        let n = self.count as f64;
        let mean = self.sum / n;
        let variance = (self.squares / n - mean * mean).max(0.0);
        match self.count {
            0 | 1 => 0.0,
            _ => (variance / (n - 1.0)).sqrt() * mean.exp(),
        }
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
    fn perplexity_of_certainty_is_one_and_of_a_coin_two() {
        let mut likelihood = Likelihood::default();
        likelihood.add(0.0);
        assert_eq!(likelihood.perplexity(), 1.0);
        let mut coin = Likelihood::default();
        (0..10).for_each(|_| coin.add(std::f64::consts::LN_2));
        assert!((coin.perplexity() - 2.0).abs() < 1e-12);
        assert!(coin.standard_error() < 1e-6);
    }

    #[test]
    fn most_values_lie_between_the_first_and_the_last_tenth() {
        let deciles = Deciles::of((0..=10).rev().map(f64::from).collect());
        assert_eq!(deciles, Deciles { p10: 1.0, p50: 5.0, p90: 9.0 });
    }

    #[test]
    fn the_tail_is_near_the_largest() {
        let p = Percentiles::of((0..=100).rev().map(f64::from).collect());
        assert_eq!((p.p50, p.p99), (50.0, 99.0));
    }
}
