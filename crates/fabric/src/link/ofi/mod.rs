//! Ranks on different machines over libfabric: RDMA where a machine has it, through one interface.
//!
//! A put is a remote write with 32 bits of immediate data, which say whose it is and which counter
//! it raises. The library is opened at run time; without it, or without a provider that can do
//! this, the error says so and another transport is taken. Who is gone is found by
//! [`pulse`](super::pulse), never by the library, which may wait for the dead for ever.

mod endpoint;
mod ffi;
mod library;
mod survey;

use std::io::{Read, Write};
use std::net::{IpAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use pomona_types::GroupError;

use self::endpoint::{Endpoint, Failure, NAME_BYTES_MAX, Region, Written};
use self::library::Library;
pub use self::survey::{Survey, survey};
use super::memory::Memory;
use super::mesh::{Connections, MeshError, MeshOptions, connect};
use super::pulse::{Pulse, SILENT_AFTER_MS, lock};
use super::socket::poll;
use super::{COUNTERS, Link};

/// Providers in the order in which they are tried: those of RDMA, then the one that everybody has.
pub const PROVIDERS: &[&str] = &["efa", "verbs;ofi_rxm", "tcp;ofi_rxm"];
/// Looks before a wait sleeps: about 100 us.
const SPINS: u32 = 300;
/// How long a sleep is: the library moves nothing while nobody looks.
const NAP: Duration = Duration::from_micros(200);
/// Immediate data: the counter's bits, then the rank's, then the epoch's.
const COUNTER_BITS: u32 = COUNTERS.trailing_zeros();
const RANK_BITS: u32 = 12;
const EPOCH_BITS: u32 = 32 - COUNTER_BITS - RANK_BITS;

/// Why there is no link over libfabric.
#[derive(Debug, thiserror::Error)]
pub enum OfiError {
    /// It is not installed, or too old.
    #[error("no libfabric: {0}")]
    Absent(String),
    /// It is there, and cannot do what is needed.
    #[error("{0}")]
    Unsuitable(String),
    /// A call failed.
    #[error("{what}: {text}")]
    Call {
        /// Which.
        what: &'static str,
        /// The library's words.
        text: String,
    },
    /// The ranks did not find each other.
    #[error(transparent)]
    Mesh(#[from] MeshError),
}

/// What a link over libfabric is made from.
#[derive(Clone, Debug)]
pub struct OfiOptions {
    /// Who and where; the addresses are for signs of life and to meet.
    pub mesh: MeshOptions,
    /// Bytes of each arena, the same on all ranks.
    pub arena_bytes: usize,
    /// How long a rank may give no sign of life.
    pub silent_after: Duration,
    /// Looks before a wait sleeps.
    pub spins: u32,
    /// The provider, the same on all ranks: see [`provider`].
    pub provider: String,
}

impl OfiOptions {
    /// With the default patience.
    pub fn new(mesh: MeshOptions, arena_bytes: usize, provider: &str) -> OfiOptions {
        let silent_after = Duration::from_millis(SILENT_AFTER_MS.into());
        let provider = provider.to_owned();
        OfiOptions { mesh, arena_bytes, silent_after, spins: SPINS, provider }
    }
}

/// The first of [`PROVIDERS`] that this machine has on the interface of `source`; or why there is
/// none, to be logged before another transport is taken.
pub fn provider(source: IpAddr) -> Result<&'static str, OfiError> {
    let library = Library::open()?;
    let memory = Memory::new(1);
    let mut last = OfiError::Unsuitable("no provider was tried".to_owned());
    for provider in PROVIDERS {
        match Endpoint::open(library, provider, source, &memory) {
            Ok(_) => return Ok(provider),
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// The ends that a rank holds in one epoch.
pub struct OfiLink {
    /// None after the end: closed, lest the library uses memory of a put that was given up.
    endpoint: Mutex<Option<Endpoint>>,
    /// Outlives the endpoint, which writes into it.
    memory: Memory,
    /// One put at a time.
    putting: Mutex<()>,
    regions: Vec<Region>,
    counts: Vec<[AtomicU32; COUNTERS]>,
    pulse: Pulse,
    spins: u32,
    begun: Instant,
}

impl OfiLink {
    /// Connects to all other ranks, which do the same now. Sealing is not possible here, so a
    /// policy that asks for it is refused.
    pub fn connect(listener: &TcpListener, options: &OfiOptions) -> Result<OfiLink, OfiError> {
        let begun = Instant::now();
        let OfiOptions { mesh, arena_bytes, silent_after, spins, provider } = options;
        if mesh.policy.seals_data() {
            let why = "policy 'seal' is not possible over libfabric: use tcp, or policy 'auth'";
            return Err(OfiError::Unsuitable(why.to_owned()));
        }
        if mesh.addresses.len() > 1 << RANK_BITS || mesh.rank >= mesh.addresses.len() {
            let why = format!("rank {} of {}", mesh.rank, mesh.addresses.len());
            return Err(OfiError::Unsuitable(why));
        }
        let source = mesh.addresses[mesh.rank].ip();
        let memory = Memory::new(*arena_bytes);
        let mut endpoint = Endpoint::open(Library::open()?, provider, source, &memory)?;
        let own = Card { region: endpoint.region(), name: endpoint.name()? };
        let (data, pulses) = connect(listener, mesh)?;
        let cards = exchange(data, own, begun + mesh.timeout).map_err(io("meet other ranks"))?;
        let names: Vec<Vec<u8>> = cards.iter().map(|card| card.name.clone()).collect();
        endpoint.insert(&names)?;
        let pulse = Pulse::start(mesh.rank, mesh.epoch, *silent_after, pulses)
            .map_err(io("start the pulse of an epoch"))?;
        let none = |_| std::array::from_fn(|_| AtomicU32::new(0));
        Ok(OfiLink {
            endpoint: Mutex::new(Some(endpoint)),
            memory,
            putting: Mutex::new(()),
            regions: cards.iter().map(|card| card.region).collect(),
            counts: (0..cards.len()).map(none).collect(),
            pulse,
            spins: *spins,
            begun,
        })
    }

    fn progress(&self, endpoint: &mut MutexGuard<'_, Option<Endpoint>>) -> Result<(), Failure> {
        let Some(endpoint) = &mut **endpoint else { return Ok(()) };
        endpoint.progress(|data| {
            let counter = data as usize & (COUNTERS - 1);
            let rank = (data >> COUNTER_BITS) as usize & ((1 << RANK_BITS) - 1);
            let epoch = (data >> (COUNTER_BITS + RANK_BITS)) as u32;
            let ours = self.pulse.epoch() & ((1 << EPOCH_BITS) - 1);
            // What no rank of this epoch tells is no notification.
            if let Some(counts) = self.counts.get(rank).filter(|_| epoch == ours) {
                // Release: whoever sees the count sees the bytes.
                counts[counter].fetch_add(1, Ordering::Release);
            }
        })
    }

    /// Looks at what has come, unless another thread does so.
    fn look(&self) {
        let Ok(mut endpoint) = self.endpoint.try_lock() else { return };
        let result = self.progress(&mut endpoint);
        drop(endpoint);
        if let Err(failure) = result {
            self.failed(&failure);
        }
    }

    /// Something under way has failed: because somebody is gone, which the pulse knows better.
    fn failed(&self, Failure { rank, error }: &Failure) {
        match rank {
            Some(rank) => self.pulse.broken(*rank, error),
            None => self.pulse.end(&GroupError::Ended(format!("libfabric fails: {error}"))),
        }
    }

    /// Writes, or waits until the last write is complete; true when there is nothing to wait for.
    fn step(&self, put: &Put<'_>, pending: &mut bool) -> Result<bool, Failure> {
        let failed = |error| Failure { rank: Some(put.peer), error };
        let mut endpoint = lock(&self.endpoint);
        if let Some(endpoint) = &mut *endpoint
            && !*pending
        {
            let region = self.regions[put.peer];
            let parts = put.parts;
            match endpoint.write(put.peer, region, put.offset, parts, put.data).map_err(failed)? {
                Written::Done => return Ok(true),
                Written::Pending => *pending = true,
                Written::Again => {}
            }
        }
        self.progress(&mut endpoint)?;
        match &*endpoint {
            Some(endpoint) if *pending => endpoint.is_complete().map_err(failed),
            _ => Ok(false),
        }
    }
}

/// One put.
struct Put<'a> {
    peer: usize,
    offset: usize,
    parts: &'a [&'a [u8]],
    data: u64,
}

impl Link for OfiLink {
    fn rank(&self) -> usize {
        self.pulse.rank()
    }

    fn ranks(&self) -> usize {
        self.regions.len()
    }

    fn epoch(&self) -> u32 {
        self.pulse.epoch()
    }

    fn arena_bytes(&self) -> usize {
        self.memory.len()
    }

    fn put(
        &self,
        peer: usize,
        offset: usize,
        parts: &[&[u8]],
        counter: usize,
    ) -> Result<(), GroupError> {
        if let Some(why) = self.aborted() {
            return Err(why);
        }
        let bytes: usize = parts.iter().map(|part| part.len()).sum();
        let inside = offset.checked_add(bytes).is_some_and(|end| end <= self.memory.len());
        if !inside || counter >= COUNTERS || peer >= self.ranks() || peer == self.rank() {
            let message = format!(
                "a put of {bytes} bytes at {offset} of an arena of {}, counter {counter}, to rank \
                 {peer} of {}",
                self.memory.len(),
                self.ranks(),
            );
            return Err(GroupError::Invalid(message));
        }
        let epoch = u64::from(self.epoch()) & ((1 << EPOCH_BITS) - 1);
        let data = (epoch << RANK_BITS | self.rank() as u64) << COUNTER_BITS | counter as u64;
        let put = Put { peer, offset, parts, data };
        let _turn = lock(&self.putting);
        let mut pending = false;
        loop {
            match self.step(&put, &mut pending) {
                Ok(true) => return Ok(()),
                Ok(false) => {}
                Err(failure) => self.failed(&failure),
            }
            let over = self.aborted();
            if over.is_none() && !self.pulse.has_left(peer) {
                continue;
            }
            if pending {
                // The library must not touch the parts any more.
                lock(&self.endpoint).take();
                let left = format!("rank {peer} has left while it was written to");
                self.pulse.end(&GroupError::Ended(left));
                return self.aborted().map_or(Ok(()), Err);
            }
            // Nobody is there any more for what goes to one that has left.
            return over.map_or(Ok(()), Err);
        }
    }

    fn count(&self, peer: usize, counter: usize) -> u32 {
        self.look();
        // Acquire: the bytes before the notification are seen with it.
        self.counts.get(peer).map_or(0, |counts| counts[counter].load(Ordering::Acquire))
    }

    fn park(&self, peer: usize, counter: usize, seen: u32, at_most: Duration) {
        if self.count(peer, counter) == seen && self.aborted().is_none() {
            poll([self.pulse.over().interest()].into_iter(), at_most.min(NAP));
        }
    }

    fn spins(&self) -> u32 {
        self.spins
    }

    fn now(&self) -> Duration {
        self.begun.elapsed()
    }

    fn arena(&self, rank: usize) -> Option<*mut u8> {
        (rank == self.rank()).then(|| self.memory.start())
    }

    fn aborted(&self) -> Option<GroupError> {
        self.pulse.over().why()
    }

    fn abort(&self, why: GroupError) {
        self.pulse.end(&why);
    }
}

impl Drop for OfiLink {
    fn drop(&mut self) {
        self.pulse.leave();
        lock(&self.endpoint).take();
    }
}

/// What a rank tells the others of its endpoint.
#[derive(Clone)]
struct Card {
    region: Region,
    name: Vec<u8>,
}

impl Card {
    const BYTES: usize = 8 + 8 + 2 + NAME_BYTES_MAX;

    fn encode(&self) -> Vec<u8> {
        let mut all = self.region.start.to_le_bytes().to_vec();
        all.extend_from_slice(&self.region.key.to_le_bytes());
        all.extend_from_slice(&(self.name.len() as u16).to_le_bytes());
        all.extend_from_slice(&self.name);
        all.resize(Card::BYTES, 0);
        all
    }

    fn decode(all: &[u8]) -> Option<Card> {
        let (start, all) = all.split_first_chunk::<8>()?;
        let (key, all) = all.split_first_chunk::<8>()?;
        let (length, all) = all.split_first_chunk::<2>()?;
        let name = all.get(..u16::from_le_bytes(*length).into())?.to_vec();
        let region = Region { start: u64::from_le_bytes(*start), key: u64::from_le_bytes(*key) };
        Some(Card { region, name })
    }
}

/// Gives the own card to all and takes theirs, over connections that are then closed.
fn exchange(data: Connections, own: Card, deadline: Instant) -> std::io::Result<Vec<Card>> {
    let mut streams: Vec<Option<TcpStream>> =
        data.into_iter().map(|one| one.map(|one| one.stream)).collect();
    for stream in streams.iter_mut().flatten() {
        stream.set_nonblocking(false)?;
        let left = deadline.saturating_duration_since(Instant::now()).max(NAP);
        stream.set_read_timeout(Some(left))?;
        stream.set_write_timeout(Some(left))?;
        stream.write_all(&own.encode())?;
    }
    let mut cards = Vec::with_capacity(streams.len());
    for stream in &mut streams {
        let Some(stream) = stream else {
            cards.push(own.clone());
            continue;
        };
        let mut bytes = [0; Card::BYTES];
        stream.read_exact(&mut bytes)?;
        let wrong = || std::io::Error::other("a rank's card is none");
        cards.push(Card::decode(&bytes).ok_or_else(wrong)?);
    }
    Ok(cards)
}

fn io(what: &'static str) -> impl Fn(std::io::Error) -> OfiError {
    move |source| OfiError::Mesh(MeshError::Io { what: what.to_owned(), source })
}
