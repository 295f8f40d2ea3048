//! Byte pair encoding by the `tokenizers` crate, and the splitting of text at special tokens,
//! which SentencePiece vocabularies use as well.

use std::collections::BTreeSet;

use tokenizers::models::bpe::{BPE, Merges, Vocab};
use tokenizers::normalizers::NormalizerWrapper;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::{
    AddedToken, AddedVocabulary, Model, OffsetReferential, OffsetType, PreTokenizedString,
    PreTokenizer,
};

use pomona_types::TokenId;

use super::byte_level::letter_of;
use super::words::Words;
use crate::TextError;

/// Tokens that are found in a text before anything else happens to it.
#[derive(Debug)]
pub(crate) struct Added {
    /// Finds all of them.
    all: AddedVocabulary,
    /// Finds those that are not special.
    ordinary: AddedVocabulary,
}

impl Added {
    pub(crate) fn new(
        tokens: &[(TokenId, AddedToken)],
        normalizer: Option<&NormalizerWrapper>,
    ) -> Result<Self, TextError> {
        // The only way to give an added token its id is a model that knows it.
        let ids: Vocab = tokens.iter().map(|(id, token)| (token.content.clone(), *id)).collect();
        if ids.len() != tokens.len() {
            return Err(TextError::Tokenizer("two added tokens have the same text".into()));
        }
        let names = BPE::builder()
            .vocab_and_merges(ids, Vec::new())
            .cache_capacity(0)
            .build()
            .map_err(|error| TextError::Tokenizer(error.to_string()))?;
        let tokens: Vec<AddedToken> = tokens.iter().map(|(_, token)| token.clone()).collect();
        let mut all = AddedVocabulary::new();
        all.add_tokens(&tokens, &names, normalizer);
        let mut ordinary = all.clone();
        ordinary.set_encode_special_tokens(true);
        Ok(Self { all, ordinary })
    }

    pub(crate) fn id(&self, token: &str) -> Option<TokenId> {
        self.all.get_vocab().get(token).copied()
    }

    /// Cuts `text` at added tokens, and applies the normaliser to what lies between them.
    pub(crate) fn split(
        &self,
        text: &str,
        normalizer: Option<&NormalizerWrapper>,
        parse_special: bool,
    ) -> PreTokenizedString {
        let finder = if parse_special { &self.all } else { &self.ordinary };
        finder.extract_and_normalize(normalizer, text)
    }
}

/// Takes out the merges that make special tokens or are made of them: they would turn ordinary
/// text into marks.
pub(crate) fn drop_special_merges(merges: &mut Merges, special: &BTreeSet<&str>) {
    let longest = special.iter().map(|text| text.len()).max().unwrap_or(0);
    // Most tokens begin like no special token, and there are many merges.
    let mut begins = [false; 256];
    special.iter().filter_map(|text| text.bytes().next()).for_each(|b| begins[b as usize] = true);
    merges.retain(|(left, right)| {
        let begins = |text: &str| text.bytes().next().is_none_or(|b| begins[b as usize]);
        if !begins(left) && !begins(right) {
            return true;
        }
        let is_special = |text: &str| text.len() <= longest && special.contains(text);
        let joined = left.len() + right.len() <= longest && is_special(&format!("{left}{right}"));
        !joined && !is_special(left) && !is_special(right)
    });
}

/// What a BPE model is made of.
pub(crate) struct BpeParts {
    pub(crate) vocab: Vocab,
    pub(crate) merges: Merges,
    pub(crate) unk: Option<String>,
    pub(crate) fuse_unk: bool,
    pub(crate) byte_fallback: bool,
    pub(crate) ignore_merges: bool,
    pub(crate) normalizer: Option<NormalizerWrapper>,
    pub(crate) pre_tokenizer: Option<PreTokenizerWrapper>,
}

/// A BPE tokeniser without its decoder.
pub(crate) struct Bpe {
    model: BPE,
    normalizer: Option<NormalizerWrapper>,
    pre_tokenizer: Option<PreTokenizerWrapper>,
    /// Does what `pre_tokenizer` does, and faster, where it can.
    words: Option<Words>,
}

impl Bpe {
    pub(crate) fn new(parts: BpeParts) -> Result<Self, TextError> {
        if let Some(unk) = parts.unk.as_ref().filter(|unk| !parts.vocab.contains_key(*unk)) {
            return Err(TextError::Tokenizer(format!(
                "its unknown token {unk:?} is not in the vocabulary"
            )));
        }
        let mut builder = BPE::builder()
            .vocab_and_merges(parts.vocab, parts.merges)
            .fuse_unk(parts.fuse_unk)
            .byte_fallback(parts.byte_fallback)
            .ignore_merges(parts.ignore_merges);
        if let Some(unk) = parts.unk {
            builder = builder.unk_token(unk);
        }
        let model = builder.build().map_err(|error| TextError::Tokenizer(error.to_string()))?;
        let BpeParts { normalizer, pre_tokenizer, .. } = parts;
        let words = pre_tokenizer.as_ref().and_then(Words::new);
        Ok(Self { model, normalizer, pre_tokenizer, words })
    }

    pub(crate) fn normalizer(&self) -> Option<&NormalizerWrapper> {
        self.normalizer.as_ref()
    }

    pub(crate) fn id(&self, token: &str) -> Option<TokenId> {
        self.model.token_to_id(token)
    }

    /// Appends the tokens of `text` to `out`.
    pub(crate) fn encode(
        &self,
        added: &Added,
        text: &str,
        parse_special: bool,
        out: &mut Vec<TokenId>,
    ) -> tokenizers::Result<()> {
        // Composing leaves ASCII as it is.
        let idle =
            |normalizer: &&_| matches!(normalizer, NormalizerWrapper::NFC(_) if text.is_ascii());
        let normalizer = self.normalizer.as_ref().filter(|normalizer| !idle(normalizer));
        let mut pieces = added.split(text, normalizer, parse_special);
        if let Some(words) = &self.words {
            return self.encode_words(words, &pieces, out);
        }
        if let Some(pre_tokenizer) = &self.pre_tokenizer {
            pre_tokenizer.pre_tokenize(&mut pieces)?;
        }
        pieces.tokenize(|piece| self.model.tokenize(piece.get()))?;
        for (_, _, tokens) in pieces.get_splits(OffsetReferential::Normalized, OffsetType::Byte) {
            out.extend(tokens.iter().flatten().map(|token| token.id));
        }
        Ok(())
    }

    fn encode_words(
        &self,
        words: &Words,
        pieces: &PreTokenizedString,
        out: &mut Vec<TokenId>,
    ) -> tokenizers::Result<()> {
        let mut letters = String::new();
        for (piece, _, tokens) in pieces.get_splits(OffsetReferential::Normalized, OffsetType::Byte)
        {
            if let Some(tokens) = tokens {
                out.extend(tokens.iter().map(|token| token.id));
                continue;
            }
            words.each(piece, &mut |word| {
                letters.clear();
                letters.extend(word.bytes().map(letter_of));
                out.extend(self.model.tokenize(&letters)?.iter().map(|token| token.id));
                tokenizers::Result::Ok(())
            })?;
        }
        Ok(())
    }
}
