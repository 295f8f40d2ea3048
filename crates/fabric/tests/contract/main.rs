//! What every transport has to do, and every collective over it. Another transport is one more
//! line at the end.
#![allow(clippy::unwrap_used)]

mod suite;

use std::sync::Arc;
use std::time::Duration;

use pomona_fabric::link::Link;
use pomona_fabric::link::shm::{ShmEpoch, ShmOptions};
use pomona_types::GroupError;
use suite::contract;

/// Shared memory among threads.
fn shm(ranks: usize, arena_bytes: usize) -> Vec<Arc<dyn Link>> {
    let epoch = ShmEpoch::create(ShmOptions::new(ranks, arena_bytes)).unwrap();
    // As if the descriptor had come from another process.
    let other = ShmEpoch::open(epoch.descriptor().try_clone_to_owned().unwrap()).unwrap();
    let of = |rank: usize| if rank.is_multiple_of(2) { epoch.link(rank) } else { other.link(rank) };
    (0..ranks).map(|rank| Arc::new(of(rank).unwrap()) as _).collect()
}

/// The same, as a transport that reaches no peer's arena in place.
fn puts(ranks: usize, arena_bytes: usize) -> Vec<Arc<dyn Link>> {
    shm(ranks, arena_bytes).into_iter().map(|link| Arc::new(PutsOnly(link)) as _).collect()
}

struct PutsOnly(Arc<dyn Link>);

impl Link for PutsOnly {
    fn rank(&self) -> usize {
        self.0.rank()
    }

    fn ranks(&self) -> usize {
        self.0.ranks()
    }

    fn epoch(&self) -> u32 {
        self.0.epoch()
    }

    fn arena_bytes(&self) -> usize {
        self.0.arena_bytes()
    }

    fn put(
        &self,
        peer: usize,
        offset: usize,
        parts: &[&[u8]],
        counter: usize,
    ) -> Result<(), GroupError> {
        self.0.put(peer, offset, parts, counter)
    }

    fn count(&self, peer: usize, counter: usize) -> u32 {
        self.0.count(peer, counter)
    }

    fn park(&self, peer: usize, counter: usize, seen: u32, at_most: Duration) {
        self.0.park(peer, counter, seen, at_most);
    }

    fn spins(&self) -> u32 {
        self.0.spins()
    }

    fn now(&self) -> Duration {
        self.0.now()
    }

    fn arena(&self, rank: usize) -> Option<*mut u8> {
        (rank == self.rank()).then(|| self.0.arena(rank)).flatten()
    }

    fn aborted(&self) -> Option<GroupError> {
        self.0.aborted()
    }

    fn abort(&self, why: GroupError) {
        self.0.abort(why);
    }
}

contract!(shm, puts);
