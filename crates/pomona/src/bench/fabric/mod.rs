//! Collectives between real processes of this machine, over each transport: what they take, against
//! what copying or a plain socket takes, and whether that was predicted.

mod check;
mod limits;
mod ranks;
mod table;
mod trial;

use clap::ValueEnum;
use pomona_fabric::secure::Policy;
use pomona_policy::cost::{Operation, Point, Sample, Setting, Transport};
use serde::{Deserialize, Serialize};

use super::others::Neighbours;
use super::stats::Deciles;

pub use check::{Verdict, sizes_to_check};
pub use ranks::{follow, measure};
pub use table::print;

/// What carries the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Wire {
    /// Shared memory
    Shm,
    /// TCP on the loopback interface
    Tcp,
    /// libfabric on the loopback interface
    Ofi,
}

/// What to measure, as ranks are told.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Job {
    /// Over what.
    pub wire: Wire,
    /// What is protected; on shared memory there is nothing to protect.
    pub policy: Policy,
    /// Among how many processes.
    pub ranks: usize,
    /// Bytes, multiples of 4.
    pub sizes: Vec<usize>,
    /// How often all calls are repeated, one after the other.
    pub rounds: u32,
    /// libfabric's, where that is measured.
    pub provider: Option<String>,
}

impl Job {
    /// Where that is.
    pub fn setting(&self) -> Setting {
        let transport = match (self.wire, self.policy) {
            (Wire::Shm, _) => Transport::Shm,
            (Wire::Tcp, Policy::Seal) => Transport::TcpSealed,
            (Wire::Tcp, _) => Transport::Tcp,
            (Wire::Ofi, _) => Transport::Ofi,
        };
        Setting { transport, ranks: self.ranks }
    }

    /// All calls, size by size.
    pub fn cases(&self) -> Vec<(Operation, usize)> {
        let sized = || Operation::all().filter(|operation| *operation != Operation::Barrier);
        let cases = self.sizes.iter().flat_map(|bytes| sized().map(|one| (one, *bytes)));
        [(Operation::Barrier, 0)].into_iter().chain(cases).collect()
    }
}

/// What ranks have measured of a job, in one start or in several.
pub struct Times {
    limits: Vec<Point>,
    /// Of each of the job's cases, microseconds.
    times: Vec<Vec<f64>>,
}

impl Times {
    /// Adds what another start of the same job has measured. Of limits, the best one counts.
    pub fn join(&mut self, other: Times) {
        for (own, other) in self.limits.iter_mut().zip(other.limits) {
            own.micros = own.micros.min(other.micros);
        }
        for (own, other) in self.times.iter_mut().zip(other.times) {
            own.extend(other);
        }
    }
}

/// What one call took.
#[derive(Clone, Debug, Serialize)]
pub struct Figure {
    /// Which.
    pub operation: Operation,
    /// Of how many bytes.
    pub bytes: usize,
    /// How often it was made.
    pub calls: usize,
    /// From a barrier until the last rank has its result, microseconds.
    pub us: Deciles,
    /// The limit's time over the middle one.
    pub of_limit: Option<f64>,
}

/// What was measured in one setting.
#[derive(Clone, Debug, Serialize)]
pub struct Run {
    /// What.
    #[serde(flatten)]
    pub job: Job,
    /// Of as many bytes, microseconds: a copy in memory, or one way over a plain socket.
    pub limits: Vec<Point>,
    /// Each call.
    pub figures: Vec<Figure>,
}

impl Run {
    /// Of what was measured of a job.
    pub fn new(job: Job, Times { limits, times }: Times) -> Run {
        let figure = |((operation, bytes), times): ((Operation, usize), Vec<f64>)| {
            let calls = times.len();
            let us = Deciles::of(times);
            let limit = limits.iter().find(|limit| limit.bytes == bytes);
            let of_limit = limit.map(|limit| limit.micros / us.p50);
            Figure { operation, bytes, calls, us, of_limit }
        };
        let figures = job.cases().into_iter().zip(times).map(figure).collect();
        Run { job, limits, figures }
    }

    /// The middle times.
    pub fn samples(&self) -> impl Iterator<Item = Sample> {
        let setting = self.job.setting();
        self.figures.iter().map(move |figure| Sample {
            setting,
            operation: figure.operation,
            bytes: figure.bytes,
            micros: figure.us.p50,
        })
    }

    fn figure(&self, operation: Operation, bytes: usize) -> Option<&Figure> {
        self.figures.iter().find(|one| (one.operation, one.bytes) == (operation, bytes))
    }
}

/// A record of everything.
#[derive(Clone, Debug, Serialize)]
pub struct Record {
    /// The version.
    pub pomona: &'static str,
    /// Of the machine.
    pub cpu: String,
    /// That this process may use.
    pub cores: usize,
    /// What was measured.
    pub runs: Vec<Run>,
    /// What came of a check.
    pub verdicts: Vec<Verdict>,
    /// What others did meanwhile.
    pub neighbours: Neighbours,
}
