//! Reading `tokenizer.json`, the file of the `tokenizers` crate. The file is read piece by piece
//! rather than handed over whole, because it may be hostile: only parts that language models use
//! are taken, each is bounded, and what would pad, truncate or draw random numbers is left out.

use std::collections::BTreeSet;

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::Value;
use tokenizers::AddedToken;
use tokenizers::models::bpe::Vocab;

use pomona_types::TokenId;

use super::bpe::{Added, Bpe, BpeParts, drop_special_merges};
use super::json_parts::{Decoding, affixes, decoding, normalizer, pre_tokenizer};
use super::pieces::Pieces;
use super::{Engine, Named, Tokenizer};
use crate::TextError;

/// Bytes a `tokenizer.json` may have. The largest in use have some 35 MB.
const MAX_JSON_BYTES: usize = 1 << 28;

#[derive(Deserialize)]
struct File {
    #[serde(default)]
    added_tokens: Vec<AddedEntry>,
    #[serde(default)]
    normalizer: Value,
    #[serde(default)]
    pre_tokenizer: Value,
    #[serde(default)]
    post_processor: Value,
    #[serde(default)]
    decoder: Value,
    model: ModelEntry,
}

#[derive(Deserialize)]
struct AddedEntry {
    id: TokenId,
    #[serde(flatten)]
    token: AddedToken,
}

#[derive(Deserialize)]
struct ModelEntry {
    #[serde(rename = "type", default)]
    kind: Option<String>,
    #[serde(default)]
    vocab: Option<VocabEntries>,
    #[serde(default)]
    merges: Vec<Merge>,
    #[serde(default)]
    unk_token: Option<String>,
    #[serde(default)]
    continuing_subword_prefix: Option<String>,
    #[serde(default)]
    end_of_word_suffix: Option<String>,
    #[serde(default)]
    dropout: Option<f32>,
    #[serde(default)]
    fuse_unk: bool,
    #[serde(default)]
    byte_fallback: bool,
    #[serde(default)]
    ignore_merges: bool,
}

/// Merges are written `"left right"`, or since 2024 as pairs.
#[derive(Deserialize)]
#[serde(untagged)]
enum Merge {
    Line(String),
    Pair(String, String),
}

/// Token to id, in the order of the file. A vocabulary of another shape (Unigram's list) is empty,
/// and its model is refused by name.
struct VocabEntries(Vec<(String, TokenId)>);

impl<'de> Deserialize<'de> for VocabEntries {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = VocabEntries;

            fn expecting(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                out.write_str("a map from tokens to ids (the vocabulary of a BPE model)")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<VocabEntries, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(VocabEntries(entries))
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

/// Builds the tokeniser of a `tokenizer.json`, with what `tokenizer_config.json` adds to it.
pub(crate) fn from_json(bytes: &[u8], config: Option<&Value>) -> Result<Tokenizer, TextError> {
    if bytes.len() > MAX_JSON_BYTES {
        return Err(TextError::Tokenizer(format!(
            "tokenizer.json has {} bytes, more than {MAX_JSON_BYTES}",
            bytes.len()
        )));
    }
    let file: File = serde_json::from_slice(bytes)
        .map_err(|error| TextError::Tokenizer(format!("tokenizer.json: {error}")))?;
    check_model(&file.model)?;
    let decoding = decoding(&file.decoder)?;
    let normalizer = normalizer(&file.normalizer)?;
    let pre_tokenizer = pre_tokenizer(&file.pre_tokenizer)?;
    let (mut prefix, mut suffix) = affixes(&file.post_processor)?;

    let added: Vec<(TokenId, AddedToken)> =
        file.added_tokens.into_iter().map(|entry| (entry.id, entry.token)).collect();
    let vocab = file.model.vocab.map(|vocab| vocab.0).unwrap_or_default();
    let pieces = pieces(&added, &vocab, &decoding)?;
    let mut merges = Vec::with_capacity(file.model.merges.len());
    for merge in file.model.merges {
        merges.extend(merge.into_pair()?);
    }
    let unk = file.model.unk_token.as_deref();
    let special: BTreeSet<&str> = added
        .iter()
        .filter(|(_, token)| token.special && Some(token.content.as_str()) != unk)
        .map(|(_, token)| token.content.as_str())
        .collect();
    let vocab = without_special(vocab, &special)?;
    drop_special_merges(&mut merges, &special);
    let engine = Bpe::new(BpeParts {
        vocab,
        merges,
        unk: file.model.unk_token,
        fuse_unk: file.model.fuse_unk,
        byte_fallback: file.model.byte_fallback,
        ignore_merges: file.model.ignore_merges,
        normalizer,
        pre_tokenizer,
    })?;
    let added = Added::new(&added, engine.normalizer())?;
    let find = |key: &str| config_token(config?, key).and_then(|text| added.id(&text));
    let named = Named {
        bos: find("bos_token").or(prefix.first().copied()),
        eos: find("eos_token").or(suffix.last().copied()),
        unk: find("unk_token"),
        pad: find("pad_token"),
        eot: None,
    };
    obey_config(config, &named, &mut prefix, &mut suffix);
    Tokenizer::assemble(Engine::Bpe(Box::new(engine)), added, pieces, named)?.with_affixes(
        prefix,
        suffix,
        decoding.leading_spaces,
    )
}

fn check_model(model: &ModelEntry) -> Result<(), TextError> {
    let refuse = |what: &str| Err(TextError::Tokenizer(format!("tokenizer.json: {what}")));
    match model.kind.as_deref() {
        None | Some("BPE") => {}
        Some(kind) => {
            return refuse(&format!("a model of type {kind:?} is not supported, only \"BPE\" is"));
        }
    }
    if model.vocab.as_ref().is_none_or(|vocab| vocab.0.is_empty()) {
        return refuse("the vocabulary is empty");
    }
    let affix = |text: &Option<String>| text.as_ref().is_some_and(|text| !text.is_empty());
    if affix(&model.continuing_subword_prefix) || affix(&model.end_of_word_suffix) {
        return refuse("continuing_subword_prefix and end_of_word_suffix are not supported");
    }
    if model.dropout.is_some_and(|share| share != 0.0) {
        return refuse("dropout would make the tokens of a text random; set it to null");
    }
    Ok(())
}

impl Merge {
    fn into_pair(self) -> Result<Option<(String, String)>, TextError> {
        match self {
            Merge::Pair(left, right) => Ok(Some((left, right))),
            Merge::Line(line) if line.starts_with("#version") => Ok(None),
            Merge::Line(line) => match line.split_once(' ') {
                Some((left, right)) if !right.contains(' ') => {
                    Ok(Some((left.to_owned(), right.to_owned())))
                }
                _ => Err(TextError::Tokenizer(format!(
                    "tokenizer.json: the merge {line:?} is not two tokens"
                ))),
            },
        }
    }
}

/// What each id adds to a text. An added token stands for its own text.
fn pieces(
    added: &[(TokenId, AddedToken)],
    vocab: &[(String, TokenId)],
    decoding: &Decoding,
) -> Result<Pieces, TextError> {
    let mut pieces = Pieces::default();
    for (id, token) in added {
        let bytes = if decoding.byte_level {
            token.content.as_bytes().to_vec()
        } else {
            decoding.bytes_of(&token.content)
        };
        pieces.set(*id, &bytes, token.special)?;
    }
    for (token, id) in vocab {
        pieces.set(*id, &decoding.bytes_of(token), false)?;
    }
    pieces.shrink();
    Ok(pieces)
}

/// The vocabulary for merging: special tokens are found beforehand, and must not come about in
/// text that only looks like them.
fn without_special(
    vocab: Vec<(String, TokenId)>,
    special: &BTreeSet<&str>,
) -> Result<Vocab, TextError> {
    let mut map = Vocab::default();
    let mut ids = vec![0u64; super::pieces::MAX_VOCAB.div_ceil(64)];
    for (token, id) in vocab {
        let (word, bit) = (id as usize / 64, 1 << (id % 64));
        if ids[word] & bit != 0 {
            return Err(TextError::Tokenizer(format!(
                "tokenizer.json: the id {id} belongs to two tokens, one of them {token:?}"
            )));
        }
        ids[word] |= bit;
        if !special.contains(token.as_str()) {
            map.insert(token, id);
        }
    }
    Ok(map)
}

/// The text of a special token that `tokenizer_config.json` names, as a string or as an object.
fn config_token(config: &Value, key: &str) -> Option<String> {
    let value = config.get(key)?;
    value.as_str().or_else(|| value.get("content")?.as_str()).map(str::to_owned)
}

/// `add_bos_token` and `add_eos_token`, where the configuration has them, are the last word.
fn obey_config(
    config: Option<&Value>,
    named: &Named,
    prefix: &mut Vec<TokenId>,
    suffix: &mut Vec<TokenId>,
) {
    let flag = |key: &str| config?.get(key)?.as_bool();
    if let Some(bos) = named.bos {
        match flag("add_bos_token") {
            Some(true) if prefix.first() != Some(&bos) => prefix.insert(0, bos),
            Some(false) if prefix.first() == Some(&bos) => drop(prefix.remove(0)),
            _ => {}
        }
    }
    if let Some(eos) = named.eos {
        match flag("add_eos_token") {
            Some(true) if suffix.last() != Some(&eos) => suffix.push(eos),
            Some(false) if suffix.last() == Some(&eos) => drop(suffix.pop()),
            _ => {}
        }
    }
}
