//! A checkpoint's settings, whichever file they come from, checked for sense.

use pomona_types::{ExpertsSpec, LayerKind, ModelSpec};
use serde_json::Value as Json;

use crate::layers::{Rope, Scaling};
use crate::weights::gguf::Gguf;
use crate::{ModelError, invalid};

/// Largest sizes that are believed; ten times beyond any real model.
const LAYERS_MAX: u64 = 2_000;
const WIDTH_MAX: u64 = 1 << 20;
const VOCAB_MAX: u64 = 1 << 24;
const POSITIONS_MAX: u64 = 1 << 30;
const EXPERTS_MAX: u64 = 10_000;

/// GGUF metadata or `config.json`.
pub(crate) enum Settings<'a> {
    Gguf(&'a Gguf),
    HuggingFace(&'a Json),
}

impl Settings<'_> {
    pub(crate) fn is_gguf(&self) -> bool {
        matches!(self, Settings::Gguf(_))
    }

    /// A number, by its GGUF key (under the architecture) and its `config.json` key.
    pub(crate) fn number(&self, gguf: &str, hf: &str) -> Option<f64> {
        match self {
            Settings::Gguf(file) => file.arch_value(gguf)?.as_f64(),
            Settings::HuggingFace(config) => config.get(hf)?.as_f64(),
        }
    }

    /// A size from 1 to `most`.
    fn size(&self, gguf: &str, hf: &str, most: u64) -> Result<u32, ModelError> {
        let key = if self.is_gguf() { gguf } else { hf };
        let value =
            self.number(gguf, hf).ok_or_else(|| invalid!("the setting {key} is missing"))?;
        if value < 1.0 || value > most as f64 || value.fract() != 0.0 {
            return Err(invalid!("the setting {key} is {value}: impossible"));
        }
        Ok(value as u32)
    }

    /// A truth value.
    pub(crate) fn flag(&self, gguf: &str, hf: &str) -> Option<bool> {
        match self {
            Settings::Gguf(file) => file.arch_value(gguf)?.as_bool(),
            Settings::HuggingFace(config) => config.get(hf)?.as_bool(),
        }
    }

    pub(crate) fn text(&self, hf: &str) -> Option<&str> {
        match self {
            Settings::Gguf(_) => None,
            Settings::HuggingFace(config) => config.get(hf)?.as_str(),
        }
    }

    /// Refuses a `config.json` setting that is there, not null and not false.
    pub(crate) fn refuse(&self, keys: &[&str]) -> Result<(), ModelError> {
        let Settings::HuggingFace(config) = self else { return Ok(()) };
        for key in keys {
            match config.get(key) {
                None | Some(Json::Null | Json::Bool(false)) => {}
                Some(value) => {
                    return Err(invalid!("config.json: {key} = {value} is not supported"));
                }
            }
        }
        Ok(())
    }

    /// Refuses any activation but the one that the architecture is known with.
    pub(crate) fn check_activation(&self, key: &str, names: &[&str]) -> Result<(), ModelError> {
        match self.text(key) {
            Some(name) if !names.contains(&name) => {
                Err(invalid!("config.json: {key} = {name:?} is not supported, only {names:?}"))
            }
            _ => Ok(()),
        }
    }

    /// Sizes; all layers see everything.
    pub(crate) fn spec(&self, architecture: &str) -> Result<ModelSpec, ModelError> {
        let layers = self.size("block_count", "num_hidden_layers", LAYERS_MAX)?;
        let hidden = self.size("embedding_length", "hidden_size", WIDTH_MAX)?;
        let ffn = self.size("feed_forward_length", "intermediate_size", WIDTH_MAX)?;
        let heads = self.size("attention.head_count", "num_attention_heads", WIDTH_MAX)?;
        let kv = ("attention.head_count_kv", "num_key_value_heads");
        let kv_heads = match self.number(kv.0, kv.1) {
            None => heads,
            Some(_) => self.size(kv.0, kv.1, WIDTH_MAX)?,
        };
        let head_dim = match self.number("attention.key_length", "head_dim") {
            None => hidden / heads,
            Some(_) => self.size("attention.key_length", "head_dim", WIDTH_MAX)?,
        };
        let context = ("context_length", "max_position_embeddings");
        let max_position = self.size(context.0, context.1, POSITIONS_MAX)?;
        let vocab = self.vocab()?;
        if !heads.is_multiple_of(kv_heads) {
            return Err(invalid!("{heads} query heads cannot share {kv_heads} key heads evenly"));
        }
        if head_dim == 0 || !head_dim.is_multiple_of(2) {
            return Err(invalid!("heads of {head_dim} elements cannot be rotated in pairs"));
        }
        if u64::from(heads) * u64::from(head_dim) > WIDTH_MAX {
            return Err(invalid!("{heads} heads of {head_dim} elements: impossible"));
        }
        if let Some(length) = self.number("attention.value_length", "v_head_dim")
            && length != f64::from(head_dim)
        {
            return Err(invalid!("value heads of {length} beside key heads of {head_dim}"));
        }
        Ok(ModelSpec {
            architecture: architecture.to_owned(),
            hidden,
            ffn,
            experts: None,
            heads,
            kv_heads,
            head_dim,
            vocab,
            max_position,
            layers: vec![LayerKind::Full; layers as usize],
        })
    }

    /// Experts of the feed-forward layers, if there are any.
    pub(crate) fn experts(&self) -> Result<Option<ExpertsSpec>, ModelError> {
        let (gguf, names) = ("expert_count", ["num_local_experts", "num_experts"]);
        let name = names.into_iter().find(|name| self.number(gguf, name).is_some_and(|n| n > 0.0));
        let Some(name) = name else { return Ok(None) };
        if let Settings::Gguf(_) = self {
            self.refuse_other_experts()?;
        }
        let count = self.size(gguf, name, EXPERTS_MAX)?;
        let per_token = self.size("expert_used_count", "num_experts_per_tok", EXPERTS_MAX)?;
        if per_token > count {
            return Err(invalid!("each token is to meet {per_token} of {count} experts"));
        }
        Ok(Some(ExpertsSpec { count, per_token }))
    }

    /// Refuses what other families do with experts.
    fn refuse_other_experts(&self) -> Result<(), ModelError> {
        // Each with the value that changes nothing beside absence and zero.
        let keys = [
            ("expert_shared_count", 0.0),
            ("expert_group_count", 1.0),
            ("expert_weights_scale", 1.0),
            // ggml's number for a softmax.
            ("expert_gating_func", 1.0),
            ("leading_dense_block_count", 0.0),
            ("interleave_moe_layer_step", 1.0),
        ];
        for (key, neutral) in keys {
            match self.number(key, "-") {
                Some(value) if value != 0.0 && value != neutral => {
                    return Err(invalid!("{key} = {value} is not supported"));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// The width of experts where it is not that of a dense layer.
    pub(crate) fn expert_ffn(&self) -> Result<u32, ModelError> {
        self.size("expert_feed_forward_length", "moe_intermediate_size", WIDTH_MAX)
    }

    /// Refuses models some of whose layers have experts, and some none.
    pub(crate) fn refuse_dense_layers(&self) -> Result<(), ModelError> {
        let Settings::HuggingFace(config) = self else { return Ok(()) };
        let listed = config.get("mlp_only_layers").and_then(Json::as_array);
        let every = self.number("-", "decoder_sparse_step").unwrap_or(1.0);
        if listed.is_some_and(|layers| !layers.is_empty()) || every != 1.0 {
            return Err(invalid!(
                "config.json: dense layers among those with experts (mlp_only_layers, \
                 decoder_sparse_step) are not supported"
            ));
        }
        Ok(())
    }

    fn vocab(&self) -> Result<u32, ModelError> {
        let Settings::Gguf(file) = self else {
            return self.size("", "vocab_size", VOCAB_MAX);
        };
        // The embedding matrix decides; vocab_size is optional in GGUF.
        let rows = file.tensors.get("token_embd.weight").and_then(|t| t.shape.first());
        let rows = rows.filter(|r| **r as u64 <= VOCAB_MAX);
        rows.map(|r| *r as u32).ok_or_else(|| invalid!("the file has no token_embd.weight"))
    }

    pub(crate) fn eps(&self) -> Result<f32, ModelError> {
        let eps = self.number("attention.layer_norm_rms_epsilon", "rms_norm_eps");
        let eps = eps.filter(|e| (0.0..1.0).contains(e));
        Ok(eps.ok_or_else(|| invalid!("the norms' epsilon is missing or impossible"))? as f32)
    }

    /// The rotation that most models have: one base, all of the head, maybe scaled.
    pub(crate) fn rope(&self, head_dim: u32, layer_type: &str) -> Result<Rope, ModelError> {
        let rotated = match self.number("rope.dimension_count", "-") {
            Some(n) if n < 2.0 || n > f64::from(head_dim) || n % 2.0 != 0.0 => {
                return Err(invalid!("rope.dimension_count is {n} for heads of {head_dim}"));
            }
            Some(n) => n as u32,
            None => head_dim,
        };
        let partial = self.number("-", "partial_rotary_factor").unwrap_or(1.0);
        if partial != 1.0 {
            return Err(invalid!("partial_rotary_factor = {partial} is not supported"));
        }
        let (base, scaling) = match self {
            Settings::Gguf(file) => {
                let base = self.number("rope.freq_base", "").unwrap_or(10_000.0);
                (base, gguf_scaling(file)?)
            }
            Settings::HuggingFace(config) => hf_rope(config, layer_type)?,
        };
        if !(1.0..1e15).contains(&base) {
            return Err(invalid!("a rope base of {base} is impossible"));
        }
        Ok(Rope { base, rotated, scaling })
    }
}

fn gguf_scaling(file: &Gguf) -> Result<Scaling, ModelError> {
    let kind = file.arch_value("rope.scaling.type").and_then(|v| v.as_str());
    let factor = file.arch_value("rope.scaling.factor").and_then(|v| v.as_f64());
    match (kind, factor) {
        (None | Some("none"), None) => Ok(Scaling::None),
        (None | Some("none"), Some(1.0)) => Ok(Scaling::None),
        (None | Some("linear"), Some(factor)) if factor > 0.0 => Ok(Scaling::Linear(factor)),
        (kind, factor) => {
            Err(invalid!("rope scaling {kind:?} with factor {factor:?} is not supported"))
        }
    }
}

/// Base and scaling from `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling`.
fn hf_rope(config: &Json, layer_type: &str) -> Result<(f64, Scaling), ModelError> {
    let parameters = config.get("rope_parameters").filter(|p| !p.is_null());
    // Models with several kinds of layers give parameters for each.
    let parameters = parameters.map(|p| p.get(layer_type).unwrap_or(p));
    let number = |from: Option<&Json>, key: &str| from.and_then(|f| f.get(key)?.as_f64());
    let scaling = parameters.or_else(|| config.get("rope_scaling").filter(|s| !s.is_null()));
    let base = number(parameters, "rope_theta")
        .or_else(|| number(Some(config), "rope_theta"))
        .unwrap_or(10_000.0);
    if number(scaling, "partial_rotary_factor").is_some_and(|f| f != 1.0) {
        return Err(invalid!("rope_parameters: partial_rotary_factor is not supported"));
    }
    let kind = scaling.and_then(|s| s.get("rope_type").or_else(|| s.get("type"))?.as_str());
    let need = |key: &str| {
        let value = number(scaling, key).filter(|v| *v > 0.0);
        value.ok_or_else(|| invalid!("rope scaling: {key} is missing or impossible"))
    };
    let scaling = match kind {
        None | Some("default") => Scaling::None,
        Some("linear") => Scaling::Linear(need("factor")?),
        Some("llama3") => Scaling::Llama3 {
            factor: need("factor")?,
            low: need("low_freq_factor")?,
            high: need("high_freq_factor")?,
            context: need("original_max_position_embeddings")?,
        },
        Some(other) => return Err(invalid!("rope scaling {other:?} is not supported")),
    };
    Ok((base, scaling))
}
