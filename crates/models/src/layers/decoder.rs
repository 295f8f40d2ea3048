//! The decoder: a blueprint with weights, run by operations on views.
//!
//! Five joins a layer: [norm, q k v], [rope, write, attention], [out, residual], [norm, gate up],
//! [activation, down, residual].

use std::ops::Range;

use pomona_device::{DType, DeviceError, View};
use pomona_kernels::{Attention, Batch, LinearPart, Matrix, OpError, Ops, Write};
use pomona_types::{LayerKind, ModelSpec};

use crate::weights::{Name, Role, Tensors};
use crate::{Blueprint, KvCache, LoadOptions, Model, ModelError, invalid};

struct Layer {
    attention_norm: View,
    query: Linear,
    key: Linear,
    value: Linear,
    head_norms: Option<(View, View)>,
    attention_out: Linear,
    post_attention_norm: Option<View>,
    ffn_norm: View,
    gate: Linear,
    up: Linear,
    down: Linear,
    post_ffn_norm: Option<View>,
}

struct Linear {
    weight: Matrix,
    bias: Option<View>,
    /// How its input's columns are to be reordered first.
    order: Option<View>,
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
    let parts = parts.map(|(linear, out)| LinearPart {
        weight: &linear.weight,
        bias: linear.bias.as_ref(),
        out,
    });
    ops.linear(input, &parts, write)
}

/// Memory for the activations of a step, `[max_tokens, width]` each.
struct Scratch {
    /// The residual stream.
    x: View,
    /// A normed copy of it, or what is to be added to it.
    h: View,
    q: View,
    k: View,
    v: View,
    attended: View,
    gate: View,
    up: View,
    /// `[max_tokens, rotated / 2, 2]` for each rotation.
    tables: Vec<View>,
    /// Final hidden states of the rows whose logits are wanted.
    outputs: View,
}

/// A loaded model.
pub(crate) struct Decoder {
    blueprint: Blueprint,
    embedding: Matrix,
    layers: Vec<Layer>,
    output_norm: View,
    /// `None`: tied to the embedding.
    output: Option<Linear>,
    inverse_frequencies: Vec<View>,
    scratch: Scratch,
}

/// Reads weights and puts them on the device.
struct Loader<'a> {
    tensors: &'a Tensors,
    ops: &'a dyn Ops,
    norm_offset: f32,
    done: u64,
    progress: &'a mut dyn FnMut(u64),
}

impl Loader<'_> {
    fn matrix(&mut self, name: Name, rows: u32, cols: u32) -> Result<Matrix, ModelError> {
        let source = self.tensors.matrix(name, rows as usize, cols as usize)?;
        let matrix = self.ops.matrix(&source)?;
        self.done += self.tensors.find(name).map_or(0, |(_, t)| t.bytes as u64);
        (self.progress)(self.done);
        Ok(matrix)
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

    fn linear(&mut self, at: (u32, Role), rows: u32, cols: u32) -> Result<Linear, ModelError> {
        let weight = self.matrix(Name::Layer(at.0, at.1), rows, cols)?;
        let bias = self.tensors.vector(Name::Bias(at.0, at.1), rows as usize)?;
        let bias = bias.map(|values| self.upload(&values)).transpose()?;
        let order = self.order(Name::Layer(at.0, at.1))?;
        Ok(Linear { weight, bias, order })
    }

    fn layer(&mut self, l: u32, blueprint: &Blueprint) -> Result<Layer, ModelError> {
        let spec = &blueprint.spec;
        let (hidden, ffn) = (spec.hidden, spec.ffn);
        let (q, kv) = (spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim);
        self.one_order(l, &[Role::Query, Role::Key, Role::Value])?;
        self.one_order(l, &[Role::Gate, Role::Up])?;
        let layer = Layer {
            attention_norm: self.norm(Name::Layer(l, Role::AttentionNorm), hidden)?,
            query: self.linear((l, Role::Query), q, hidden)?,
            key: self.linear((l, Role::Key), kv, hidden)?,
            value: self.linear((l, Role::Value), kv, hidden)?,
            head_norms: match blueprint.head_norms {
                false => None,
                true => Some((
                    self.norm(Name::Layer(l, Role::QueryNorm), spec.head_dim)?,
                    self.norm(Name::Layer(l, Role::KeyNorm), spec.head_dim)?,
                )),
            },
            attention_out: self.linear((l, Role::AttentionOut), hidden, q)?,
            post_attention_norm: match blueprint.sandwich {
                false => None,
                true => Some(self.norm(Name::Layer(l, Role::PostAttentionNorm), hidden)?),
            },
            ffn_norm: self.norm(Name::Layer(l, Role::FfnNorm), hidden)?,
            gate: self.linear((l, Role::Gate), ffn, hidden)?,
            up: self.linear((l, Role::Up), ffn, hidden)?,
            down: self.linear((l, Role::Down), hidden, ffn)?,
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
}

impl Decoder {
    /// Puts weights on the device and allocates scratch memory for `max_tokens` tokens a step.
    pub(crate) fn load(
        blueprint: Blueprint,
        tensors: &Tensors,
        ops: &dyn Ops,
        options: &LoadOptions,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Decoder, ModelError> {
        let spec = blueprint.spec.clone();
        let norm_offset = blueprint.norm_offset;
        let mut loader = Loader { tensors, ops, norm_offset, done: 0, progress };
        if tensors.order(Name::Embedding).is_some() {
            return Err(invalid!("the embedding has columns in another order: not supported"));
        }
        let embedding = loader.matrix(Name::Embedding, spec.vocab, spec.hidden)?;
        let layers = (0..spec.layers.len() as u32)
            .map(|l| loader.layer(l, &blueprint))
            .collect::<Result<_, _>>()?;
        let output_norm = loader.norm(Name::OutputNorm, spec.hidden)?;
        let output = match tensors.find(Name::Output) {
            None => None,
            Some(_) => Some(Linear {
                weight: loader.matrix(Name::Output, spec.vocab, spec.hidden)?,
                bias: None,
                order: loader.order(Name::Output)?,
            }),
        };
        let pairs = blueprint.ropes[0].rotated as usize / 2;
        let factors = tensors.vector(Name::RopeFactors, pairs)?;
        let inverse_frequencies = blueprint
            .ropes
            .iter()
            .map(|rope| loader.upload(&rope.inverse_frequencies(factors.as_deref())))
            .collect::<Result<_, _>>()?;
        let scratch = Scratch::new(ops, &blueprint, options).map_err(OpError::from)?;
        Ok(Decoder {
            blueprint,
            embedding,
            layers,
            output_norm,
            output,
            inverse_frequencies,
            scratch,
        })
    }

    fn attention(
        &self,
        ops: &dyn Ops,
        batch: &Batch,
        kv: &KvCache,
        at: usize,
    ) -> Result<(), OpError> {
        let (b, layer, tokens) = (&self.blueprint, &self.layers[at], batch.tokens.elements());
        let spec = &b.spec;
        let s = self.scratch.rows(tokens);
        let (heads, kv_heads) = (spec.heads as usize, spec.kv_heads as usize);
        let head_dim = spec.head_dim as usize;
        ops.rms_norm(&s.x, &layer.attention_norm, b.eps, Write::Set, &s.h)?;
        let parts = [(&layer.query, &s.q), (&layer.key, &s.k), (&layer.value, &s.v)];
        products(ops, &s.h, parts, Write::Set)?;
        let norms = layer.head_norms.as_ref();
        let table = &s.tables[b.rope_of[at]];
        let by_head = |view: &View, heads| view.reshape(&[tokens, heads, head_dim]);
        let (q, k) = (by_head(&s.q, heads), by_head(&s.k, kv_heads));
        ops.rope(&q, norms.map(|n| (&n.0, b.eps)), table, b.rope_style)?;
        ops.rope(&k, norms.map(|n| (&n.1, b.eps)), table, b.rope_style)?;
        let (cache, group) = (&kv.layers[at], kv.group_of[at]);
        ops.kv_write(&s.k, &s.v, &batch.slots[group], cache)?;
        let how = Attention {
            spans: &batch.spans,
            tables: &batch.tables[group],
            scale: b.query_scale,
            window: match spec.layers[at] {
                LayerKind::Full => None,
                LayerKind::Sliding { window } => Some(window),
            },
        };
        ops.attention(&q, cache, &how, &by_head(&s.attended, heads))?;
        self.add(ops, &s, (&s.attended, &layer.attention_out), &layer.post_attention_norm)
    }

    fn feed_forward(&self, ops: &dyn Ops, tokens: usize, layer: &Layer) -> Result<(), OpError> {
        let (b, s) = (&self.blueprint, self.scratch.rows(tokens));
        ops.rms_norm(&s.x, &layer.ffn_norm, b.eps, Write::Set, &s.h)?;
        products(ops, &s.h, [(&layer.gate, &s.gate), (&layer.up, &s.up)], Write::Set)?;
        ops.glu(&s.gate, &s.up, b.activation, &s.gate)?;
        self.add(ops, &s, (&s.gate, &layer.down), &layer.post_ffn_norm)
    }

    /// Adds a product to the residual stream, normed first if the layer has a norm for it.
    fn add(
        &self,
        ops: &dyn Ops,
        s: &Scratch,
        (input, linear): (&View, &Linear),
        norm: &Option<View>,
    ) -> Result<(), OpError> {
        match norm {
            None => products(ops, input, [(linear, &s.x)], Write::Add),
            Some(norm) => {
                products(ops, input, [(linear, &s.h)], Write::Set)?;
                ops.rms_norm(&s.h, norm, self.blueprint.eps, Write::Add, &s.x)
            }
        }
    }
}

impl Model for Decoder {
    fn spec(&self) -> &ModelSpec {
        &self.blueprint.spec
    }

    fn forward(&mut self, ops: &dyn Ops, batch: &Batch, kv: &KvCache) -> Result<(), ModelError> {
        let tokens = batch.tokens.elements();
        let s = self.scratch.rows(tokens);
        ops.embed(&self.embedding, &batch.tokens, self.blueprint.embedding_scale, &s.x)?;
        for (frequencies, table) in self.inverse_frequencies.iter().zip(&s.tables) {
            ops.rope_table(&batch.positions, frequencies, 1.0, table)?;
        }
        for (at, layer) in self.layers.iter().enumerate() {
            self.attention(ops, batch, kv, at)?;
            self.feed_forward(ops, tokens, layer)?;
        }
        let outputs = self.scratch.outputs.rows(0, batch.logit_rows.elements());
        ops.gather(&s.x, &batch.logit_rows, &outputs)?;
        ops.rms_norm(&outputs, &self.output_norm, self.blueprint.eps, Write::Set, &outputs)?;
        // Here, once: logits are taken in pieces, and any number of times.
        if let Some(order) = self.output.as_ref().and_then(|output| output.order.as_ref()) {
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
        let hidden = self.scratch.outputs.rows(outputs.start, outputs.len());
        let weight = self.output.as_ref().map_or(&self.embedding, |output| &output.weight);
        ops.linear(&hidden, &[LinearPart { weight, bias: None, out: logits }], Write::Set)?;
        Ok(())
    }
}

impl Scratch {
    fn new(
        ops: &dyn Ops,
        blueprint: &Blueprint,
        options: &LoadOptions,
    ) -> Result<Scratch, DeviceError> {
        let spec = &blueprint.spec;
        let view =
            |rows: usize, width: u32| ops.device().alloc_view(DType::F32, &[rows, width as usize]);
        let tokens = options.max_tokens;
        let tables = blueprint.ropes.iter().map(|rope| view(tokens, rope.rotated));
        Ok(Scratch {
            x: view(tokens, spec.hidden)?,
            h: view(tokens, spec.hidden)?,
            q: view(tokens, spec.heads * spec.head_dim)?,
            k: view(tokens, spec.kv_heads * spec.head_dim)?,
            v: view(tokens, spec.kv_heads * spec.head_dim)?,
            attended: view(tokens, spec.heads * spec.head_dim)?,
            gate: view(tokens, spec.ffn)?,
            up: view(tokens, spec.ffn)?,
            tables: tables.collect::<Result<_, _>>()?,
            outputs: view(options.max_outputs, spec.hidden)?,
        })
    }

    /// The first `tokens` rows of everything.
    fn rows(&self, tokens: usize) -> Scratch {
        let first = |view: &View| view.rows(0, tokens);
        Scratch {
            x: first(&self.x),
            h: first(&self.h),
            q: first(&self.q),
            k: first(&self.k),
            v: first(&self.v),
            attended: first(&self.attended),
            gate: first(&self.gate),
            up: first(&self.up),
            tables: self.tables.iter().map(first).collect(),
            outputs: self.outputs.clone(),
        }
    }
}
