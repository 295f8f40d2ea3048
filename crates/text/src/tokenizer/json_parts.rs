//! The parts of a `tokenizer.json` that surround its model: normaliser, pre-tokeniser,
//! post-processor, decoder. Each is checked before the `tokenizers` crate gets it.

use serde_json::Value;
use tokenizers::normalizers::NormalizerWrapper;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;

use pomona_types::TokenId;

use super::byte_level;
use crate::TextError;

/// Steps that a normaliser, pre-tokeniser or decoder may have.
const MAX_STEPS: usize = 32;
/// Times longer that a normaliser may make a text.
const MAX_GROWTH: usize = 256;
/// Bytes of a regular expression.
const MAX_PATTERN_BYTES: usize = 4096;
/// Bytes of a prefix or a replacement.
const MAX_CONTENT_BYTES: usize = 64;
/// Tokens that may be put before or after a text.
const MAX_AFFIX: usize = 16;

fn refuse<T>(what: impl std::fmt::Display) -> Result<T, TextError> {
    Err(TextError::Tokenizer(format!("tokenizer.json: {what}")))
}

fn kind(part: &Value) -> &str {
    part.get("type").and_then(Value::as_str).unwrap_or("")
}

/// The steps of a part, with sequences in sequences laid out flat.
fn steps<'a>(part: &'a Value, list: &str, out: &mut Vec<&'a Value>) -> Result<(), TextError> {
    if part.is_null() {
        return Ok(());
    }
    if kind(part) == "Sequence" {
        let inner = part.get(list).and_then(Value::as_array);
        let Some(inner) = inner else { return refuse(format!("a Sequence without {list:?}")) };
        return inner.iter().try_for_each(|step| steps(step, list, out));
    }
    if out.len() == MAX_STEPS {
        return refuse(format!("more than {MAX_STEPS} steps in {list:?}"));
    }
    out.push(part);
    Ok(())
}

/// The pattern of a `Replace` or `Split` and whether it is a regular expression.
fn pattern(step: &Value) -> Result<(&str, bool), TextError> {
    let pattern = step.get("pattern");
    let text = |key| pattern.and_then(|pattern| pattern.get(key)).and_then(Value::as_str);
    match (text("String"), text("Regex")) {
        (Some(text), _) if !text.is_empty() && text.len() <= MAX_PATTERN_BYTES => Ok((text, false)),
        (None, Some(regex)) if regex.len() <= MAX_PATTERN_BYTES => Ok((regex, true)),
        _ => refuse(format!("{} without a usable pattern", kind(step))),
    }
}

fn content<'a>(step: &'a Value, key: &str) -> Result<&'a str, TextError> {
    match step.get(key).and_then(Value::as_str) {
        Some(text) if text.len() <= MAX_CONTENT_BYTES => Ok(text),
        _ => refuse(format!("{} needs a short text in {key:?}", kind(step))),
    }
}

/// The normaliser, once it is known that it cannot blow a text up.
pub(crate) fn normalizer(part: &Value) -> Result<Option<NormalizerWrapper>, TextError> {
    let mut all = Vec::new();
    steps(part, "normalizers", &mut all)?;
    let mut growth = 1usize;
    for step in &all {
        growth = growth.saturating_mul(match kind(step) {
            "Replace" => match pattern(step)? {
                (text, false) => content(step, "content")?.len().div_ceil(text.len()).max(1),
                (_, true) => content(step, "content")?.len() + 1,
            },
            "Prepend" => content(step, "prepend")?.len().min(1) + 1,
            "NFKC" | "NFKD" => 11,
            "NFC" | "NFD" => 3,
            "ByteLevel" | "Lowercase" => 2,
            "Strip" | "StripAccents" | "Nmt" => 1,
            other => return refuse(format!("the normalizer {other:?} is not supported")),
        });
    }
    if growth > MAX_GROWTH {
        return refuse(format!("its normalizer can make a text {growth} times longer"));
    }
    if all.is_empty() {
        return Ok(None);
    }
    match serde_json::from_value(part.clone()) {
        Ok(normalizer) => Ok(Some(normalizer)),
        Err(error) => refuse(format!("its normalizer: {error}")),
    }
}

/// The pre-tokeniser.
pub(crate) fn pre_tokenizer(part: &Value) -> Result<Option<PreTokenizerWrapper>, TextError> {
    let mut all = Vec::new();
    steps(part, "pretokenizers", &mut all)?;
    for step in &all {
        match kind(step) {
            "Split" => drop(pattern(step)?),
            "ByteLevel" | "Metaspace" | "Digits" | "Punctuation" | "Whitespace"
            | "WhitespaceSplit" | "CharDelimiterSplit" => {}
            other => return refuse(format!("the pre-tokenizer {other:?} is not supported")),
        }
    }
    if all.is_empty() {
        return Ok(None);
    }
    match serde_json::from_value(part.clone()) {
        Ok(pre_tokenizer) => Ok(Some(pre_tokenizer)),
        Err(error) => refuse(format!("its pre-tokenizer: {error}")),
    }
}

/// The tokens that the post-processor puts before and after a single text.
pub(crate) fn affixes(part: &Value) -> Result<(Vec<TokenId>, Vec<TokenId>), TextError> {
    let mut all = Vec::new();
    steps(part, "processors", &mut all)?;
    let (mut prefix, mut suffix) = (Vec::new(), Vec::new());
    for step in all {
        let (before, after) = match kind(step) {
            "ByteLevel" => continue,
            "TemplateProcessing" => template_affixes(step)?,
            "BertProcessing" | "RobertaProcessing" => {
                let id = |key: &str| step.get(key)?.get(1)?.as_u64()?.try_into().ok();
                match (id("cls"), id("sep")) {
                    (Some(cls), Some(sep)) => (vec![cls], vec![sep]),
                    _ => return refuse(format!("{} without cls and sep", kind(step))),
                }
            }
            other => return refuse(format!("the post-processor {other:?} is not supported")),
        };
        prefix.splice(0..0, before);
        suffix.extend(after);
    }
    if prefix.len() + suffix.len() > MAX_AFFIX {
        return refuse(format!("its post-processor adds more than {MAX_AFFIX} tokens"));
    }
    Ok((prefix, suffix))
}

fn template_affixes(step: &Value) -> Result<(Vec<TokenId>, Vec<TokenId>), TextError> {
    let mut sides = [Vec::new(), Vec::new()];
    let mut seen = 0;
    let single = step.get("single").and_then(Value::as_array);
    for item in single.into_iter().flatten() {
        if item.get("Sequence").is_some() {
            seen += 1;
            continue;
        }
        let name = item.get("SpecialToken").and_then(|token| token.get("id")?.as_str());
        let ids = name.and_then(|name| step.get("special_tokens")?.get(name)?.get("ids"));
        let Some(ids) = ids.and_then(Value::as_array) else {
            return refuse(format!("its post-processor uses {item}, which it does not define"));
        };
        for id in ids {
            let id = id.as_u64().and_then(|id| TokenId::try_from(id).ok());
            let Some(id) = id else { return refuse("a special token whose id is no id") };
            sides[seen.min(1)].push(id);
        }
    }
    if seen != 1 {
        return refuse("its post-processor does not place the text exactly once");
    }
    let [prefix, suffix] = sides;
    Ok((prefix, suffix))
}

/// How tokens turn into bytes.
#[derive(Debug, Default)]
pub(crate) struct Decoding {
    /// Every character of a token is one byte (GPT-2's alphabet).
    pub(crate) byte_level: bool,
    /// A token `<0xNN>` is one byte.
    byte_fallback: bool,
    replacements: Vec<(String, String)>,
    /// Spaces to be taken from the beginning of a text.
    pub(crate) leading_spaces: usize,
}

impl Decoding {
    /// What `token` adds to a text.
    pub(crate) fn bytes_of(&self, token: &str) -> Vec<u8> {
        if self.byte_level {
            return byte_level::bytes_of(token);
        }
        if let Some(byte) = byte_token(token).filter(|_| self.byte_fallback) {
            return vec![byte];
        }
        let replace = |text: String, (from, to): &(String, String)| text.replace(from, to);
        self.replacements.iter().fold(token.to_owned(), replace).into_bytes()
    }
}

/// The byte that a SentencePiece byte token (`<0x0A>`) stands for.
pub(crate) fn byte_token(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    let digits = Some(digits).filter(|digits| digits.len() == 2 && !digits.contains('+'))?;
    u8::from_str_radix(digits, 16).ok()
}

/// The decoder. Those that need to see the whole text cannot stream and are refused.
pub(crate) fn decoding(part: &Value) -> Result<Decoding, TextError> {
    let mut all = Vec::new();
    steps(part, "decoders", &mut all)?;
    let mut decoding = Decoding::default();
    for step in &all {
        match kind(step) {
            "ByteLevel" => decoding.byte_level = true,
            "ByteFallback" => decoding.byte_fallback = true,
            "Fuse" => {}
            "Replace" => match pattern(step)? {
                (text, false) => {
                    let to = content(step, "content")?.to_owned();
                    decoding.replacements.push((text.to_owned(), to));
                }
                (_, true) => return refuse("a decoder that replaces by regular expression"),
            },
            "Metaspace" => {
                let from = step.get("replacement").and_then(Value::as_str).unwrap_or("\u{2581}");
                decoding.replacements.push((from.to_owned(), " ".to_owned()));
                let never = step.get("prepend_scheme").and_then(Value::as_str) == Some("never")
                    || step.get("add_prefix_space").and_then(Value::as_bool) == Some(false);
                decoding.leading_spaces = usize::from(!never);
            }
            "Strip" => {
                let count = |key| step.get(key).and_then(Value::as_u64).unwrap_or(0);
                let space = step.get("content").and_then(Value::as_str) == Some(" ");
                if !space || count("stop") != 0 || count("start") > 16 {
                    return refuse("a decoder that strips more than leading spaces");
                }
                decoding.leading_spaces = count("start") as usize;
            }
            other => return refuse(format!("the decoder {other:?} is not supported")),
        }
    }
    if all.is_empty() {
        return refuse("it has no decoder, so that tokens cannot be turned into text");
    }
    if decoding.byte_level && all.len() != 1 {
        return refuse("a ByteLevel decoder combined with others is not supported");
    }
    Ok(decoding)
}
