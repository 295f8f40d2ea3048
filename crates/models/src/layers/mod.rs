//! What architectures share.

mod decoder;
mod rope;

pub(crate) use decoder::Decoder;
pub(crate) use rope::{Rope, Scaling};
