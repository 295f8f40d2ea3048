//! Qwen2 and Qwen2.5 (Yang et al., 2024): Llama with biases on q, k and v.

use pomona_kernels::RopeStyle;

use super::{Blueprint, Settings, llama};
use crate::ModelError;

pub(super) fn blueprint(settings: &Settings<'_>) -> Result<Blueprint, ModelError> {
    settings.check_activation("hidden_act", &["silu"])?;
    settings.refuse(&["use_sliding_window"])?;
    let blueprint = llama::plain(settings, "qwen2", RopeStyle::Halves)?;
    Ok(Blueprint { qkv_bias: true, ..blueprint })
}
