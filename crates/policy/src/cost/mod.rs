//! What collectives cost, from measurements: the time of a call, and which algorithm is the
//! quickest. Between sizes that were measured, time is interpolated; beyond them it follows a
//! latency and a cost for each byte (Hockney: The Communication Challenge for MPP, 1994), fitted to
//! them. Knows only numbers of ranks and transports that were measured: of others it says nothing.

mod choice;
mod curve;

use std::fmt;

use serde::{Deserialize, Serialize};

pub use self::choice::Choices;
pub use self::curve::{Curve, Point};

/// How the sum of all ranks' numbers is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Algorithm {
    /// Everyone gives everything to everyone, and adds it up. One step; where arenas can be
    /// reached in place, numbers are written once and read where they are.
    OneShot,
    /// Everyone adds up a part, and gives the sums to everyone. Two steps, the fewest bytes.
    TwoShot,
    /// What is known is passed on in a number of steps that is the logarithm of the ranks (Bruck
    /// and others: Efficient Algorithms for All-to-All Communications, 1997), then added up.
    Doubling,
    /// From rank to rank, in pieces: sums on the first way around, results on the second.
    Ring,
}

impl Algorithm {
    /// All of them.
    pub const ALL: [Algorithm; 4] =
        [Algorithm::OneShot, Algorithm::TwoShot, Algorithm::Doubling, Algorithm::Ring];

    /// For tables.
    pub fn name(self) -> &'static str {
        match self {
            Algorithm::OneShot => "one-shot",
            Algorithm::TwoShot => "two-shot",
            Algorithm::Doubling => "doubling",
            Algorithm::Ring => "ring",
        }
    }
}

/// What carries bytes between ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Transport {
    /// Memory that processes of one machine share.
    Shm,
    /// TCP in clear.
    Tcp,
    /// TCP with all data in sealed records.
    TcpSealed,
    /// libfabric.
    Ofi,
}

impl Transport {
    /// For tables.
    pub fn name(self) -> &'static str {
        match self {
            Transport::Shm => "shm",
            Transport::Tcp => "tcp",
            Transport::TcpSealed => "sealed tcp",
            Transport::Ofi => "libfabric",
        }
    }
}

/// A call whose cost is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Operation {
    /// Sums of as many bytes on each rank.
    AllReduce(Algorithm),
    /// So many bytes of each rank for all.
    AllGather,
    /// So many bytes from one rank to all.
    Broadcast,
    /// One way of so many bytes between two ranks.
    SendReceive,
    /// No bytes.
    Barrier,
}

impl Operation {
    /// All of them.
    pub fn all() -> impl Iterator<Item = Operation> {
        let others = [Operation::AllGather, Operation::Broadcast, Operation::SendReceive];
        let sums = Algorithm::ALL.into_iter().map(Operation::AllReduce);
        sums.chain(others).chain([Operation::Barrier])
    }

    /// For tables; all sums have the same.
    pub fn name(self) -> &'static str {
        match self {
            Operation::AllReduce(_) => "all-reduce",
            Operation::AllGather => "all-gather",
            Operation::Broadcast => "broadcast",
            Operation::SendReceive => "send/receive",
            Operation::Barrier => "barrier",
        }
    }
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())?;
        match self {
            Operation::AllReduce(algorithm) => write!(f, " {}", algorithm.name()),
            _ => Ok(()),
        }
    }
}

/// Where a call is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Setting {
    /// Over what.
    pub transport: Transport,
    /// Among how many.
    pub ranks: usize,
}

/// What a call was measured to take.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sample {
    /// Where.
    pub setting: Setting,
    /// Which call.
    pub operation: Operation,
    /// Of how many bytes, in the sense of the operation.
    pub bytes: usize,
    /// The middle of the times that it took, microseconds.
    pub micros: f64,
}

/// Most curves of a model, lest a file fills the memory.
const CURVES_MAX: usize = 4096;

/// What calls cost that were measured.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Vec<Costs>", into = "Vec<Costs>")]
pub struct CostModel {
    /// In order of setting and operation, each pair once.
    costs: Vec<Costs>,
}

/// What one call costs, by bytes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Costs {
    /// Where.
    #[serde(flatten)]
    pub setting: Setting,
    /// Which call.
    pub operation: Operation,
    /// How much.
    #[serde(flatten)]
    pub curve: Curve,
}

/// Why a list of costs is no model.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum CostError {
    /// Too many of them.
    #[error("{0} curves of costs, {CURVES_MAX} are the most")]
    Many(usize),
    /// A curve that is none.
    #[error("{what} {why}")]
    Curve {
        /// Whose.
        what: String,
        /// What is wrong.
        why: &'static str,
    },
}

impl CostModel {
    /// Of samples, of which those that are no positive times do not count. Of two samples of the
    /// same call and size the later one counts.
    pub fn fit(samples: &[Sample]) -> CostModel {
        let mut costs: Vec<Costs> = Vec::new();
        let mut keys: Vec<_> = samples.iter().map(|one| (one.setting, one.operation)).collect();
        keys.sort_unstable();
        keys.dedup();
        for (setting, operation) in keys {
            let of = |one: &&Sample| (one.setting, one.operation) == (setting, operation);
            let points = samples.iter().filter(of);
            let points = points.map(|one| Point { bytes: one.bytes, micros: one.micros });
            if let Some(curve) = Curve::fit(points) {
                costs.push(Costs { setting, operation, curve });
            }
        }
        CostModel { costs }
    }

    /// Everything that is known.
    pub fn costs(&self) -> &[Costs] {
        &self.costs
    }

    /// Where calls were measured.
    pub fn settings(&self) -> Vec<Setting> {
        let mut all: Vec<Setting> = self.costs.iter().map(|costs| costs.setting).collect();
        all.dedup();
        all
    }

    /// The time that a call takes, microseconds, if it was measured in this setting.
    pub fn predict(&self, setting: Setting, operation: Operation, bytes: usize) -> Option<f64> {
        let key = |costs: &Costs| (costs.setting, costs.operation);
        let at = self.costs.binary_search_by_key(&(setting, operation), key).ok()?;
        Some(self.costs[at].curve.at(bytes))
    }

    /// The quickest way to make a sum, among those that were measured; the first of equals.
    pub fn best(&self, setting: Setting, bytes: usize) -> Option<Algorithm> {
        let time = |one| self.predict(setting, Operation::AllReduce(one), bytes);
        let known = Algorithm::ALL.into_iter().filter_map(|one| Some((one, time(one)?)));
        known.min_by(|a, b| a.1.total_cmp(&b.1)).map(|(algorithm, _)| algorithm)
    }

    /// The sizes at which sums were measured.
    fn sizes(&self, setting: Setting) -> Vec<usize> {
        let sums = self.costs.iter().filter(|costs| {
            costs.setting == setting && matches!(costs.operation, Operation::AllReduce(_))
        });
        let mut sizes: Vec<usize> =
            sums.flat_map(|costs| costs.curve.points().iter().map(|point| point.bytes)).collect();
        sizes.sort_unstable();
        sizes.dedup();
        sizes
    }
}

impl TryFrom<Vec<Costs>> for CostModel {
    type Error = CostError;

    fn try_from(mut costs: Vec<Costs>) -> Result<CostModel, CostError> {
        if costs.len() > CURVES_MAX {
            return Err(CostError::Many(costs.len()));
        }
        costs.sort_by_key(|one| (one.setting, one.operation));
        let key = |one: &Costs| (one.setting, one.operation);
        let twice = costs.windows(2).find(|pair| key(&pair[0]) == key(&pair[1]));
        let twice = twice.map(|pair| (&pair[0], "stands there twice"));
        let mut wrong = costs.iter().filter_map(|one| Some((one, one.curve.fault()?)));
        if let Some((one, why)) = twice.or_else(|| wrong.next()) {
            let Setting { transport, ranks } = one.setting;
            let what = format!("{} of {ranks} ranks over {}", one.operation, transport.name());
            return Err(CostError::Curve { what, why });
        }
        Ok(CostModel { costs })
    }
}

impl From<CostModel> for Vec<Costs> {
    fn from(model: CostModel) -> Vec<Costs> {
        model.costs
    }
}

#[cfg(test)]
mod tests;
