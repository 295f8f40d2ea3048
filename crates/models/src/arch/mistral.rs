//! Mistral (Jiang et al., 2023): Llama with a sliding window in its first version.

use pomona_kernels::RopeStyle;
use pomona_types::LayerKind;

use super::{Blueprint, Settings, llama};
use crate::{ModelError, invalid};

pub(super) fn blueprint(settings: &Settings<'_>) -> Result<Blueprint, ModelError> {
    named(settings, "mistral")
}

/// The same for its relative.
pub(super) fn named(settings: &Settings<'_>, architecture: &str) -> Result<Blueprint, ModelError> {
    settings.check_activation("hidden_act", &["silu"])?;
    let rope_style = if settings.is_gguf() { RopeStyle::Pairs } else { RopeStyle::Halves };
    let mut blueprint = llama::plain(settings, architecture, rope_style)?;
    if let Some(window) = settings.number("attention.sliding_window", "sliding_window") {
        if window < 1.0 || window.fract() != 0.0 {
            return Err(invalid!("a sliding window of {window} tokens is impossible"));
        }
        blueprint.spec.layers.fill(LayerKind::Sliding { window: window as u32 });
    }
    Ok(blueprint)
}
