//! What keeps strangers out and bytes private between machines: the policy, the token with which
//! ranks join, the keys of an epoch, and sealed records.
//!
//! Pure but for random numbers. Does not know sockets; certificates and TLS are `rendezvous`'s.

mod keys;
mod record;
mod token;

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

pub use self::keys::{Confirmation, Direction, EpochSecret, PairKeys};
pub use self::record::{Opener, RECORD_BYTES_MAX, RECORD_EXTRA_BYTES, RecordError, Sealer};
pub(crate) use self::token::Side;
pub use self::token::{Proof, Token, TokenError};

/// What is protected between machines. Both ends of a connection have the same one; whoever is
/// offered another refuses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Policy {
    /// Nothing: for one machine, or a network that is trusted.
    Off,
    /// Control is mutual TLS 1.3; data is sent in clear by ranks that have proven who they are.
    Auth,
    /// And data are sealed records.
    #[default]
    Seal,
}

impl Policy {
    /// Whether control connections are TLS, and pulses sealed.
    pub fn protects_control(self) -> bool {
        self != Policy::Off
    }

    /// Whether data are sealed.
    pub fn seals_data(self) -> bool {
        self == Policy::Seal
    }

    /// Its place in a handshake.
    pub(crate) fn byte(self) -> u8 {
        match self {
            Policy::Off => 0,
            Policy::Auth => 1,
            Policy::Seal => 2,
        }
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Policy::Off => "off",
            Policy::Auth => "auth",
            Policy::Seal => "seal",
        })
    }
}

impl FromStr for Policy {
    type Err = String;

    fn from_str(text: &str) -> Result<Policy, String> {
        match text {
            "off" => Ok(Policy::Off),
            "auth" => Ok(Policy::Auth),
            "seal" => Ok(Policy::Seal),
            _ => Err(format!("the policy is off, auth or seal, not '{text}'")),
        }
    }
}

/// Random bytes of the operating system.
pub(crate) fn random<const N: usize>() -> [u8; N] {
    use ring::rand::SecureRandom;
    let mut bytes = [0; N];
    ring::rand::SystemRandom::new()
        .fill(&mut bytes)
        .expect("the operating system has random numbers once it has started");
    bytes
}

/// Bytes as text.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The other way, for a fixed length.
pub(crate) fn unhex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let digits: Option<Vec<u32>> = text.chars().map(|c| c.to_digit(16)).collect();
    let digits = digits.filter(|digits| digits.len() == 2 * N)?;
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = (pair[0] << 4 | pair[1]) as u8;
    }
    Some(bytes)
}
