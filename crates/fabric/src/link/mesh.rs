//! Connections between all pairs of ranks for one epoch.
//!
//! A rank connects to those below it and is connected to by those above, once for each channel. In
//! three messages both ends prove that they know the epoch's secret, and put a random number into
//! the keys of the connection: who connects late from an earlier epoch, by mistake, or with
//! recorded bytes, is turned away before anything of it is kept. Everything has a deadline.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use super::socket::{Interest, poll, would_block};
use crate::secure::{Direction, EpochSecret, Opener, PairKeys, Policy, Sealer, random};

/// Most ranks of an epoch over a network.
pub const RANKS_MAX: usize = 1024;
/// Longest that one handshake takes.
const HANDSHAKE: Duration = Duration::from_secs(2);
/// Handshakes at the same time; who comes beyond them is turned away and comes again.
const HANDSHAKES_MAX: usize = 64;
/// How long somebody who was turned away waits before the next try.
const RETRY: Duration = Duration::from_millis(20);

const MAGIC: [u8; 8] = *b"pomona\x00\x02";
const NONCE_BYTES: usize = 32;
const TAG_BYTES: usize = 32;
const INTRODUCTION_BYTES: usize = 20;
const HELLO_BYTES: usize = INTRODUCTION_BYTES + NONCE_BYTES;

/// What the connections of one rank in one epoch are made from.
#[derive(Clone, Debug)]
pub struct MeshOptions {
    /// The own place.
    pub rank: usize,
    /// Where each rank listens, the own one too.
    pub addresses: Vec<SocketAddr>,
    /// Which life of the group.
    pub epoch: u32,
    /// What only its ranks know.
    pub secret: EpochSecret,
    /// What is protected; the same on all ranks.
    pub policy: Policy,
    /// How long to wait for the others.
    pub timeout: Duration,
}

/// Why there are no connections.
#[derive(Debug, thiserror::Error)]
pub enum MeshError {
    /// The caller's mistake.
    #[error("{0}")]
    Invalid(String),
    /// A system call failed.
    #[error("cannot {what}")]
    Io {
        /// What was attempted.
        what: String,
        /// What the system said.
        source: io::Error,
    },
    /// Somebody did not come.
    #[error("ranks {missing:?} did not connect within {after_ms} ms; {last}")]
    Missing {
        /// Who.
        missing: Vec<usize>,
        /// How long.
        after_ms: u128,
        /// What was last seen of a connection that failed.
        last: String,
    },
}

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Channel {
    Data,
    Pulse,
}

const CHANNELS: [Channel; 2] = [Channel::Data, Channel::Pulse];

impl Channel {
    fn byte(self) -> u8 {
        match self {
            Channel::Data => 0,
            Channel::Pulse => 1,
        }
    }

    fn is_sealed(self, policy: Policy) -> bool {
        match self {
            Channel::Data => policy.seals_data(),
            Channel::Pulse => policy.protects_control(),
        }
    }
}

/// One connection that both ends believe in.
pub(crate) struct Connection {
    pub(crate) stream: TcpStream,
    pub(crate) opener: Option<Opener>,
    pub(crate) sealer: Option<Sealer>,
}

/// All of a rank's connections on one channel, by rank of the peer; none for itself.
pub(crate) type Connections = Vec<Option<Connection>>;

/// Connects to all other ranks, which call this at the same time.
pub(crate) fn connect(
    listener: &TcpListener,
    options: &MeshOptions,
) -> Result<(Connections, Connections), MeshError> {
    let ranks = options.addresses.len();
    if options.rank >= ranks || ranks > RANKS_MAX {
        let message = format!("rank {} of {ranks}, at most {RANKS_MAX}", options.rank);
        return Err(MeshError::Invalid(message));
    }
    let deadline = Instant::now() + options.timeout;
    let mut made = BTreeMap::new();
    for peer in 0..options.rank {
        for channel in CHANNELS {
            made.insert((peer, channel), dial(options, peer, channel, deadline)?);
        }
    }
    accept(listener, options, deadline, &mut made)?;
    let mut take = |channel: Channel| -> Connections {
        (0..ranks).map(|peer| made.remove(&(peer, channel))).collect()
    };
    Ok((take(Channel::Data), take(Channel::Pulse)))
}

/// What a connector says first: who it is, to whom, in which epoch, for what.
fn introduction(options: &MeshOptions, from: usize, to: usize, channel: Channel) -> Vec<u8> {
    let mut all = MAGIC.to_vec();
    all.extend_from_slice(&options.epoch.to_le_bytes());
    all.extend_from_slice(&(from as u16).to_le_bytes());
    all.extend_from_slice(&(to as u16).to_le_bytes());
    all.extend_from_slice(&[channel.byte(), options.policy.byte(), 0, 0]);
    all
}

fn finish(
    stream: TcpStream,
    options: &MeshOptions,
    channel: Channel,
    keys: &PairKeys,
    own: Direction,
) -> io::Result<Connection> {
    stream.set_read_timeout(None)?;
    stream.set_write_timeout(None)?;
    stream.set_nonblocking(true)?;
    let theirs = match own {
        Direction::FromConnector => Direction::ToConnector,
        Direction::ToConnector => Direction::FromConnector,
    };
    let sealed = channel.is_sealed(options.policy);
    let opener = sealed.then(|| Opener::new(keys.of(theirs)));
    let sealer = sealed.then(|| Sealer::new(keys.of(own)));
    Ok(Connection { stream, opener, sealer })
}

/// Connects to a peer below, and tries again until it is there.
fn dial(
    options: &MeshOptions,
    peer: usize,
    channel: Channel,
    deadline: Instant,
) -> Result<Connection, MeshError> {
    loop {
        let error = match dial_once(options, peer, channel, deadline) {
            Ok(connection) => return Ok(connection),
            Err(error) => error,
        };
        if Instant::now() + RETRY >= deadline {
            let last = format!("{}: {error}", options.addresses[peer]);
            let after_ms = options.timeout.as_millis();
            return Err(MeshError::Missing { missing: vec![peer], after_ms, last });
        }
        std::thread::sleep(RETRY);
    }
}

fn dial_once(
    options: &MeshOptions,
    peer: usize,
    channel: Channel,
    deadline: Instant,
) -> io::Result<Connection> {
    let left = deadline.saturating_duration_since(Instant::now()).max(RETRY);
    let mut stream = TcpStream::connect_timeout(&options.addresses[peer], left.min(HANDSHAKE))?;
    stream.set_nodelay(true)?;
    let until = deadline.min(Instant::now() + HANDSHAKE);
    let ours: [u8; NONCE_BYTES] = random();
    let mut hello = introduction(options, options.rank, peer, channel);
    hello.extend_from_slice(&ours);
    let tag = options.secret.confirm("hello", &[&hello]);
    write(&mut stream, &[&hello[..], &tag].concat(), until)?;
    let welcome: [u8; NONCE_BYTES + TAG_BYTES] = read(&mut stream, until)?;
    let (theirs, tag) = welcome.split_at(NONCE_BYTES);
    let theirs: &[u8; NONCE_BYTES] = theirs.try_into().expect("split there");
    let tag: &[u8; TAG_BYTES] = tag.try_into().expect("what is behind the nonce");
    if !options.secret.accepts("welcome", &[&hello, theirs], tag) {
        return Err(io::Error::other("who answers does not know the secret of this epoch"));
    }
    write(&mut stream, &options.secret.confirm("confirm", &[&hello, theirs]), until)?;
    let keys = options.secret.pair(&hello[..INTRODUCTION_BYTES], [&ours, theirs]);
    finish(stream, options, channel, &keys, Direction::FromConnector)
}

/// What a handshake with somebody who connected came to.
type Greeted = Result<(usize, Channel, Connection), String>;

/// Accepts the peers above. Handshakes have threads, so that a silent stranger holds nobody up.
fn accept(
    listener: &TcpListener,
    options: &MeshOptions,
    deadline: Instant,
    made: &mut BTreeMap<(usize, Channel), Connection>,
) -> Result<(), MeshError> {
    let failed = |what: &str, source| MeshError::Io { what: what.to_owned(), source };
    listener.set_nonblocking(true).map_err(|error| failed("listen for ranks", error))?;
    let wanted = CHANNELS.len() * (options.addresses.len() - 1);
    let (greeted, results): (Sender<Greeted>, Receiver<Greeted>) = channel();
    let (running, shared) = (Arc::new(AtomicUsize::new(0)), Arc::new(options.clone()));
    let mut last = "nobody tried".to_owned();
    while made.len() < wanted {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            let ranks = 0..options.addresses.len();
            let is_missing =
                |peer: &usize| CHANNELS.iter().any(|of| !made.contains_key(&(*peer, *of)));
            let missing = ranks.filter(|peer| *peer != options.rank).filter(is_missing).collect();
            let after_ms = options.timeout.as_millis();
            return Err(MeshError::Missing { missing, after_ms, last });
        }
        match listener.accept() {
            Ok((stream, _)) if running.load(Ordering::Relaxed) < HANDSHAKES_MAX => {
                greet_beside(stream, &shared, &running, &greeted);
            }
            // Beyond the limit: closed at once.
            Ok(_) => {}
            Err(error) if would_block(&error) => {
                // A handshake in progress is looked after every millisecond.
                let busy = running.load(Ordering::Acquire) > 0;
                let nap = if busy { Duration::from_millis(1) } else { left.min(RETRY) };
                poll([Interest { fd: listener.as_raw_fd(), write: false }].into_iter(), nap);
            }
            // Somebody who hung up before being accepted, or no descriptor left for now.
            Err(error) => {
                last = error.to_string();
                std::thread::sleep(RETRY.min(left));
            }
        }
        for result in results.try_iter() {
            match result {
                Ok((peer, channel, connection)) => {
                    // Who comes a second time knows the secret, and is confused: the first stays.
                    made.entry((peer, channel)).or_insert(connection);
                }
                Err(why) => last = why,
            }
        }
    }
    Ok(())
}

fn greet_beside(
    stream: TcpStream,
    options: &Arc<MeshOptions>,
    running: &Arc<AtomicUsize>,
    greeted: &Sender<Greeted>,
) {
    let (options, greeted) = (Arc::clone(options), greeted.clone());
    let counter = Arc::clone(running);
    counter.fetch_add(1, Ordering::Relaxed);
    let thread = std::thread::Builder::new().name("handshake".to_owned());
    let begun = thread.spawn(move || {
        // Nobody receives when all ranks are there already.
        let _ = greeted.send(greet(stream, &options).map_err(|error| error.to_string()));
        counter.fetch_sub(1, Ordering::Release);
    });
    if begun.is_err() {
        running.fetch_sub(1, Ordering::Release);
    }
}

/// The other side of `dial_once`.
fn greet(mut stream: TcpStream, options: &MeshOptions) -> io::Result<(usize, Channel, Connection)> {
    stream.set_nonblocking(false)?;
    stream.set_nodelay(true)?;
    let until = Instant::now() + HANDSHAKE;
    let all: [u8; HELLO_BYTES + TAG_BYTES] = read(&mut stream, until)?;
    let (hello, tag) = all.split_at(HELLO_BYTES);
    let tag: &[u8; TAG_BYTES] = tag.try_into().expect("what is behind the hello");
    let (from, channel) = who(hello, options)
        .filter(|_| options.secret.accepts("hello", &[hello], tag))
        .ok_or_else(|| io::Error::other("a stranger, or a rank of another epoch or policy"))?;
    let ours: [u8; NONCE_BYTES] = random();
    let welcome = options.secret.confirm("welcome", &[hello, &ours]);
    write(&mut stream, &[&ours[..], &welcome].concat(), until)?;
    let confirmed: [u8; TAG_BYTES] = read(&mut stream, until)?;
    if !options.secret.accepts("confirm", &[hello, &ours], &confirmed) {
        return Err(io::Error::other("who connected repeats what another has said"));
    }
    let (introduction, theirs) = hello.split_at(INTRODUCTION_BYTES);
    let theirs: &[u8; NONCE_BYTES] = theirs.try_into().expect("a hello ends with its nonce");
    let keys = options.secret.pair(introduction, [theirs, &ours]);
    let connection = finish(stream, options, channel, &keys, Direction::ToConnector)?;
    Ok((from, channel, connection))
}

/// Who introduces itself, if it is a rank above this one in this epoch and with this policy.
fn who(hello: &[u8], options: &MeshOptions) -> Option<(usize, Channel)> {
    let from = u16::from_le_bytes(*hello.get(12..14)?.first_chunk()?).into();
    let channel = *CHANNELS.iter().find(|channel| Some(&channel.byte()) == hello.get(16))?;
    let is_above = from > options.rank && from < options.addresses.len();
    let expected = introduction(options, from, options.rank, channel);
    (is_above && hello.starts_with(&expected)).then_some((from, channel))
}

fn read<const N: usize>(stream: &mut TcpStream, until: Instant) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    let mut have = 0;
    while have < N {
        stream.set_read_timeout(Some(left(until)?))?;
        match stream.read(&mut bytes[have..]) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(got) => have += got,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(bytes)
}

/// A handshake's message fits into any socket's buffer, so one timeout is enough.
fn write(stream: &mut TcpStream, bytes: &[u8], until: Instant) -> io::Result<()> {
    stream.set_write_timeout(Some(left(until)?))?;
    stream.write_all(bytes)
}

fn left(until: Instant) -> io::Result<Duration> {
    let left = until.saturating_duration_since(Instant::now());
    if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(left) }
}
