//! What a rank calls, as a mark that travels with the bytes: ranks that call different things find
//! out, and agree on which of them is wrong.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes in front of every message.
pub(super) const HEADER_BYTES: usize = 64;

/// The kinds of calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Operation {
    AllGather = 1,
    AllReduce,
    ReduceScatter,
    AllToAll,
    Broadcast,
    Barrier,
    Send,
    Start,
    Work,
}

/// Added to an operation: the wait for what was called, where a call returns before it is done.
const WAIT: u32 = 0x80;

const OPERATIONS: [(Operation, &str); 9] = [
    (Operation::AllGather, "all_gather"),
    (Operation::AllReduce, "all_reduce"),
    (Operation::ReduceScatter, "reduce_scatter"),
    (Operation::AllToAll, "all_to_all"),
    (Operation::Broadcast, "broadcast"),
    (Operation::Barrier, "barrier"),
    (Operation::Send, "send"),
    (Operation::Start, "start"),
    (Operation::Work, "work on the device"),
];

/// A call. Ranks that made the same calls so far, in the same order and with the same sizes, have
/// the same marks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Mark {
    /// Of this call and all before it.
    pub hash: u64,
    /// How many calls there were before.
    pub sequence: u64,
    /// An [`Operation`], if the peer is of sound mind.
    pub operation: u32,
    /// Bytes, in the sense of the operation.
    pub bytes: u64,
}

impl Mark {
    /// The mark of a message between two ranks, which belongs to no sequence.
    pub fn message(bytes: usize) -> Mark {
        Mark::alone(Operation::Send, bytes)
    }

    /// The mark of what a rank does alone.
    pub fn work() -> Mark {
        Mark::alone(Operation::Work, 0)
    }

    fn alone(operation: Operation, bytes: usize) -> Mark {
        // No call of a sequence gets there.
        let sequence = u64::MAX;
        Mark { hash: 0, sequence, operation: operation as u32, bytes: bytes as u64 }
    }

    /// Whether all ranks make this call.
    pub fn in_sequence(&self) -> bool {
        self.sequence != u64::MAX
    }
}

impl fmt::Display for Mark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let called = self.operation & !WAIT;
        let known = OPERATIONS.iter().find(|(operation, _)| *operation as u32 == called);
        let name = known.map_or("something unknown", |(_, name)| name);
        if called != self.operation {
            write!(f, "a wait after ")?;
        }
        write!(f, "{name}")?;
        if called != Operation::Work as u32 {
            write!(f, " of {} bytes", self.bytes)?;
        }
        if self.in_sequence() {
            write!(f, " (call {}, shape and history {:08x})", self.sequence, self.hash as u32)?;
        }
        Ok(())
    }
}

/// The calls of one rank so far.
#[derive(Default)]
pub(super) struct Calls {
    hash: u64,
    sequence: u64,
}

/// So many calls are remembered: more than a rank can be ahead of others, which is as far as
/// messages go that nobody has taken yet.
const REMEMBERED: usize = 32;

/// What a rank remembers of its calls, for when others turn out to be in other ones. Looked at
/// from within a call, while that is made.
#[derive(Default)]
pub(super) struct Past {
    /// By sequence: the mark's hash, and its operation and bytes in one.
    marks: [[AtomicU64; 2]; REMEMBERED],
    /// How many there were.
    made: AtomicU64,
}

impl Past {
    /// Remembers a call.
    pub fn note(&self, mark: Mark) {
        let [hash, rest] = &self.marks[mark.sequence as usize % REMEMBERED];
        hash.store(mark.hash, Ordering::Relaxed);
        rest.store(u64::from(mark.operation) << 56 | mark.bytes, Ordering::Relaxed);
        self.made.store(mark.sequence + 1, Ordering::Relaxed);
    }

    /// The last call before the one that has this mark, or before a message now.
    pub fn before(&self, mark: Mark) -> Option<Mark> {
        let now = match mark.in_sequence() {
            true => mark.sequence,
            false => self.made.load(Ordering::Relaxed),
        };
        self.mark(now.checked_sub(1)?)
    }

    /// The call with a number, if it was made and is remembered.
    pub fn mark(&self, sequence: u64) -> Option<Mark> {
        let ago = self.made.load(Ordering::Relaxed).checked_sub(sequence)?;
        (1..=REMEMBERED as u64).contains(&ago).then_some(())?;
        let [hash, rest] = &self.marks[sequence as usize % REMEMBERED];
        let (hash, rest) = (hash.load(Ordering::Relaxed), rest.load(Ordering::Relaxed));
        let (operation, bytes) = ((rest >> 56) as u32, rest & (u64::MAX >> 8));
        Some(Mark { hash, sequence, operation, bytes })
    }
}

impl Calls {
    /// Takes note of a call; `shape` is what else must be the same on all ranks.
    pub fn note(
        &mut self,
        operation: Operation,
        bytes: usize,
        shape: impl IntoIterator<Item = usize>,
    ) -> Mark {
        let mut hash = mix(self.hash, operation as u64);
        hash = mix(hash, bytes as u64);
        for number in shape {
            hash = mix(hash, number as u64);
        }
        self.next(hash, operation as u32, bytes as u64)
    }

    /// Takes note of the wait for calls that are not done when they return. In words it is the
    /// last of them.
    pub fn note_wait(&mut self, last: Mark) -> Mark {
        let operation = last.operation | WAIT;
        self.next(mix(self.hash, u64::from(operation)), operation, last.bytes)
    }

    fn next(&mut self, hash: u64, operation: u32, bytes: u64) -> Mark {
        let mark = Mark { hash, sequence: self.sequence, operation, bytes };
        self.hash = hash;
        self.sequence += 1;
        mark
    }
}

/// The step of the generator SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number
/// Generators, 2014), over what was mixed so far.
fn mix(hash: u64, value: u64) -> u64 {
    let mut z = hash.rotate_left(5) ^ value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// What stands in front of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    /// The sender's call.
    pub mark: Mark,
    /// Bytes behind the header, in this piece.
    pub piece: usize,
    /// Bytes of the whole message, where the receiver cannot know: a broadcast.
    pub whole: usize,
    /// The rank that the sender waits for, where it says so.
    pub waits_for: u32,
}

impl Header {
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        let longs = [
            self.mark.hash,
            self.mark.sequence,
            u64::from(self.mark.operation),
            self.mark.bytes,
            self.piece as u64,
            self.whole as u64,
            u64::from(self.waits_for),
        ];
        for (place, long) in bytes.chunks_exact_mut(8).zip(longs) {
            place.copy_from_slice(&long.to_le_bytes());
        }
        bytes
    }

    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Header {
        let (longs, _) = bytes.as_chunks::<8>();
        let long = |index: usize| u64::from_le_bytes(longs[index]);
        Header {
            mark: Mark {
                hash: long(0),
                sequence: long(1),
                operation: long(2) as u32,
                bytes: long(3),
            },
            piece: long(4) as usize,
            whole: long(5) as usize,
            waits_for: long(6) as u32,
        }
    }
}

/// Who is wrong when marks differ, as places in the list, and with whom the others agree: most
/// ranks are right, and where two opinions have as many, the one of `favourite`, or else the one
/// that the lowest rank has.
pub(super) fn judge(marks: &[Option<Mark>], favourite: usize) -> Option<(usize, usize)> {
    let votes = |mark: &Mark| marks.iter().flatten().filter(|other| *other == mark).count();
    let known = || marks.iter().enumerate().filter_map(|(place, mark)| Some((place, (*mark)?)));
    // Of equals `max_by_key` takes the last, which is the lowest rank in this order.
    let favoured = |place: usize| place == favourite;
    let (right, ours) =
        known().rev().max_by_key(|(place, mark)| (votes(mark), favoured(*place)))?;
    let (wrong, _) = known().find(|(_, mark)| *mark != ours)?;
    Some((wrong, right))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mark(bytes: usize) -> Option<Mark> {
        Some(Calls::default().note(Operation::AllGather, bytes, []))
    }

    #[test]
    fn the_minority_is_wrong_and_the_lowest_rank_right_among_two() {
        assert_eq!(judge(&[mark(1), mark(2), mark(1)], 0), Some((1, 0)));
        assert_eq!(judge(&[mark(2), mark(1), mark(1)], 0), Some((0, 1)));
        assert_eq!(judge(&[mark(1), mark(2)], 0), Some((1, 0)));
        assert_eq!(judge(&[mark(1), mark(2)], 1), Some((0, 1)));
        assert_eq!(judge(&[None, mark(2), mark(1)], 0), Some((2, 1)));
        assert_eq!(judge(&[mark(1), None, mark(1)], 0), None);
        assert_eq!(judge(&[None], 0), None);
    }

    #[test]
    fn a_mark_depends_on_operation_bytes_shape_and_history() {
        let note = |operation, bytes, shape: &[usize], before: usize| {
            let mut calls = Calls::default();
            for bytes in 0..before {
                calls.note(Operation::Barrier, bytes, []);
            }
            calls.note(operation, bytes, shape.iter().copied()).hash
        };
        let base = note(Operation::AllGather, 8, &[1, 2], 0);
        assert_eq!(base, note(Operation::AllGather, 8, &[1, 2], 0));
        assert_ne!(base, note(Operation::AllReduce, 8, &[1, 2], 0));
        assert_ne!(base, note(Operation::AllGather, 9, &[1, 2], 0));
        assert_ne!(base, note(Operation::AllGather, 8, &[2, 1], 0));
        assert_ne!(base, note(Operation::AllGather, 8, &[1, 2], 1));
        assert_ne!(
            note(Operation::AllGather, 8, &[1, 2], 1),
            note(Operation::AllGather, 8, &[1, 2], 2)
        );
    }

    #[test]
    fn a_header_survives_the_wire() {
        let mark = Calls::default().note(Operation::Broadcast, 7, [3]);
        let header = Header { mark, piece: 1, whole: 1 << 40, waits_for: 5 };
        assert_eq!(Header::decode(&header.encode()), header);
    }

    #[test]
    fn a_mark_says_what_was_called() {
        let mark = Calls::default().note(Operation::AllReduce, 12, []);
        assert!(mark.to_string().starts_with("all_reduce of 12 bytes (call 0"));
        let mut calls = Calls::default();
        let last = calls.note(Operation::AllGather, 12, []);
        let wait = calls.note_wait(last).to_string();
        assert!(wait.starts_with("a wait after all_gather of 12 bytes (call 1"), "{wait}");
        let unknown = Mark { operation: 99, ..mark };
        assert!(unknown.to_string().starts_with("something unknown"));
    }
}
