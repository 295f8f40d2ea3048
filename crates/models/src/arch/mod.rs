//! Architectures. Each file turns a checkpoint's configuration into a [`Blueprint`]: what a decoder
//! layer consists of and with which constants. The registry is [`from_gguf`] and
//! [`from_hugging_face`].

mod gemma3;
mod llama;
mod mistral;
mod mixtral;
mod qwen2;
mod qwen3;
mod qwen3_moe;
mod settings;

use pomona_kernels::{Activation, RopeStyle, RouteWeights};
use pomona_types::ModelSpec;

use crate::layers::Rope;
use crate::weights::gguf::Gguf;
use crate::{ModelError, invalid};
pub(crate) use settings::Settings;

/// A decoder: pre-norm attention and gated feed-forward, in the variations that exist.
#[derive(Clone, Debug, PartialEq)]
pub struct Blueprint {
    /// Sizes and layer kinds.
    pub spec: ModelSpec,
    /// Added to a mean square before its root is taken.
    pub eps: f32,
    /// Added to every norm weight (Gemma stores weights less one).
    pub norm_offset: f32,
    /// Multiplies embeddings.
    pub embedding_scale: f32,
    /// Multiplies q·k.
    pub query_scale: f32,
    /// Norms on each query and key head.
    pub head_norms: bool,
    /// Norms on what attention and feed-forward add to the residual.
    pub sandwich: bool,
    /// Biases on q, k and v are required rather than optional.
    pub qkv_bias: bool,
    /// The gate's non-linearity.
    pub activation: Activation,
    /// What the weights of a token's experts are parts of, where there are experts.
    pub route_weights: RouteWeights,
    /// Which elements of a head are rotated together.
    pub rope_style: RopeStyle,
    /// Rotations in use.
    pub(crate) ropes: Vec<Rope>,
    /// For each layer, which of `ropes`.
    pub(crate) rope_of: Vec<usize>,
}

/// The blueprint of a GGUF file.
pub(crate) fn from_gguf(gguf: &Gguf) -> Result<Blueprint, ModelError> {
    let architecture = gguf.metadata.get("general.architecture").and_then(|v| v.as_str());
    let settings = Settings::Gguf(gguf);
    match architecture {
        // A Mixtral calls itself a llama with experts.
        Some("llama") if settings.experts()?.is_some() => mixtral::blueprint(&settings),
        Some("llama") => llama::blueprint(&settings),
        Some("mistral" | "mistral3") => mistral::blueprint(&settings),
        Some("qwen2") => qwen2::blueprint(&settings),
        Some("qwen3") => qwen3::blueprint(&settings),
        Some("qwen3moe") => qwen3_moe::blueprint(&settings),
        Some("gemma3") => gemma3::blueprint(&settings),
        Some(other) => Err(unknown(other)),
        None => Err(invalid!("the file does not say its general.architecture")),
    }
}

/// The blueprint of a Hugging Face `config.json`.
///
/// # Errors
/// When the architecture is not known, or a setting is missing, impossible, or would change the
/// mathematics in a way that is not implemented.
pub(crate) fn from_hugging_face(config: &serde_json::Value) -> Result<Blueprint, ModelError> {
    let settings = Settings::HuggingFace(config);
    match config.get("model_type").and_then(|v| v.as_str()) {
        Some("llama") => llama::blueprint(&settings),
        Some("mistral") => mistral::blueprint(&settings),
        Some("mixtral") => mixtral::blueprint(&settings),
        Some("qwen2") => qwen2::blueprint(&settings),
        Some("qwen3") => qwen3::blueprint(&settings),
        Some("qwen3_moe") => qwen3_moe::blueprint(&settings),
        Some("gemma3_text") => gemma3::blueprint(&settings),
        Some(other) => Err(unknown(other)),
        None => Err(invalid!("config.json does not say its model_type")),
    }
}

fn unknown(architecture: &str) -> ModelError {
    invalid!(
        "the architecture {architecture:?} is not supported; these are: llama, mistral, mixtral, \
         qwen2, qwen3, qwen3_moe, gemma3 (text)"
    )
}
