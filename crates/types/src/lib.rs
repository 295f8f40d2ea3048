//! The words that all of Pomona shares: ids and units, a request and its sampling, what a model and
//! its KV cache look like, and the seams ([`Replica`], [`TokenSink`], [`Collective`]) between
//! crates that must not know each other.
//!
//! This crate decides nothing and does nothing: no clock, no thread, no I/O. Everything here is a
//! value or a trait.
#![forbid(unsafe_code)]

mod collective;
mod experts;
mod id;
mod model;
mod replica;
mod request;
mod units;

pub use collective::{Collective, GroupError, LostCause};
pub use experts::ExpertLoads;
pub use id::{RequestId, TenantId, TokenId};
pub use model::{ExpertsSpec, LayerGroup, LayerKind, ModelSpec};
pub use replica::{
    Finish, Load, Refusal, Replica, ReplicaInfo, StepTimes, TokenLogprobs, TokenOutput, TokenSink,
};
pub use request::{FinishReason, QosClass, Request, Sampling};
pub use units::{BLOCK_TOKENS, Micros, SPLIT_BLOCKS, blocks_of_one_rank};
