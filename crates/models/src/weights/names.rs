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
    Gate,
    Up,
    Down,
    PostFfnNorm,
}

impl Role {
    pub(crate) const ALL: [Role; 13] = [
        Role::AttentionNorm,
        Role::Query,
        Role::Key,
        Role::Value,
        Role::AttentionOut,
        Role::QueryNorm,
        Role::KeyNorm,
        Role::PostAttentionNorm,
        Role::FfnNorm,
        Role::Gate,
        Role::Up,
        Role::Down,
        Role::PostFfnNorm,
    ];
}

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
        Role::Gate => "mlp.gate_proj",
        Role::Up => "mlp.up_proj",
        Role::Down => "mlp.down_proj",
        Role::PostFfnNorm => "post_feedforward_layernorm",
    }
}
