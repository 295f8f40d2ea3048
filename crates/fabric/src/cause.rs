//! Why a group ended, as bytes: what an abort word points to, and what a control frame carries.

use pomona_types::{GroupError, LostCause};

/// A cause has at most so many bytes; longer words are cut.
pub const CAUSE_BYTES: usize = 768;
/// The longest word in a cause, of which there are at most two.
const WORD_BYTES: usize = 300;

/// The bytes of a cause.
pub fn encode(why: &GroupError) -> Vec<u8> {
    let mut out = Vec::new();
    match why {
        GroupError::PeerLost { rank, epoch, cause } => {
            out.push(0);
            number(&mut out, *rank as u64);
            number(&mut out, u64::from(*epoch));
            encode_lost(&mut out, cause);
        }
        GroupError::Mismatch { rank, theirs, ours } => {
            out.push(1);
            number(&mut out, *rank as u64);
            word(&mut out, theirs);
            word(&mut out, ours);
        }
        GroupError::Ended(why) => {
            out.push(2);
            word(&mut out, why);
        }
        GroupError::Invalid(why) => {
            out.push(3);
            word(&mut out, why);
        }
    }
    out
}

fn encode_lost(out: &mut Vec<u8>, cause: &LostCause) {
    match cause {
        LostCause::Exited => out.push(0),
        LostCause::Silent(after_ms) => {
            out.push(1);
            number(out, u64::from(*after_ms));
        }
        LostCause::Disconnected(why) => {
            out.push(2);
            word(out, why);
        }
        LostCause::Late { call, after_ms } => {
            out.push(3);
            word(out, call);
            number(out, u64::from(*after_ms));
        }
        LostCause::Failed(why) => {
            out.push(4);
            word(out, why);
        }
    }
}

fn number(out: &mut Vec<u8>, value: u64) {
    out.extend_from_slice(&value.to_le_bytes());
}

fn word(out: &mut Vec<u8>, text: &str) {
    let text = &text[..text.floor_char_boundary(WORD_BYTES)];
    number(out, text.len() as u64);
    out.extend_from_slice(text.as_bytes());
}

/// The cause that these bytes are, if they are one.
pub fn decode(bytes: &[u8]) -> Option<GroupError> {
    let mut bytes = Bytes(bytes);
    let why = match bytes.byte()? {
        0 => GroupError::PeerLost {
            rank: usize::try_from(bytes.number()?).ok()?,
            epoch: u32::try_from(bytes.number()?).ok()?,
            cause: bytes.lost()?,
        },
        1 => GroupError::Mismatch {
            rank: usize::try_from(bytes.number()?).ok()?,
            theirs: bytes.word()?,
            ours: bytes.word()?,
        },
        2 => GroupError::Ended(bytes.word()?),
        3 => GroupError::Invalid(bytes.word()?),
        _ => return None,
    };
    bytes.0.is_empty().then_some(why)
}

/// What is left to read.
struct Bytes<'a>(&'a [u8]);

impl Bytes<'_> {
    fn byte(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    fn number(&mut self) -> Option<u64> {
        let (first, rest) = self.0.split_first_chunk::<8>()?;
        self.0 = rest;
        Some(u64::from_le_bytes(*first))
    }

    fn word(&mut self) -> Option<String> {
        let length = usize::try_from(self.number()?).ok()?;
        let (first, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        String::from_utf8(first.to_vec()).ok()
    }

    fn lost(&mut self) -> Option<LostCause> {
        Some(match self.byte()? {
            0 => LostCause::Exited,
            1 => LostCause::Silent(u32::try_from(self.number()?).ok()?),
            2 => LostCause::Disconnected(self.word()?),
            3 => LostCause::Late {
                call: self.word()?,
                after_ms: u32::try_from(self.number()?).ok()?,
            },
            4 => LostCause::Failed(self.word()?),
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn causes() -> Vec<GroupError> {
        let lost = |cause| GroupError::PeerLost { rank: 3, epoch: 7, cause };
        vec![
            lost(LostCause::Exited),
            lost(LostCause::Silent(500)),
            lost(LostCause::Disconnected("reset".into())),
            lost(LostCause::Late { call: "a barrier".into(), after_ms: 9 }),
            lost(LostCause::Failed("no memory".into())),
            GroupError::Mismatch { rank: 1, theirs: "a".into(), ours: "b".into() },
            GroupError::Ended("shutdown".into()),
            GroupError::Invalid("3 numbers".into()),
        ]
    }

    #[test]
    fn a_cause_survives_the_wire() {
        for why in causes() {
            assert_eq!(decode(&encode(&why)), Some(why));
        }
    }

    #[test]
    fn a_damaged_cause_is_none_at_all() {
        for why in causes() {
            let whole = encode(&why);
            for length in 0..whole.len() {
                assert_eq!(decode(&whole[..length]), None);
            }
            assert_eq!(decode(&[&whole[..], &[0]].concat()), None);
        }
        assert_eq!(decode(&[9]), None);
    }

    #[test]
    fn long_words_are_cut_and_the_cause_fits() {
        let long = "ä".repeat(1000);
        let why = GroupError::Mismatch { rank: 1, theirs: long.clone(), ours: long };
        let bytes = encode(&why);
        assert!(bytes.len() <= CAUSE_BYTES);
        assert!(matches!(decode(&bytes), Some(GroupError::Mismatch { rank: 1, .. })));
    }
}
