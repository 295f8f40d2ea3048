//! Mixtral (Jiang et al., 2024): Mistral with experts for its feed-forward layers. A token's
//! weights are a softmax over the logits of the experts that it meets.

use super::{Blueprint, Settings, mistral};
use crate::{ModelError, invalid};

pub(super) fn blueprint(settings: &Settings<'_>) -> Result<Blueprint, ModelError> {
    let mut blueprint = mistral::named(settings, "mixtral")?;
    blueprint.spec.experts = settings.experts()?;
    if blueprint.spec.experts.is_none() {
        return Err(invalid!("the setting num_local_experts is missing"));
    }
    Ok(blueprint)
}
