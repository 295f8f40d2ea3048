//! Qwen3's mixtures of experts (Yang et al., 2025): Qwen3 with experts for all its feed-forward
//! layers. A token's weights are a softmax over all experts, or over those that it meets, as the
//! settings say; GGUF files that say nothing are of the second kind.

use pomona_kernels::RouteWeights;

use super::{Blueprint, Settings, qwen3};
use crate::{ModelError, invalid};

pub(super) fn blueprint(settings: &Settings<'_>) -> Result<Blueprint, ModelError> {
    settings.refuse_dense_layers()?;
    let mut blueprint = qwen3::blueprint(settings)?;
    let spec = &mut blueprint.spec;
    spec.architecture = "qwen3_moe".to_owned();
    spec.ffn = settings.expert_ffn()?;
    spec.experts = settings.experts()?;
    if spec.experts.is_none() {
        return Err(invalid!("the number of experts is missing"));
    }
    blueprint.route_weights = match settings.flag("expert_weights_norm", "norm_topk_prob") {
        Some(true) => RouteWeights::Chosen,
        None if settings.is_gguf() => RouteWeights::Chosen,
        _ => RouteWeights::All,
    };
    Ok(blueprint)
}
