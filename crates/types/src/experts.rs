//! What layers of experts have done, as counters.

/// Counters of a model's layers of experts. A pair is a token and one of its experts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExpertLoads {
    /// By layer and expert: tokens that it got.
    pub tokens: Vec<Vec<u64>>,
    /// By rank: pairs that it computed. Empty where no ranks share layers.
    pub pairs: Vec<u64>,
    /// How many ranks share a layer.
    pub sharing: usize,
    /// Of each layer in each step, the pairs of the rank that had most: the others waited for it.
    pub slowest: u64,
}

impl ExpertLoads {
    /// Adds what another model of the same kind has counted, over as many ranks.
    pub fn add(&mut self, other: &ExpertLoads) {
        fn add(sums: &mut Vec<u64>, other: &[u64]) {
            sums.resize(sums.len().max(other.len()), 0);
            sums.iter_mut().zip(other).for_each(|(sum, n)| *sum = sum.saturating_add(*n));
        }
        let layers = self.tokens.len().max(other.tokens.len());
        self.tokens.resize(layers, Vec::new());
        self.tokens.iter_mut().zip(&other.tokens).for_each(|(sums, other)| add(sums, other));
        add(&mut self.pairs, &other.pairs);
        self.sharing = self.sharing.max(other.sharing);
        self.slowest = self.slowest.saturating_add(other.slowest);
    }

    /// How many times longer the slowest rank took than if pairs were spread evenly: 1 at best, as
    /// many as ranks share a layer at worst. `None` before there was any, and where none shares.
    pub fn balance(&self) -> Option<f64> {
        let pairs: u64 = self.pairs.iter().sum();
        (pairs > 0).then(|| self.slowest as f64 * self.sharing as f64 / pairs as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loads_of_replicas_add_up() {
        let one = ExpertLoads {
            tokens: vec![vec![1, 2], vec![3, 0]],
            pairs: vec![4, 2],
            sharing: 2,
            slowest: 4,
        };
        let mut sum = ExpertLoads::default();
        assert_eq!(sum.balance(), None);
        sum.add(&one);
        assert_eq!(sum, one);
        sum.add(&one);
        assert_eq!((sum.tokens, sum.pairs), (vec![vec![2, 4], vec![6, 0]], vec![8, 4]));
        assert_eq!(one.balance(), Some(4.0 / 3.0));
    }
}
