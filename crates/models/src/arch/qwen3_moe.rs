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

#[cfg(test)]
mod tests {
    use serde_json::{Value as Json, json};

    use super::*;

    fn with(key: &str, value: Json) -> Result<Blueprint, String> {
        let mut config = json!({
            "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96,
            "moe_intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
            "max_position_embeddings": 128, "vocab_size": 100, "rms_norm_eps": 1e-6,
            "num_experts": 4, "num_experts_per_tok": 2,
        });
        config[key] = value;
        blueprint(&Settings::HuggingFace(&config)).map_err(|error| error.to_string())
    }

    #[test]
    fn weights_are_of_all_experts_unless_they_are_to_add_up_to_one() {
        let of_all = with("norm_topk_prob", json!(false)).unwrap();
        assert_eq!((of_all.spec.ffn, of_all.route_weights), (32, RouteWeights::All));
        let experts = of_all.spec.experts.unwrap();
        assert_eq!((experts.count, experts.per_token), (4, 2));
        let of_chosen = with("norm_topk_prob", json!(true)).unwrap();
        assert_eq!(of_chosen.route_weights, RouteWeights::Chosen);
        assert_eq!(with("decoder_sparse_step", json!(1)).unwrap(), of_all);
        assert_eq!(with("mlp_only_layers", json!([])).unwrap(), of_all);
    }

    #[test]
    fn what_is_not_implemented_or_impossible_is_refused() {
        let refusal = |key: &str, value: Json| with(key, value).unwrap_err();
        assert!(refusal("mlp_only_layers", json!([0])).contains("dense layers among"));
        assert!(refusal("decoder_sparse_step", json!(2)).contains("dense layers among"));
        assert!(refusal("num_experts_per_tok", json!(5)).contains("meet 5 of 4 experts"));
        assert!(refusal("num_experts", json!(0)).contains("number of experts is missing"));
        assert!(refusal("num_experts", json!(1e9)).contains("impossible"));
        assert!(refusal("moe_intermediate_size", json!(null)).contains("moe_intermediate_size"));
    }
}
