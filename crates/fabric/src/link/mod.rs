//! What a transport gives to the layers above: arenas, puts into them, and counters.
//!
//! The one primitive is a put with a notification behind it. It asks for no order between puts, so
//! it maps to shared memory, to TCP frames, and to writes with immediate data of libfabric and
//! verbs. A transport takes no decision and knows no collective; waiting is
//! [`wait`](crate::wait)'s.

use std::time::Duration;

use pomona_types::GroupError;

mod memory;
pub mod mesh;
pub mod ofi;
pub mod pulse;
pub mod shm;
pub mod simulated;
pub(crate) mod socket;
pub mod tcp;

/// Counters that each pair of ranks has in each direction.
pub const COUNTERS: usize = 128;

/// The ends that one rank holds of all its connections in one epoch. Made new for each epoch:
/// nothing that was sent in an earlier one can arrive.
pub trait Link: Send + Sync {
    /// The own place.
    fn rank(&self) -> usize;

    /// How many ranks the epoch has.
    fn ranks(&self) -> usize;

    /// Which life of the group this is.
    fn epoch(&self) -> u32;

    /// Bytes of each rank's arena: memory of its own that the others write.
    fn arena_bytes(&self) -> usize;

    /// Copies `parts`, one after the other, to `offset` of `peer`'s arena, and then adds one to its
    /// counter `counter` for this rank: once, or never if the epoch ends. Returns when the parts
    /// may be reused, which a slow peer can delay: not longer than until the abort.
    fn put(
        &self,
        peer: usize,
        offset: usize,
        parts: &[&[u8]],
        counter: usize,
    ) -> Result<(), GroupError>;

    /// How many notifications of `peer` have arrived on `counter`, the bytes before them in place.
    /// Never blocks; may do the transport's work.
    fn count(&self, peer: usize, counter: usize) -> u32;

    /// Sleeps until `count(peer, counter)` is no longer `seen` or the abort was raised, `at_most`
    /// so long. May return early; must not sleep through either.
    fn park(&self, peer: usize, counter: usize, seen: u32, at_most: Duration);

    /// How many times a wait should look before it parks.
    fn spins(&self) -> u32;

    /// The time since some moment before this link was made, which waits are measured in.
    fn now(&self) -> Duration;

    /// Where the own arena begins, and where a peer's does if it can be reached in place: at least
    /// [`arena_bytes`](Link::arena_bytes), aligned to 64, valid as long as the link. Who uses it
    /// keeps to the protocol of counters, for there are no locks.
    fn arena(&self, rank: usize) -> Option<*mut u8>;

    /// Why the epoch is over, if it is: the same on all ranks that hear of it. Cheap: looked at in
    /// every wait.
    fn aborted(&self) -> Option<GroupError>;

    /// Ends the epoch for all ranks that can be told; the first cause stays. Where ranks have to
    /// agree which was the first, [`aborted`](Link::aborted) has it as soon as they do.
    fn abort(&self, why: GroupError);
}
