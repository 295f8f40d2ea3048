//! Where the messages of one communicator lie in the arenas of its members.
//!
//! Each member's arena has, for each member as the sender, four cells for what it says about
//! itself, two slots for exchanges, and four slots for messages between two. The lane of the
//! member itself is where it writes what all are to read, where arenas can be reached in place.

use std::ops::Range;
use std::sync::Arc;

use super::call::HEADER_BYTES;
use crate::link::Link;

/// Slots of a lane for exchanges. Two are enough: see `exchange.rs`.
pub(super) const EXCHANGE_SLOTS: usize = 2;
/// Slots of a lane for messages between two.
pub(super) const MESSAGE_SLOTS: usize = 4;
/// Cells of a lane for what a rank says about itself.
pub(super) const STATUS_CELLS: usize = 4;
/// A slot for messages is such a part of one for exchanges.
const MESSAGE_SHARE: usize = 4;
/// Slots begin at multiples of this.
const LINE: usize = 64;
/// The least that a slot has behind its header.
const PAYLOAD_BYTES_MIN: usize = 64;

/// Counters of one communicator. Each slot has its own: puts may overtake each other, so one
/// counter for two slots would not tell which of them was filled.
#[derive(Clone, Copy)]
pub(super) struct Counters {
    first: usize,
}

/// How many those are.
pub(super) const COUNTERS_EACH: usize = EXCHANGE_SLOTS + MESSAGE_SLOTS + 2;

impl Counters {
    /// Those from `first` on.
    pub fn from(first: usize) -> Counters {
        Counters { first }
    }

    /// Raised when the slot of an exchange was filled.
    pub fn exchange(self, slot: usize) -> usize {
        self.first + slot
    }

    /// Raised when the slot of a message was filled.
    pub fn message(self, slot: usize) -> usize {
        self.first + EXCHANGE_SLOTS + slot
    }

    /// Raised when slots of messages were given back.
    pub fn credit(self) -> usize {
        self.first + EXCHANGE_SLOTS + MESSAGE_SLOTS
    }

    /// Raised when a rank has told what it does.
    pub fn status(self) -> usize {
        self.first + EXCHANGE_SLOTS + MESSAGE_SLOTS + 1
    }
}

/// One communicator's part of the arenas.
pub(super) struct Lanes {
    pub link: Arc<dyn Link>,
    /// The ranks of the members in the world.
    pub members: Vec<usize>,
    /// The own place among them.
    pub me: usize,
    pub counters: Counters,
    /// Whether all members' arenas can be reached.
    pub in_place: bool,
    /// Bytes of a slot behind its header.
    pub exchange_payload: usize,
    pub message_payload: usize,
    status_at: usize,
    exchange_at: usize,
    message_at: usize,
    own: Arena,
    arenas: Vec<Option<Arena>>,
}

/// Where an arena begins.
#[derive(Clone, Copy)]
struct Arena(*mut u8);

// SAFETY: a pointer to memory that is shared among processes as it is; the link keeps it alive,
// and is held beside it.
unsafe impl Send for Arena {}
// SAFETY: as above.
unsafe impl Sync for Arena {}

impl Lanes {
    /// The lanes of `members`, of which this rank is one, in `part` of everyone's arena, which has
    /// at least [`bytes_min`](Lanes::bytes_min).
    pub fn new(
        link: Arc<dyn Link>,
        members: Vec<usize>,
        part: Range<usize>,
        counters: Counters,
    ) -> Lanes {
        let count = members.len();
        let me = members.iter().position(|rank| *rank == link.rank());
        let me = me.expect("members make lanes");
        let status_bytes = count * STATUS_CELLS * HEADER_BYTES;
        // A lane is two slots for exchanges and four of a quarter: three slots' bytes.
        let lane = part.len().saturating_sub(status_bytes) / count;
        let slots = EXCHANGE_SLOTS + MESSAGE_SLOTS / MESSAGE_SHARE;
        let exchange = lane / slots / LINE * LINE;
        let message = exchange / MESSAGE_SHARE / LINE * LINE;
        assert!(message >= HEADER_BYTES + PAYLOAD_BYTES_MIN, "the part is too small");
        let own = link.arena(link.rank()).expect("every link has its own arena in place");
        let arenas: Vec<_> = members.iter().map(|rank| link.arena(*rank).map(Arena)).collect();
        Lanes {
            me,
            counters,
            in_place: arenas.iter().all(Option::is_some),
            exchange_payload: exchange - HEADER_BYTES,
            message_payload: message - HEADER_BYTES,
            status_at: part.start,
            exchange_at: part.start + status_bytes,
            message_at: part.start + status_bytes + count * EXCHANGE_SLOTS * exchange,
            own: Arena(own),
            arenas,
            link,
            members,
        }
    }

    /// The smallest part that will do for so many members.
    pub fn bytes_min(members: usize) -> usize {
        let exchange = MESSAGE_SHARE * (HEADER_BYTES + PAYLOAD_BYTES_MIN);
        let slots = EXCHANGE_SLOTS + MESSAGE_SLOTS / MESSAGE_SHARE;
        members * (STATUS_CELLS * HEADER_BYTES + slots * exchange)
    }

    pub fn count(&self) -> usize {
        self.members.len()
    }

    /// The members but the own one, beginning behind it, so that not all turn to the same one
    /// first.
    pub fn others(&self) -> impl Iterator<Item = usize> + use<> {
        let (me, count) = (self.me, self.count());
        (1..count).map(move |step| (me + step) % count)
    }

    /// Where the slot of `sender` for an exchange is in every arena.
    pub fn exchange_slot(&self, sender: usize, slot: usize) -> usize {
        let bytes = self.exchange_payload + HEADER_BYTES;
        self.exchange_at + (sender * EXCHANGE_SLOTS + slot) * bytes
    }

    /// Where the slot of `sender` for a message is.
    pub fn message_slot(&self, sender: usize, slot: usize) -> usize {
        let bytes = self.message_payload + HEADER_BYTES;
        self.message_at + (sender * MESSAGE_SLOTS + slot) * bytes
    }

    /// Where the cell is in which `sender` says what it does.
    pub fn status_cell(&self, sender: usize, cell: usize) -> usize {
        self.status_at + (sender * STATUS_CELLS + cell) * HEADER_BYTES
    }

    /// Bytes of the own arena.
    ///
    /// # Safety
    ///
    /// The range is in a slot of this communicator, and by the protocol of counters nobody writes
    /// it while the slice lives.
    pub unsafe fn own(&self, at: usize, length: usize) -> &[u8] {
        // SAFETY: slots are within the part, which is within the arena; the rest is the caller's.
        unsafe { std::slice::from_raw_parts(self.own.0.add(at), length) }
    }

    /// Bytes of the own arena to write.
    ///
    /// # Safety
    ///
    /// As with [`own`](Lanes::own), and nobody reads them either.
    #[expect(clippy::mut_from_ref, reason = "shared memory has no owner that could be borrowed")]
    pub unsafe fn own_mut(&self, at: usize, length: usize) -> &mut [u8] {
        // SAFETY: as in `own`.
        unsafe { std::slice::from_raw_parts_mut(self.own.0.add(at), length) }
    }

    /// Bytes of a member's arena, which can be reached in place.
    ///
    /// # Safety
    ///
    /// As with [`own`](Lanes::own).
    pub unsafe fn of(&self, member: usize, at: usize, length: usize) -> &[u8] {
        let arena = self.arenas[member].expect("asked for where all can be reached");
        // SAFETY: as in `own`; all arenas have the same size.
        unsafe { std::slice::from_raw_parts(arena.0.add(at), length) }
    }
}
