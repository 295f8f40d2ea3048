//! A histogram that many threads may add to without waiting.

use std::sync::atomic::{AtomicU64, Ordering};

/// Counts of observations below fixed bounds, and their sum.
pub(crate) struct Histogram {
    bounds: Vec<f64>,
    /// One per bound and one for what lies above them all; not cumulative.
    counts: Vec<AtomicU64>,
    /// The bits of an `f64`.
    sum: AtomicU64,
}

impl Histogram {
    /// Empty, with these upper bounds, ascending.
    pub(crate) fn new(bounds: &[f64]) -> Histogram {
        Histogram {
            bounds: bounds.to_vec(),
            counts: (0..=bounds.len()).map(|_| AtomicU64::new(0)).collect(),
            sum: AtomicU64::new(0),
        }
    }

    /// For counts of tokens up to `most`: 1, 2, 5, 10, 20, 50, ...
    pub(crate) fn tokens(most: u32) -> Histogram {
        let steps = (0..10u32).flat_map(|tens| [1u64, 2, 5].map(|step| step * 10u64.pow(tens)));
        let bounds: Vec<f64> =
            steps.take_while(|bound| *bound <= u64::from(most)).map(|bound| bound as f64).collect();
        Histogram::new(&bounds)
    }

    /// Adds one observation. Never waits; a few instructions.
    pub(crate) fn observe(&self, value: f64) {
        let bucket = self.bounds.partition_point(|bound| *bound < value);
        self.counts[bucket].fetch_add(1, Ordering::Relaxed);
        let add = |bits| Some((f64::from_bits(bits) + value).to_bits());
        // The update cannot fail: `add` never says no.
        let _ = self.sum.fetch_update(Ordering::Relaxed, Ordering::Relaxed, add);
    }

    /// Bounds with the number of observations at or below each, then the number of all, then the
    /// sum.
    pub(crate) fn snapshot(&self) -> (Vec<(f64, u64)>, u64, f64) {
        let mut total = 0;
        let mut below = Vec::with_capacity(self.bounds.len());
        for (index, count) in self.counts.iter().enumerate() {
            total += count.load(Ordering::Relaxed);
            if let Some(bound) = self.bounds.get(index) {
                below.push((*bound, total));
            }
        }
        (below, total, f64::from_bits(self.sum.load(Ordering::Relaxed)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_observation_counts_at_its_bound_and_above() {
        let histogram = Histogram::new(&[1.0, 2.0]);
        for value in [0.5, 1.0, 1.5, 9.0] {
            histogram.observe(value);
        }
        assert_eq!(histogram.snapshot(), (vec![(1.0, 2), (2.0, 3)], 4, 12.0));
    }

    #[test]
    fn token_bounds_end_at_the_context() {
        let (below, ..) = Histogram::tokens(100).snapshot();
        let bounds: Vec<f64> = below.into_iter().map(|(bound, _)| bound).collect();
        assert_eq!(bounds, [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0]);
    }
}
