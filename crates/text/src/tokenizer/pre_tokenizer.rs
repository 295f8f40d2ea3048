//! How a byte-level BPE cuts text into words before it merges: the rules that GGUF files call by
//! name in `tokenizer.ggml.pre`. Each rule is the regular expressions that the model's own
//! `tokenizer.json` carries, applied one after the other, each to the pieces the last one left.

use tokenizers::SplitDelimiterBehavior;
use tokenizers::normalizers::{NFC, NormalizerWrapper};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};

use crate::TextError;

/// One rule and the names it goes by.
struct Rule {
    names: &'static [&'static str],
    patterns: &'static [&'static str],
    /// A word that is a token as a whole is not merged at all.
    whole_words: bool,
    /// Whether texts begin with the beginning-of-sequence token if the file does not say.
    add_bos: bool,
    /// Characters are composed first (Unicode normalisation form C). A GGUF file cannot say so,
    /// but the model's tokenizer.json does.
    compose: bool,
}

const NONE: Rule =
    Rule { names: &[], patterns: &[], whole_words: false, add_bos: false, compose: false };

// The expressions end in parts that many share: line breaks with what precedes them, and white
// space, the last of which stays with the word after it.
pub(crate) const GPT2: &str =
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const LLAMA3: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
);
const QWEN2: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
);
const QWEN35: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}",
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
);
const TEKKEN: &str = concat!(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
);
const GPT4O: &str = concat!(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
);
const DEEPSEEK3: &str = concat!(
    r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"##,
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
);

/// The expressions whose matches do not depend on what lies before them.
pub(crate) const PLAIN: &[&str] = &[GPT2, LLAMA3, QWEN2, QWEN35, TEKKEN, GPT4O, DEEPSEEK3];

const RULES: &[Rule] = &[
    Rule {
        names: &["default"],
        patterns: &[r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"],
        ..NONE
    },
    Rule {
        names: &["gpt-2", "phi-2", "mpt", "olmo", "jais", "exaone4"],
        patterns: &[GPT2],
        ..NONE
    },
    Rule {
        names: &["llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "lfm2"],
        patterns: &[LLAMA3],
        whole_words: true,
        add_bos: true,
        ..NONE
    },
    Rule { names: &["dbrx", "smaug-bpe"], patterns: &[LLAMA3], ..NONE },
    Rule { names: &["qwen2"], patterns: &[QWEN2], compose: true, ..NONE },
    Rule { names: &["deepseek-r1-qwen", "stablelm2", "megrez"], patterns: &[QWEN2], ..NONE },
    Rule { names: &["qwen35"], patterns: &[QWEN35], compose: true, ..NONE },
    Rule {
        names: &["smollm", "starcoder", "refact", "command-r", "codeshell"],
        patterns: &[r"\p{N}", GPT2],
        ..NONE
    },
    Rule {
        names: &["falcon"],
        patterns: &[r"[\p{P}\$\+<=>\^~\|`]+", GPT2, r"[0-9][0-9][0-9]"],
        ..NONE
    },
    Rule { names: &["tekken"], patterns: &[TEKKEN], whole_words: true, add_bos: true, ..NONE },
    Rule { names: &["gpt-4o", "llama4"], patterns: &[GPT4O], ..NONE },
    Rule {
        names: &["deepseek-coder"],
        patterns: &[
            r"[\r\n]",
            r"\s?\p{L}+",
            r"\s?\p{P}+",
            r"[\u{4e00}-\u{9fa5}\u{0800}-\u{4e00}\u{ac00}-\u{d7ff}]+",
            r"\p{N}",
        ],
        ..NONE
    },
    Rule {
        names: &["deepseek-v3"],
        patterns: &[
            r"\p{N}{1,3}",
            r"[\u{4e00}-\u{9fa5}\u{3040}-\u{309f}\u{30a0}-\u{30ff}]+",
            DEEPSEEK3,
        ],
        ..NONE
    },
];

/// A named way of cutting text, ready to use.
pub(crate) struct PreTokenizerChoice {
    pub(crate) pre_tokenizer: PreTokenizerWrapper,
    pub(crate) normalizer: Option<NormalizerWrapper>,
    pub(crate) whole_words: bool,
    pub(crate) add_bos: bool,
}

/// The rule called `name`; a file that names none gets `default`.
pub(crate) fn named(name: Option<&str>) -> Result<PreTokenizerChoice, TextError> {
    let name = name.unwrap_or("default");
    let Some(rule) = RULES.iter().find(|rule| rule.names.contains(&name)) else {
        let known: Vec<&str> = RULES.iter().flat_map(|rule| rule.names).copied().collect();
        return Err(TextError::Tokenizer(format!(
            "the pre-tokenizer {name:?} (tokenizer.ggml.pre) is not known; known are {}",
            known.join(", ")
        )));
    };
    let mut steps = Vec::with_capacity(rule.patterns.len() + 1);
    for pattern in rule.patterns {
        let pattern = SplitPattern::Regex((*pattern).to_owned());
        let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false)
            .map_err(|error| TextError::Tokenizer(error.to_string()))?;
        steps.push(PreTokenizerWrapper::Split(split));
    }
    steps.push(PreTokenizerWrapper::ByteLevel(ByteLevel::new(false, false, false)));
    Ok(PreTokenizerChoice {
        pre_tokenizer: PreTokenizerWrapper::Sequence(Sequence::new(steps)),
        normalizer: rule.compose.then_some(NormalizerWrapper::NFC(NFC)),
        whole_words: rule.whole_words,
        add_bos: rule.add_bos,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_has_a_rule_that_compiles() {
        for rule in RULES {
            for name in rule.names {
                assert!(named(Some(name)).is_ok(), "{name}");
            }
        }
        assert!(named(None).is_ok());
    }

    #[test]
    fn an_unknown_name_is_answered_with_the_known_ones() {
        let error = named(Some("klingon")).err().map(|error| error.to_string());
        let error = error.unwrap_or_default();
        assert!(error.contains("klingon") && error.contains("qwen2"), "{error}");
    }
}
