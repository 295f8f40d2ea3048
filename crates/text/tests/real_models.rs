//! The tokenisers of real models, against llama.cpp's ids for the corpus of nasty text
//! (`golden/real.json`, written by `tools/golden/tokenizers_golden.py`).
//!
//! Where transformers gives other ids, the file has those too. It loads SmolLM2 from GGUF without
//! the rule that cuts digits apart (two texts differ), and Gemma without the rule that runs of
//! spaces are tokens of their own (three texts differ). llama.cpp does what the models were
//! trained with.
#![allow(clippy::unwrap_used)]

mod gguf_metadata;

use pomona_text::{GgufVocab, Tokenizer, TokenizerSource};
use serde_json::{Map, Value};

fn golden(name: &str) -> Value {
    let path = format!("{}/tests/golden/{name}", env!("CARGO_MANIFEST_DIR"));
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn vocab(file: &Map<String, Value>) -> GgufVocab {
    let get = |key: &str| file.get(&format!("tokenizer.ggml.{key}")).cloned();
    let id = |key: &str| get(key).and_then(|id| u32::try_from(id.as_u64()?).ok());
    let flag = |key: &str| get(key).and_then(|flag| flag.as_bool());
    let text = |key: &str| get(key).and_then(|text| Some(text.as_str()?.to_owned()));
    GgufVocab {
        model: text("model").unwrap(),
        pre: text("pre"),
        tokens: serde_json::from_value(get("tokens").unwrap()).unwrap(),
        scores: get("scores").map(|list| serde_json::from_value(list).unwrap()),
        token_types: get("token_type").map(|list| serde_json::from_value(list).unwrap()),
        merges: get("merges").map(|list| serde_json::from_value(list).unwrap()),
        bos: id("bos_token_id"),
        eos: id("eos_token_id"),
        unk: id("unknown_token_id"),
        pad: id("padding_token_id"),
        eot: id("eot_token_id"),
        add_bos: flag("add_bos_token"),
        add_eos: flag("add_eos_token"),
        add_space_prefix: flag("add_space_prefix"),
    }
}

/// Compares a model's tokeniser with the reference; the file is named by an environment variable.
fn check(variable: &str, name: &str, ends: &[&str]) {
    let Ok(path) = std::env::var(variable) else {
        println!("SKIPPED: {variable} does not name the model's GGUF file");
        return;
    };
    let source = TokenizerSource::Gguf(vocab(&gguf_metadata::read(&path)));
    let tokenizer = Tokenizer::new(&source).unwrap();
    let golden_ids = &golden("real.json")[name];
    let corpus: Vec<String> = serde_json::from_value(golden("corpus.json")).unwrap();
    let rows: Vec<Vec<u32>> = serde_json::from_value(golden_ids["ids"].clone()).unwrap();
    assert_eq!(corpus.len(), rows.len());
    for (text, ids) in corpus.iter().zip(rows) {
        assert_eq!(tokenizer.encode(text, false).unwrap(), ids, "{text:?}");
        let back = tokenizer.decode(&ids, false);
        let spaced = |text: &str| text.replace('\u{2581}', " ");
        assert!(back == *text || back == spaced(text), "{text:?}: {back:?}");
    }
    let with_special: Vec<u32> =
        serde_json::from_value(golden_ids["with_special"].clone()).unwrap();
    assert_eq!(tokenizer.encode("x", true).unwrap(), with_special);
    let texts: Vec<String> =
        tokenizer.end_ids().iter().map(|&id| tokenizer.token_text(id)).collect();
    assert_eq!(texts, ends);
}

#[test]
fn smollm2_gives_the_ids_of_llama_cpp() {
    check("POMONA_TEST_SMOLLM2", "smollm2", &["<|endoftext|>", "<|im_end|>"]);
}

#[test]
fn gemma_gives_the_ids_of_llama_cpp() {
    check("POMONA_TEST_GEMMA", "gemma", &["<eos>", "<end_of_turn>"]);
}
