//! How ranks on different machines find each other before there is a group.
//!
//! The leader opens a [`Lobby`] on an address; nodes [`join`] it with a [`Token`], and wait. Both
//! sides prove that they know the token, and compare their versions, their policies and the weights
//! that they have: what differs is refused with the reason. The leader then starts epochs with
//! those who wait, as many as it needs; the others stay as spares. Everything from strangers is
//! bounded in bytes, number and time. Which ranks form an epoch is decided elsewhere.
//!
//! [`Token`]: crate::secure::Token

mod channel;
mod lobby;
mod message;
mod node;
mod tls;
mod transport;

#[cfg(test)]
mod tests;

pub use self::channel::{Channel, ChannelError, MESSAGE_BYTES_MAX};
pub use self::lobby::{EpochPlan, Lobby, LobbyError, LobbyOptions, Member};
pub use self::message::parse_hostile_messages;
pub use self::node::{JoinError, JoinOptions, Seat, Started, join};
pub use self::transport::Transport;

/// What tells one set of weights from another, made by whoever loads them: equal on two machines
/// only if the weights are.
pub type Fingerprint = [u8; 32];
