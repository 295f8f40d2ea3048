//! Operations on views: what a model's forward is made of, for every weight format and every
//! instruction set.
//!
//! [`Ops`] is the seam: the CPU implements it here, a test device implements it over memory that
//! the host cannot touch, a GPU will. A model calls nothing else. Does not know models or requests.

mod attention;
mod cpu;
mod experts;
mod format;
mod formats;
mod isa;
mod lanes;
mod limits;
mod linear;
mod ops;
mod packing;
#[cfg(test)]
mod parcels;
mod quantise;
mod rows;
mod weights;

pub use attention::kv_row_bytes;
pub use cpu::CpuOps;
pub use experts::Placement;
pub use format::Format;
pub use formats::{Int4Group, dequantize_row};
pub use isa::Isa;
pub use limits::limits;
pub use linear::packed::LAYOUT as PACKED_LAYOUT;
pub use linear::{ActivationBits, LinearPath};
pub use ops::{
    Activation, Attention, Batch, Context, Divided, Embedding, Expert, Experts, HeadGroups,
    KvLayer, LinearPart, Matrix, NO_SLOT, OpError, Ops, OwnExperts, Pairs, RopeStyle, RouteWeights,
    Routes, Span, Write,
};
pub use packing::PackedStore;
pub use weights::{QuantisedRows, StoredRows, WeightRows, WeightSource};
