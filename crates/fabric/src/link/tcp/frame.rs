//! Frames of a data connection: a header, and the bytes of one put.
//!
//! Owns the only place where a peer's numbers are believed: what the parser lets through is of this
//! epoch and this peer, and inside of the arena. Pure but for the memory that it fills.

use std::sync::atomic::{AtomicU32, Ordering};

use crate::link::COUNTERS;
use crate::link::memory::Memory;

/// Bytes of a header.
pub(crate) const HEADER_BYTES: usize = 24;

/// What stands before the bytes of a put.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) epoch: u32,
    pub(crate) from: u16,
    pub(crate) counter: u16,
    pub(crate) offset: u64,
    pub(crate) bytes: u64,
}

impl Header {
    pub(crate) fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut all = [0; HEADER_BYTES];
        all[..4].copy_from_slice(&self.epoch.to_le_bytes());
        all[4..6].copy_from_slice(&self.from.to_le_bytes());
        all[6..8].copy_from_slice(&self.counter.to_le_bytes());
        all[8..16].copy_from_slice(&self.offset.to_le_bytes());
        all[16..].copy_from_slice(&self.bytes.to_le_bytes());
        all
    }

    fn decode(all: &[u8; HEADER_BYTES]) -> Header {
        let eight = |at: usize| {
            u64::from_le_bytes(all[at..at + 8].try_into().expect("eight bytes were cut out"))
        };
        Header {
            epoch: u32::from_le_bytes([all[0], all[1], all[2], all[3]]),
            from: u16::from_le_bytes([all[4], all[5]]),
            counter: u16::from_le_bytes([all[6], all[7]]),
            offset: eight(8),
            bytes: eight(16),
        }
    }
}

/// A frame that no rank of this epoch sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum FrameError {
    #[error("a frame of epoch {theirs} in epoch {ours}")]
    Epoch { theirs: u32, ours: u32 },
    #[error("a frame of rank {theirs} on the connection to rank {ours}")]
    Rank { theirs: u16, ours: u16 },
    #[error("a frame for counter {0}, there are {COUNTERS}")]
    Counter(u16),
    #[error("a frame of {bytes} bytes at {offset}, beyond the arena of {arena}")]
    Outside { offset: u64, bytes: u64, arena: usize },
}

/// What a connection delivers to.
pub(crate) struct Inbox<'a> {
    pub(crate) memory: &'a Memory,
    pub(crate) counts: &'a [AtomicU32; COUNTERS],
}

/// The frame that is being received.
#[derive(Clone, Copy)]
struct Open {
    offset: usize,
    left: usize,
    counter: usize,
}

/// Takes a connection's bytes as they come, in pieces of any size.
pub(crate) struct Parser {
    epoch: u32,
    peer: u16,
    header: [u8; HEADER_BYTES],
    have: usize,
    open: Option<Open>,
}

impl Parser {
    pub(crate) fn new(epoch: u32, peer: u16) -> Parser {
        Parser { epoch, peer, header: [0; HEADER_BYTES], have: 0, open: None }
    }

    /// Where in the arena the next bytes go, and how many, when they belong to a put: a caller may
    /// place them there itself and say so with [`placed`](Parser::placed).
    pub(crate) fn wants(&self) -> Option<(usize, usize)> {
        self.open.map(|open| (open.offset, open.left))
    }

    /// The next so many bytes are where [`wants`](Parser::wants) said. True if a put is complete.
    pub(crate) fn placed(&mut self, bytes: usize, inbox: &Inbox<'_>) -> bool {
        let Some(open) = &mut self.open else { return false };
        open.offset += bytes;
        open.left -= bytes;
        if open.left > 0 {
            return false;
        }
        // Release: whoever sees the count sees the bytes.
        inbox.counts[open.counter].fetch_add(1, Ordering::Release);
        self.open = None;
        true
    }

    /// Takes these bytes. True if a put was completed.
    pub(crate) fn feed(&mut self, mut bytes: &[u8], inbox: &Inbox<'_>) -> Result<bool, FrameError> {
        let mut complete = false;
        while !bytes.is_empty() {
            if let Some((offset, left)) = self.wants() {
                let (now, later) = bytes.split_at(left.min(bytes.len()));
                inbox.memory.write(offset, now);
                complete |= self.placed(now.len(), inbox);
                bytes = later;
                continue;
            }
            let (now, later) = bytes.split_at(bytes.len().min(HEADER_BYTES - self.have));
            self.header[self.have..self.have + now.len()].copy_from_slice(now);
            self.have += now.len();
            bytes = later;
            if self.have == HEADER_BYTES {
                self.have = 0;
                self.open = Some(self.check(Header::decode(&self.header), inbox.memory.len())?);
                // Completes a put of no bytes.
                complete |=
                    self.wants().is_some_and(|(_, left)| left == 0) && self.placed(0, inbox);
            }
        }
        Ok(complete)
    }

    fn check(&self, header: Header, arena: usize) -> Result<Open, FrameError> {
        let Header { epoch, from, counter, offset, bytes } = header;
        if epoch != self.epoch {
            return Err(FrameError::Epoch { theirs: epoch, ours: self.epoch });
        }
        if from != self.peer {
            return Err(FrameError::Rank { theirs: from, ours: self.peer });
        }
        if usize::from(counter) >= COUNTERS {
            return Err(FrameError::Counter(counter));
        }
        if offset.checked_add(bytes).is_none_or(|end| end > arena as u64) {
            return Err(FrameError::Outside { offset, bytes, arena });
        }
        Ok(Open { offset: offset as usize, left: bytes as usize, counter: counter.into() })
    }
}

/// Feeds bytes of a stranger to a parser, cut where they themselves say: for tests with hostile
/// bytes, which only ask that it returns.
pub fn parse_hostile_frames(bytes: &[u8]) {
    let memory = Memory::new(1 << 16);
    let counts = std::array::from_fn(|_| AtomicU32::new(0));
    let inbox = Inbox { memory: &memory, counts: &counts };
    let mut parser = Parser::new(1, 1);
    let (cuts, mut rest) = bytes.split_at(bytes.len().min(8));
    for cut in cuts.iter().cycle().take(bytes.len()) {
        let (now, later) = rest.split_at(rest.len().min(usize::from(*cut).max(1)));
        rest = later;
        if parser.feed(now, &inbox).is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ARENA: usize = 100;
    const GOOD: Header = Header { epoch: 3, from: 1, counter: 5, offset: 10, bytes: 4 };

    struct End {
        memory: Memory,
        counts: [AtomicU32; COUNTERS],
        parser: Parser,
    }

    fn end() -> End {
        let counts = std::array::from_fn(|_| AtomicU32::new(0));
        End { memory: Memory::new(ARENA), counts, parser: Parser::new(3, 1) }
    }

    impl End {
        fn feed(&mut self, bytes: &[u8]) -> Result<bool, FrameError> {
            self.parser.feed(bytes, &Inbox { memory: &self.memory, counts: &self.counts })
        }

        fn bytes(&self, offset: usize, bytes: usize) -> &[u8] {
            // SAFETY: `at` checks the range; the borrow of the end keeps others from writing.
            unsafe { std::slice::from_raw_parts(self.memory.at(offset, bytes), bytes) }
        }
    }

    #[test]
    fn puts_arrive_however_the_stream_is_cut() {
        let empty = Header { counter: 6, bytes: 0, ..GOOD };
        let stream = [&GOOD.encode()[..], b"abcd", &empty.encode(), &GOOD.encode(), b"wxyz"];
        let stream = stream.concat();
        for cut in 1..=stream.len() {
            let mut end = end();
            for piece in stream.chunks(cut) {
                end.feed(piece).unwrap();
            }
            assert_eq!(end.bytes(9, 6), b"\0wxyz\0", "cut at {cut}");
            let counts = [5, 6, 7].map(|at: usize| end.counts[at].load(Ordering::Relaxed));
            assert_eq!(counts, [2, 1, 0], "cut at {cut}");
        }
    }

    #[test]
    fn a_count_waits_for_the_last_byte() {
        let mut end = end();
        assert_eq!(end.feed(&[&GOOD.encode()[..], b"abc"].concat()), Ok(false));
        assert_eq!(end.counts[5].load(Ordering::Relaxed), 0);
        assert_eq!(end.feed(b"d"), Ok(true));
        assert_eq!(end.counts[5].load(Ordering::Relaxed), 1);
    }

    #[track_caller]
    fn check(header: Header, expected: FrameError) {
        assert_eq!(end().feed(&header.encode()), Err(expected));
    }

    #[test]
    fn frames_of_strangers_are_refused() {
        check(Header { epoch: 2, ..GOOD }, FrameError::Epoch { theirs: 2, ours: 3 });
        check(Header { from: 2, ..GOOD }, FrameError::Rank { theirs: 2, ours: 1 });
        check(Header { counter: COUNTERS as u16, ..GOOD }, FrameError::Counter(COUNTERS as u16));
        for (offset, bytes) in [(97, 4), (101, 0), (u64::MAX, 1), (1, u64::MAX)] {
            let expected = FrameError::Outside { offset, bytes, arena: ARENA };
            check(Header { offset, bytes, ..GOOD }, expected);
        }
    }
}
