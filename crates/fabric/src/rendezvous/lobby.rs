//! The leader's side: who comes is examined, and waits until an epoch needs it.

use std::collections::VecDeque;
use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::channel::{Channel, ChannelError};
use super::message::{Message, PROTOCOL, Start, binding};
use super::transport::Transport;
use super::{Fingerprint, tls};
use crate::link::Link;
use crate::link::mesh::{MeshOptions, RANKS_MAX};
use crate::link::ofi::{OfiError, provider};
use crate::link::pulse::{SILENT_AFTER_MS, lock};
use crate::link::socket::{Bell, Interest, poll, would_block};
use crate::secure::{EpochSecret, Policy, Side, Token, hex, random, unhex};

/// How long somebody has to show that it may join.
const EXAMINATION: Duration = Duration::from_secs(5);
/// Strangers that are examined at the same time; who comes beyond them is hung up on.
const STRANGERS_MAX: usize = 64;
/// Reasons of refusals that are kept to be told.
const REFUSALS_MAX: usize = 16;

/// What a leader offers.
#[derive(Clone, Debug)]
pub struct LobbyOptions {
    /// What nodes must know.
    pub token: Token,
    /// What is protected.
    pub policy: Policy,
    /// The version of Pomona, which nodes must have too.
    pub version: String,
    /// What nodes are told of the work, so that they can look for the weights.
    pub task: String,
    /// The weights that nodes must have.
    pub fingerprint: Fingerprint,
    /// How long a node may take to look for them.
    pub preparation: Duration,
}

/// Why there is no lobby, or nobody in it.
#[derive(Debug, thiserror::Error)]
pub enum LobbyError {
    /// Nobody can connect there.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// Where.
        address: String,
        /// What the system said.
        source: io::Error,
    },
    /// Too few came.
    #[error("{here} of {wanted} nodes joined within {after_s} s; refused: {refusals}")]
    Missing {
        /// How many did.
        here: usize,
        /// How many were to.
        wanted: usize,
        /// How long.
        after_s: u64,
        /// Whom, and why.
        refusals: String,
    },
    /// A member hung up before the epoch.
    #[error("{member} cannot be told of epoch {epoch}: {source}")]
    Member {
        /// Where it listens.
        member: SocketAddr,
        /// Which epoch.
        epoch: u32,
        /// What was seen.
        source: ChannelError,
    },
    /// The ranks did not find each other.
    #[error(transparent)]
    Link(#[from] OfiError),
}

/// A node that may take part.
pub struct Member {
    /// Where it listens for other ranks, as the leader sees it.
    pub data: SocketAddr,
    /// The control connection.
    pub channel: Channel,
}

/// What an epoch is made of, besides its ranks.
#[derive(Clone, Debug)]
pub struct EpochPlan {
    /// Its number, larger than any before.
    pub epoch: u32,
    /// What carries the data.
    pub transport: Transport,
    /// Bytes of each arena.
    pub arena_bytes: usize,
    /// How long ranks wait for each other to connect.
    pub timeout: Duration,
    /// What ranks are told of the work.
    pub task: String,
}

/// Where nodes join. Dropping it turns away who still comes.
pub struct Lobby {
    address: SocketAddr,
    data: TcpListener,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    options: LobbyOptions,
    waiting: Mutex<VecDeque<Member>>,
    news: Condvar,
    refusals: Mutex<VecDeque<String>>,
    strangers: AtomicUsize,
    stop: Bell,
    stopped: AtomicBool,
}

impl Lobby {
    /// Listens on an address like `0.0.0.0:7000`; port 0 takes a free one.
    pub fn open(
        address: impl ToSocketAddrs + std::fmt::Debug,
        options: LobbyOptions,
    ) -> Result<Lobby, LobbyError> {
        let failed = |source| LobbyError::Listen { address: format!("{address:?}"), source };
        let listener = TcpListener::bind(&address).map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        let local = listener.local_addr().map_err(failed)?;
        let data = TcpListener::bind((local.ip(), 0)).map_err(failed)?;
        let shared = Arc::new(Shared {
            options,
            waiting: Mutex::default(),
            news: Condvar::new(),
            refusals: Mutex::default(),
            strangers: AtomicUsize::new(0),
            stop: Bell::new().map_err(failed)?,
            stopped: AtomicBool::new(false),
        });
        let runner = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name("lobby".to_owned());
        let thread = thread.spawn(move || accept(&listener, &runner)).map_err(failed)?;
        Ok(Lobby { address: local, data, shared, thread: Some(thread) })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// How many nodes wait.
    pub fn waiting(&self) -> usize {
        let mut waiting = lock(&self.shared.waiting);
        forget_the_gone(&mut waiting);
        waiting.len()
    }

    /// Whom it refused since it was asked last, and why; the latest [`REFUSALS_MAX`] of them.
    pub fn refusals(&self) -> Vec<String> {
        lock(&self.shared.refusals).drain(..).collect()
    }

    /// Waits for so many nodes, and takes them, those first who came first.
    pub fn take(&self, wanted: usize, timeout: Duration) -> Result<Vec<Member>, LobbyError> {
        let deadline = Instant::now() + timeout;
        let mut waiting = lock(&self.shared.waiting);
        loop {
            forget_the_gone(&mut waiting);
            if waiting.len() >= wanted {
                return Ok(waiting.drain(..wanted).collect());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let here = waiting.len();
                let refusals: Vec<String> = lock(&self.shared.refusals).iter().cloned().collect();
                let refusals =
                    if refusals.is_empty() { "nobody".to_owned() } else { refusals.join("; ") };
                let after_s = timeout.as_secs();
                return Err(LobbyError::Missing { here, wanted, after_s, refusals });
            }
            let news = &self.shared.news;
            waiting = news.wait_timeout(waiting, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// libfabric by the best provider that this machine has towards these members; or why there is
    /// none, to be logged before another transport is taken.
    pub fn libfabric(&self, members: &[Member]) -> Result<Transport, OfiError> {
        if self.shared.options.policy.seals_data() {
            let why = "libfabric carries data in clear, and the policy is 'seal'";
            return Err(OfiError::Unsuitable(why.to_owned()));
        }
        let ways = members.iter().filter_map(|member| member.channel.machines().ok());
        let (_, source) = ways.last().unwrap_or((self.address.ip(), self.address.ip()));
        Ok(Transport::Libfabric { provider: provider(source)?.to_owned() })
    }

    /// Starts an epoch: this process is rank 0, the members follow in their order.
    pub fn start(&self, members: &[Member], plan: &EpochPlan) -> Result<Arc<dyn Link>, LobbyError> {
        let secret = EpochSecret::generate();
        let own = self.data.local_addr().map_err(|source| LobbyError::Listen {
            address: "a port for data".to_owned(),
            source,
        })?;
        let mut addresses = vec![own];
        addresses.extend(members.iter().map(|member| member.data));
        for (at, member) in members.iter().enumerate() {
            let failed =
                |source| LobbyError::Member { member: member.data, epoch: plan.epoch, source };
            // The leader has the address under which this node reached it.
            let (_, as_seen) = member.channel.machines().map_err(failed)?;
            addresses[0].set_ip(as_seen);
            let start = Start {
                epoch: plan.epoch,
                rank: at + 1,
                addresses: addresses.clone(),
                secret: secret.to_hex(),
                transport: plan.transport.clone(),
                arena_bytes: plan.arena_bytes,
                silent_ms: SILENT_AFTER_MS,
                timeout_ms: plan.timeout.as_millis().try_into().unwrap_or(u32::MAX),
                task: plan.task.clone(),
            };
            member.channel.send(&Message::Start(Box::new(start)).encode()).map_err(failed)?;
        }
        let mesh = MeshOptions {
            rank: 0,
            addresses,
            epoch: plan.epoch,
            secret,
            policy: self.shared.options.policy,
            timeout: plan.timeout,
        };
        let silent_after = Duration::from_millis(SILENT_AFTER_MS.into());
        Ok(plan.transport.connect(&self.data, mesh, plan.arena_bytes, silent_after)?)
    }
}

impl Drop for Lobby {
    fn drop(&mut self) {
        self.shared.stopped.store(true, Ordering::Release);
        self.shared.stop.ring();
        if let Some(thread) = self.thread.take() {
            // The thread does not panic, and there is nothing to do if it did.
            let _ = thread.join();
        }
    }
}

/// Members whose process has ended, or who speak before they are spoken to.
fn forget_the_gone(waiting: &mut VecDeque<Member>) {
    waiting.retain(|member| matches!(member.channel.try_receive(), Ok(None)));
}

fn accept(listener: &TcpListener, shared: &Arc<Shared>) {
    /// Sleeps no longer than this when the system has no descriptor or thread left.
    const PAUSE: Duration = Duration::from_millis(50);
    while !shared.stopped.load(Ordering::Acquire) {
        match listener.accept() {
            Ok((stream, from)) => {
                if shared.strangers.fetch_add(1, Ordering::Relaxed) >= STRANGERS_MAX {
                    shared.strangers.fetch_sub(1, Ordering::Relaxed);
                    continue;
                }
                let own = Arc::clone(shared);
                let thread = std::thread::Builder::new().name("examination".to_owned());
                if thread.spawn(move || own.examine(stream, from)).is_err() {
                    shared.strangers.fetch_sub(1, Ordering::Relaxed);
                }
            }
            Err(error) if would_block(&error) => {
                let fds = [listener.as_raw_fd(), shared.stop.as_raw_fd()];
                let interests = fds.into_iter().map(|fd| Interest { fd, write: false });
                poll(interests, Duration::from_secs(1));
            }
            Err(_) => std::thread::sleep(PAUSE),
        }
    }
}

/// Why somebody may not join.
enum Refusal {
    /// To be told to it.
    Told(String),
    /// There is nobody to tell.
    Gone(ChannelError),
}

impl From<ChannelError> for Refusal {
    fn from(error: ChannelError) -> Refusal {
        Refusal::Gone(error)
    }
}

impl Shared {
    fn examine(&self, stream: TcpStream, from: SocketAddr) {
        let deadline = Instant::now() + EXAMINATION;
        let known = self.prove(stream, deadline);
        // From here on it is no stranger, or it is gone.
        self.strangers.fetch_sub(1, Ordering::Relaxed);
        let result = known.and_then(|member| {
            let admitted = self.compare(&member);
            if let Err(Refusal::Told(reason)) = &admitted {
                let reason = reason.clone();
                // It is refused either way.
                let _ = member.channel.send(&Message::Refused { reason }.encode());
            }
            admitted.map(|()| member)
        });
        match result {
            Ok(member) => {
                lock(&self.waiting).push_back(member);
                self.news.notify_all();
            }
            Err(Refusal::Told(reason)) => self.note(from, &reason),
            Err(Refusal::Gone(error)) => self.note(from, &error.to_string()),
        }
    }

    fn note(&self, from: SocketAddr, reason: &str) {
        let mut refusals = lock(&self.refusals);
        if refusals.len() == REFUSALS_MAX {
            refusals.pop_front();
        }
        refusals.push_back(format!("{from}: {reason}"));
    }

    /// Both sides show that they know the token.
    fn prove(&self, stream: TcpStream, deadline: Instant) -> Result<Member, Refusal> {
        let channel = if self.options.policy.protects_control() {
            let session = tls::server().map_err(ChannelError::from)?;
            Channel::protected(stream, session, deadline)?
        } else {
            Channel::clear(stream)?
        };
        let result = self.converse(&channel, deadline);
        if let Err(Refusal::Told(reason)) = &result {
            let reason = reason.clone();
            // It is refused either way.
            let _ = channel.send(&Message::Refused { reason }.encode());
        }
        let data = result?;
        Ok(Member { data, channel })
    }

    fn converse(&self, channel: &Channel, deadline: Instant) -> Result<SocketAddr, Refusal> {
        let LobbyOptions { token, policy, version, .. } = &self.options;
        let Message::Hello { protocol, version: theirs, policy: offered, nonce } =
            hear(channel, deadline)?
        else {
            return Err(unexpected());
        };
        if protocol != PROTOCOL || theirs != *version {
            let reason =
                format!("this is Pomona {version}, the node is {theirs}: run the same version");
            return Err(Refusal::Told(reason));
        }
        if offered != *policy {
            let reason =
                format!("the policy here is '{policy}', the node's is '{offered}': use the same");
            return Err(Refusal::Told(reason));
        }
        let own = hex(&random::<32>());
        let bound = binding(&channel.exporter()?, &nonce, &own);
        let challenge = Message::Challenge {
            version: version.clone(),
            policy: *policy,
            nonce: own,
            proof: hex(&token.prove(Side::Leader, &bound)),
        };
        channel.send(&challenge.encode())?;
        let (proof, mut data) = match hear(channel, deadline)? {
            Message::Proof { proof, data } => (proof, data),
            Message::Refused { .. } => return Err(Refusal::Gone(ChannelError::Closed)),
            _ => return Err(unexpected()),
        };
        let proof = unhex(&proof).ok_or_else(unexpected)?;
        if !token.accepts(Side::Node, &bound, &proof) {
            let reason = "the token is not the one of this leader: copy it from there";
            return Err(Refusal::Told(reason.to_owned()));
        }
        let (seen, _): (IpAddr, _) = channel.machines()?;
        if data.ip().is_unspecified() {
            data.set_ip(seen);
        }
        Ok(data)
    }

    /// One that knows the token has to have the same weights.
    fn compare(&self, member: &Member) -> Result<(), Refusal> {
        let LobbyOptions { task, fingerprint, preparation, .. } = &self.options;
        if lock(&self.waiting).len() >= RANKS_MAX {
            return Err(Refusal::Told(format!("{RANKS_MAX} nodes wait already")));
        }
        member.channel.send(&Message::Offer { task: task.clone() }.encode())?;
        let theirs = match hear(&member.channel, Instant::now() + *preparation)? {
            Message::Ready { fingerprint } => unhex::<32>(&fingerprint).ok_or_else(unexpected)?,
            Message::Refused { .. } => return Err(Refusal::Gone(ChannelError::Closed)),
            _ => return Err(unexpected()),
        };
        if theirs != *fingerprint {
            let reason = format!(
                "the weights differ: fingerprint {} here, {} at the node: use the same file",
                hex(&fingerprint[..8]),
                hex(&theirs[..8]),
            );
            return Err(Refusal::Told(reason));
        }
        Ok(member.channel.send(&Message::Admitted {}.encode())?)
    }
}

fn hear(channel: &Channel, deadline: Instant) -> Result<Message, Refusal> {
    let bytes = channel.receive(Some(deadline))?;
    Message::decode(&bytes).ok_or_else(unexpected)
}

fn unexpected() -> Refusal {
    Refusal::Told("not what a node of this version says".to_owned())
}
