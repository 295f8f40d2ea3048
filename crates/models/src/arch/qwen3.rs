//! Qwen3 (Yang et al., 2025): Llama with norms on each query and key head instead of biases.

use pomona_kernels::RopeStyle;

use super::{Blueprint, Settings, llama};
use crate::ModelError;

pub(super) fn blueprint(settings: &Settings<'_>) -> Result<Blueprint, ModelError> {
    settings.check_activation("hidden_act", &["silu"])?;
    settings.refuse(&["use_sliding_window"])?;
    let blueprint = llama::plain(settings, "qwen3", RopeStyle::Halves)?;
    Ok(Blueprint { head_norms: true, ..blueprint })
}
