//! One replica at work: a thread that plans a step, runs the model, samples, commits, and hands
//! tokens to their sinks.
//!
//! Owns the step loop, KV memory and sampling. What runs next is the scheduler's decision, how it
//! is computed the model's; this crate only carries values between them. Does not know text, HTTP
//! or other machines.
#![forbid(unsafe_code)]

mod active;
mod draft;
mod engine;
mod experts;
mod input;
mod kv;
mod logits;
mod order;
mod phases;
mod ranks;
pub mod sampling;
mod step;

pub use engine::{Engine, EngineConfig, EngineError};
pub use kv::{draft_block_bytes, kv_block_bytes, kv_cache};
pub use pomona_scheduler::batch::{Lookup, Method, Speculation};
pub use ranks::{FollowConfig, Others, Seat, follow};
