//! What tensors are called in GGUF files and Hugging Face checkpoints.

/// A tensor's role.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Name {
    Embedding,
    OutputNorm,
    Output,
    RopeFactors,
    /// Of a layer.
    Layer(u32, Role),
    /// The bias of a layer's matrix.
    Bias(u32, Role),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Role {
    AttentionNorm,
    Query,
    Key,
    Value,
    AttentionOut,
    QueryNorm,
    KeyNorm,
    PostAttentionNorm,
    FfnNorm,
    /// Who says which experts a token meets.
    Router,
    Gate,
    Up,
    Down,
    PostFfnNorm,
}

impl Role {
    pub(crate) const ALL: [Role; 14] = [
        Role::AttentionNorm,
        Role::Query,
        Role::Key,
        Role::Value,
        Role::AttentionOut,
        Role::QueryNorm,
        Role::KeyNorm,
        Role::PostAttentionNorm,
        Role::FfnNorm,
        Role::Router,
        Role::Gate,
        Role::Up,
        Role::Down,
        Role::PostFfnNorm,
    ];
}

/// Where a matrix of an expert may be: a tensor's name, and `None` where it is all of that tensor.
/// Else the tensor has those of all experts, some matrices of one size for each: which of them it
/// is, and of how many.
pub(crate) type ExpertPlace = (String, Option<[usize; 2]>);

/// Whose names.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Dialect {
    Gguf,
    /// Hugging Face; `sandwich` says that norms stand before and after both halves of a layer,
    /// which moves the meaning of `post_attention_layernorm`.
    HuggingFace {
        sandwich: bool,
    },
}

impl Dialect {
    pub(crate) fn text(self, name: Name) -> String {
        let gguf = self == Dialect::Gguf;
        match name {
            Name::Embedding if gguf => "token_embd.weight".to_owned(),
            Name::Embedding => "model.embed_tokens.weight".to_owned(),
            Name::OutputNorm if gguf => "output_norm.weight".to_owned(),
            Name::OutputNorm => "model.norm.weight".to_owned(),
            Name::Output if gguf => "output.weight".to_owned(),
            Name::Output => "lm_head.weight".to_owned(),
            Name::RopeFactors => "rope_freqs.weight".to_owned(),
            Name::Layer(layer, role) => self.layer(layer, role, "weight"),
            Name::Bias(layer, role) => self.layer(layer, role, "bias"),
        }
    }

    /// Another name in use for the same, where there is one.
    pub(crate) fn other_text(self, name: Name) -> Option<String> {
        match (self, name) {
            (Dialect::HuggingFace { .. }, Name::Layer(layer, Role::Router)) => {
                Some(format!("model.layers.{layer}.block_sparse_moe.gate.weight"))
            }
            _ => None,
        }
    }

    /// Where a matrix of an expert may be. Mixtral has words of its own; transformers 5 writes the
    /// matrices of all experts as one, gate above up, where it is not asked for the names of
    /// before.
    pub(crate) fn expert(self, (layer, role, expert): (u32, Role, u32)) -> Vec<ExpertPlace> {
        let (plain, mixtral, joined, half) = match role {
            Role::Gate => ("gate_proj", "w1", "gate_up", [0, 2]),
            Role::Up => ("up_proj", "w3", "gate_up", [1, 2]),
            _ => ("down_proj", "w2", "down", [0, 1]),
        };
        let (blk, at) = (format!("blk.{layer}"), format!("model.layers.{layer}"));
        match self {
            Dialect::Gguf => vec![
                (format!("{blk}.{}_exps.weight", gguf(role)), Some([0, 1])),
                (format!("{blk}.ffn_{joined}_exps.weight"), Some(half)),
            ],
            Dialect::HuggingFace { .. } => vec![
                (format!("{at}.mlp.experts.{expert}.{plain}.weight"), None),
                (format!("{at}.block_sparse_moe.experts.{expert}.{mixtral}.weight"), None),
                (format!("{at}.mlp.experts.{joined}_proj"), Some(half)),
            ],
        }
    }

    /// The layer that a tensor belongs to, if it belongs to one.
    pub(crate) fn layer_of(self, name: &str) -> Option<u32> {
        let prefix = if self == Dialect::Gguf { "blk." } else { "model.layers." };
        name.strip_prefix(prefix)?.split('.').next()?.parse().ok()
    }

    /// Whether a tensor is part of experts, of which a token meets some only.
    pub(crate) fn is_of_experts(self, name: &str) -> bool {
        match self {
            Dialect::Gguf => name.ends_with("_exps.weight"),
            Dialect::HuggingFace { .. } => name.contains(".experts."),
        }
    }

    /// Whether a tensor is a router.
    pub(crate) fn is_router(self, name: &str) -> bool {
        match self {
            Dialect::Gguf => name.ends_with(".ffn_gate_inp.weight"),
            Dialect::HuggingFace { .. } => name.ends_with(".gate.weight"),
        }
    }

    fn layer(self, layer: u32, role: Role, what: &str) -> String {
        match self {
            Dialect::Gguf => format!("blk.{layer}.{}.{what}", gguf(role)),
            Dialect::HuggingFace { sandwich } => {
                format!("model.layers.{layer}.{}.{what}", hugging_face(role, sandwich))
            }
        }
    }
}

fn gguf(role: Role) -> &'static str {
    match role {
        Role::AttentionNorm => "attn_norm",
        Role::Query => "attn_q",
        Role::Key => "attn_k",
        Role::Value => "attn_v",
        Role::AttentionOut => "attn_output",
        Role::QueryNorm => "attn_q_norm",
        Role::KeyNorm => "attn_k_norm",
        Role::PostAttentionNorm => "post_attention_norm",
        Role::FfnNorm => "ffn_norm",
        Role::Router => "ffn_gate_inp",
        Role::Gate => "ffn_gate",
        Role::Up => "ffn_up",
        Role::Down => "ffn_down",
        Role::PostFfnNorm => "post_ffw_norm",
    }
}

fn hugging_face(role: Role, sandwich: bool) -> &'static str {
    match role {
        Role::AttentionNorm => "input_layernorm",
        Role::Query => "self_attn.q_proj",
        Role::Key => "self_attn.k_proj",
        Role::Value => "self_attn.v_proj",
        Role::AttentionOut => "self_attn.o_proj",
        Role::QueryNorm => "self_attn.q_norm",
        Role::KeyNorm => "self_attn.k_norm",
        Role::PostAttentionNorm => "post_attention_layernorm",
        Role::FfnNorm if sandwich => "pre_feedforward_layernorm",
        Role::FfnNorm => "post_attention_layernorm",
        Role::Router => "mlp.gate",
        Role::Gate => "mlp.gate_proj",
        Role::Up => "mlp.up_proj",
        Role::Down => "mlp.down_proj",
        Role::PostFfnNorm => "post_feedforward_layernorm",
    }
}
