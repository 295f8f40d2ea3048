//! Which algorithm to take for a sum, as a list that all ranks can be given.

use std::fmt;
use std::str::FromStr;

use super::{Algorithm, CostModel, Setting, Transport};

/// Most entries of a list.
const CHOICES_MAX: usize = 1024;

/// For numbers of ranks that were measured: up to which size which algorithm. Written like
/// `2:4096:one-shot,2:*:ring`, for another process's command line.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Choices {
    /// In order of ranks and sizes; the last size for each number of ranks has no bound.
    list: Vec<Choice>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Choice {
    ranks: usize,
    /// Up to this size; all from the one before on, if there is none.
    bytes_max: Option<usize>,
    algorithm: Algorithm,
}

impl Choices {
    /// The algorithm for a sum of so many bytes on each rank, where one is known.
    pub fn algorithm(&self, ranks: usize, bytes: usize) -> Option<Algorithm> {
        let of = |one: &&Choice| one.ranks == ranks && one.bytes_max.is_none_or(|max| bytes <= max);
        self.list.iter().find(of).map(|one| one.algorithm)
    }

    /// Whether nothing is known.
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }
}

impl CostModel {
    /// The quickest algorithms over a transport: as many as others read, so that all ranks know the
    /// same. Where they are more, those of the largest numbers of ranks are left out.
    pub fn choices(&self, transport: Transport) -> Choices {
        let settings = self.settings().into_iter().filter(|one| one.transport == transport);
        let mut list = Vec::new();
        for choices in settings.map(|setting| self.choices_of(setting)) {
            // Whole, since the last one is for all larger sizes.
            if list.len() + choices.len() > CHOICES_MAX {
                break;
            }
            list.extend(choices);
        }
        Choices { list }
    }

    fn choices_of(&self, setting: Setting) -> Vec<Choice> {
        let ranks = setting.ranks;
        let mut list: Vec<Choice> = Vec::new();
        let mut before: Option<(usize, Algorithm)> = None;
        for size in self.sizes(setting) {
            let Some(algorithm) = self.best(setting, size) else { continue };
            if let Some((below, other)) = before
                && other != algorithm
            {
                let bytes_max = Some(self.turn(setting, below, size));
                list.push(Choice { ranks, bytes_max, algorithm: other });
            }
            before = Some((size, algorithm));
        }
        list.extend(before.map(|(_, algorithm)| Choice { ranks, bytes_max: None, algorithm }));
        list
    }

    /// The last size, from `low` to `high`, at which the algorithm of `low` is the best, if another
    /// one is at `high`.
    fn turn(&self, setting: Setting, mut low: usize, mut high: usize) -> usize {
        let first = self.best(setting, low);
        while high - low > 1 {
            let middle = low + (high - low) / 2;
            if self.best(setting, middle) == first { low = middle } else { high = middle }
        }
        low
    }
}

impl fmt::Display for Choices {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, Choice { ranks, bytes_max, algorithm }) in self.list.iter().enumerate() {
            let comma = if index == 0 { "" } else { "," };
            let size = bytes_max.map_or("*".to_owned(), |bytes| bytes.to_string());
            write!(f, "{comma}{ranks}:{size}:{}", algorithm.name())?;
        }
        Ok(())
    }
}

/// A text that is no list of choices.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("'{0}' is no list of algorithms like 2:4096:one-shot,2:*:ring")]
pub struct ChoicesError(String);

impl FromStr for Choices {
    type Err = ChoicesError;

    fn from_str(text: &str) -> Result<Choices, ChoicesError> {
        let entries = text.split(',').filter(|entry| !entry.is_empty()).take(CHOICES_MAX);
        let list = entries.map(choice).collect::<Option<Vec<_>>>();
        list.map(|list| Choices { list }).ok_or_else(|| ChoicesError(text.to_owned()))
    }
}

fn choice(entry: &str) -> Option<Choice> {
    let mut parts = entry.split(':');
    let (ranks, size, name) = (parts.next()?, parts.next()?, parts.next()?);
    let bytes_max = if size == "*" { None } else { Some(size.parse().ok()?) };
    let algorithm = Algorithm::ALL.into_iter().find(|one| one.name() == name)?;
    let whole = parts.next().is_none();
    whole.then_some(Choice { ranks: ranks.parse().ok()?, bytes_max, algorithm })
}
