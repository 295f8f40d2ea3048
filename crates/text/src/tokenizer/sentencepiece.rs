//! SentencePiece's BPE: characters are joined, best score first, as long as the joined piece is in
//! the vocabulary; what is left over is spelt in bytes. (Kudo and Richardson, "SentencePiece: A
//! simple and language independent subword tokenizer", 2018.)
//!
//! Pieces are kept with the space that a text has, not with U+2581 that the vocabulary writes.

use std::cmp::Ordering;
use std::collections::BinaryHeap;

use pomona_types::TokenId;

use super::json_parts::byte_token;
use super::pieces::{PieceIndex, Pieces};
use crate::TextError;

/// The scores and the byte tokens of a SentencePiece vocabulary.
#[derive(Clone, Debug)]
pub(crate) struct SentencePiece {
    index: PieceIndex,
    scores: Vec<f32>,
    /// The token of each byte value, if the vocabulary has all of them.
    bytes: Option<Box<[TokenId; 256]>>,
    unk: Option<TokenId>,
    longest: usize,
}

/// A run of characters that is one token so far; `length == 0` once it is part of its left
/// neighbour.
#[derive(Clone, Copy)]
struct Symbol {
    start: u32,
    length: u32,
    previous: u32,
    next: u32,
}

const NONE: u32 = u32::MAX;

/// Two neighbours that may be joined. Valid only while both are as long as they were.
#[derive(Clone, Copy, PartialEq)]
struct Candidate {
    score: f32,
    left: u32,
    right: u32,
    length: u32,
}

impl Eq for Candidate {}

impl Ord for Candidate {
    /// The highest score first, then the leftmost.
    fn cmp(&self, other: &Self) -> Ordering {
        self.score.total_cmp(&other.score).then(other.left.cmp(&self.left))
    }
}

impl PartialOrd for Candidate {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl SentencePiece {
    /// `mergeable` says which ids a text may be joined into (not control tokens, not byte tokens).
    pub(crate) fn new(
        pieces: &Pieces,
        mergeable: impl Fn(TokenId) -> bool,
        scores: Vec<f32>,
        bytes: Option<Box<[TokenId; 256]>>,
        unk: Option<TokenId>,
    ) -> Result<Self, TextError> {
        if bytes.is_none() && unk.is_none() {
            return Err(TextError::Tokenizer(
                "it has neither the 256 byte tokens nor an unknown token, so that some text could \
                 not be written; set tokenizer.ggml.unknown_token_id"
                    .into(),
            ));
        }
        if let Some(at) = scores.iter().position(|score| score.is_nan()) {
            return Err(TextError::Tokenizer(format!("the score of token {at} is not a number")));
        }
        let ids = (0..pieces.len() as TokenId).filter(|&id| mergeable(id));
        let mut index = PieceIndex::with_room_for(pieces.len());
        let mut longest = 0;
        for id in ids {
            let length = pieces.get(id).map_or(0, <[u8]>::len);
            if length > 0 && index.insert(pieces, id)?.is_none() {
                longest = longest.max(length);
            }
        }
        // Adding 0.0 makes one zero of two, so that they tie.
        let scores = scores.into_iter().map(|score| score + 0.0).collect();
        Ok(Self { index, scores, bytes, unk, longest })
    }

    /// The id of a token as the vocabulary writes it.
    pub(crate) fn id(&self, pieces: &Pieces, token: &str) -> Option<TokenId> {
        let byte = byte_token(token).and_then(|byte| Some(self.bytes.as_ref()?[byte as usize]));
        byte.or_else(|| self.index.find(pieces, token.replace('\u{2581}', " ").as_bytes()))
    }

    /// Appends the tokens of `text` to `out`. O(n log n) in its length.
    pub(crate) fn encode(&self, pieces: &Pieces, text: &str, out: &mut Vec<TokenId>) {
        let bytes = text.as_bytes();
        let mut symbols: Vec<Symbol> = text
            .char_indices()
            .enumerate()
            .map(|(at, (start, letter))| Symbol {
                start: start as u32,
                length: letter.len_utf8() as u32,
                previous: (at as u32).wrapping_sub(1),
                next: at as u32 + 1,
            })
            .collect();
        let Some(last) = symbols.last_mut() else { return };
        last.next = NONE;
        self.merge(pieces, bytes, &mut symbols);
        let mut at = 0;
        while at != NONE {
            let symbol = symbols[at as usize];
            self.emit(pieces, &bytes[symbol.start as usize..][..symbol.length as usize], out);
            at = symbol.next;
        }
    }

    fn merge(&self, pieces: &Pieces, bytes: &[u8], symbols: &mut [Symbol]) {
        let mut heap = BinaryHeap::with_capacity(symbols.len());
        for left in 0..symbols.len() as u32 {
            heap.extend(self.candidate(pieces, bytes, symbols, left));
        }
        while let Some(best) = heap.pop() {
            let left = symbols[best.left as usize];
            if left.length == 0 || left.next != best.right {
                continue;
            }
            let right = symbols[best.right as usize];
            if left.length + right.length != best.length {
                continue;
            }
            symbols[best.right as usize].length = 0;
            symbols[best.left as usize].length = best.length;
            symbols[best.left as usize].next = right.next;
            if right.next != NONE {
                symbols[right.next as usize].previous = best.left;
            }
            if left.previous != NONE {
                heap.extend(self.candidate(pieces, bytes, symbols, left.previous));
            }
            heap.extend(self.candidate(pieces, bytes, symbols, best.left));
        }
    }

    /// The joining of a symbol with its right neighbour, if that is a piece.
    fn candidate(
        &self,
        pieces: &Pieces,
        bytes: &[u8],
        symbols: &[Symbol],
        left: u32,
    ) -> Option<Candidate> {
        let symbol = symbols[left as usize];
        let next = symbols.get(symbol.next as usize)?;
        let length = symbol.length + next.length;
        if length as usize > self.longest {
            return None;
        }
        let joined = &bytes[symbol.start as usize..][..length as usize];
        let id = self.index.find(pieces, joined)?;
        let score = self.scores.get(id as usize).copied().unwrap_or(0.0);
        Some(Candidate { score, left, right: symbol.next, length })
    }

    fn emit(&self, pieces: &Pieces, piece: &[u8], out: &mut Vec<TokenId>) {
        if let Some(id) = self.index.find(pieces, piece) {
            out.push(id);
        } else if let Some(table) = &self.bytes {
            out.extend(piece.iter().map(|&byte| table[byte as usize]));
        } else {
            out.extend(self.unk);
        }
    }
}
