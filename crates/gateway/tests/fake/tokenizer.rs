//! A tokenizer of single bytes: token `b` is the byte `b`, then come three marks.

use std::sync::Arc;

use pomona_text::{ChatTemplate, Tokenizer, TokenizerSource};
use pomona_types::TokenId;
use serde_json::{Map, json};

/// `<|end|>`
pub const END: TokenId = 257;

/// Built from a `tokenizer.json`, as models have it.
pub fn tokenizer() -> Arc<Tokenizer> {
    let vocab: Map<_, _> =
        (0..=255u8).map(|byte| (letter(byte).to_string(), json!(byte))).collect();
    let marks = ["<|start|>", "<|end|>", "<|pad|>"];
    let added = (256..).zip(marks).map(|(id, mark)| {
        json!({ "id": id, "content": mark, "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false, "special": true })
    });
    let file = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added.collect::<Vec<_>>(),
        "normalizer": null,
        "pre_tokenizer": { "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
                           "use_regex": true },
        "post_processor": null,
        "decoder": { "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true,
                     "use_regex": true },
        "model": { "type": "BPE", "dropout": null, "unk_token": null,
                   "continuing_subword_prefix": null, "end_of_word_suffix": null,
                   "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": [] },
    });
    let source = TokenizerSource::Json { tokenizer_json: file.to_string().into(), config: None };
    Arc::new(Tokenizer::new(&source).unwrap())
}

/// The shape that most models use.
pub fn chat_template() -> Arc<ChatTemplate> {
    let source = "{% for m in messages %}{% if m.role not in ['system', 'user', 'assistant'] %}\
        {{ raise_exception('unknown role') }}{% endif %}\
        <|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}\
        {% if add_generation_prompt %}<|start|>assistant\n{% endif %}";
    Arc::new(ChatTemplate::new(source, None, Some("<|end|>")).unwrap())
}

/// How byte-level BPE writes a byte (GPT-2's `bytes_to_unicode`): printable ones as themselves,
/// the others from U+0100 on.
fn letter(byte: u8) -> char {
    let plain = |byte: u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    if plain(byte) {
        return char::from(byte);
    }
    let before = (0..byte).filter(|byte| !plain(*byte)).count() as u32;
    char::from_u32(0x100 + before).unwrap()
}
