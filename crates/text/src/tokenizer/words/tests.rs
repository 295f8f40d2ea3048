//! The `tokenizers` crate is the reference: words are what it makes of the same text.

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use serde_json::{Value, json};
use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer};

use super::super::byte_level::letter_of;
use super::super::{json_parts, pre_tokenizer};
use super::*;

/// What is joined to texts: words, digits and marks, and above all white space of all kinds.
const PARTS: &[&str] = &[
    " ",
    "  ",
    "\n",
    "\r",
    "\r\n",
    "\t",
    "\u{a0}",
    "\u{3000}",
    "\u{2028}",
    "a",
    "B",
    "é",
    "e\u{301}",
    "Ünï",
    "'s",
    "'LL",
    "'",
    "1",
    "23",
    "٣",
    "½",
    "!",
    "?!",
    "/",
    "_",
    "\u{301}",
    "中文",
    "かな",
    "🎉",
    "👩\u{200d}🚀",
    "\u{0}",
    "\u{feff}",
    "ſ",
    "<|x|>",
];

fn theirs(pre_tokenizer: &PreTokenizerWrapper, text: &str) -> Vec<String> {
    let mut pieces = PreTokenizedString::from(text);
    pre_tokenizer.pre_tokenize(&mut pieces).unwrap();
    let splits = pieces.get_splits(OffsetReferential::Normalized, OffsetType::Byte);
    splits.into_iter().map(|(word, ..)| word.to_owned()).collect()
}

fn ours(words: &Words, text: &str) -> Vec<String> {
    let mut all = Vec::new();
    let mut take = |word: &str| {
        all.push(word.bytes().map(letter_of).collect());
        Ok::<_, ()>(())
    };
    words.each(text, &mut take).unwrap();
    all
}

fn check(pre_tokenizer: &PreTokenizerWrapper, name: &str) {
    let words = Words::new(pre_tokenizer).unwrap();
    let config = Config { cases: 1500, failure_persistence: None, ..Config::default() };
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &[7; 32]);
    let texts = vec(prop::sample::select(PARTS), 1..16);
    let result = TestRunner::new_with_rng(config, rng).run(&texts, |parts| {
        let text = parts.concat();
        prop_assert_eq!(ours(&words, &text), theirs(pre_tokenizer, &text), "{}", name);
        Ok(())
    });
    result.unwrap_or_else(|failure| panic!("{failure}"));
}

#[test]
fn words_are_those_of_the_tokenizers_crate_for_rules_of_gguf() {
    for name in ["default", "gpt-2", "llama-bpe", "qwen2", "qwen35", "smollm", "falcon", "tekken"] {
        check(&pre_tokenizer::named(Some(name)).unwrap().pre_tokenizer, name);
    }
    for name in ["gpt-4o", "deepseek-coder", "deepseek-v3"] {
        check(&pre_tokenizer::named(Some(name)).unwrap().pre_tokenizer, name);
    }
}

#[test]
fn words_are_those_of_the_tokenizers_crate_for_steps_of_files() {
    let bytes = |regex| {
        json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
                "use_regex": regex })
    };
    let split = |pattern| {
        json!({ "type": "Split", "pattern": { "Regex": pattern }, "behavior": "Isolated",
                "invert": false })
    };
    let digits = json!({ "type": "Digits", "individual_digits": true });
    for steps in [
        vec![bytes(true)],
        vec![digits, bytes(true)],
        // Expressions of files that are on no list, one of which matches the empty text.
        vec![split(r"\b\w|\s+(?!\S)|\s+"), bytes(false)],
        vec![split(r"a*"), split(r"(?<=\s)\S+"), bytes(true)],
    ] {
        let part: Value = json!({ "type": "Sequence", "pretokenizers": steps });
        check(&json_parts::pre_tokenizer(&part).unwrap().unwrap(), &part.to_string());
    }
}

#[test]
fn other_pre_tokenizers_are_left_to_the_tokenizers_crate() {
    for part in [
        json!({ "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true,
                "use_regex": true }),
        json!({ "type": "Split", "pattern": { "String": " " }, "behavior": "MergedWithPrevious",
                "invert": false }),
    ] {
        let pre_tokenizer = json_parts::pre_tokenizer(&part).unwrap().unwrap();
        assert!(Words::new(&pre_tokenizer).is_none(), "{part}");
    }
}
