//! The HTTP front: an OpenAI-compatible API over [`Replica`](pomona_types::Replica)s, with streams,
//! API keys, metrics under vLLM's names, probes and a chat page.
//!
//! Knows no engine: anything that implements `Replica` can be served. Holds no queue of its own;
//! a replica that is full says so, and the client is told to come again.
//!
//! What a client can rely on:
//!
//! - A field that is not implemented is refused unless it is at its default; an unknown field is
//!   refused. `user`, `safety_identifier`, `prompt_cache_key` and `metadata` are labels for records
//!   that this server does not keep: they are accepted and change nothing.
//! - A client that hangs up, before or during its answer, cancels its request at once.
//! - Choice `i` of a request with `n` and `seed` is what a request with seed `seed + i` gives.
//! - A message of the role `developer` reaches the model's template as `system`, and text parts of
//!   one message are joined by line ends.
//! - Requests of different API keys never share prefix blocks.
//! - Every answer carries `x-request-id`: the client's, if it sent one of at most 128 printable
//!   characters, or one of ours. The log names requests by it.
#![forbid(unsafe_code)]

mod access;
mod auth;
mod body;
mod chat;
mod choice;
mod completions;
mod config;
mod connection;
mod door;
mod error;
mod fields;
mod gateway;
mod generation;
mod list;
mod logprobs;
mod messages;
mod metrics;
mod models;
mod options;
mod origins;
mod page;
mod probes;
mod server;
mod sse;
mod tokenize;
mod wire;
mod writers;

pub use config::{Config, Limits, SamplingDefaults};
pub use gateway::ServedModel;
pub use server::{Gateway, router, serve};
