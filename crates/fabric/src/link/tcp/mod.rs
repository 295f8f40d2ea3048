//! Ranks on different machines, over TCP: a connection between each pair, in clear or sealed.
//!
//! A put is written by its caller, and read by its target whenever that looks for something: there
//! is no thread between the wire and whoever waits. A rank that waits polls its sockets while it
//! spins, and then sleeps in `poll`. A put that its peer does not take yet reads what others send
//! meanwhile, so two ranks that send much to each other at once both get on. Beside the data,
//! [`pulse`](super::pulse) finds those who are gone.

mod frame;
mod stream;

use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use pomona_types::{GroupError, LostCause};

pub use self::frame::parse_hostile_frames;
use self::frame::{Header, Inbox, Parser};
use self::stream::{Broken, Incoming, Message, Outgoing, Step};
use super::memory::Memory;
use super::mesh::{Connection, MeshError, MeshOptions, connect};
use super::pulse::{Pulse, SILENT_AFTER_MS, lock};
use super::socket::{Interest, poll};
use super::{COUNTERS, Link};

/// Looks before a wait sleeps: a look is a system call, so this is about 100 us.
const SPINS: u32 = 300;
/// Every so many looks for one peer, the others' connections are read too: their puts may be what
/// holds up the one that is waited for.
const LOOK_AROUND_EVERY: u32 = 16;
/// How long a put spins before it sleeps until its peer takes more.
const PUT_SPINS: u32 = 200;
/// And how long it sleeps at most, lest another thread's read is missed.
const PUT_NAP: Duration = Duration::from_millis(5);
/// Reads of what a peer still sent when the link is dropped.
const DRAINS_MAX: usize = 1000;
/// Parts of one put.
const PARTS_MAX: usize = 63;

/// What a link over TCP is made from.
#[derive(Clone, Debug)]
pub struct TcpOptions {
    /// Who and where.
    pub mesh: MeshOptions,
    /// Bytes of each arena, the same on all ranks. Only what is touched takes memory.
    pub arena_bytes: usize,
    /// How long a rank may give no sign of life.
    pub silent_after: Duration,
    /// Looks before a wait sleeps.
    pub spins: u32,
}

impl TcpOptions {
    /// With the default patience.
    pub fn new(mesh: MeshOptions, arena_bytes: usize) -> TcpOptions {
        let silent_after = Duration::from_millis(SILENT_AFTER_MS.into());
        TcpOptions { mesh, arena_bytes, silent_after, spins: SPINS }
    }
}

/// One peer.
struct Peer {
    incoming: Mutex<Incoming>,
    outgoing: Mutex<Outgoing>,
    counts: [AtomicU32; COUNTERS],
    connection: TcpStream,
}

impl Peer {
    fn new(connection: Connection, epoch: u32, rank: usize) -> Peer {
        let Connection { stream, opener, sealer } = connection;
        let parser = Parser::new(epoch, rank as u16);
        Peer {
            incoming: Mutex::new(Incoming::new(&stream, parser, opener)),
            outgoing: Mutex::new(Outgoing::new(&stream, sealer)),
            counts: std::array::from_fn(|_| AtomicU32::new(0)),
            connection: stream,
        }
    }
}

/// The ends that a rank holds in one epoch.
pub struct TcpLink {
    memory: Memory,
    /// By rank; none for the own.
    peers: Vec<Option<Peer>>,
    pulse: Pulse,
    spins: u32,
    begun: Instant,
    looks: AtomicU32,
}

impl TcpLink {
    /// Connects to all other ranks, which do the same now.
    pub fn connect(listener: &TcpListener, options: &TcpOptions) -> Result<TcpLink, MeshError> {
        let begun = Instant::now();
        let TcpOptions { mesh, arena_bytes, silent_after, spins } = options;
        let (data, pulses) = connect(listener, mesh)?;
        let pulse =
            Pulse::start(mesh.rank, mesh.epoch, *silent_after, pulses).map_err(|source| {
                MeshError::Io { what: "start the pulse of an epoch".into(), source }
            })?;
        let peers = data.into_iter().enumerate();
        let peers = peers.map(|(rank, data)| Some(Peer::new(data?, mesh.epoch, rank))).collect();
        let memory = Memory::new(*arena_bytes);
        Ok(TcpLink { memory, peers, pulse, spins: *spins, begun, looks: AtomicU32::new(0) })
    }

    fn peer(&self, rank: usize) -> Result<&Peer, GroupError> {
        let peer = self.peers.get(rank).and_then(Option::as_ref);
        peer.ok_or_else(|| GroupError::Invalid(format!("there is no connection to rank {rank}")))
    }

    /// Reads what a peer has sent, unless another thread does so.
    fn read_from(&self, rank: usize, peer: &Peer) {
        let Ok(mut incoming) = peer.incoming.try_lock() else { return };
        let inbox = Inbox { memory: &self.memory, counts: &peer.counts };
        let result = incoming.step(&inbox);
        drop(incoming);
        if let Err(broken) = result {
            self.broken(rank, broken);
        }
    }

    fn read_from_all(&self) {
        for (rank, peer) in self.peers.iter().enumerate() {
            if let Some(peer) = peer {
                self.read_from(rank, peer);
            }
        }
    }

    fn broken(&self, rank: usize, why: Broken) {
        match why {
            Broken::Closed | Broken::Io(_) => self.pulse.broken(rank, &why),
            Broken::Frame(_) | Broken::Record(_) => {
                self.pulse.lost(rank, LostCause::Disconnected(why.to_string()));
            }
        }
    }

    /// What to poll for news: all peers, the end, and where one is blocked, its room.
    fn interests(&self, blocked: Option<usize>) -> impl Iterator<Item = Interest> {
        let peers = self.peers.iter().enumerate();
        let open = peers.filter_map(move |(rank, peer)| {
            let peer = peer.as_ref()?;
            // One that has closed would be ready for ever.
            let closed = peer.incoming.try_lock().is_ok_and(|incoming| incoming.is_closed());
            let write = blocked == Some(rank);
            (!closed).then(|| Interest { fd: peer.connection.as_raw_fd(), write })
        });
        open.chain([self.pulse.over().interest()])
    }

    fn send(&self, rank: usize, peer: &Peer, message: &mut Message<'_>) -> Result<(), GroupError> {
        let mut outgoing = lock(&peer.outgoing);
        let mut idle = 0;
        loop {
            match outgoing.step(message) {
                Ok(Step::Done) => return Ok(()),
                Ok(Step::Bytes) => idle = 0,
                Ok(Step::Idle) => {
                    idle += 1;
                    self.read_from_all();
                    if idle > PUT_SPINS {
                        poll(self.interests(Some(rank)), PUT_NAP);
                    }
                    if let Some(why) = self.aborted() {
                        return Err(why);
                    }
                }
                Err(broken) => {
                    self.broken(rank, broken);
                    // Nobody is there any more for what goes to one that has left.
                    return self.aborted().map_or(Ok(()), Err);
                }
            }
        }
    }
}

impl Link for TcpLink {
    fn rank(&self) -> usize {
        self.pulse.rank()
    }

    fn ranks(&self) -> usize {
        self.peers.len()
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
        let end = offset.checked_add(bytes);
        let inside = end.is_some_and(|end| end <= self.memory.len());
        if !inside || counter >= COUNTERS || parts.len() > PARTS_MAX {
            let message = format!(
                "a put of {} parts, {bytes} bytes at {offset} of an arena of {}, counter {counter}",
                parts.len(),
                self.memory.len(),
            );
            return Err(GroupError::Invalid(message));
        }
        let header = Header {
            epoch: self.epoch(),
            from: self.rank() as u16,
            counter: counter as u16,
            offset: offset as u64,
            bytes: bytes as u64,
        };
        let header = header.encode();
        let mut pieces: [&[u8]; PARTS_MAX + 1] = [&[]; PARTS_MAX + 1];
        pieces[0] = &header;
        pieces[1..=parts.len()].copy_from_slice(parts);
        let mut message = Message::new(&pieces[..=parts.len()]);
        self.send(peer, self.peer(peer)?, &mut message)
    }

    fn count(&self, peer: usize, counter: usize) -> u32 {
        let Ok(from) = self.peer(peer) else { return 0 };
        self.read_from(peer, from);
        if self.looks.fetch_add(1, Ordering::Relaxed).is_multiple_of(LOOK_AROUND_EVERY) {
            self.read_from_all();
        }
        // Acquire: the bytes before the notification are seen with it.
        from.counts[counter].load(Ordering::Acquire)
    }

    fn park(&self, peer: usize, counter: usize, seen: u32, at_most: Duration) {
        if self.count(peer, counter) != seen || self.pulse.over().why().is_some() {
            return;
        }
        poll(self.interests(None), at_most.min(PUT_NAP));
        self.read_from_all();
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

impl Drop for TcpLink {
    fn drop(&mut self) {
        // Before the data ends, so that nobody takes its end for a fault.
        self.pulse.leave();
        for peer in self.peers.iter().flatten() {
            // A connection that is closed with bytes to read forgets what it still has to send.
            let _ = peer.connection.shutdown(Shutdown::Write);
            let inbox = Inbox { memory: &self.memory, counts: &peer.counts };
            let read = || lock(&peer.incoming).step(&inbox).is_ok_and(|step| step != Step::Idle);
            // A peer that sends for ever gets its connection closed all the same.
            let _ = (0..DRAINS_MAX).all(|_| read());
        }
    }
}

#[cfg(test)]
mod tests;
