//! NCCL's communicators, over a stand-in for NCCL and CUDA's driver that needs no GPU (`fake.c`),
//! and, where they are asked for, over the real ones:
//!
//!     cargo test -p pomona-fabric --test nccl -- --ignored --nocapture real_library
//!     cargo test -p pomona-fabric --test nccl -- --ignored --nocapture on_a_gpu
//!
//! The first needs libnccl.so.2, in `LD_LIBRARY_PATH` if not installed; the second GPUs too.
#![allow(clippy::unwrap_used)]

mod checks;
mod device;
mod fake;
mod faults;
mod kills;
mod libraries;

use std::net::TcpListener;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use device::{Device, Driver, Memory};
use pomona_fabric::coll::{Comm, World};
use pomona_fabric::link::Link;
use pomona_fabric::link::mesh::MeshOptions;
use pomona_fabric::link::shm::{ShmEpoch, ShmOptions};
use pomona_fabric::link::tcp::{TcpLink, TcpOptions};
use pomona_fabric::nccl::{Nccl, NcclComm, Paths};
use pomona_fabric::secure::{EpochSecret, Policy};
use pomona_types::GroupError;

const ARENA_BYTES: usize = 64 << 10;
/// Nothing takes longer, on however busy a machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// One test at a time: the stand-in has faults and complaints that belong to one.
static ONE: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    ONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A rank and its device. The communicator goes first, and memory behind it that it may still
/// write.
struct Rank {
    comm: NcclComm,
    kept: Vec<Memory>,
    device: Device,
}

/// Links of ranks that are threads, over shared memory.
fn shm(ranks: usize) -> Vec<Arc<dyn Link>> {
    let options = ShmOptions { epoch: 1, ..ShmOptions::new(ranks, ARENA_BYTES) };
    let epoch = ShmEpoch::create(options).unwrap();
    (0..ranks).map(|rank| Arc::new(epoch.link(rank).unwrap()) as _).collect()
}

/// The same over TCP, as between machines.
fn tcp(ranks: usize) -> Vec<Arc<dyn Link>> {
    let listeners: Vec<_> = (0..ranks).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
    let addresses: Vec<_> =
        listeners.iter().map(|listener| listener.local_addr().unwrap()).collect();
    let secret = EpochSecret::generate();
    let connect = |rank: usize| -> Arc<dyn Link> {
        let (addresses, secret) = (addresses.clone(), secret.clone());
        let (policy, timeout) = (Policy::Auth, PATIENCE);
        let mesh = MeshOptions { rank, addresses, epoch: 1, secret, policy, timeout };
        // For a machine that runs many tests at once.
        let (silent_after, spins) = (Duration::from_secs(20), 10);
        let options = TcpOptions { silent_after, spins, ..TcpOptions::new(mesh, ARENA_BYTES) };
        Arc::new(TcpLink::connect(&listeners[rank], &options).unwrap())
    };
    let connect = &connect;
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..ranks).map(|rank| scope.spawn(move || connect(rank))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// Runs `body` as each rank, in a thread with a device of its own, and returns what they return.
fn each_device<T: Send>(
    paths: &Paths,
    links: Vec<Arc<dyn Link>>,
    limit: Duration,
    body: impl Fn(Comm, Device) -> T + Sync,
) -> Vec<T> {
    let driver = Driver::open(&paths.driver);
    let rank = |link: Arc<dyn Link>| {
        let _others = EndsWithPanic(link.clone());
        let rank = link.rank();
        let control = World::new(link).with_limit(limit).all(ARENA_BYTES).unwrap();
        body(control, Device::open(driver, rank))
    };
    let rank = &rank;
    std::thread::scope(|scope| {
        let ranks = links.into_iter().map(|link| scope.spawn(move || rank(link)));
        let ranks: Vec<_> = ranks.collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

/// The same with a communicator.
fn each_rank<T: Send>(
    paths: &Paths,
    links: Vec<Arc<dyn Link>>,
    limit: Duration,
    body: impl Fn(&mut Rank) -> T + Sync,
) -> Vec<T> {
    let nccl = Nccl::open(paths).unwrap();
    each_device(paths, links, limit, |control, device| {
        let comm = NcclComm::begin(&nccl, control).unwrap();
        body(&mut Rank { comm, kept: Vec::new(), device })
    })
}

/// A rank whose check fails does not let the others wait.
struct EndsWithPanic(Arc<dyn Link>);

impl Drop for EndsWithPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.abort(GroupError::Ended("a rank's check has failed".into()));
        }
    }
}
