//! Llama 2 and 3 (Touvron et al., 2023; Dubey et al., 2024), SmolLM2, and others of the family.
//!
//! The plain decoder: pre-norm, rotary embedding over the whole head, SiLU gate. Llama 3 scales
//! its frequencies. GGUF files pair neighbouring elements, because their Q and K rows are permuted.

use pomona_kernels::{Activation, RopeStyle, RouteWeights};

use super::{Blueprint, Settings};
use crate::ModelError;

pub(super) fn blueprint(settings: &Settings<'_>) -> Result<Blueprint, ModelError> {
    settings.check_activation("hidden_act", &["silu"])?;
    settings.refuse(&["mlp_bias"])?;
    let rope_style = if settings.is_gguf() { RopeStyle::Pairs } else { RopeStyle::Halves };
    plain(settings, "llama", rope_style)
}

/// The decoder that the others vary.
pub(super) fn plain(
    settings: &Settings<'_>,
    architecture: &str,
    rope_style: RopeStyle,
) -> Result<Blueprint, ModelError> {
    let spec = settings.spec(architecture)?;
    Ok(Blueprint {
        eps: settings.eps()?,
        norm_offset: 0.0,
        embedding_scale: 1.0,
        query_scale: 1.0 / (spec.head_dim as f32).sqrt(),
        head_norms: false,
        sandwich: false,
        qkv_bias: false,
        activation: Activation::Silu,
        route_weights: RouteWeights::Chosen,
        rope_style,
        ropes: vec![settings.rope(spec.head_dim, "")?],
        rope_of: vec![0; spec.layers.len()],
        spec,
    })
}
