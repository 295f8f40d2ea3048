//! Text to tokens and back: one [`Tokenizer`] over a byte-level BPE or a SentencePiece vocabulary,
//! whether it comes from a `tokenizer.json` or from GGUF metadata.
//!
//! Byte pair encoding itself is the `tokenizers` crate's; SentencePiece's merging by score, which
//! that crate has not, is in `sentencepiece.rs`. Decoding is ours in both cases, because it must
//! stream: a token stands for bytes, and a text is the bytes of its tokens.

mod bpe;
mod byte_level;
mod gguf;
mod json;
mod json_parts;
mod pieces;
mod pre_tokenizer;
mod sentencepiece;
mod source;
mod words;

use std::borrow::Cow;
use std::panic::{AssertUnwindSafe, catch_unwind};

use tokenizers::{OffsetReferential, OffsetType};

use pomona_types::TokenId;

pub use source::{GgufVocab, TokenizerSource};

use self::bpe::{Added, Bpe};
use self::pieces::Pieces;
use self::sentencepiece::SentencePiece;
use crate::TextError;
use crate::detokenizer::TextStream;

/// Bytes of text that can be encoded at once. Encoding needs some hundred bytes of memory for
/// each byte of text.
pub const MAX_TEXT_BYTES: usize = 8 << 20;

/// Tokens that end an answer although the model's files may not list them, by their text.
const END_TEXTS: &[&str] = &[
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<end_of_turn>",
    "<turn|>",
    "<EOT>",
];

/// A model's tokeniser. Share it by `Arc`; encoding takes `&self` and may run on many threads.
pub struct Tokenizer {
    engine: Engine,
    added: Added,
    pieces: Pieces,
    named: Named,
    prefix: Vec<TokenId>,
    suffix: Vec<TokenId>,
    leading_spaces: usize,
    special_ids: Vec<TokenId>,
    end_ids: Vec<TokenId>,
}

enum Engine {
    Bpe(Box<Bpe>),
    SentencePiece {
        model: SentencePiece,
        /// Text that follows a special token or nothing gets a space in front.
        add_space: bool,
    },
}

/// The tokens that have a role.
#[derive(Clone, Copy, Debug, Default)]
struct Named {
    bos: Option<TokenId>,
    eos: Option<TokenId>,
    unk: Option<TokenId>,
    pad: Option<TokenId>,
    eot: Option<TokenId>,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let engine = match self.engine {
            Engine::Bpe(_) => "BPE",
            Engine::SentencePiece { .. } => "SentencePiece",
        };
        out.debug_struct("Tokenizer")
            .field("engine", &engine)
            .field("vocab_size", &self.vocab_size())
            .field("named", &self.named)
            .finish_non_exhaustive()
    }
}

/// Runs code of the `tokenizers` crate on data from outside. That crate has assertions of its own;
/// should one be met, it becomes an error instead of taking a thread down.
fn shielded<T>(work: impl FnOnce() -> Result<T, TextError>) -> Result<T, TextError> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| {
        Err(TextError::Tokenizer("the tokenizers library met a case it does not handle".into()))
    })
}

impl Tokenizer {
    /// Builds a tokeniser. Takes some 50 ms for 50,000 tokens, and memory in proportion to the
    /// source. Any source that cannot be trusted or is not supported is [`TextError::Tokenizer`].
    pub fn new(source: &TokenizerSource) -> Result<Self, TextError> {
        shielded(|| match source {
            TokenizerSource::Json { tokenizer_json, config } => {
                json::from_json(tokenizer_json, config.as_ref())
            }
            TokenizerSource::Gguf(vocab) => gguf::from_gguf(vocab),
        })
    }

    /// A tokeniser that puts nothing before or after a text.
    fn assemble(
        engine: Engine,
        added: Added,
        pieces: Pieces,
        named: Named,
    ) -> Result<Self, TextError> {
        let special_ids = pieces.special_ids();
        let known = END_TEXTS.iter().filter_map(|text| added.id(text));
        let mut end_ids: Vec<TokenId> = named.eos.into_iter().chain(named.eot).collect();
        end_ids.extend(known.filter(|&id| pieces.is_special(id)));
        end_ids.sort_unstable();
        end_ids.dedup();
        let (prefix, suffix) = (Vec::new(), Vec::new());
        let leading_spaces = 0;
        Ok(Self {
            engine,
            added,
            pieces,
            named,
            prefix,
            suffix,
            leading_spaces,
            special_ids,
            end_ids,
        })
    }

    fn with_affixes(
        mut self,
        prefix: Vec<TokenId>,
        suffix: Vec<TokenId>,
        leading_spaces: usize,
    ) -> Result<Self, TextError> {
        for &id in prefix.iter().chain(&suffix) {
            if self.pieces.get(id).is_none() {
                return Err(TextError::Tokenizer(format!(
                    "it adds the token {id} to each text, but has no such token"
                )));
            }
        }
        (self.prefix, self.suffix, self.leading_spaces) = (prefix, suffix, leading_spaces);
        Ok(self)
    }

    /// The tokens of `text`. Special tokens written in it are parsed, as a rendered chat template
    /// needs; use [`Tokenizer::encode_ordinary`] for text that must not steer the model.
    /// `add_special` puts the tokens before and after it that the model expects (`<s>`).
    ///
    /// Near linear in the length of the text. Fails with [`TextError::TooLong`] above
    /// [`MAX_TEXT_BYTES`].
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<TokenId>, TextError> {
        if !add_special {
            return self.encode_with(text, true, Vec::new());
        }
        let mut out = self.encode_with(text, true, self.prefix.clone())?;
        out.extend_from_slice(&self.suffix);
        Ok(out)
    }

    /// The tokens of `text`, none of them special: `<|im_end|>` in it stays the ten characters
    /// that it is, so that text from outside cannot end a turn or open another. Nothing is added.
    pub fn encode_ordinary(&self, text: &str) -> Result<Vec<TokenId>, TextError> {
        self.encode_with(text, false, Vec::new())
    }

    fn encode_with(
        &self,
        text: &str,
        parse_special: bool,
        mut out: Vec<TokenId>,
    ) -> Result<Vec<TokenId>, TextError> {
        if text.len() > MAX_TEXT_BYTES {
            return Err(TextError::TooLong { bytes: text.len(), max: MAX_TEXT_BYTES });
        }
        if text.is_empty() {
            return Ok(out);
        }
        shielded(|| {
            match &self.engine {
                Engine::Bpe(bpe) => {
                    bpe.encode(&self.added, text, parse_special, &mut out).map_err(|error| {
                        TextError::Encode { bytes: text.len(), reason: error.to_string() }
                    })?
                }
                Engine::SentencePiece { model, add_space } => {
                    self.encode_pieces(model, *add_space, text, parse_special, &mut out);
                }
            }
            Ok(out)
        })
    }

    fn encode_pieces(
        &self,
        model: &SentencePiece,
        add_space: bool,
        text: &str,
        parse_special: bool,
        out: &mut Vec<TokenId>,
    ) {
        let split = self.added.split(text, None, parse_special);
        let mut at_start = true;
        for (piece, _, tokens) in split.get_splits(OffsetReferential::Normalized, OffsetType::Byte)
        {
            if let Some(tokens) = tokens {
                out.extend(tokens.iter().map(|token| token.id));
                at_start = true;
                continue;
            }
            // SentencePiece does not tell U+2581 from a space; both are pieces with a space here.
            let mut piece = Cow::Borrowed(piece);
            if piece.contains('\u{2581}') {
                piece = Cow::Owned(piece.replace('\u{2581}', " "));
            }
            if add_space && at_start {
                piece.to_mut().insert(0, ' ');
            }
            model.encode(&self.pieces, &piece, out);
            at_start = false;
        }
    }

    /// The text of `ids`. Bytes that are no UTF-8 become U+FFFD, one for each maximal ill-formed
    /// sequence; ids outside the vocabulary stand for nothing; `skip_special` leaves special
    /// tokens out. Where encoding puts a space in front of a text, it is taken away again.
    pub fn decode(&self, ids: &[TokenId], skip_special: bool) -> String {
        let mut out = String::new();
        let mut stream = TextStream::new(self.leading_spaces);
        for &id in ids {
            if let Some(bytes) = self.shown(id, skip_special) {
                stream.push(bytes, &mut out);
            }
        }
        stream.finish(&mut out);
        out
    }

    /// The bytes of `id` in a text, or `None` if it is not in the vocabulary. A special token's
    /// are its own text.
    pub fn token_bytes(&self, id: TokenId) -> Option<Vec<u8>> {
        self.pieces.get(id).map(<[u8]>::to_vec)
    }

    /// The text of one token, for showing it: not UTF-8 becomes U+FFFD, an id outside the
    /// vocabulary is empty.
    pub fn token_text(&self, id: TokenId) -> String {
        String::from_utf8_lossy(self.pieces.get(id).unwrap_or_default()).into_owned()
    }

    /// The id of a token by its text: a special token as it is written (`<|im_end|>`), another as
    /// the vocabulary's file writes it (`Ġthe`, `▁the`).
    pub fn token_id(&self, token: &str) -> Option<TokenId> {
        self.added.id(token).or_else(|| match &self.engine {
            Engine::Bpe(bpe) => bpe.id(token),
            Engine::SentencePiece { model, .. } => model.id(&self.pieces, token),
        })
    }

    /// One more than the largest id. The model's logits may be longer (padding), not shorter.
    pub fn vocab_size(&self) -> usize {
        self.pieces.len()
    }

    /// The token that begins a text.
    pub fn bos(&self) -> Option<TokenId> {
        self.named.bos
    }

    /// The token that ends a text.
    pub fn eos(&self) -> Option<TokenId> {
        self.named.eos
    }

    /// The token for what cannot be written otherwise.
    pub fn unk(&self) -> Option<TokenId> {
        self.named.unk
    }

    /// The token that fills up a batch.
    pub fn pad(&self) -> Option<TokenId> {
        self.named.pad
    }

    /// Every token that is not text, in order of id.
    pub fn special_ids(&self) -> &[TokenId] {
        &self.special_ids
    }

    /// Whether `id` is not text but a mark.
    pub fn is_special(&self, id: TokenId) -> bool {
        self.pieces.is_special(id)
    }

    /// Tokens after which an answer is over, in order of id: end of text and end of turn, also
    /// those that are known by their text only.
    pub fn end_ids(&self) -> &[TokenId] {
        &self.end_ids
    }

    /// The tokens that `encode` puts before a text with `add_special`.
    pub fn prefix(&self) -> &[TokenId] {
        &self.prefix
    }

    pub(crate) fn leading_spaces(&self) -> usize {
        self.leading_spaces
    }

    /// What `id` adds to a decoded text.
    pub(crate) fn shown(&self, id: TokenId, skip_special: bool) -> Option<&[u8]> {
        self.pieces.get(id).filter(|_| !(skip_special && self.pieces.is_special(id)))
    }
}
