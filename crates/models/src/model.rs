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

/// What one rank has of a model: all of it where there is one.
#[derive(Clone, PartialEq, Debug)]
pub struct ModelPart {
    /// Sizes of what is here: its layers, and the heads that it computes, only.
    pub spec: ModelSpec,
    /// Which of the model's layers is the first.
    pub first_layer: u32,
    /// Ranks that keep the splits of a sequence in turn, and their blocks with them.
    pub context_ranks: u32,
    /// This one among them.
    pub context_rank: u32,
}

/// A decoder that turns a batch into logits. Holds weights on one device; keeps no state between
/// calls but scratch memory.
pub trait Model: Send {
    /// Its sizes.
    fn spec(&self) -> &ModelSpec;

    /// What of it is here.
    fn part(&self) -> &ModelPart;

    /// Runs `batch` (at most the token count given at load), writing keys and values to `kv`. All
    /// ranks of a model do so with the same batch. Of a pipeline, a stage is done when it has
    /// handed its work to the next, and may begin another batch.
    fn forward(&mut self, ops: &dyn Ops, batch: &Batch, kv: &KvCache) -> Result<(), ModelError>;

    /// Brings the normed hidden states of the `count` rows of `batch.logit_rows` to where
    /// [`Model::logits`] takes them from. Once for each forward, in their order.
    fn outputs(&mut self, ops: &dyn Ops, count: usize) -> Result<(), ModelError>;

    /// Logits of some of the outputs that [`Model::outputs`] brought last: `logits: f32
    /// [outputs.len(), vocab]`. Taken in pieces, 32 rows at most, because all of them at once would
    /// be more memory than the weights. Ranks without a part of the vocabulary leave them alone.
    fn logits(
        &mut self,
        ops: &dyn Ops,
        outputs: std::ops::Range<usize>,
        logits: &View,
    ) -> Result<(), ModelError>;

    /// What each layer of experts has counted so far, from the first to the last. All ranks of a
    /// model ask at the same place among forwards and outputs; the first rank gets all layers, the
    /// others none.
    fn expert_counts(&mut self, _ops: &dyn Ops) -> Result<Vec<ExpertCounts>, ModelError> {
        Ok(Vec::new())
    }
}

/// What a layer of experts has counted, modulo 2^32.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ExpertCounts {
    /// Whose layer it is.
    pub stage: usize,
    /// Tokens that each expert got.
    pub tokens: Vec<u32>,
    /// Pairs of tokens and experts that each of the ranks computed that share the layer; none where
    /// one rank has it alone.
    pub pairs: Vec<u32>,
    /// Those of the rank that had most, step by step.
    pub slowest: u32,
}
