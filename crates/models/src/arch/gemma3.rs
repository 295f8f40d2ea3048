//! Gemma 3, text (Gemma Team, 2025): five sliding layers to one that sees everything, each kind
//! with its own rotary base; norms before and after both halves of a layer and on each query and
//! key head; embeddings scaled by the root of their width.
//!
//! Checkpoints store norm weights less one; GGUF files have the one added already.

use pomona_kernels::{Activation, RopeStyle};
use pomona_types::LayerKind;
use serde_json::Value as Json;

use super::{Blueprint, Settings, llama};
use crate::layers::{Rope, Scaling};
use crate::{ModelError, invalid};

/// Rotary base of sliding layers where the file does not say (GGUF never does).
const LOCAL_BASE: f64 = 10_000.0;
/// Every so many layers one sees everything, where the file does not say.
const PATTERN: usize = 6;

pub(super) fn blueprint(settings: &Settings<'_>) -> Result<Blueprint, ModelError> {
    settings.check_activation("hidden_activation", &["gelu_pytorch_tanh"])?;
    let unsupported =
        ["attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention"];
    settings.refuse(&unsupported)?;
    let mut blueprint = llama::plain(settings, "gemma3", RopeStyle::Halves)?;
    let spec = &mut blueprint.spec;
    let window = settings.number("attention.sliding_window", "sliding_window");
    let window = window.filter(|w| *w >= 1.0 && w.fract() == 0.0);
    let window = window.ok_or_else(|| invalid!("the sliding window is missing or impossible"))?;
    let sliding = LayerKind::Sliding { window: window as u32 };
    set_kinds(settings, &mut spec.layers, sliding)?;
    let scalar = settings.number("-", "query_pre_attn_scalar");
    let scalar = scalar.unwrap_or(f64::from(spec.head_dim));
    if scalar <= 0.0 {
        return Err(invalid!("query_pre_attn_scalar is {scalar}: impossible"));
    }
    let local = match settings {
        Settings::HuggingFace(config) if config.get("rope_parameters").is_some() => {
            settings.rope(spec.head_dim, "sliding_attention")?
        }
        _ => {
            let base = settings.number("rope.freq_base_swa", "rope_local_base_freq");
            let base = base.unwrap_or(LOCAL_BASE);
            Rope { base, rotated: spec.head_dim, scaling: Scaling::None }
        }
    };
    let global = settings.rope(spec.head_dim, "full_attention")?;
    Ok(Blueprint {
        norm_offset: if settings.is_gguf() { 0.0 } else { 1.0 },
        embedding_scale: (spec.hidden as f32).sqrt(),
        query_scale: (1.0 / scalar.sqrt()) as f32,
        head_norms: true,
        sandwich: true,
        activation: Activation::GeluTanh,
        rope_of: spec.layers.iter().map(|k| usize::from(*k == sliding)).collect(),
        ropes: vec![global, local],
        ..blueprint
    })
}

fn set_kinds(
    settings: &Settings<'_>,
    layers: &mut [LayerKind],
    sliding: LayerKind,
) -> Result<(), ModelError> {
    if let Settings::HuggingFace(config) = settings
        && let Some(types) = config.get("layer_types").and_then(Json::as_array)
    {
        if types.len() != layers.len() {
            return Err(invalid!("{} layer_types for {} layers", types.len(), layers.len()));
        }
        for (layer, kind) in layers.iter_mut().zip(types) {
            *layer = match kind.as_str() {
                Some("sliding_attention") => sliding,
                Some("full_attention") => LayerKind::Full,
                _ => return Err(invalid!("the layer type {kind} is not supported")),
            };
        }
        return Ok(());
    }
    let key = ("attention.sliding_window_pattern", "sliding_window_pattern");
    let pattern = settings.number(key.0, key.1).map_or(PATTERN, |p| p as usize).max(1);
    for (i, layer) in layers.iter_mut().enumerate() {
        *layer = if (i + 1).is_multiple_of(pattern) { LayerKind::Full } else { sliding };
    }
    Ok(())
}
