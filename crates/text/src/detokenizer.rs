//! Tokens to text while they come: only whole characters leave, and what has left never changes.

use std::sync::Arc;

use pomona_types::TokenId;

use crate::Tokenizer;

/// Turns a stream of tokens into text. The pieces, put together with [`Detokenizer::finish`], are
/// what [`Tokenizer::decode`] makes of all the tokens at once. Holds at most three bytes back.
#[derive(Clone, Debug)]
pub struct Detokenizer {
    tokenizer: Arc<Tokenizer>,
    skip_special: bool,
    text: TextStream,
}

impl Detokenizer {
    /// For tokens that are a text of their own: a leading space that the tokeniser would have
    /// added while encoding is taken away again, as `decode` does.
    pub fn new(tokenizer: Arc<Tokenizer>, skip_special: bool) -> Self {
        let strip = tokenizer.leading_spaces();
        Self { tokenizer, skip_special, text: TextStream::new(strip) }
    }

    /// For tokens that continue a prompt: a leading space belongs to the text and stays. This is
    /// the one to use for what a model generates.
    pub fn continuing(tokenizer: Arc<Tokenizer>, skip_special: bool) -> Self {
        Self { tokenizer, skip_special, text: TextStream::new(0) }
    }

    /// The whole characters that `id` completes; often its text, sometimes nothing. An id outside
    /// the vocabulary adds nothing, as in `decode`.
    pub fn push(&mut self, id: TokenId) -> String {
        let mut out = String::new();
        if let Some(bytes) = self.tokenizer.shown(id, self.skip_special) {
            self.text.push(bytes, &mut out);
        }
        out
    }

    /// The end: an unfinished character becomes U+FFFD.
    pub fn finish(&mut self) -> String {
        let mut out = String::new();
        self.text.finish(&mut out);
        out
    }
}

/// Bytes in any pieces to text: each maximal ill-formed sequence becomes one U+FFFD (Unicode 16,
/// section 3.9, "U+FFFD Substitution of Maximal Subparts"), as `String::from_utf8_lossy` does with
/// the whole.
#[derive(Clone, Debug)]
pub(crate) struct TextStream {
    /// The beginning of a character, not yet whole: at most three bytes.
    held: Vec<u8>,
    /// Spaces still to be taken from the front; 0 after the first other byte.
    strip: usize,
}

impl TextStream {
    pub(crate) fn new(strip: usize) -> Self {
        Self { held: Vec::new(), strip }
    }

    pub(crate) fn push(&mut self, bytes: &[u8], out: &mut String) {
        let bytes = self.stripped(bytes);
        if bytes.is_empty() {
            return;
        }
        let joined;
        let mut rest = if self.held.is_empty() {
            bytes
        } else {
            self.held.extend_from_slice(bytes);
            joined = std::mem::take(&mut self.held);
            &joined[..]
        };
        loop {
            match std::str::from_utf8(rest) {
                Ok(text) => {
                    out.push_str(text);
                    return;
                }
                Err(error) => {
                    let (good, bad) = rest.split_at(error.valid_up_to());
                    out.push_str(&String::from_utf8_lossy(good));
                    match error.error_len() {
                        Some(length) => {
                            out.push(char::REPLACEMENT_CHARACTER);
                            rest = &bad[length..];
                        }
                        None => {
                            self.held = bad.to_vec();
                            return;
                        }
                    }
                }
            }
        }
    }

    pub(crate) fn finish(&mut self, out: &mut String) {
        if !self.held.is_empty() {
            self.held.clear();
            out.push(char::REPLACEMENT_CHARACTER);
        }
        self.strip = 0;
    }

    fn stripped<'a>(&mut self, mut bytes: &'a [u8]) -> &'a [u8] {
        while self.strip > 0 {
            match bytes.split_first() {
                Some((b' ', rest)) => {
                    bytes = rest;
                    self.strip -= 1;
                }
                Some(_) => self.strip = 0,
                None => break,
            }
        }
        bytes
    }
}
