//! Sealed records: a stream of bytes, cut up, each piece encrypted and numbered.
//!
//! A record is its length (4 bytes, little-endian, authenticated), the ciphertext, and a tag of 16
//! bytes. AES-256-GCM with the record's number as its nonce (NIST SP 800-38D, 8.2.1): one that is
//! repeated, left out, out of order, changed, or from another connection does not open. After one
//! that does not, nothing opens any more.

use ring::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};

/// Most bytes of content in a record: large enough that system calls do not count, small enough
/// that it stays in the cache between encryption and the copy into the kernel.
pub const RECORD_BYTES_MAX: usize = 64 << 10;
/// What a record has beside its content.
pub const RECORD_EXTRA_BYTES: usize = LENGTH + TAG;

pub(crate) const LENGTH: usize = 4;
pub(crate) const TAG: usize = 16;

/// Why a record was not opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// Its length is none that a sender makes.
    #[error("a record claims {0} bytes, {RECORD_BYTES_MAX} are allowed")]
    Length(usize),
    /// Changed, repeated, left out, out of order, or of another epoch.
    #[error("record {0} is not what was sent: changed, repeated, reordered, or of another epoch")]
    Untrue(u64),
}

/// Makes records.
pub struct Sealer {
    key: LessSafeKey,
    number: u64,
}

/// Opens them.
pub struct Opener {
    key: LessSafeKey,
    number: u64,
    broken: Option<RecordError>,
}

fn key(bytes: &[u8; 32]) -> LessSafeKey {
    LessSafeKey::new(UnboundKey::new(&AES_256_GCM, bytes).expect("the key has 32 bytes"))
}

fn nonce(number: u64) -> Nonce {
    let mut bytes = [0; 12];
    bytes[4..].copy_from_slice(&number.to_be_bytes());
    Nonce::assume_unique_for_key(bytes)
}

impl Sealer {
    /// For one direction of one connection.
    pub fn new(bytes: &[u8; 32]) -> Sealer {
        Sealer { key: key(bytes), number: 0 }
    }

    /// Seals a record in place: `record` has room for the length, the content in its middle, and
    /// room for the tag.
    pub fn seal(&mut self, record: &mut [u8]) {
        let content = record.len() - RECORD_EXTRA_BYTES;
        assert!(content <= RECORD_BYTES_MAX, "the caller cuts at RECORD_BYTES_MAX");
        let (length, rest) = record.split_at_mut(LENGTH);
        length.copy_from_slice(&(content as u32).to_le_bytes());
        let (content, tag) = rest.split_at_mut(content);
        let made = self
            .key
            .seal_in_place_separate_tag(nonce(self.number), Aad::from(&*length), content)
            .expect("a record is far below the limit of AES-GCM");
        tag.copy_from_slice(made.as_ref());
        // Never comes round: at a record per nanosecond it would take centuries.
        self.number += 1;
    }
}

impl Opener {
    /// For one direction of one connection.
    pub fn new(bytes: &[u8; 32]) -> Opener {
        Opener { key: key(bytes), number: 0, broken: None }
    }

    /// How long the record is that begins with these bytes, when they are enough to tell.
    pub fn length(begin: &[u8]) -> Result<Option<usize>, RecordError> {
        let Some(length) = begin.first_chunk::<LENGTH>() else { return Ok(None) };
        let content = u32::from_le_bytes(*length) as usize;
        if content > RECORD_BYTES_MAX {
            return Err(RecordError::Length(content));
        }
        Ok(Some(content + RECORD_EXTRA_BYTES))
    }

    /// Opens a whole record in place and returns its content.
    pub fn open<'a>(&mut self, record: &'a mut [u8]) -> Result<&'a [u8], RecordError> {
        if let Some(broken) = self.broken {
            return Err(broken);
        }
        let untrue = RecordError::Untrue(self.number);
        let Some((length, rest)) = record.split_first_chunk_mut::<LENGTH>() else {
            return Err(*self.broken.insert(untrue));
        };
        let aad = Aad::from(&*length);
        match self.key.open_in_place(nonce(self.number), aad, rest) {
            Ok(content) => {
                self.number += 1;
                Ok(content)
            }
            Err(_) => Err(*self.broken.insert(untrue)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(sealer: &mut Sealer, content: &[u8]) -> Vec<u8> {
        let mut record = [&[0; LENGTH], content, &[0; TAG]].concat();
        sealer.seal(&mut record);
        record
    }

    #[test]
    fn records_open_in_their_order() {
        let (mut sealer, mut opener) = (Sealer::new(&[7; 32]), Opener::new(&[7; 32]));
        for length in [0, 1, 1000, RECORD_BYTES_MAX] {
            let content: Vec<u8> = (0..length).map(|i| i as u8).collect();
            let mut record = record(&mut sealer, &content);
            assert_eq!(Opener::length(&record), Ok(Some(record.len())));
            assert_eq!(opener.open(&mut record), Ok(content.as_slice()));
        }
    }

    /// The first two records of a stream pass through `change`; what does the opener say to each?
    fn opened(change: impl FnOnce([Vec<u8>; 2]) -> Vec<Vec<u8>>) -> Vec<bool> {
        let (mut sealer, mut opener) = (Sealer::new(&[7; 32]), Opener::new(&[7; 32]));
        let records = [record(&mut sealer, b"first"), record(&mut sealer, b"second")];
        change(records).iter_mut().map(|record| opener.open(record).is_ok()).collect()
    }

    #[test]
    fn replayed_reordered_and_missing_records_do_not_open() {
        assert_eq!(opened(|[a, b]| vec![a, b]), [true, true]);
        assert_eq!(opened(|[a, b]| vec![a.clone(), a, b]), [true, false, false]);
        assert_eq!(opened(|[a, b]| vec![b, a]), [false, false]);
        assert_eq!(opened(|[_, b]| vec![b]), [false]);
    }

    #[test]
    fn each_changed_bit_is_noticed() {
        let bytes = RECORD_EXTRA_BYTES + b"first".len();
        for bit in 0..8 * bytes {
            let changed = opened(|[mut a, b]| {
                a[bit / 8] ^= 1 << (bit % 8);
                vec![a, b]
            });
            assert_eq!(changed, [false, false], "bit {bit}");
        }
    }

    #[test]
    fn a_record_of_another_key_does_not_open() {
        let mut record = record(&mut Sealer::new(&[8; 32]), b"stale");
        assert!(Opener::new(&[7; 32]).open(&mut record).is_err());
    }

    #[test]
    fn lengths_are_bounded_before_anything_is_kept() {
        assert_eq!(Opener::length(&[1, 2, 3]), Ok(None));
        assert_eq!(Opener::length(&[255; 8]), Err(RecordError::Length(u32::MAX as usize)));
    }
}
