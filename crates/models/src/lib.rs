//! Architectures, one readable file each, the layers they share, and weight files.
//!
//! A checkpoint (GGUF file or Hugging Face folder) is opened without touching its weights; an
//! architecture turns its configuration into a [`Blueprint`]; the decoder runs a blueprint. Does
//! not know requests or HTTP.
#![forbid(unsafe_code)]

mod arch;
mod checkpoint;
mod division;
mod layers;
mod model;
pub mod weights;

pub use arch::Blueprint;
pub use checkpoint::{Checkpoint, LoadOptions, TensorInfo};
pub use division::{Division, Parallel, Place};
pub use layers::{Groups, LOGIT_ROWS_MAX, Ranks};
pub use model::{ExpertCounts, KvCache, Model, ModelError, ModelPart};
pub use weights::Quantization;

/// A [`ModelError::Invalid`] with a formatted text.
macro_rules! invalid {
    ($($arg:tt)*) => { $crate::ModelError::Invalid(format!($($arg)*)) };
}
pub(crate) use invalid;
