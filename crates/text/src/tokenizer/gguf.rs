//! Tokenisers from the metadata of a GGUF file. What the keys mean follows the GGUF specification
//! and, where that is silent, what llama.cpp does with them.

use std::collections::BTreeSet;

use tokenizers::AddedToken;
use tokenizers::models::bpe::{Merges, Vocab};
use tokenizers::normalizers::{NormalizerWrapper, Prepend, Replace, Sequence};

use pomona_types::TokenId;

use super::bpe::{Added, Bpe, BpeParts, drop_special_merges};
use super::byte_level;
use super::json_parts::byte_token;
use super::pieces::{MAX_VOCAB, Pieces};
use super::pre_tokenizer;
use super::sentencepiece::SentencePiece;
use super::source::GgufVocab;
use super::{Engine, Named, Tokenizer};
use crate::TextError;

/// What SentencePiece writes for a space.
const SPACE: char = '\u{2581}';

/// `tokenizer.ggml.token_type`.
mod kind {
    pub(super) const NORMAL: i32 = 1;
    pub(super) const UNKNOWN: i32 = 2;
    pub(super) const CONTROL: i32 = 3;
    pub(super) const USER_DEFINED: i32 = 4;
    pub(super) const BYTE: i32 = 6;
}

fn refuse<T>(what: impl std::fmt::Display) -> Result<T, TextError> {
    Err(TextError::Tokenizer(format!("the GGUF's {what}")))
}

/// Builds the tokeniser of a GGUF file.
pub(crate) fn from_gguf(vocab: &GgufVocab) -> Result<Tokenizer, TextError> {
    check(vocab)?;
    match vocab.model.as_str() {
        "gpt2" => byte_level_bpe(vocab),
        "llama" if vocab.scores.is_some() => sentencepiece(vocab),
        "llama" if vocab.merges.is_some() => sentencepiece_by_merges(vocab),
        "llama" => refuse("tokenizer \"llama\" has neither scores nor merges"),
        other => refuse(format!(
            "tokenizer model {other:?} (tokenizer.ggml.model) is not supported; known are gpt2, \
             llama"
        )),
    }
}

fn check(vocab: &GgufVocab) -> Result<(), TextError> {
    let count = vocab.tokens.len();
    if count == 0 || count > MAX_VOCAB {
        return refuse(format!("vocabulary has {count} tokens; 1 to {MAX_VOCAB} are possible"));
    }
    let lengths = [
        ("scores", vocab.scores.as_ref().map(Vec::len)),
        ("token_type", vocab.token_types.as_ref().map(Vec::len)),
    ];
    for (name, length) in lengths {
        if length.is_some_and(|length| length != count) {
            let length = length.unwrap_or_default();
            return refuse(format!("tokenizer has {count} tokens but {length} of {name}"));
        }
    }
    let ids = [
        ("bos", vocab.bos),
        ("eos", vocab.eos),
        ("unknown", vocab.unk),
        ("padding", vocab.pad),
        ("eot", vocab.eot),
    ];
    for (name, id) in ids {
        if let Some(id) = id.filter(|&id| id as usize >= count) {
            return refuse(format!("{name}_token_id is {id}, but there are {count} tokens"));
        }
    }
    Ok(())
}

impl GgufVocab {
    fn kind(&self, id: TokenId) -> i32 {
        let kinds = self.token_types.as_ref();
        kinds.and_then(|kinds| kinds.get(id as usize)).copied().unwrap_or(kind::NORMAL)
    }

    /// Not part of any text: found only where the text is trusted, left out of decoded text.
    fn is_special(&self, id: TokenId) -> bool {
        matches!(self.kind(id), kind::CONTROL | kind::UNKNOWN)
            || [self.bos, self.eos, self.eot, self.pad].contains(&Some(id))
    }

    /// Whether text may turn into this token. The unknown token must be in the vocabulary.
    fn merges_into(&self, id: TokenId) -> bool {
        !self.is_special(id) || self.unk == Some(id)
    }

    fn ids(&self) -> impl Iterator<Item = (TokenId, &str)> {
        self.tokens.iter().enumerate().map(|(id, token)| (id as TokenId, token.as_str()))
    }

    /// Tokens that are found in a text as a whole.
    fn added(&self) -> Vec<(TokenId, AddedToken)> {
        self.ids()
            .filter(|&(id, _)| self.is_special(id) || self.kind(id) == kind::USER_DEFINED)
            .map(|(id, token)| {
                let added = AddedToken::from(token, self.is_special(id)).normalized(false);
                (id, added)
            })
            .collect()
    }

    fn named(&self) -> Named {
        Named { bos: self.bos, eos: self.eos, unk: self.unk, pad: self.pad, eot: self.eot }
    }

    /// What is put before and after a text.
    fn affixes(&self, add_bos: bool) -> (Vec<TokenId>, Vec<TokenId>) {
        let bos = self.bos.filter(|_| self.add_bos.unwrap_or(add_bos));
        let eos = self.eos.filter(|_| self.add_eos.unwrap_or(false));
        (bos.into_iter().collect(), eos.into_iter().collect())
    }

    fn merges(&self) -> Result<Merges, TextError> {
        let lines = self.merges.as_deref().unwrap_or_default();
        let split = |(at, line): (usize, &String)| {
            // The first character may itself be a space.
            let first = line.chars().next().map_or(0, char::len_utf8);
            match line[first..].split_once(' ') {
                Some((left, right)) if !right.is_empty() => {
                    Ok((line[..first + left.len()].to_owned(), right.to_owned()))
                }
                _ => refuse(format!("merge {at} is {line:?}, which is not two tokens")),
            }
        };
        let mut merges = Merges::with_capacity(lines.len());
        for line in lines.iter().enumerate() {
            merges.push(split(line)?);
        }
        let special: BTreeSet<&str> =
            self.ids().filter(|&(id, _)| !self.merges_into(id)).map(|(_, token)| token).collect();
        drop_special_merges(&mut merges, &special);
        Ok(merges)
    }

    /// The vocabulary for merging: without special tokens, which text must not turn into.
    fn vocab(&self) -> Result<Vocab, TextError> {
        let mut map = Vocab::with_capacity(self.tokens.len());
        for (id, token) in self.ids() {
            if self.merges_into(id) && map.insert(token.to_owned(), id).is_some() {
                return refuse(format!("vocabulary has the token {token:?} twice"));
            }
        }
        Ok(map)
    }

    /// What each id adds to a text in a SentencePiece vocabulary.
    fn spelt(&self) -> Result<Pieces, TextError> {
        let mut pieces = Pieces::default();
        for (id, token) in self.ids() {
            match byte_token(token).filter(|_| self.is_byte(id)) {
                Some(byte) => pieces.set(id, &[byte], false)?,
                None => {
                    let text = token.replace(SPACE, " ");
                    pieces.set(id, text.as_bytes(), self.is_special(id))?;
                }
            }
        }
        pieces.shrink();
        Ok(pieces)
    }

    /// A file without token types marks its byte tokens by their text alone.
    fn is_byte(&self, id: TokenId) -> bool {
        self.kind(id) == kind::BYTE || self.token_types.is_none()
    }
}

fn byte_level_bpe(vocab: &GgufVocab) -> Result<Tokenizer, TextError> {
    if vocab.merges.is_none() {
        return refuse("tokenizer \"gpt2\" has no merges (tokenizer.ggml.merges)");
    }
    let choice = pre_tokenizer::named(vocab.pre.as_deref())?;
    let mut pieces = Pieces::default();
    for (id, token) in vocab.ids() {
        if vocab.is_special(id) || vocab.kind(id) == kind::USER_DEFINED {
            pieces.set(id, token.as_bytes(), vocab.is_special(id))?;
        } else {
            pieces.set(id, &byte_level::bytes_of(token), false)?;
        }
    }
    pieces.shrink();
    let engine = Bpe::new(BpeParts {
        vocab: vocab.vocab()?,
        merges: vocab.merges()?,
        unk: None,
        fuse_unk: false,
        byte_fallback: false,
        ignore_merges: choice.whole_words,
        normalizer: choice.normalizer,
        pre_tokenizer: Some(choice.pre_tokenizer),
    })?;
    let added = Added::new(&vocab.added(), engine.normalizer())?;
    let (prefix, suffix) = vocab.affixes(choice.add_bos);
    Tokenizer::assemble(Engine::Bpe(Box::new(engine)), added, pieces, vocab.named())?
        .with_affixes(prefix, suffix, 0)
}

fn sentencepiece(vocab: &GgufVocab) -> Result<Tokenizer, TextError> {
    let pieces = vocab.spelt()?;
    let added = Added::new(&vocab.added(), None)?;
    let mut bytes = [None; 256];
    for (id, token) in vocab.ids().filter(|&(id, _)| vocab.is_byte(id)) {
        if let Some(byte) = byte_token(token) {
            bytes[byte as usize] = Some(id);
        }
    }
    let is_byte =
        |id: TokenId| vocab.is_byte(id) && byte_token(&vocab.tokens[id as usize]).is_some();
    // A token written with a real space is never met: in a SentencePiece text there are none.
    let mergeable = |id: TokenId| {
        !vocab.is_special(id) && !is_byte(id) && !vocab.tokens[id as usize].contains(' ')
    };
    let table: Option<Vec<TokenId>> = bytes.into_iter().collect();
    let table = table.and_then(|table| table.try_into().ok()).map(Box::new);
    let scores = vocab.scores.clone().unwrap_or_default();
    let model = SentencePiece::new(&pieces, mergeable, scores, table, vocab.unk)?;
    let add_space = vocab.add_space_prefix.unwrap_or(true);
    let (prefix, suffix) = vocab.affixes(true);
    Tokenizer::assemble(Engine::SentencePiece { model, add_space }, added, pieces, vocab.named())?
        .with_affixes(prefix, suffix, usize::from(add_space))
}

/// A SentencePiece vocabulary whose merges the file spells out.
fn sentencepiece_by_merges(vocab: &GgufVocab) -> Result<Tokenizer, TextError> {
    let add_space = vocab.add_space_prefix.unwrap_or(true);
    let spaces = Replace::new(" ", SPACE.to_string())
        .map_err(|error| TextError::Tokenizer(error.to_string()))?;
    let mut steps = vec![NormalizerWrapper::Replace(spaces)];
    if add_space {
        steps.insert(0, NormalizerWrapper::Prepend(Prepend::new(SPACE.to_string())));
    }
    let engine = Bpe::new(BpeParts {
        vocab: vocab.vocab()?,
        merges: vocab.merges()?,
        unk: vocab.unk.map(|id| vocab.tokens[id as usize].clone()),
        fuse_unk: true,
        byte_fallback: true,
        ignore_merges: false,
        normalizer: Some(NormalizerWrapper::Sequence(Sequence::new(steps))),
        pre_tokenizer: None,
    })?;
    let added = Added::new(&vocab.added(), engine.normalizer())?;
    let (prefix, suffix) = vocab.affixes(true);
    let pieces = vocab.spelt()?;
    Tokenizer::assemble(Engine::Bpe(Box::new(engine)), added, pieces, vocab.named())?.with_affixes(
        prefix,
        suffix,
        usize::from(add_space),
    )
}
