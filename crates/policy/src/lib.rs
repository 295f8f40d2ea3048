//! Decisions above a single replica: which one a request goes to, what it costs that ranks talk to
//! each other, and which ranks get which experts. Pure: loads, times and measurements come in as
//! values. Does not know sockets, engines or models.
#![forbid(unsafe_code)]

pub mod cost;
pub mod experts;
mod routing;

pub use routing::{Route, Router};
