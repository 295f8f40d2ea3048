//! What a model looks like to those who never touch its tensors: sizes for memory planning, layer
//! kinds for the block manager.

use crate::BLOCK_TOKENS;

/// How a layer sees the past.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum LayerKind {
    /// Every earlier token.
    Full,
    /// The last `window` tokens, its own included.
    Sliding {
        /// Tokens visible, at least 1.
        window: u32,
    },
}

/// Experts of a layer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ExpertsSpec {
    /// How many there are.
    pub count: u32,
    /// How many each token meets; at most all.
    pub per_token: u32,
}

/// A decoder-only transformer's sizes.
#[derive(Clone, PartialEq, Debug)]
pub struct ModelSpec {
    /// `llama`, `mistral`, `mixtral`, `qwen2`, `qwen3`, `qwen3_moe`, `gemma3`.
    pub architecture: String,
    /// Width of the residual stream.
    pub hidden: u32,
    /// Width of the feed-forward layer, or of an expert.
    pub ffn: u32,
    /// Experts in the feed-forward layers, if they consist of such.
    pub experts: Option<ExpertsSpec>,
    /// Query heads.
    pub heads: u32,
    /// Key and value heads; divides `heads`.
    pub kv_heads: u32,
    /// Width of one head.
    pub head_dim: u32,
    /// Number of token ids, rows of the output matrix.
    pub vocab: u32,
    /// Longest context that the checkpoint declares.
    pub max_position: u32,
    /// One entry per layer.
    pub layers: Vec<LayerKind>,
}

/// Layers of one kind that share a block table. All groups of a model have the same number of
/// slots, so that a block of any group is the same number of bytes and one pool serves all
/// (vLLM's hybrid KV cache manager uses the same idea).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LayerGroup {
    /// What its layers see.
    pub kind: LayerKind,
    /// Layer indices; slot `i` of a block belongs to `layers[i]`. The last group of a kind may
    /// have fewer layers than slots.
    pub layers: Vec<u32>,
}

impl ModelSpec {
    /// Splits the layers into groups of equal slot count: the size of the rarest kind, so that
    /// nothing but the last group of a kind is padded. One kind gives one group.
    pub fn layer_groups(&self) -> Vec<LayerGroup> {
        let mut kinds: Vec<LayerKind> = self.layers.clone();
        kinds.sort_unstable();
        kinds.dedup();
        let of = |kind: LayerKind| -> Vec<u32> {
            (0u32..).zip(&self.layers).filter(|(_, k)| **k == kind).map(|(i, _)| i).collect()
        };
        let slots = kinds.iter().map(|k| of(*k).len()).min().unwrap_or(0).max(1);
        kinds
            .iter()
            .flat_map(|kind| {
                of(*kind)
                    .chunks(slots)
                    .map(|layers| LayerGroup { kind: *kind, layers: layers.to_vec() })
                    .collect::<Vec<_>>()
            })
            .collect()
    }

    /// Layers a block has room for: the largest group.
    pub fn slots_per_block(&self) -> u32 {
        self.layer_groups().iter().map(|g| g.layers.len() as u32).max().unwrap_or(0)
    }

    /// Bytes of one block (16 tokens, all slots, keys and values), `row_bytes` for a head's key or
    /// value of one token.
    pub fn block_bytes(&self, row_bytes: u32) -> u64 {
        u64::from(BLOCK_TOKENS)
            * u64::from(self.slots_per_block())
            * 2
            * u64::from(self.kv_heads)
            * u64::from(row_bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(layers: Vec<LayerKind>) -> ModelSpec {
        ModelSpec {
            architecture: "test".into(),
            hidden: 64,
            ffn: 128,
            experts: None,
            heads: 4,
            kv_heads: 2,
            head_dim: 16,
            vocab: 100,
            max_position: 128,
            layers,
        }
    }

    #[test]
    fn one_kind_is_one_group() {
        let groups = spec(vec![LayerKind::Full; 5]).layer_groups();
        assert_eq!(groups.len(), 1);
        assert_eq!(groups[0].layers, vec![0, 1, 2, 3, 4]);
    }

    #[test]
    fn sliding_layers_are_cut_to_the_size_of_the_full_group() {
        let sliding = LayerKind::Sliding { window: 512 };
        let mut layers = vec![sliding; 18];
        for full in [5, 11, 17] {
            layers[full] = LayerKind::Full;
        }
        let spec = spec(layers);
        let groups = spec.layer_groups();
        assert_eq!(groups.len(), 6);
        assert!(groups.iter().all(|g| g.layers.len() == 3));
        assert_eq!(groups[0].layers, vec![5, 11, 17]);
        assert_eq!(spec.block_bytes(2 * 16), 16 * 3 * 2 * 2 * 16 * 2);
    }
}
