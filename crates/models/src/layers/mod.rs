//! What architectures share.

mod decoder;
mod moe;
mod ranks;
mod rope;

pub(crate) use decoder::Decoder;
pub use decoder::LOGIT_ROWS_MAX;
pub use ranks::{Groups, Ranks};
pub(crate) use rope::{Rope, Scaling};
