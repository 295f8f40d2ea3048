//! What every transport has to do, and every collective over it. Another transport is one more
//! line at the end.
#![allow(clippy::unwrap_used)]

mod suite;

use std::net::{Ipv4Addr, TcpListener};
use std::sync::Arc;
use std::time::Duration;

use pomona_fabric::link::Link;
use pomona_fabric::link::mesh::MeshOptions;
use pomona_fabric::link::ofi::{OfiLink, OfiOptions, provider};
use pomona_fabric::link::shm::{ShmEpoch, ShmOptions};
use pomona_fabric::link::tcp::{TcpLink, TcpOptions};
use pomona_fabric::secure::{EpochSecret, Policy};
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

/// TCP over the loopback interface, in clear.
fn tcp(ranks: usize, arena_bytes: usize) -> Vec<Arc<dyn Link>> {
    tcp_with(Policy::Off, ranks, arena_bytes)
}

/// The same with sealed records.
fn sealed(ranks: usize, arena_bytes: usize) -> Vec<Arc<dyn Link>> {
    tcp_with(Policy::Seal, ranks, arena_bytes)
}

fn tcp_with(policy: Policy, ranks: usize, arena_bytes: usize) -> Vec<Arc<dyn Link>> {
    over_loopback(ranks, policy, |listener, mesh| {
        // For a machine that runs many tests at once.
        let (silent_after, spins) = (Duration::from_secs(20), 10);
        let options = TcpOptions { silent_after, spins, ..TcpOptions::new(mesh, arena_bytes) };
        Arc::new(TcpLink::connect(listener, &options).unwrap())
    })
}

/// Says so where it is not, unless it may not be missing.
fn has_libfabric() -> bool {
    let Err(why) = provider(Ipv4Addr::LOCALHOST.into()) else { return true };
    let required = std::env::var("POMONA_REQUIRE").unwrap_or_default();
    assert!(required.split(',').all(|name| name != "libfabric"), "it is required: {why}");
    println!("SKIPPED: {why}");
    false
}

/// libfabric over TCP.
fn ofi(ranks: usize, arena_bytes: usize) -> Vec<Arc<dyn Link>> {
    over_loopback(ranks, Policy::Auth, |listener, mesh| {
        let (silent_after, spins) = (Duration::from_secs(20), 10);
        let options = OfiOptions::new(mesh, arena_bytes, "tcp;ofi_rxm");
        let options = OfiOptions { silent_after, spins, ..options };
        Arc::new(OfiLink::connect(listener, &options).unwrap())
    })
}

fn over_loopback(
    ranks: usize,
    policy: Policy,
    connect: impl Fn(&TcpListener, MeshOptions) -> Arc<dyn Link> + Sync,
) -> Vec<Arc<dyn Link>> {
    let listeners: Vec<_> = (0..ranks).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
    let addresses: Vec<_> =
        listeners.iter().map(|listener| listener.local_addr().unwrap()).collect();
    let secret = EpochSecret::generate();
    let connect = |rank: usize| -> Arc<dyn Link> {
        let (addresses, secret) = (addresses.clone(), secret.clone());
        let timeout = Duration::from_secs(20);
        let mesh = MeshOptions { rank, addresses, epoch: 1, secret, policy, timeout };
        connect(&listeners[rank], mesh)
    };
    let connect = &connect;
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..ranks).map(|rank| scope.spawn(move || connect(rank))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

contract!(shm, puts, tcp, sealed, ofi if has_libfabric);
