//! What leader and nodes say to each other before an epoch, as JSON.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use super::channel::split_message;
use super::transport::Transport;
use crate::secure::Policy;

/// Changes whenever a message does.
pub(crate) const PROTOCOL: u32 = 1;

/// One message, in the order of a conversation; each side may say `Refused` at any point.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "is", rename_all = "lowercase", deny_unknown_fields)]
pub(crate) enum Message {
    /// Node: who comes. The nonce goes into the proofs.
    Hello { protocol: u32, version: String, policy: Policy, nonce: String },
    /// Leader: proves that it knows the token.
    Challenge { version: String, policy: Policy, nonce: String, proof: String },
    /// Node: proves it too, and tells where it listens for other ranks; an address of all zeros
    /// stands for the one that the leader sees.
    Proof { proof: String, data: SocketAddr },
    /// Leader: what will be run.
    Offer { task: String },
    /// Node: the weights that it has for it.
    Ready { fingerprint: String },
    /// Leader: wait for an epoch.
    Admitted {},
    /// Leader: connect now.
    Start(Box<Start>),
    /// Either: no, and why.
    Refused { reason: String },
}

/// An epoch, as one node needs it.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Start {
    pub(crate) epoch: u32,
    pub(crate) rank: usize,
    pub(crate) addresses: Vec<SocketAddr>,
    pub(crate) secret: String,
    pub(crate) transport: Transport,
    pub(crate) arena_bytes: usize,
    pub(crate) silent_ms: u32,
    pub(crate) timeout_ms: u32,
    pub(crate) task: String,
}

impl Message {
    pub(crate) fn encode(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("a message has text and numbers only")
    }

    /// Of a peer.
    pub(crate) fn decode(bytes: &[u8]) -> Option<Message> {
        serde_json::from_slice(bytes).ok()
    }
}

/// What both proofs of a conversation are bound to.
pub(crate) fn binding(exporter: &[u8], node: &str, leader: &str) -> Vec<u8> {
    let lengths = format!("{} {} {};", exporter.len(), node.len(), leader.len());
    [lengths.as_bytes(), exporter, node.as_bytes(), leader.as_bytes()].concat()
}

/// Reads messages as from a connection: for tests with hostile bytes, which only ask that it
/// returns.
pub fn parse_hostile_messages(bytes: &[u8]) {
    let mut buffer = bytes.to_vec();
    while let Ok(Some(message)) = split_message(&mut buffer) {
        if let Some(message) = Message::decode(&message) {
            assert_eq!(Message::decode(&message.encode()), Some(message));
        }
    }
}
