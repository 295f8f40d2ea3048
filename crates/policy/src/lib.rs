//! Decisions above a single replica: which one a request goes to. Pure: loads and times come in as
//! values. Does not know sockets, engines or models.
#![forbid(unsafe_code)]

mod routing;

pub use routing::{Route, Router};
