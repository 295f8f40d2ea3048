//! The operations a forward pass is made of, as one object-safe trait.
//!
//! Activations are `f32 [tokens, width]`. Every operation computes each token's row by itself, in
//! an order that depends on nothing but the row: not on its neighbours, the number of rows, or the
//! number of threads. Same input row, same output bits. Operations check shapes and devices at
//! entry and panic never on what a file or a request can contain.

use std::any::Any;
use std::ops::Range;
use std::sync::Arc;

use pomona_device::{Device, DeviceError, Pool, View};
use pomona_types::{Collective, GroupError};

use crate::{Format, Placement, WeightSource};

/// An operation's refusal: a shape, dtype or device that does not fit, or no memory.
#[derive(Debug, thiserror::Error)]
pub enum OpError {
    /// The caller's mistake.
    #[error("{operation}: {why}")]
    Shape {
        /// Which operation.
        operation: &'static str,
        /// What does not fit.
        why: String,
    },
    /// From the device.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// From the ranks that a model is divided over.
    #[error(transparent)]
    Group(#[from] GroupError),
}

/// A weight matrix `[rows = output features, cols = input features]` on a device, in whatever
/// layout the device's operations like best. Cheap to clone.
#[derive(Clone)]
pub struct Matrix {
    /// The stored format.
    pub format: Format,
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
    /// The backend's own representation.
    pub storage: Arc<dyn Any + Send + Sync>,
}

/// One product of a join: `out = x * weightᵀ (+ bias)`, `out: f32 [tokens, weight.rows]`.
pub struct LinearPart<'a> {
    /// The weights.
    pub weight: &'a Matrix,
    /// `f32 [rows]`, added once.
    pub bias: Option<&'a View>,
    /// Where it goes.
    pub out: &'a View,
}

/// Activations whose columns are divided over ranks.
#[derive(Clone, Copy)]
pub struct Divided<'a> {
    /// How many each has.
    pub widths: &'a [usize],
    /// This rank's, `f32 [tokens, widths[rank]]`.
    pub own: &'a View,
    /// Room for those of all, `f32 [tokens, widths.sum()]`.
    pub all: &'a View,
}

/// A table of embeddings, or a part of it.
pub struct Embedding<'a> {
    /// Its rows.
    pub table: &'a Matrix,
    /// Where they stand in the vocabulary.
    pub first: usize,
    /// Number of token ids.
    pub vocab: usize,
    /// Multiplies what is read.
    pub scale: f32,
}

/// Whether a result replaces what was there or is added to it (residual connections).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Write {
    /// `out = value`.
    Set,
    /// `out = out + value`.
    Add,
}

/// Which elements of a head rotary embedding pairs up.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RopeStyle {
    /// `(i, i + d/2)`: Hugging Face order, and GGUF for Qwen and Gemma.
    Halves,
    /// `(2i, 2i + 1)`: GGUF order of Llama and Mistral, whose Q and K rows are permuted.
    Pairs,
}

/// The gate's non-linearity: `act(gate) * up`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Activation {
    /// `x * sigmoid(x)`.
    Silu,
    /// GELU, tanh approximation.
    GeluTanh,
}

/// An expert: `down(act(gate(x)) * up(x))`, `gate, up: [ffn, hidden]`, `down: [hidden, ffn]`.
#[derive(Clone)]
pub struct Expert {
    /// Its gate.
    pub gate: Matrix,
    /// What the gate multiplies.
    pub up: Matrix,
    /// Back to the residual stream.
    pub down: Matrix,
}

/// What the weights of a token's experts are parts of.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RouteWeights {
    /// A softmax over all experts.
    All,
    /// A softmax over those that were chosen: they add up to one.
    Chosen,
}

/// Where [`Ops::route`] writes.
#[derive(Clone, Copy)]
pub struct Routes<'a> {
    /// `u32 [tokens, k]`: experts of each token, the largest logit first, of equals the lower
    /// index.
    pub ids: &'a View,
    /// `f32 [tokens, k]`: their weights.
    pub weights: &'a View,
    /// `u32 [experts]`: each is raised by the tokens that the expert got, and wraps around.
    pub loads: &'a View,
}

/// What [`Ops::experts`] computes with.
#[derive(Clone, Copy)]
pub struct Experts<'a> {
    /// Experts that are here, of one shape.
    pub here: &'a [Expert],
    /// The gates' non-linearity.
    pub activation: Activation,
    /// Memory for what lies between, which is lost: `f32 [tokens * k, ffn]` each.
    pub between: [&'a View; 2],
}

/// Where [`Ops::own_experts`] writes.
#[derive(Clone, Copy)]
pub struct OwnExperts<'a> {
    /// `u32 [tokens, k]`: the rank's own numbers for its experts; other pairs have a number that is
    /// none.
    pub ids: &'a View,
    /// `u32 [ranks + 1]`: those of the ranks are raised by the pairs that each computes, the last
    /// one by those of the rank that has most, for which all others wait. They wrap around.
    pub work: &'a View,
}

/// Pairs of tokens and experts, and whose their results are.
#[derive(Clone, Copy)]
pub struct Pairs<'a> {
    /// `u32 [tokens, k]`: experts of each token.
    pub ids: &'a View,
    /// `f32 [tokens, k]`: their weights.
    pub weights: &'a View,
    /// Who computes them.
    pub placement: &'a Placement,
    /// Which columns each rank gets.
    pub columns: &'a [Range<usize>],
}

/// One layer's keys and values: views of `[blocks, kv_heads, 16, head_dim]`, dtype F32, F16 or
/// BF16; or I8, whose last axis is [`kv_row_bytes`](crate::kv_row_bytes) long. The order of
/// elements within a block belongs to the operations.
#[derive(Clone, Debug)]
pub struct KvLayer {
    /// Keys.
    pub k: View,
    /// Values.
    pub v: View,
}

/// A sequence's rows in a step: rows `first_row..first_row + rows` stand at positions
/// `start..start + rows`, and see blocks `tables[table..table + table_len]` of the layer's group.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Span {
    /// First row in the batch.
    pub first_row: u32,
    /// Number of rows.
    pub rows: u32,
    /// Position of the first row.
    pub start: u32,
    /// Where its block table starts in the group's `tables`.
    pub table: u32,
    /// Its length.
    pub table_len: u32,
}

/// A step's input, prepared once and used by every layer. Views live on the device.
pub struct Batch {
    /// `u32 [tokens]`: token ids.
    pub tokens: View,
    /// `u32 [tokens]`: positions.
    pub positions: View,
    /// For each layer group, `u32 [tokens]`: `block * 16 + offset` of each token's KV.
    pub slots: Vec<View>,
    /// For each layer group: all block tables, concatenated (host side; small).
    pub tables: Vec<Vec<u32>>,
    /// The sequences, the same for all groups.
    pub spans: Vec<Span>,
    /// For each sequence, the rank of a context group that has its first split; empty where a
    /// cache is not divided.
    pub origins: Vec<u32>,
    /// `u32 [outputs]`: rows whose logits are wanted, in order.
    pub logit_rows: View,
    /// The sequences that have such rows, as spans over these rows alone; their tables are those of
    /// `spans`.
    pub logit_spans: Vec<Span>,
}

/// What one attention call is told beside its views.
#[derive(Clone, Copy, Debug)]
pub struct Attention<'a> {
    /// The sequences.
    pub spans: &'a [Span],
    /// The group's block tables.
    pub tables: &'a [u32],
    /// Multiplies q·k.
    pub scale: f32,
    /// Tokens visible, own included; `None` for all.
    pub window: Option<u32>,
    /// Which query heads read which KV head.
    pub heads: HeadGroups,
}

/// Query heads are divided evenly over KV heads; of the first group, some may be on another rank.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct HeadGroups {
    /// Query heads that share a KV head.
    pub size: usize,
    /// How many of the first group are not here; less than `size`.
    pub skipped: usize,
}

impl HeadGroups {
    /// The query heads, of `heads` that are here, which read a KV head.
    pub fn of(self, kv_head: usize, heads: usize) -> Range<usize> {
        let first = (kv_head * self.size).saturating_sub(self.skipped);
        first..((kv_head + 1) * self.size).saturating_sub(self.skipped).min(heads)
    }
}

/// The ranks that one cache is divided over along the sequence: of each sequence, a rank has every
/// so-manieth split of 256 positions.
#[derive(Clone, Copy)]
pub struct Context<'a> {
    /// They.
    pub group: &'a dyn Collective,
    /// Query heads whose results each of them gets.
    pub heads: &'a [Range<usize>],
    /// For each span, the rank that has its first split; the next one has the next, and so on.
    pub origins: &'a [u32],
}

/// The slot of a token whose key and value are another rank's to keep.
pub const NO_SLOT: u32 = u32::MAX;

/// Everything a model's forward may do. Each call is complete on return as far as later calls and
/// copies can tell. Outputs must not overlap inputs unless an operation says "in place".
pub trait Ops: Send + Sync {
    /// The device whose views it takes.
    fn device(&self) -> &Arc<dyn Device>;

    /// The host's threads that work on operations, for what is to be done between two of them.
    fn workers(&self) -> &Pool;

    /// Brings a weight matrix to the device: maps it where it lies, repacks it, or uploads it.
    fn matrix(&self, source: &WeightSource) -> Result<Matrix, OpError>;

    /// `out[t] = table[tokens[t] - part.start] * scale`; `out: f32 [tokens, cols]`. The table has
    /// the rows `part` of a vocabulary; tokens of other parts give zeros, and a token id beyond
    /// the vocabulary is an error.
    fn embed(&self, table: &Embedding<'_>, tokens: &View, out: &View) -> Result<(), OpError>;

    /// `out[t] (+)= x[t] / sqrt(mean(x[t]²) + eps) * weight`; `x, out: f32 [tokens, n]`, `weight:
    /// f32 [n]`. In place allowed with [`Write::Set`].
    fn rms_norm(
        &self,
        x: &View,
        weight: &View,
        eps: f32,
        write: Write,
        out: &View,
    ) -> Result<(), OpError>;

    /// Several products of the same `x: f32 [tokens, cols]` in one join.
    fn linear(&self, x: &View, parts: &[LinearPart<'_>], write: Write) -> Result<(), OpError>;

    /// `out: f32 [tokens, d/2, 2]` = cos and sin of `positions[t] * inv_freq[i]`, times `scale`
    /// (1 but for scaled rope variants). `inv_freq: f32 [d/2]`. The product is taken in f32, as
    /// the reference implementations do.
    fn rope_table(
        &self,
        positions: &View,
        inv_freq: &View,
        scale: f32,
        out: &View,
    ) -> Result<(), OpError>;

    /// In place on `x: f32 [tokens, heads, head_dim]`: RMS norm of each head by `norm` (weight
    /// `f32 [head_dim]`, eps) if given, then rotation by `table: f32 [tokens, d/2, 2]`.
    fn rope(
        &self,
        x: &View,
        norm: Option<(&View, f32)>,
        table: &View,
        style: RopeStyle,
    ) -> Result<(), OpError>;

    /// Stores `k, v: f32 [tokens, kv_heads, head_dim]` at `slots: u32 [tokens]` of a layer; not
    /// those of [`NO_SLOT`].
    fn kv_write(&self, k: &View, v: &View, slots: &View, layer: &KvLayer) -> Result<(), OpError>;

    /// Causal attention of `q: f32 [tokens, heads, head_dim]` over the cache (which holds the
    /// step's own keys and values already); `out` like `q`. Rows outside every
    /// span are left alone.
    fn attention(
        &self,
        q: &View,
        layer: &KvLayer,
        how: &Attention<'_>,
        out: &View,
    ) -> Result<(), OpError>;

    /// The same over a cache that is divided over the ranks of a group, whose block tables mean
    /// something where a split is this rank's. All compute the heads of all for their own splits,
    /// and each gets its heads: `out: f32 [tokens, own heads, head_dim]`, the very bits that
    /// [`attention`](Ops::attention) finds over all splits. Blocks until all have come here. Costs
    /// the wire `head_dim + 2` numbers for each row, head and split that the row sees.
    fn shared_attention(
        &self,
        context: &Context<'_>,
        q: &View,
        layer: &KvLayer,
        how: &Attention<'_>,
        out: &View,
    ) -> Result<(), OpError>;

    /// `out = act(gate) * up`, all `f32 [tokens, n]`; `out` may be `gate`.
    fn glu(
        &self,
        gate: &View,
        up: &View,
        activation: Activation,
        out: &View,
    ) -> Result<(), OpError>;

    /// In place on `x: f32 [tokens, n]`: `x[t][i] = x[t][order[i]]`; `order: u32 [n]`.
    fn permute(&self, x: &View, order: &View) -> Result<(), OpError>;

    /// `out[i] = x[rows[i]]`; `x: f32 [tokens, n]`, `rows: u32 [outputs]`.
    fn gather(&self, x: &View, rows: &View, out: &View) -> Result<(), OpError>;

    /// `out[t] = x[t][first..][..m]`; `x: f32 [tokens, n]`, `out: f32 [tokens, m]`.
    fn columns(&self, x: &View, first: usize, out: &View) -> Result<(), OpError>;

    /// Joins the columns that the ranks of a group have: `own: f32 [tokens, widths[rank]]`,
    /// `all: f32 [tokens, widths.sum()]`. Blocks until all have come here.
    fn all_gather(
        &self,
        group: &dyn Collective,
        widths: &[usize],
        own: &View,
        all: &View,
    ) -> Result<(), OpError>;

    /// Products of an input whose columns the ranks of a group have: those that
    /// [`all_gather`](Ops::all_gather) into `input.all` and [`linear`](Ops::linear) of it make, to
    /// the bit. What `input.all` holds then is left open.
    fn divided_linear(
        &self,
        group: &dyn Collective,
        input: &Divided<'_>,
        parts: &[LinearPart<'_>],
        write: Write,
    ) -> Result<(), OpError> {
        self.all_gather(group, input.widths, input.own, input.all)?;
        self.linear(input.all, parts, write)
    }

    /// In place on `x: f32`: the sum over the ranks of a group, in their order.
    fn all_reduce(&self, group: &dyn Collective, x: &View) -> Result<(), OpError>;

    /// Hands a view to a rank, which [`receive`](Ops::receive)s into one of the same size.
    fn send(&self, group: &dyn Collective, to: usize, x: &View) -> Result<(), OpError>;

    /// The other side of [`send`](Ops::send).
    fn receive(&self, group: &dyn Collective, from: usize, x: &View) -> Result<(), OpError>;

    /// Chooses `k` experts for each token by `logits: f32 [tokens, experts]`. Where a logit is not
    /// a number, neither are the token's weights.
    fn route(
        &self,
        logits: &View,
        weights_of: RouteWeights,
        routes: &Routes<'_>,
    ) -> Result<(), OpError>;

    /// `out[t][i] = expert(x[t])` with expert `ids[t][i]`, if there is one here; other rows of
    /// `out` stay as they are. `x: f32 [tokens, hidden]`, `ids: u32 [tokens, k]`, `out: f32
    /// [tokens, k, hidden]`. The bits are those of three calls of [`Ops::linear`]. Costs the bytes
    /// of those experts that have a token.
    fn experts(
        &self,
        x: &View,
        ids: &View,
        experts: &Experts<'_>,
        out: &View,
    ) -> Result<(), OpError>;

    /// `out[t] (+)= weights[t][0] * x[t][0] + weights[t][1] * x[t][1] + ...`, added up in this
    /// order. `x: f32 [tokens, k, n]`, `weights: f32 [tokens, k]`, `out: f32 [tokens, n]`.
    fn combine(&self, x: &View, weights: &View, write: Write, out: &View) -> Result<(), OpError>;

    /// Which pairs of tokens and experts are `rank`'s to compute, with the rank's own number for
    /// the expert, to be given to [`experts`](Ops::experts). `ids: u32 [tokens, k]`.
    fn own_experts(
        &self,
        ids: &View,
        placement: &Placement,
        rank: usize,
        out: &OwnExperts<'_>,
    ) -> Result<(), OpError>;

    /// [`combine`](Ops::combine) of a rank's columns, where each pair has been computed by one
    /// rank: they give each other what is missing. `results: f32 [tokens, k, n]`, `out: f32
    /// [tokens, columns[rank]]`. Blocks until all have come here.
    fn combine_divided(
        &self,
        group: &dyn Collective,
        pairs: &Pairs<'_>,
        results: &View,
        write: Write,
        out: &View,
    ) -> Result<(), OpError>;
}
