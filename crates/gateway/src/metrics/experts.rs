//! What layers of experts have done: who got how many tokens, and which rank had how much to do.

use super::Scrape;
use super::exposition::{Exposition, Labels};
use super::labels;

/// Most counters of single experts. With more, only layers are told: what scrapes keep grows with
/// every one of them. So many are told in 0.7 ms, as 400 kB (a shared Xeon with AVX-512, `cargo
/// bench -p pomona-gateway -- scrapes`).
const SAMPLES_MAX: usize = 4096;

/// Adds the metrics of those models that have experts.
pub(super) fn expose(out: &mut Exposition, models: &[Scrape<'_>]) {
    let of_experts = || models.iter().filter_map(|model| Some((model, model.experts.as_deref()?)));
    if of_experts().next().is_none() {
        return;
    }
    let name = "pomona:expert_tokens_total";
    let count = |tokens: &[Vec<u64>]| tokens.iter().map(Vec::len).sum::<usize>();
    if of_experts().map(|(_, loads)| count(&loads.tokens)).sum::<usize>() <= SAMPLES_MAX {
        out.metric(name, "counter", "Tokens that an expert got.");
        for (model, loads) in of_experts() {
            let [model_name, engine] = labels(model);
            for (layer, tokens) in loads.tokens.iter().enumerate() {
                let layer = layer.to_string();
                for (expert, tokens) in tokens.iter().enumerate() {
                    let layer: (&str, &str) = ("layer", &layer);
                    let expert: (&str, &str) = ("expert", &expert.to_string());
                    out.sample(name, &[model_name, engine, layer, expert], tokens);
                }
            }
        }
    }
    let name = "pomona:expert_hottest_ratio";
    out.metric(name, "gauge", "Tokens of a layer's hottest expert, over the mean of its experts.");
    for (model, loads) in of_experts() {
        let [model_name, engine] = labels(model);
        for (layer, tokens) in loads.tokens.iter().enumerate() {
            let (sum, most) = (tokens.iter().sum::<u64>(), tokens.iter().max());
            let ratio = *most.unwrap_or(&0) as f64 * tokens.len() as f64 / sum.max(1) as f64;
            out.sample(name, &[model_name, engine, ("layer", &layer.to_string())], ratio);
        }
    }
    let name = "pomona:expert_pairs_total";
    out.metric(name, "counter", "Pairs of a token and one of its experts that a rank computed.");
    for (model, loads) in of_experts() {
        let [model_name, engine] = labels(model);
        for (rank, pairs) in loads.pairs.iter().enumerate() {
            let labels: Labels<'_> = &[model_name, engine, ("rank", &rank.to_string())];
            out.sample(name, labels, pairs);
        }
    }
    let name = "pomona:expert_slowest_pairs_total";
    let help = "Pairs of the rank that had most, of each layer in each step: others waited for it.";
    out.metric(name, "counter", help);
    for (model, loads) in of_experts().filter(|(_, loads)| !loads.pairs.is_empty()) {
        out.sample(name, &labels(model), loads.slowest);
    }
    let name = "pomona:expert_balance";
    let help = "Those over the mean of the ranks that share a layer: 1 where all have as much.";
    out.metric(name, "gauge", help);
    for (model, loads) in of_experts() {
        if let Some(balance) = loads.balance() {
            out.sample(name, &labels(model), balance);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use pomona_types::{ExpertLoads, Load};

    use super::super::ModelMetrics;
    use super::*;

    fn told(loads: Option<ExpertLoads>) -> String {
        let metrics = ModelMetrics::new(100);
        let (load, experts) = (Load::default(), loads.map(Arc::new));
        let mut out = Exposition::default();
        expose(&mut out, &[Scrape { name: "m", load, experts, metrics: &metrics }]);
        out.finish()
    }

    #[test]
    fn experts_and_ranks_are_counted() {
        let loads = ExpertLoads {
            tokens: vec![vec![3, 1], vec![2, 2]],
            pairs: vec![5, 3],
            sharing: 2,
            slowest: 6,
        };
        let text = told(Some(loads));
        let m = "{model_name=\"m\",engine=\"0\"";
        for line in [
            format!("pomona:expert_tokens_total{m},layer=\"0\",expert=\"1\"}} 1"),
            format!("pomona:expert_hottest_ratio{m},layer=\"0\"}} 1.5"),
            format!("pomona:expert_pairs_total{m},rank=\"1\"}} 3"),
            format!("pomona:expert_slowest_pairs_total{m}}} 6"),
            format!("pomona:expert_balance{m}}} 1.5"),
        ] {
            assert!(text.lines().any(|l| l == line), "{line}: {text}");
        }
        assert_eq!(told(None), "");
    }

    #[test]
    fn of_many_experts_layers_are_told() {
        let loads = ExpertLoads { tokens: vec![vec![1; 128]; 94], ..ExpertLoads::default() };
        let text = told(Some(loads));
        assert!(!text.contains("expert=\""));
        assert!(text.contains("layer=\"93\"} 1\n"));
        // Where no ranks share layers, nothing is said of them.
        assert!(!text.contains("rank=\"") && !text.contains("expert_balance{"));
    }
}
