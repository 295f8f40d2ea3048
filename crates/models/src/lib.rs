//! Architectures, one readable file each, the layers they share, and weight files.
#![forbid(unsafe_code)]

mod model;

pub use model::{KvCache, Model, ModelError};
