//! Several replicas of a model as one. Knows replicas by their seam only, wherever they run. Does
//! not know models, kernels or HTTP.
#![forbid(unsafe_code)]

mod replicas;
mod revived;

pub use replicas::Replicas;
pub use revived::{Life, Maker, Revived};
