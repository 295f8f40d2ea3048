//! The API over a real socket and a replica without a model.
#![allow(clippy::unwrap_used, reason = "a test that fails shall panic")]

mod access;
mod chat;
mod client;
mod completions;
#[path = "../fake/mod.rs"]
mod fake;
mod lifecycle;
mod probes;
mod refusals;
mod streams;
