//! How many tokens each expert of a model got, in all runs that kept it: what a file says, which
//! may be of another model or damaged.

use serde::{Deserialize, Serialize};

/// What was counted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counted {
    /// The model's name, for those who read the file.
    pub model: String,
    /// Tells its weights from others.
    pub weights: String,
    /// By layer and expert.
    pub tokens: Vec<Vec<u64>>,
}

/// Why counts are of no use to a model.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum CountedError {
    /// Of others.
    #[error("it was counted with other weights, of {0:?}")]
    Weights(String),
    /// They are not for each of its experts.
    #[error("it has other layers or experts than the model")]
    Shape,
}

impl Counted {
    /// What was found, if it is of the model that `self` has no counts of yet.
    ///
    /// # Errors
    /// When it is not.
    pub fn of_same_model(&self, found: Counted) -> Result<Counted, CountedError> {
        if found.weights != self.weights {
            return Err(CountedError::Weights(found.model));
        }
        let shape = |counted: &Counted| counted.tokens.iter().map(Vec::len).collect::<Vec<_>>();
        if shape(&found) != shape(self) {
            return Err(CountedError::Shape);
        }
        Ok(found)
    }

    /// With what was counted since, by layer and expert.
    #[must_use]
    pub fn with(&self, since: &[Vec<u64>]) -> Counted {
        let mut sum = self.clone();
        for (sums, since) in sum.tokens.iter_mut().zip(since) {
            sums.iter_mut().zip(since).for_each(|(sum, now)| *sum = sum.saturating_add(*now));
        }
        sum
    }
}
