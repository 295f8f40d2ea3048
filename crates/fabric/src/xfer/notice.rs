//! What one rank tells another beside its bytes.

use super::Handle;

/// A notice fills a cache line.
pub(super) const NOTICE_BYTES: usize = 64;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Kind {
    /// Bytes were put; the value is the number behind them.
    Put = 1,
    /// Bytes are wanted; the value is how many.
    Get,
    /// An answer is wanted when all before this is done.
    Fence,
    /// That answer.
    Fenced,
    /// A region is closed.
    Close,
    /// Nothing more goes to that region from here.
    Closed,
}

const KINDS: [Kind; 6] =
    [Kind::Put, Kind::Get, Kind::Fence, Kind::Fenced, Kind::Close, Kind::Closed];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Notice {
    pub kind: Kind,
    pub region: Handle,
    pub offset: u64,
    pub value: u64,
}

impl Notice {
    pub fn encode(&self) -> [u8; NOTICE_BYTES] {
        let mut bytes = [0; NOTICE_BYTES];
        bytes[..8].copy_from_slice(&(self.kind as u64).to_le_bytes());
        bytes[8..8 + Handle::BYTES].copy_from_slice(&self.region.encode());
        bytes[48..56].copy_from_slice(&self.offset.to_le_bytes());
        bytes[56..].copy_from_slice(&self.value.to_le_bytes());
        bytes
    }

    pub fn decode(bytes: &[u8; NOTICE_BYTES]) -> Option<Notice> {
        let long = |at: usize| bytes[at..].first_chunk().map(|long| u64::from_le_bytes(*long));
        let kind = long(0)?;
        Some(Notice {
            kind: KINDS.into_iter().find(|known| *known as u64 == kind)?,
            region: Handle::decode(bytes[8..].first_chunk()?),
            offset: long(48)?,
            value: long(56)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_notice_survives_the_wire() {
        let region = Handle { rank: 3, epoch: 9, generation: 1 << 40, at: 128, bytes: 77 };
        for kind in KINDS {
            let notice = Notice { kind, region, offset: 5, value: u64::MAX };
            assert_eq!(Notice::decode(&notice.encode()), Some(notice));
        }
        assert_eq!(Notice::decode(&[0; NOTICE_BYTES]), None);
        assert_eq!(Notice::decode(&[0xff; NOTICE_BYTES]), None);
    }
}
