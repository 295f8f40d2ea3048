//! What stands in for a model's files: a small byte-level BPE vocabulary, trained and split as
//! Qwen 2 splits, and the chat template of Qwen 3.

use std::sync::Arc;

use pomona_text::{ChatInput, ChatTemplate, Tokenizer, TokenizerSource};
use serde_json::{Map, Value, json};

/// What clients call it.
pub const NAME: &str = "null";

/// A conversation as clients send it.
pub fn messages() -> Value {
    json!([
        { "role": "system", "content": "You are a helpful assistant who answers in a few words." },
        { "role": "user", "content": "Why do apples fall, and what would they do on the moon?" },
    ])
}

/// How many tokens that is.
pub fn chat_tokens() -> usize {
    let input =
        ChatInput { messages: messages(), add_generation_prompt: true, ..ChatInput::default() };
    tokenizer().encode(&template().render(&input).unwrap(), false).unwrap().len()
}

pub fn tokenizer() -> Arc<Tokenizer> {
    let kinds = golden("kinds.json");
    let kind = kinds.as_array().unwrap().iter().find(|kind| kind["name"] == "qwen2").unwrap();
    let vocabulary = golden("byte_level.json");
    let tokens = vocabulary["tokens"].as_array().unwrap().iter();
    let ids: Map<String, Value> = tokens
        .enumerate()
        .map(|(id, token)| (token.as_str().unwrap().to_owned(), json!(id)))
        .collect();
    let mut file = kind["file"].clone();
    file["model"]["vocab"] = ids.into();
    file["model"]["merges"] = vocabulary["merges"].clone();
    let tokenizer_json = serde_json::to_vec(&file).unwrap();
    let source = TokenizerSource::Json { tokenizer_json, config: None };
    Arc::new(Tokenizer::new(&source).unwrap())
}

pub fn template() -> Arc<ChatTemplate> {
    let chat = golden("chat.json");
    let source = chat["templates"]["qwen3"]["source"].as_str().unwrap();
    Arc::new(ChatTemplate::new(source, None, Some("<|im_end|>")).unwrap())
}

fn golden(name: &str) -> Value {
    let path = format!("{}/../text/tests/golden/{name}", env!("CARGO_MANIFEST_DIR"));
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}
