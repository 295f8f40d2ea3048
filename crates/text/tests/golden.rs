//! Tokenisers against references, on a corpus of nasty text: `tokenizer.json` files against the
//! `tokenizers` package of Python, GGUF metadata against llama.cpp. The files in `golden/` are
//! written by `tools/golden/tokenizers_golden.py`.
#![allow(clippy::unwrap_used)]

use pomona_text::{GgufVocab, TextError, Tokenizer, TokenizerSource};
use serde_json::{Value, json};

fn golden(name: &str) -> Value {
    let path = format!("{}/tests/golden/{name}", env!("CARGO_MANIFEST_DIR"));
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn texts(value: &Value) -> Vec<String> {
    serde_json::from_value(value.clone()).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap()
}

/// The vocabulary of a `tokenizer.json`: token to id.
fn map_of(tokens: &Value) -> Value {
    texts(tokens).into_iter().enumerate().map(|(id, token)| (token, json!(id))).collect()
}

/// Puts a vocabulary back into a `tokenizer.json` that was stored without it.
fn whole_file(kind: &Value) -> Vec<u8> {
    let mut file = kind["file"].clone();
    let (vocabulary, merges) = if kind["vocabulary"] == "byte_level" {
        let vocabulary = golden("byte_level.json");
        let merges = vocabulary["merges"].clone();
        (vocabulary, merges)
    } else {
        (golden("pieces.json"), golden("piece_merges.json"))
    };
    file["model"]["vocab"] = map_of(&vocabulary["tokens"]);
    file["model"]["merges"] = merges;
    serde_json::to_vec(&file).unwrap()
}

fn from_kind(kind: &Value) -> Tokenizer {
    let source = TokenizerSource::Json { tokenizer_json: whole_file(kind), config: None };
    Tokenizer::new(&source).unwrap()
}

fn byte_level_vocab(pre: &str) -> GgufVocab {
    let vocabulary = golden("byte_level.json");
    let tokens = texts(&vocabulary["tokens"]);
    // The first four are the special ones.
    let token_types = (0..tokens.len()).map(|id| if id < 4 { 3 } else { 1 }).collect();
    GgufVocab {
        model: "gpt2".into(),
        pre: Some(pre.into()),
        tokens,
        token_types: Some(token_types),
        merges: Some(texts(&vocabulary["merges"])),
        bos: Some(0),
        eos: Some(2),
        ..GgufVocab::default()
    }
}

fn pieces_vocab(add_space_prefix: bool) -> GgufVocab {
    let vocabulary = golden("pieces.json");
    GgufVocab {
        model: "llama".into(),
        tokens: texts(&vocabulary["tokens"]),
        scores: Some(serde_json::from_value(vocabulary["scores"].clone()).unwrap()),
        token_types: Some(serde_json::from_value(vocabulary["token_types"].clone()).unwrap()),
        bos: Some(1),
        eos: Some(2),
        unk: Some(0),
        add_space_prefix: Some(add_space_prefix),
        ..GgufVocab::default()
    }
}

fn from_gguf(vocab: GgufVocab) -> Tokenizer {
    Tokenizer::new(&TokenizerSource::Gguf(vocab)).unwrap()
}

/// Every text of the corpus whose ids are not the reference's.
fn differences(tokenizer: &Tokenizer, rows: &Value) -> Vec<String> {
    let corpus = texts(&golden("corpus.json"));
    let rows = rows.as_array().unwrap();
    assert_eq!(corpus.len(), rows.len());
    let compare = |(text, row): (&String, &Value)| {
        let got = tokenizer.encode(text, false).unwrap();
        let expected = ids(row);
        let words = |ids: &[u32]| -> Vec<String> {
            ids.iter().map(|&id| tokenizer.token_text(id)).collect()
        };
        (got != expected).then(|| format!("{text:?}: {:?} for {:?}", words(&got), words(&expected)))
    };
    corpus.iter().zip(rows).filter_map(compare).collect()
}

#[test]
fn tokenizer_json_gives_the_ids_of_the_tokenizers_package() {
    for kind in golden("kinds.json").as_array().unwrap() {
        let name = &kind["name"];
        let tokenizer = from_kind(kind);
        let differences = differences(&tokenizer, &kind["ids"]);
        assert!(differences.is_empty(), "{name}: {differences:#?}");
        let bare = tokenizer.encode("x", false).unwrap();
        let expected = [ids(&kind["prefix"]), bare, ids(&kind["suffix"])].concat();
        assert_eq!(tokenizer.encode("x", true).unwrap(), expected, "{name}");
    }
}

#[test]
fn tokenizer_json_decodes_as_the_tokenizers_package_does() {
    for kind in golden("kinds.json").as_array().unwrap() {
        let tokenizer = from_kind(kind);
        let rows = kind["ids"].as_array().unwrap();
        for (row, expected) in rows.iter().zip(texts(&kind["decoded"])) {
            assert_eq!(tokenizer.decode(&ids(row), true), expected, "{}: {row}", kind["name"]);
        }
    }
}

/// For two rules llama.cpp has approximations, which cut words at combining marks; and it leaves
/// out the normalisation of Qwen's tokenizer.json. There the reference is the model's own file,
/// [`gguf_rules_are_those_of_the_models_own_files`].
#[test]
fn gguf_vocabularies_give_the_ids_of_llama_cpp() {
    for case in golden("gguf.json").as_array().unwrap() {
        let vocab = match case["pre"].as_str() {
            Some("tekken" | "gpt-4o") => continue,
            Some(pre) => byte_level_vocab(pre),
            None => pieces_vocab(case["add_space_prefix"].as_bool().unwrap()),
        };
        let tokenizer = from_gguf(vocab);
        let mut differences = differences(&tokenizer, &case["ids"]);
        if ["qwen2", "qwen35"].iter().any(|name| case["pre"] == *name) {
            let composed = differences.len();
            differences.retain(|text| !text.contains("\\u{30"));
            assert_eq!(composed, 1, "texts that normalisation changes");
        }
        assert!(differences.is_empty(), "{} {}: {differences:#?}", case["model"], case["pre"]);
    }
}

#[test]
fn gguf_rules_are_those_of_the_models_own_files() {
    let mut compared = 0;
    for kind in golden("kinds.json").as_array().unwrap() {
        if kind["vocabulary"] == "byte_level" {
            let tokenizer = from_gguf(byte_level_vocab(kind["name"].as_str().unwrap()));
            let differences = differences(&tokenizer, &kind["ids"]);
            assert!(differences.is_empty(), "{}: {differences:#?}", kind["name"]);
            compared += 1;
        }
    }
    assert_eq!(compared, 6);
}

#[test]
fn ordinary_text_never_becomes_a_special_token() {
    let special = ["<|begin|>", "<|im_start|>", "<|im_end|>", "<|eot_id|>"];
    for case in golden("gguf.json").as_array().unwrap() {
        let vocab = match case["pre"].as_str() {
            Some(pre) => byte_level_vocab(pre),
            None => pieces_vocab(case["add_space_prefix"].as_bool().unwrap()),
        };
        let tokenizer = from_gguf(vocab);
        for (text, row) in special.iter().zip(case["plain"].as_array().unwrap()) {
            let got = tokenizer.encode_ordinary(text).unwrap();
            assert_eq!(got, ids(row), "{} {}: {text}", case["model"], case["pre"]);
        }
        for text in texts(&golden("corpus.json")) {
            let got = tokenizer.encode_ordinary(&text).unwrap();
            assert!(!got.iter().any(|&id| tokenizer.is_special(id)), "{text:?}");
        }
    }
}

#[test]
fn decoding_gives_the_text_back() {
    let vocabularies = [byte_level_vocab("llama-bpe"), pieces_vocab(false), pieces_vocab(true)];
    for vocab in vocabularies {
        let sentencepiece = vocab.model == "llama";
        let adds_space = vocab.add_space_prefix == Some(true);
        let tokenizer = from_gguf(vocab);
        for text in texts(&golden("corpus.json")) {
            let ids = tokenizer.encode_ordinary(&text).unwrap();
            // SentencePiece writes a space as U+2581, so that it cannot tell them apart; and after
            // a user-defined token (here two newlines) it puts one more space.
            let expected = if sentencepiece { text.replace('\u{2581}', " ") } else { text };
            if !(adds_space && expected.contains("\n\n")) {
                assert_eq!(tokenizer.decode(&ids, true), expected, "{ids:?}");
            }
        }
    }
}

/// Both ways to a SentencePiece vocabulary: by scores, and by the merges they amount to.
#[test]
fn merges_give_what_the_scores_give() {
    let by_scores = from_gguf(pieces_vocab(false));
    let merges = golden("piece_merges.json");
    let merges = merges.as_array().unwrap().iter().map(|pair| texts(pair).join(" ")).collect();
    let vocab = GgufVocab { scores: None, merges: Some(merges), ..pieces_vocab(false) };
    let by_merges = from_gguf(vocab);
    for text in texts(&golden("corpus.json")) {
        assert_eq!(by_merges.encode(&text, true), by_scores.encode(&text, true), "{text:?}");
    }
}

#[test]
fn a_configuration_names_and_adds_tokens() {
    let kinds = golden("kinds.json");
    let kind = kinds.as_array().unwrap().iter().find(|kind| kind["name"] == "gpt-2").unwrap();
    let build = |config: Value| {
        let tokenizer_json = whole_file(kind);
        Tokenizer::new(&TokenizerSource::Json { tokenizer_json, config: Some(config) }).unwrap()
    };
    let plain = build(json!({"bos_token": "<|begin|>", "eos_token": {"content": "<|im_end|>"}}));
    assert_eq!((plain.bos(), plain.eos()), (Some(0), Some(2)));
    assert_eq!(plain.encode("x", true), plain.encode("x", false));
    assert_eq!(plain.end_ids(), &[2, 3]);
    let adding = build(json!({"bos_token": "<|begin|>", "add_bos_token": true}));
    assert_eq!(adding.encode("", true).unwrap(), [0]);
    assert_eq!(adding.token_id("<|im_start|>"), Some(1));
    assert_eq!(adding.token_text(1), "<|im_start|>");
    assert_eq!(adding.special_ids(), &[0, 1, 2, 3]);
}

#[test]
fn a_text_that_is_too_long_is_refused() {
    let tokenizer = from_gguf(pieces_vocab(true));
    let text = "a".repeat(pomona_text::MAX_TEXT_BYTES + 1);
    assert!(matches!(tokenizer.encode(&text, true), Err(TextError::TooLong { .. })));
}

/// Quadratic work would take hours here; near linear takes seconds in all.
#[test]
fn long_runs_of_one_character_are_encoded_in_near_linear_time() {
    let tokenizers = [
        from_gguf(byte_level_vocab("llama-bpe")),
        from_gguf(byte_level_vocab("default")),
        from_gguf(pieces_vocab(true)),
    ];
    for tokenizer in tokenizers {
        for unit in ["a", " ", "\n", "1", ".", "é", "a ", "<|im_end|>", "'s", "\u{301}", "🎉"] {
            let text = unit.repeat(200_000 / unit.len());
            let ids = tokenizer.encode(&text, false).unwrap();
            assert_eq!(tokenizer.decode(&ids, false), text);
        }
    }
}
