//! What coordinator and members say to each other, as bytes.

use pomona_types::GroupError;

use crate::cause;

/// A frame has at most so many bytes; longer ones are not read.
pub const FRAME_BYTES_MAX: usize = 64 << 10;

/// One thing that is said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    /// A member's first word: what has to be equal on all, as versions and weights are.
    Hello {
        /// That, in words.
        identity: String,
    },
    /// A member is done with an epoch (0: there was none yet) and waits for the next.
    Ready {
        /// That epoch.
        after: u32,
        /// Why it ended, if the member knows.
        why: Option<GroupError>,
    },
    /// A sign of life, from either side.
    Alive,
    /// The coordinator begins an epoch.
    Begin {
        /// Its number.
        epoch: u32,
        /// The member's rank in it.
        rank: usize,
        /// How many ranks it has.
        ranks: usize,
        /// What else the transport needs to connect the ranks.
        connect: Vec<u8>,
    },
    /// The coordinator ends an epoch.
    End {
        /// Its number.
        epoch: u32,
        /// The cause that all ranks return.
        why: GroupError,
    },
    /// A member's link has a cause to end the epoch; the coordinator decides which counts.
    Report {
        /// Its number.
        epoch: u32,
        /// The cause.
        why: GroupError,
    },
    /// The coordinator is done with this member: there will be no other epoch.
    Over {
        /// Why.
        why: GroupError,
    },
}

impl Frame {
    /// The bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        match self {
            Frame::Hello { identity } => {
                out.push(0);
                out.extend_from_slice(identity.as_bytes());
            }
            Frame::Ready { after, why } => {
                out.push(1);
                out.extend_from_slice(&after.to_le_bytes());
                out.extend(why.iter().flat_map(cause::encode));
            }
            Frame::Alive => out.push(2),
            Frame::Begin { epoch, rank, ranks, connect } => {
                out.push(3);
                for number in [*epoch, *rank as u32, *ranks as u32] {
                    out.extend_from_slice(&number.to_le_bytes());
                }
                out.extend_from_slice(connect);
            }
            Frame::End { epoch, why } => {
                out.push(4);
                out.extend_from_slice(&epoch.to_le_bytes());
                out.extend(cause::encode(why));
            }
            Frame::Report { epoch, why } => {
                out.push(6);
                out.extend_from_slice(&epoch.to_le_bytes());
                out.extend(cause::encode(why));
            }
            Frame::Over { why } => {
                out.push(5);
                out.extend(cause::encode(why));
            }
        }
        out
    }

    /// What these bytes say, if they say something.
    pub fn decode(bytes: &[u8]) -> Option<Frame> {
        let (kind, rest) = bytes.split_first()?;
        let number = |bytes: &mut &[u8]| {
            let (first, rest) = bytes.split_first_chunk::<4>()?;
            *bytes = rest;
            Some(u32::from_le_bytes(*first))
        };
        let mut rest = rest;
        Some(match kind {
            0 => Frame::Hello { identity: String::from_utf8(rest.to_vec()).ok()? },
            1 => {
                let after = number(&mut rest)?;
                let why = match rest {
                    [] => None,
                    bytes => Some(cause::decode(bytes)?),
                };
                Frame::Ready { after, why }
            }
            2 if rest.is_empty() => Frame::Alive,
            3 => {
                let epoch = number(&mut rest)?;
                let (rank, ranks) = (number(&mut rest)? as usize, number(&mut rest)? as usize);
                (rank < ranks).then_some(())?;
                Frame::Begin { epoch, rank, ranks, connect: rest.to_vec() }
            }
            4 => {
                let epoch = number(&mut rest)?;
                Frame::End { epoch, why: cause::decode(rest)? }
            }
            6 => {
                let epoch = number(&mut rest)?;
                Frame::Report { epoch, why: cause::decode(rest)? }
            }
            5 => Frame::Over { why: cause::decode(rest)? },
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_survive_the_wire_and_damage_is_no_frame() {
        let why = GroupError::Ended("for a test".into());
        let frames = [
            Frame::Hello { identity: "pomona 0.1".into() },
            Frame::Ready { after: 3, why: None },
            Frame::Ready { after: 3, why: Some(why.clone()) },
            Frame::Alive,
            Frame::Begin { epoch: 2, rank: 1, ranks: 4, connect: vec![1, 2, 3] },
            Frame::End { epoch: 2, why: why.clone() },
            Frame::Report { epoch: 2, why: why.clone() },
            Frame::Over { why },
        ];
        for frame in frames {
            let bytes = frame.encode();
            assert_eq!(Frame::decode(&bytes), Some(frame.clone()));
            for length in 0..bytes.len() {
                assert_ne!(Frame::decode(&bytes[..length]), Some(frame.clone()));
            }
        }
        for bytes in [&[][..], &[9], &[2, 0], &[0, 0xff], &[3, 1, 0, 0, 0, 2, 0, 0, 0, 2, 0, 0, 0]]
        {
            assert_eq!(Frame::decode(bytes), None);
        }
    }
}
