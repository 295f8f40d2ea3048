//! The seam between a model and the engine that runs it.

use pomona_device::View;
use pomona_kernels::{Batch, KvLayer, OpError, Ops};
use pomona_types::ModelSpec;

/// Why a model cannot be loaded or run.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// Data that cannot be trusted or is not supported: the file's fault. Says what to do.
    #[error("{0}")]
    Invalid(String),
    /// Reading failed.
    #[error("cannot read {path}")]
    Io {
        /// The file.
        path: String,
        /// The system's answer.
        source: std::io::Error,
    },
    /// An operation refused.
    #[error(transparent)]
    Op(#[from] OpError),
}

/// KV memory of all layers.
pub struct KvCache {
    /// By layer index.
    pub layers: Vec<KvLayer>,
    /// By layer index: which layer group (index into `Batch::slots` and `Batch::tables`).
    pub group_of: Vec<usize>,
}

/// A decoder that turns a batch into logits. Holds weights on one device; keeps no state between
/// calls but scratch memory.
pub trait Model: Send {
    /// Its sizes.
    fn spec(&self) -> &ModelSpec;

    /// Runs `batch` (at most the token count given at load), writing keys and values to `kv`, and
    /// keeps the normed hidden states of `batch.logit_rows` (any number of them, up to the token
    /// count given at load) for [`Model::logits`].
    fn forward(&mut self, ops: &dyn Ops, batch: &Batch, kv: &KvCache) -> Result<(), ModelError>;

    /// Logits of some of the last forward's outputs: `logits: f32 [outputs.len(), vocab]`. Taken
    /// in pieces, because all of them at once would be more memory than the weights.
    fn logits(
        &mut self,
        ops: &dyn Ops,
        outputs: std::ops::Range<usize>,
        logits: &View,
    ) -> Result<(), ModelError>;
}
