//! The vocabulary as bytes: what each token adds to a text, in one arena, and back from bytes to
//! ids.

use pomona_types::TokenId;

use crate::TextError;

/// Ids a vocabulary may have. The largest in use have some 260,000.
pub(crate) const MAX_VOCAB: usize = 1 << 22;
/// Bytes that all tokens together may have.
const MAX_VOCAB_BYTES: usize = 1 << 28;

/// The bytes of every token, by id. Ids may have holes.
#[derive(Clone, Debug, Default)]
pub(crate) struct Pieces {
    bytes: Vec<u8>,
    entries: Vec<Entry>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Entry {
    start: u32,
    length: u32,
    present: bool,
    special: bool,
}

impl Pieces {
    /// Sets what `id` stands for; the first one to set it wins.
    pub(crate) fn set(
        &mut self,
        id: TokenId,
        bytes: &[u8],
        special: bool,
    ) -> Result<(), TextError> {
        let at = id as usize;
        if at >= MAX_VOCAB || self.bytes.len() + bytes.len() > MAX_VOCAB_BYTES {
            return Err(TextError::Tokenizer(format!(
                "token id {id} makes the vocabulary larger than {MAX_VOCAB} ids or \
                 {MAX_VOCAB_BYTES} bytes"
            )));
        }
        if at >= self.entries.len() {
            self.entries.resize(at + 1, Entry::default());
        }
        if !self.entries[at].present {
            let (start, length) = (self.bytes.len() as u32, bytes.len() as u32);
            self.bytes.extend_from_slice(bytes);
            self.entries[at] = Entry { start, length, present: true, special };
        }
        Ok(())
    }

    pub(crate) fn get(&self, id: TokenId) -> Option<&[u8]> {
        let entry = self.entries.get(id as usize).filter(|entry| entry.present)?;
        Some(&self.bytes[entry.start as usize..][..entry.length as usize])
    }

    pub(crate) fn is_special(&self, id: TokenId) -> bool {
        self.entries.get(id as usize).is_some_and(|entry| entry.special)
    }

    /// One more than the largest id.
    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    pub(crate) fn special_ids(&self) -> Vec<TokenId> {
        (0..self.entries.len() as TokenId).filter(|&id| self.is_special(id)).collect()
    }

    pub(crate) fn shrink(&mut self) {
        self.bytes.shrink_to_fit();
        self.entries.shrink_to_fit();
    }
}

/// From bytes to the id that stands for them: open addressing over ids, so that the bytes are
/// stored once, in [`Pieces`].
#[derive(Clone, Debug)]
pub(crate) struct PieceIndex {
    /// Id + 1, or 0 for an empty place. A power of two long, at most half full.
    table: Vec<u32>,
}

/// Places that may be looked at for one entry. A fair vocabulary stays below 30; one that goes
/// further was made to.
const MAX_PROBES: usize = 512;

impl PieceIndex {
    /// Room for `count` ids.
    pub(crate) fn with_room_for(count: usize) -> Self {
        Self { table: vec![0; (count * 2).next_power_of_two().max(16)] }
    }

    /// Adds an id unless another one has the same bytes: then that one is returned.
    pub(crate) fn insert(
        &mut self,
        pieces: &Pieces,
        id: TokenId,
    ) -> Result<Option<TokenId>, TextError> {
        let bytes = pieces.get(id).unwrap_or_default();
        for place in self.places(bytes) {
            match self.table[place] {
                0 => {
                    self.table[place] = id + 1;
                    return Ok(None);
                }
                other if pieces.get(other - 1) == Some(bytes) => return Ok(Some(other - 1)),
                _ => {}
            }
        }
        Err(TextError::Tokenizer("its tokens were chosen to collide; the file is hostile".into()))
    }

    pub(crate) fn find(&self, pieces: &Pieces, bytes: &[u8]) -> Option<TokenId> {
        for place in self.places(bytes) {
            match self.table[place] {
                0 => return None,
                other if pieces.get(other - 1) == Some(bytes) => return Some(other - 1),
                _ => {}
            }
        }
        None
    }

    fn places(&self, bytes: &[u8]) -> impl Iterator<Item = usize> + use<> {
        let mask = self.table.len() - 1;
        let start = hash(bytes) as usize;
        (0..MAX_PROBES.min(mask + 1)).map(move |step| start.wrapping_add(step) & mask)
    }
}

/// Eight bytes at a time, multiplied and folded; the constants are digits of pi.
fn hash(bytes: &[u8]) -> u64 {
    const SEED: u64 = 0x243f_6a88_85a3_08d3;
    const FACTOR: u64 = 0xa409_3822_299f_31d1;
    let mut state = SEED ^ bytes.len() as u64;
    for chunk in bytes.chunks(8) {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        let product = u128::from(state ^ u64::from_le_bytes(word)) * u128::from(FACTOR);
        state = (product as u64) ^ (product >> 64) as u64;
    }
    state
}
