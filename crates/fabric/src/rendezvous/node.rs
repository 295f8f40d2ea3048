//! A node's side: finding the leader, being examined, waiting for epochs.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::channel::{Channel, ChannelError};
use super::message::{Message, PROTOCOL, Start, binding};
use super::{Fingerprint, tls};
use crate::link::Link;
use crate::link::mesh::{MeshOptions, RANKS_MAX};
use crate::link::ofi::OfiError;
use crate::secure::{EpochSecret, Policy, Side, Token, hex, random, unhex};

/// How long the leader has for each answer.
const ANSWER: Duration = Duration::from_secs(10);
/// More than any machine's memory.
const ARENA_BYTES_MAX: usize = 1 << 40;
/// How long between two tries to reach it.
const RETRY: Duration = Duration::from_millis(200);

/// How a node joins.
#[derive(Clone, Debug)]
pub struct JoinOptions {
    /// Where the leader listens, like `10.0.0.1:7000`.
    pub leader: String,
    /// What the leader printed.
    pub token: Token,
    /// What is protected.
    pub policy: Policy,
    /// The version of Pomona.
    pub version: String,
    /// Where other ranks connect; none: a free port on the address that the leader sees.
    pub data: Option<SocketAddr>,
    /// How long to try to reach the leader, which may start later.
    pub patience: Duration,
    /// How long the leader may take to admit this node once it has looked for the weights.
    pub admission: Duration,
}

/// Why a node did not join, or does not go on.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// Nobody is there.
    #[error("cannot reach the leader at {address}: {source}")]
    Unreachable {
        /// Where.
        address: String,
        /// What the system said.
        source: io::Error,
    },
    /// The leader does not want it.
    #[error("the leader refuses: {0}")]
    Refused(String),
    /// The leader is not what it should be, so this node does not want it.
    #[error("this node refuses the leader at {address}: {reason}")]
    Untrusted {
        /// Where.
        address: String,
        /// Why.
        reason: String,
    },
    /// This node cannot do the work.
    #[error("{0}")]
    Unfit(String),
    /// The connection to the leader.
    #[error("with the leader: {0}")]
    Channel(#[from] ChannelError),
    /// The ranks did not find each other.
    #[error(transparent)]
    Link(#[from] OfiError),
}

/// A place in the lobby.
pub struct Seat {
    /// The control connection.
    pub channel: Channel,
    data: TcpListener,
    policy: Policy,
}

/// An epoch that has begun.
pub struct Started {
    /// The connections to the other ranks.
    pub link: Arc<dyn Link>,
    /// What the leader tells of the work.
    pub task: String,
}

/// Joins a leader. `prepare` is given what the leader tells of the work, and returns the
/// fingerprint of the weights for it, or why there are none.
pub fn join(
    options: &JoinOptions,
    prepare: impl FnOnce(&str) -> Result<Fingerprint, String>,
) -> Result<Seat, JoinError> {
    let deadline = Instant::now() + options.patience;
    let stream = dial(&options.leader, deadline)?;
    let untrusted = |reason: &str| JoinError::Untrusted {
        address: options.leader.clone(),
        reason: reason.to_owned(),
    };
    let channel = if options.policy.protects_control() {
        let session = tls::client().map_err(ChannelError::from)?;
        Channel::protected(stream, session, Instant::now() + ANSWER).map_err(|error| {
            untrusted(&format!("the policy here is '{}', and it offers {error}", options.policy))
        })?
    } else {
        Channel::clear(stream)?
    };
    let data = listen(&channel, options.data)?;
    let port = data.local_addr().map_err(ChannelError::from)?;
    prove(options, &channel, port).map_err(|error| match error {
        Refused::ByUs(reason) => untrusted(&reason),
        Refused::Other(error) => error,
    })?;
    let Message::Offer { task } = hear(&channel, Some(Instant::now() + ANSWER))? else {
        return Err(untrusted("it offers no work"));
    };
    let fingerprint = match prepare(&task) {
        Ok(fingerprint) => hex(&fingerprint),
        Err(reason) => {
            channel.send(&Message::Refused { reason: reason.clone() }.encode())?;
            return Err(JoinError::Unfit(reason));
        }
    };
    channel.send(&Message::Ready { fingerprint }.encode())?;
    match hear(&channel, Some(Instant::now() + options.admission))? {
        Message::Admitted {} => Ok(Seat { channel, data, policy: options.policy }),
        _ => Err(untrusted("it does not say whether this node is admitted")),
    }
}

/// Who refuses whom.
enum Refused {
    ByUs(String),
    Other(JoinError),
}

impl<E: Into<JoinError>> From<E> for Refused {
    fn from(error: E) -> Refused {
        Refused::Other(error.into())
    }
}

/// Both sides show that they know the token, the leader first.
fn prove(options: &JoinOptions, channel: &Channel, data: SocketAddr) -> Result<(), Refused> {
    let own = hex(&random::<32>());
    let hello = Message::Hello {
        protocol: PROTOCOL,
        version: options.version.clone(),
        policy: options.policy,
        nonce: own.clone(),
    };
    channel.send(&hello.encode())?;
    let answer = hear(channel, Some(Instant::now() + ANSWER)).map_err(|error| match error {
        JoinError::Channel(error) => {
            let policy = options.policy;
            Refused::ByUs(format!("{error}; has it another policy than '{policy}', as here?"))
        }
        other => Refused::Other(other),
    })?;
    let Message::Challenge { version, policy, nonce, proof } = answer else {
        return Err(Refused::ByUs("it does not answer as a leader does".to_owned()));
    };
    if version != options.version || policy != options.policy {
        let reason = format!(
            "it is Pomona {version} with policy '{policy}', this is {} with '{}': use the same",
            options.version, options.policy
        );
        return Err(Refused::ByUs(reason));
    }
    let bound = binding(&channel.exporter()?, &own, &nonce);
    let known =
        unhex(&proof).is_some_and(|proof| options.token.accepts(Side::Leader, &bound, &proof));
    if !known {
        return Err(Refused::ByUs("it does not know this token: copy it from the leader".into()));
    }
    let proof = hex(&options.token.prove(Side::Node, &bound));
    Ok(channel.send(&Message::Proof { proof, data }.encode())?)
}

impl Seat {
    /// Waits for an epoch, for as long as the leader is there or until the deadline, and connects
    /// to its ranks.
    pub fn start(&self, deadline: Option<Instant>) -> Result<Started, JoinError> {
        let Message::Start(start) = hear(&self.channel, deadline)? else {
            return Err(JoinError::Unfit("the leader speaks of something else".to_owned()));
        };
        let Start { epoch, rank, addresses, secret, arena_bytes, .. } = *start;
        let secret = EpochSecret::from_hex(&secret);
        let is_one = rank < addresses.len()
            && addresses.len() <= RANKS_MAX
            && arena_bytes <= ARENA_BYTES_MAX;
        let Some(secret) = secret.filter(|_| is_one) else {
            return Err(JoinError::Unfit("the leader describes no epoch".to_owned()));
        };
        let mesh = MeshOptions {
            rank,
            addresses,
            epoch,
            secret,
            policy: self.policy,
            timeout: Duration::from_millis(start.timeout_ms.into()),
        };
        let silent_after = Duration::from_millis(start.silent_ms.into());
        let link = start.transport.connect(&self.data, mesh, arena_bytes, silent_after)?;
        Ok(Started { link, task: start.task })
    }
}

fn hear(channel: &Channel, deadline: Option<Instant>) -> Result<Message, JoinError> {
    match Message::decode(&channel.receive(deadline)?) {
        Some(Message::Refused { reason }) => Err(JoinError::Refused(reason)),
        Some(message) => Ok(message),
        None => Err(JoinError::Unfit("the leader says what no leader of this version says".into())),
    }
}

/// A port for the other ranks. On all addresses unless told otherwise: which one they can reach is
/// known by who sees this node from outside.
fn listen(channel: &Channel, wanted: Option<SocketAddr>) -> Result<TcpListener, JoinError> {
    let (leader, _) = channel.machines()?;
    let any: IpAddr = match leader {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let wanted = wanted.unwrap_or(SocketAddr::new(any, 0));
    TcpListener::bind(wanted)
        .map_err(|error| JoinError::Unfit(format!("cannot listen on {wanted}: {error}")))
}

fn dial(leader: &str, deadline: Instant) -> Result<TcpStream, JoinError> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now()).max(RETRY);
        let tried = leader.to_socket_addrs().and_then(|addresses| {
            let mut last = io::Error::other("the name has no address");
            for address in addresses {
                match TcpStream::connect_timeout(&address, left.min(ANSWER)) {
                    Ok(stream) => return Ok(stream),
                    Err(error) => last = error,
                }
            }
            Err(last)
        });
        match tried {
            Ok(stream) => return Ok(stream),
            Err(source) if Instant::now() + RETRY >= deadline => {
                return Err(JoinError::Unreachable { address: leader.to_owned(), source });
            }
            Err(_) => std::thread::sleep(RETRY),
        }
    }
}
