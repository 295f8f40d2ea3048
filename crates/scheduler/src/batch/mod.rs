//! Requests to steps: continuous batching over paged blocks.
//!
//! One rule, no phases: a request has tokens computed and tokens known or guessed; each step hands
//! out a token budget so that computed catches up. Chunked prefill, prefix hits, decode,
//! speculation and recompute after a preemption all follow from it. [`State::plan`] decides, the
//! caller computes, [`State::commit`] takes note.

mod blocks;
mod commit;
mod config;
mod lanes;
mod ordering;
mod pace;
mod plan;
mod planning;
mod prefix;
mod record;
mod speculation;
mod state;

#[cfg(test)]
mod tests;

pub use config::{Config, ConfigError};
pub use ordering::Ordering;
pub use plan::{Effect, Effects, NO_BLOCK, PlanRow, Sampled, StepPlan, StepResult};
pub use speculation::{Lookup, Method, Speculation};
pub use state::{State, Stats};
