//! Decisions above a single replica: which one a request goes to, and what it costs that ranks talk
//! to each other. Pure: loads, times and measurements come in as values. Does not know sockets,
//! engines or models.
#![forbid(unsafe_code)]

pub mod cost;
mod routing;

pub use routing::{Route, Router};
