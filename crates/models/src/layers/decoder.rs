//! The decoder: a blueprint with weights, run by operations on views.
//!
//! Five joins a layer: [norm, q k v], [rope, write, attention], [out, residual], [norm, gate up],
//! [activation, down, residual]. Where a model is divided over ranks, each computes its own columns
//! of everything, and what the next product needs whole is gathered. Of the last layer, rows whose
//! logits nobody wants have keys and values only.

use std::ops::Range;

use pomona_device::{DType, DeviceError, View};
use pomona_kernels::{
    Attention, Batch, Context, Embedding, HeadGroups, LinearPart, Matrix, OpError, Ops, Span,
    WeightSource, Write,
};
use pomona_types::{LayerKind, ModelSpec};

use super::moe::{self, Moe};
use super::ranks::{Columns, Ranks};
use crate::division::Rows;
use crate::weights::{Name, Role, Tensors};
use crate::{Blueprint, ExpertCounts, KvCache, LoadOptions, Model, ModelError, ModelPart, invalid};

struct Layer {
    attention_norm: View,
    query: Linear,
    key: Linear,
    value: Linear,
    head_norms: Option<(View, View)>,
    attention_out: Linear,
    post_attention_norm: Option<View>,
    ffn_norm: View,
    feed_forward: FeedForward,
    post_ffn_norm: Option<View>,
}

enum FeedForward {
    Dense { gate: Linear, up: Linear, down: Linear },
    Experts(Moe),
}

struct Linear {
    weight: Matrix,
    bias: Option<View>,
    /// How its input's columns are to be reordered first.
    order: Option<View>,
}

impl Linear {
    fn part<'a>(&'a self, out: &'a View) -> LinearPart<'a> {
        LinearPart { weight: &self.weight, bias: self.bias.as_ref(), out }
    }
}

/// Products of one input, which is reordered in place if the weights' columns are. Those of a join
/// have one order.
fn products<const N: usize>(
    ops: &dyn Ops,
    input: &View,
    parts: [(&Linear, &View); N],
    write: Write,
) -> Result<(), OpError> {
    if let Some(order) = parts.first().and_then(|(linear, _)| linear.order.as_ref()) {
        ops.permute(input, order)?;
    }
    ops.linear(input, &parts.map(|(linear, out)| linear.part(out)), write)
}

/// Memory for the activations of a step, `[max_tokens, width]` each.
struct Scratch {
    /// The residual stream.
    x: Columns,
    /// A normed copy of it, or what is to be added to it.
    h: Columns,
    q: View,
    k: View,
    v: View,
    attended: Columns,
    /// Gate and up, where layers do not consist of experts.
    ffn: Option<(Columns, View)>,
    /// `[max_tokens, rotated / 2, 2]` for each rotation.
    tables: Vec<View>,
    /// Queries of the rows whose logits are wanted, where the last layer goes on with these alone.
    output_q: View,
    /// Final hidden states of these rows.
    outputs: View,
}

/// A loaded model, or one rank's part of it.
pub(crate) struct Decoder {
    blueprint: Blueprint,
    ranks: Ranks,
    /// Its own layers and heads.
    part: ModelPart,
    /// Where tokens come in and logits go out.
    vocabulary: Option<Vocabulary>,
    layers: Vec<Layer>,
    /// Where hidden states are done.
    output_norm: Option<View>,
    inverse_frequencies: Vec<View>,
    scratch: Scratch,
}

/// The embedding and the output matrix.
struct Vocabulary {
    embedding: Matrix,
    /// `None`: tied to the embedding.
    output: Option<Linear>,
    /// `[LOGIT_ROWS_MAX, own rows]`, where it is divided.
    logits: Option<View>,
}

/// Most rows of logits that are taken at once: bounds their memory to so many vocabularies.
pub const LOGIT_ROWS_MAX: usize = 32;

/// Reads a rank's weights and puts them on the device.
pub(super) struct Loader<'a> {
    pub(super) tensors: &'a Tensors,
    pub(super) ops: &'a dyn Ops,
    spec: &'a ModelSpec,
    pub(super) ranks: &'a Ranks,
    norm_offset: f32,
    /// Where there are experts.
    moe_scratch: Option<moe::Scratch>,
    done: u64,
    progress: &'a mut dyn FnMut(u64),
}

impl Loader<'_> {
    /// The rows that are this rank's.
    fn matrix(&mut self, name: Name, cols: u32) -> Result<Matrix, ModelError> {
        let rows = self.rows(name);
        let source = self.tensors.matrix(name, rows.all as usize, cols as usize)?;
        self.place(&source.part(rows.range()))
    }

    /// Puts a matrix on the device.
    pub(super) fn place(&mut self, source: &WeightSource) -> Result<Matrix, ModelError> {
        let matrix = self.ops.matrix(source)?;
        let row_bytes = source.format.row_bytes(source.cols).unwrap_or_default();
        self.done += (row_bytes * source.rows) as u64;
        (self.progress)(self.done);
        Ok(matrix)
    }

    fn rows(&self, name: Name) -> Rows {
        self.ranks.division.rows(self.spec, self.ranks.place.tensor, name)
    }

    fn upload(&self, values: &[f32]) -> Result<View, ModelError> {
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_ne_bytes()).collect();
        self.upload_bytes(DType::F32, values.len(), &bytes)
    }

    /// The order of a matrix's columns, if it is not its input's.
    fn order(&self, name: Name) -> Result<Option<View>, ModelError> {
        let Some(order) = self.tensors.order(name) else { return Ok(None) };
        let bytes: Vec<u8> = order.iter().flat_map(|v| v.to_ne_bytes()).collect();
        self.upload_bytes(DType::U32, order.len(), &bytes).map(Some)
    }

    /// Refuses matrices of one input that want it in different orders.
    fn one_order(&self, l: u32, roles: &[Role]) -> Result<(), ModelError> {
        let orders = roles.iter().map(|role| self.tensors.order(Name::Layer(l, *role)));
        let orders: Vec<_> = orders.collect();
        if orders.windows(2).any(|pair| pair[0] != pair[1]) {
            return Err(invalid!(
                "layer {l}: {roles:?} take one input and have different g_idx tensors, which is \
                 not supported: choose a checkpoint without desc_act"
            ));
        }
        Ok(())
    }

    fn upload_bytes(&self, dtype: DType, len: usize, bytes: &[u8]) -> Result<View, ModelError> {
        let device = self.ops.device();
        let upload = || -> Result<View, DeviceError> {
            let view = device.alloc_view(dtype, &[len])?;
            device.upload(bytes, &view)?;
            Ok(view)
        };
        Ok(upload().map_err(OpError::from)?)
    }

    fn norm(&mut self, name: Name, len: u32) -> Result<View, ModelError> {
        let values = self.tensors.vector(name, len as usize)?.ok_or_else(|| {
            invalid!("the checkpoint has no tensor {}", self.tensors.dialect.text(name))
        })?;
        let values: Vec<f32> = values.iter().map(|v| v + self.norm_offset).collect();
        self.upload(&values)
    }

    fn linear(&mut self, at: (u32, Role), cols: u32) -> Result<Linear, ModelError> {
        let name = Name::Layer(at.0, at.1);
        let (weight, rows) = (self.matrix(name, cols)?, self.rows(name));
        let bias = self.tensors.vector(Name::Bias(at.0, at.1), rows.all as usize)?;
        let bias = bias.map(|values| self.upload(&values[rows.range()])).transpose()?;
        let order = self.order(name)?;
        Ok(Linear { weight, bias, order })
    }

    fn vocabulary(&mut self) -> Result<Vocabulary, ModelError> {
        if self.tensors.order(Name::Embedding).is_some() {
            return Err(invalid!("the embedding has columns in another order: not supported"));
        }
        let hidden = self.spec.hidden;
        let embedding = self.matrix(Name::Embedding, hidden)?;
        let output = match self.tensors.find(Name::Output) {
            None => None,
            Some(_) => Some(Linear {
                weight: self.matrix(Name::Output, hidden)?,
                bias: None,
                order: self.order(Name::Output)?,
            }),
        };
        let logits = match self.ranks.tensor() {
            None => None,
            Some(_) => {
                let shape = [LOGIT_ROWS_MAX, embedding.rows];
                let view = self.ops.device().alloc_view(DType::F32, &shape);
                Some(view.map_err(OpError::from)?)
            }
        };
        Ok(Vocabulary { embedding, output, logits })
    }

    fn layer(&mut self, l: u32, blueprint: &Blueprint) -> Result<Layer, ModelError> {
        let (hidden, head_dim) = (self.spec.hidden, self.spec.head_dim);
        let attended = self.spec.heads * head_dim;
        self.one_order(l, &[Role::Query, Role::Key, Role::Value])?;
        let layer = Layer {
            attention_norm: self.norm(Name::Layer(l, Role::AttentionNorm), hidden)?,
            query: self.linear((l, Role::Query), hidden)?,
            key: self.linear((l, Role::Key), hidden)?,
            value: self.linear((l, Role::Value), hidden)?,
            head_norms: match blueprint.head_norms {
                false => None,
                true => Some((
                    self.norm(Name::Layer(l, Role::QueryNorm), head_dim)?,
                    self.norm(Name::Layer(l, Role::KeyNorm), head_dim)?,
                )),
            },
            attention_out: self.linear((l, Role::AttentionOut), attended)?,
            post_attention_norm: match blueprint.sandwich {
                false => None,
                true => Some(self.norm(Name::Layer(l, Role::PostAttentionNorm), hidden)?),
            },
            ffn_norm: self.norm(Name::Layer(l, Role::FfnNorm), hidden)?,
            feed_forward: self.feed_forward(l, blueprint)?,
            post_ffn_norm: match blueprint.sandwich {
                false => None,
                true => Some(self.norm(Name::Layer(l, Role::PostFfnNorm), hidden)?),
            },
        };
        let biases = [&layer.query, &layer.key, &layer.value].map(|l| l.bias.is_some());
        if blueprint.qkv_bias && biases != [true; 3] {
            return Err(invalid!("layer {l} lacks a bias on q, k or v: it is incomplete"));
        }
        Ok(layer)
    }

    fn feed_forward(&mut self, l: u32, blueprint: &Blueprint) -> Result<FeedForward, ModelError> {
        if let Some(scratch) = self.moe_scratch.clone() {
            return Moe::load(self, l, blueprint, scratch).map(FeedForward::Experts);
        }
        self.one_order(l, &[Role::Gate, Role::Up])?;
        Ok(FeedForward::Dense {
            gate: self.linear((l, Role::Gate), self.spec.hidden)?,
            up: self.linear((l, Role::Up), self.spec.hidden)?,
            down: self.linear((l, Role::Down), self.spec.ffn)?,
        })
    }
}

impl Decoder {
    /// Puts a rank's weights on the device and allocates scratch memory for `max_tokens` tokens a
    /// step.
    pub(crate) fn load(
        blueprint: Blueprint,
        tensors: &Tensors,
        ops: &dyn Ops,
        options: &LoadOptions,
        own: Ranks,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Decoder, ModelError> {
        let (spec, ranks) = (&blueprint.spec, &own);
        let norm_offset = blueprint.norm_offset;
        let moe_scratch = spec.experts.map(|experts| {
            moe::Scratch::new(ops.device().as_ref(), spec, experts, options.max_tokens)
        });
        let moe_scratch = moe_scratch.transpose().map_err(OpError::from)?;
        let done = 0;
        let mut loader =
            Loader { tensors, ops, spec, ranks, norm_offset, moe_scratch, done, progress };
        let vocabulary = match ranks.is_first() {
            true => Some(loader.vocabulary()?),
            false => None,
        };
        let layers = ranks.layers();
        let layers = layers.map(|l| loader.layer(l, &blueprint)).collect::<Result<_, _>>()?;
        let output_norm = match ranks.is_last() {
            true => Some(loader.norm(Name::OutputNorm, spec.hidden)?),
            false => None,
        };
        let pairs = blueprint.ropes[0].rotated as usize / 2;
        let factors = tensors.vector(Name::RopeFactors, pairs)?;
        let inverse_frequencies = blueprint
            .ropes
            .iter()
            .map(|rope| loader.upload(&rope.inverse_frequencies(factors.as_deref())))
            .collect::<Result<_, _>>()?;
        let scratch = Scratch::new(ops, &blueprint, ranks, options).map_err(OpError::from)?;
        Ok(Decoder {
            part: ranks.division.part(spec, ranks.place),
            ranks: own,
            blueprint,
            vocabulary,
            layers,
            output_norm,
            inverse_frequencies,
            scratch,
        })
    }

    /// Queries, keys and values of a layer; the latter are written.
    fn keys(
        &self,
        ops: &dyn Ops,
        batch: &Batch,
        kv: &KvCache,
        (at, s): (usize, &Scratch),
    ) -> Result<(), OpError> {
        let (b, layer, spec) = (&self.blueprint, &self.layers[at], &self.part.spec);
        ops.rms_norm(&s.x.all, &layer.attention_norm, b.eps, Write::Set, &s.h.all)?;
        let parts = [(&layer.query, &s.q), (&layer.key, &s.k), (&layer.value, &s.v)];
        products(ops, &s.h.all, parts, Write::Set)?;
        let norms = layer.head_norms.as_ref();
        let table = &s.tables[b.rope_of[self.part.first_layer as usize + at]];
        let (q, k) = (by_head(&s.q, spec.heads, spec), by_head(&s.k, spec.kv_heads, spec));
        ops.rope(&q, norms.map(|n| (&n.0, b.eps)), table, b.rope_style)?;
        ops.rope(&k, norms.map(|n| (&n.1, b.eps)), table, b.rope_style)?;
        ops.kv_write(&s.k, &s.v, &batch.slots[kv.group_of[at]], &kv.layers[at])
    }

    /// Attention of the rows of some spans, and what is made of it.
    fn attention(
        &self,
        ops: &dyn Ops,
        (batch, spans): (&Batch, &[Span]),
        kv: &KvCache,
        (at, s): (usize, &Scratch),
    ) -> Result<(), OpError> {
        let (b, layer, spec, ranks) =
            (&self.blueprint, &self.layers[at], &self.part.spec, &self.ranks);
        let (cache, group) = (&kv.layers[at], kv.group_of[at]);
        let q = by_head(&s.q, spec.heads, spec);
        let how = Attention {
            spans,
            tables: &batch.tables[group],
            scale: b.query_scale,
            window: match spec.layers[at] {
                LayerKind::Full => None,
                LayerKind::Sliding { window } => Some(window),
            },
            heads: HeadGroups {
                size: (b.spec.heads / b.spec.kv_heads) as usize,
                skipped: ranks.division.skipped(ranks.place.tensor) as usize,
            },
        };
        match &ranks.groups.context {
            None => ops.attention(&q, cache, &how, &by_head(&s.attended.own, spec.heads, spec))?,
            Some(group) => {
                let shares = ranks.division.context_heads(ranks.place.tensor);
                let own = by_head(&s.attended.own, shares[group.rank()].len() as u32, spec);
                let (heads, origins) = (shares.as_slice(), batch.origins.as_slice());
                let context = Context { group: group.as_ref(), heads, origins };
                ops.shared_attention(&context, &q, cache, &how, &own)?;
            }
        }
        self.add(ops, s, (&s.attended, &layer.attention_out), &layer.post_attention_norm)
    }

    fn feed_forward(&self, ops: &dyn Ops, s: &Scratch, layer: &Layer) -> Result<(), OpError> {
        let b = &self.blueprint;
        ops.rms_norm(&s.x.all, &layer.ffn_norm, b.eps, Write::Set, &s.h.all)?;
        match (&layer.feed_forward, &s.ffn) {
            (FeedForward::Experts(moe), _) => moe.forward(ops, &self.ranks, &s.h.all, &s.x),
            (FeedForward::Dense { gate, up, down }, Some((gated, upped))) => {
                let parts = [(gate, &gated.own), (up, upped)];
                products(ops, &s.h.all, parts, Write::Set)?;
                ops.glu(&gated.own, upped, b.activation, &gated.own)?;
                self.add(ops, s, (gated, down), &layer.post_ffn_norm)
            }
            (FeedForward::Dense { .. }, None) => unreachable!("dense layers have memory"),
        }
    }

    /// A product of columns that each rank has computed some of.
    fn product(
        &self,
        ops: &dyn Ops,
        input: &Columns,
        (linear, out): (&Linear, &View),
        write: Write,
    ) -> Result<(), OpError> {
        if linear.order.is_some() {
            self.ranks.gather(ops, input)?;
            return products(ops, &input.all, [(linear, out)], write);
        }
        self.ranks.linear(ops, input, &[linear.part(out)], write)
    }

    /// Adds a product to the residual stream, normed first if the layer has a norm for it.
    fn add(
        &self,
        ops: &dyn Ops,
        s: &Scratch,
        (input, linear): (&Columns, &Linear),
        norm: &Option<View>,
    ) -> Result<(), OpError> {
        match norm {
            None => {
                self.product(ops, input, (linear, &s.x.own), Write::Add)?;
                self.ranks.gather(ops, &s.x)
            }
            Some(norm) => {
                self.product(ops, input, (linear, &s.h.own), Write::Set)?;
                self.ranks.gather(ops, &s.h)?;
                ops.rms_norm(&s.h.all, norm, self.blueprint.eps, Write::Add, &s.x.all)
            }
        }
    }

    /// The residual stream's beginning: embedded tokens, or what the stage before made of them.
    fn begin(&self, ops: &dyn Ops, batch: &Batch, x: &Columns) -> Result<(), OpError> {
        let (spec, ranks) = (&self.blueprint.spec, &self.ranks);
        match &self.vocabulary {
            Some(vocabulary) => {
                let embedding = Embedding {
                    table: &vocabulary.embedding,
                    first: ranks.division.vocab[ranks.place.tensor].start as usize,
                    vocab: spec.vocab as usize,
                    scale: self.blueprint.embedding_scale,
                };
                ops.embed(&embedding, &batch.tokens, &x.all)?;
                // All but one rank have zeros.
                if let Some(group) = ranks.tensor() {
                    ops.all_reduce(group, &x.all)?;
                }
            }
            None => ranks.receive_hidden(ops, &x.all)?,
        }
        self.own_columns(ops, x)
    }

    /// Of a residual stream that is whole, the columns that this rank adds to.
    fn own_columns(&self, ops: &dyn Ops, x: &Columns) -> Result<(), OpError> {
        let ranks = &self.ranks;
        // Where each half of a layer has a norm behind it, sums are made of whole rows.
        if ranks.tensor().is_some() && !self.blueprint.sandwich {
            let first = ranks.division.hidden[ranks.place.tensor].start as usize;
            ops.columns(&x.all, first, &x.own)?;
        }
        Ok(())
    }

    /// Whether the last layer goes on with the rows alone whose logits are wanted. Ranks that keep
    /// sequences together would have to agree on who begins which.
    fn leaves_rows(&self, batch: &Batch) -> bool {
        self.output_norm.is_some()
            && self.ranks.groups.context.is_none()
            && batch.logit_rows.elements() < batch.tokens.elements()
    }

    /// The residual stream and the queries of the rows whose logits are wanted.
    fn wanted(&self, ops: &dyn Ops, rows: &View, s: &Scratch) -> Result<Scratch, OpError> {
        let count = rows.elements();
        // The normed copy has been used, so its memory takes the rows.
        let Scratch { x: h, h: x, .. } = s.rows(count);
        let q = s.output_q.rows(0, count);
        ops.gather(&s.x.all, rows, &x.all)?;
        ops.gather(&s.q, rows, &q)?;
        self.own_columns(ops, &x)?;
        Ok(Scratch { x, h, q, ..s.rows(count) })
    }
}

/// `[tokens, heads, head_dim]`.
fn by_head(view: &View, heads: u32, spec: &ModelSpec) -> View {
    view.reshape(&[view.shape()[0], heads as usize, spec.head_dim as usize])
}

impl Model for Decoder {
    fn spec(&self) -> &ModelSpec {
        &self.blueprint.spec
    }

    fn part(&self) -> &ModelPart {
        &self.part
    }

    fn forward(&mut self, ops: &dyn Ops, batch: &Batch, kv: &KvCache) -> Result<(), ModelError> {
        let tokens = batch.tokens.elements();
        let (mut s, mut spans) = (self.scratch.rows(tokens), &batch.spans);
        self.begin(ops, batch, &s.x)?;
        for (frequencies, table) in self.inverse_frequencies.iter().zip(&s.tables) {
            ops.rope_table(&batch.positions, frequencies, 1.0, table)?;
        }
        for (at, layer) in self.layers.iter().enumerate() {
            self.keys(ops, batch, kv, (at, &s))?;
            if at + 1 == self.layers.len() && self.leaves_rows(batch) {
                spans = &batch.logit_spans;
                if spans.is_empty() {
                    break;
                }
                s = self.wanted(ops, &batch.logit_rows, &s)?;
            }
            self.attention(ops, (batch, spans), kv, (at, &s))?;
            self.feed_forward(ops, &s, layer)?;
        }
        let Some(norm) = &self.output_norm else {
            return Ok(self.ranks.send_hidden(ops, &s.x.all)?);
        };
        let outputs = self.scratch.outputs.rows(0, batch.logit_rows.elements());
        if outputs.elements() > 0 {
            let x = match self.leaves_rows(batch) {
                true => &s.x.all,
                false => {
                    ops.gather(&s.x.all, &batch.logit_rows, &outputs)?;
                    &outputs
                }
            };
            ops.rms_norm(x, norm, self.blueprint.eps, Write::Set, &outputs)?;
        }
        Ok(self.ranks.send_outputs(ops, &outputs)?)
    }

    fn outputs(&mut self, ops: &dyn Ops, count: usize) -> Result<(), ModelError> {
        let Some(vocabulary) = &self.vocabulary else { return Ok(()) };
        let outputs = self.scratch.outputs.rows(0, count);
        self.ranks.receive_outputs(ops, &outputs)?;
        // Here, once: logits are taken in pieces, and any number of times.
        if let Some(order) = vocabulary.output.as_ref().and_then(|output| output.order.as_ref()) {
            ops.permute(&outputs, order)?;
        }
        Ok(())
    }

    fn logits(
        &mut self,
        ops: &dyn Ops,
        outputs: Range<usize>,
        logits: &View,
    ) -> Result<(), ModelError> {
        let Some(vocabulary) = &self.vocabulary else { return Ok(()) };
        let hidden = self.scratch.outputs.rows(outputs.start, outputs.len());
        let weight = vocabulary.output.as_ref().map_or(&vocabulary.embedding, |o| &o.weight);
        let own = match &vocabulary.logits {
            Some(own) => own.rows(0, outputs.len()),
            None => logits.clone(),
        };
        ops.linear(&hidden, &[LinearPart { weight, bias: None, out: &own }], Write::Set)?;
        let widths = &self.ranks.division.vocab;
        Ok(self.ranks.gather_columns(ops, widths, &own, logits)?)
    }

    fn expert_counts(&mut self, ops: &dyn Ops) -> Result<Vec<ExpertCounts>, ModelError> {
        let layers = self.layers.iter().filter_map(|layer| match &layer.feed_forward {
            FeedForward::Experts(moe) => Some(moe.counts(ops)),
            FeedForward::Dense { .. } => None,
        });
        let own: Vec<Vec<u32>> = layers.collect::<Result<_, _>>()?;
        let Some(spec) = self.blueprint.spec.experts else { return Ok(Vec::new()) };
        let (tokens, ranks) = (spec.count as usize, self.ranks.tensor().map_or(0, |g| g.ranks()));
        let layers = self.ranks.gather_counts(&own.concat(), tokens + ranks + 1)?;
        let layer = |(stage, words): (usize, Vec<u32>)| ExpertCounts {
            stage,
            tokens: words[..tokens].to_vec(),
            pairs: words[tokens..tokens + ranks].to_vec(),
            slowest: words[tokens + ranks],
        };
        Ok(layers.into_iter().map(layer).collect())
    }
}

impl Scratch {
    fn new(
        ops: &dyn Ops,
        blueprint: &Blueprint,
        ranks: &Ranks,
        options: &LoadOptions,
    ) -> Result<Scratch, DeviceError> {
        let (spec, division) = (&blueprint.spec, &ranks.division);
        let part = division.part(spec, ranks.place).spec;
        let view =
            |rows: usize, width: u32| ops.device().alloc_view(DType::F32, &[rows, width as usize]);
        let tokens = options.max_tokens;
        let columns = |widths: &[Range<u32>], unit: u32| {
            Columns::new(ops.device().as_ref(), ranks, tokens, widths, unit)
        };
        let tables = blueprint.ropes.iter().map(|rope| view(tokens, rope.rotated));
        Ok(Scratch {
            x: columns(&division.hidden, 1)?,
            h: columns(&division.hidden, 1)?,
            q: view(tokens, part.heads * spec.head_dim)?,
            k: view(tokens, part.kv_heads * spec.head_dim)?,
            v: view(tokens, part.kv_heads * spec.head_dim)?,
            attended: columns(&division.heads, spec.head_dim)?,
            ffn: match spec.experts {
                Some(_) => None,
                None => Some((columns(&division.ffn, 1)?, view(tokens, part.ffn)?)),
            },
            tables: tables.collect::<Result<_, _>>()?,
            output_q: view(options.max_outputs, part.heads * spec.head_dim)?,
            outputs: view(options.max_outputs, spec.hidden)?,
        })
    }

    /// The first `tokens` rows of everything.
    fn rows(&self, tokens: usize) -> Scratch {
        let first = |view: &View| view.rows(0, tokens);
        Scratch {
            x: self.x.rows(tokens),
            h: self.h.rows(tokens),
            q: first(&self.q),
            k: first(&self.k),
            v: first(&self.v),
            attended: self.attended.rows(tokens),
            ffn: self.ffn.as_ref().map(|(gate, up)| (gate.rows(tokens), first(up))),
            tables: self.tables.iter().map(first).collect(),
            output_q: self.output_q.clone(),
            outputs: self.outputs.clone(),
        }
    }
}
