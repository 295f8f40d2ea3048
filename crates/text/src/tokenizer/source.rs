//! Where a tokeniser comes from: a Hugging Face `tokenizer.json`, or the metadata of a GGUF file.
//! Plain values; whoever reads the files fills them in.

use pomona_types::TokenId;

/// What a [`crate::Tokenizer`] is built from.
#[derive(Clone, Debug)]
pub enum TokenizerSource {
    /// A Hugging Face `tokenizer.json`.
    Json {
        /// The bytes of `tokenizer.json`.
        tokenizer_json: Vec<u8>,
        /// `tokenizer_config.json`, for `bos_token`, `eos_token`, `add_bos_token` and the like.
        config: Option<serde_json::Value>,
    },
    /// The `tokenizer.ggml.*` keys of a GGUF file.
    Gguf(GgufVocab),
}

/// The `tokenizer.ggml.*` keys of a GGUF file (GGUF specification, "Tokenizer"). A key that the
/// file lacks is `None`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GgufVocab {
    /// `tokenizer.ggml.model`: `gpt2` (byte-level BPE) or `llama` (SentencePiece).
    pub model: String,
    /// `tokenizer.ggml.pre`: how a byte-level BPE cuts text into words.
    pub pre: Option<String>,
    /// `tokenizer.ggml.tokens`, by id.
    pub tokens: Vec<String>,
    /// `tokenizer.ggml.scores`, by id: a higher score merges first.
    pub scores: Option<Vec<f32>>,
    /// `tokenizer.ggml.token_type`, by id: 1 normal, 2 unknown, 3 control, 4 user-defined,
    /// 5 unused, 6 byte.
    pub token_types: Option<Vec<i32>>,
    /// `tokenizer.ggml.merges`: `"left right"`, best first.
    pub merges: Option<Vec<String>>,
    /// `tokenizer.ggml.bos_token_id`.
    pub bos: Option<TokenId>,
    /// `tokenizer.ggml.eos_token_id`.
    pub eos: Option<TokenId>,
    /// `tokenizer.ggml.unknown_token_id`.
    pub unk: Option<TokenId>,
    /// `tokenizer.ggml.padding_token_id`.
    pub pad: Option<TokenId>,
    /// `tokenizer.ggml.eot_token_id`: the end of a turn, where it is not `eos`.
    pub eot: Option<TokenId>,
    /// `tokenizer.ggml.add_bos_token`.
    pub add_bos: Option<bool>,
    /// `tokenizer.ggml.add_eos_token`.
    pub add_eos: Option<bool>,
    /// `tokenizer.ggml.add_space_prefix`: a SentencePiece text starts with a space of its own.
    pub add_space_prefix: Option<bool>,
}
