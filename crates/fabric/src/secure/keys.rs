//! Keys of one epoch: every pair of ranks, direction and channel has its own, and a new connection
//! has new ones, since both ends put a random number in.
//!
//! All come from one secret that the leader draws for the epoch and sends over control connections.

use std::fmt;

use ring::{hkdf, hmac};

use super::{hex, random, unhex};

/// What the ranks of an epoch share, and nobody else knows.
#[derive(Clone, PartialEq, Eq)]
pub struct EpochSecret([u8; 32]);

/// Which way bytes go on a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From who connected.
    FromConnector,
    /// To it.
    ToConnector,
}

/// Keys of the two directions.
#[derive(Clone)]
pub struct PairKeys {
    from_connector: [u8; 32],
    to_connector: [u8; 32],
}

/// What a message of a handshake is confirmed with.
pub type Confirmation = [u8; 32];

impl EpochSecret {
    /// A new one.
    pub fn generate() -> EpochSecret {
        EpochSecret(random())
    }

    /// For a message on a control connection, which nobody else reads.
    pub fn to_hex(&self) -> String {
        hex(&self.0)
    }

    /// What such a message holds, if it does.
    pub fn from_hex(text: &str) -> Option<EpochSecret> {
        unhex(text).map(EpochSecret)
    }

    /// Confirms `parts` as message `label` of a handshake.
    pub(crate) fn confirm(&self, label: &str, parts: &[&[u8]]) -> Confirmation {
        let tag = self.context(label, parts).sign();
        tag.as_ref().try_into().expect("HMAC-SHA256 has 32 bytes")
    }

    /// Whether somebody with the same secret confirmed the same; in constant time.
    pub(crate) fn accepts(&self, label: &str, parts: &[&[u8]], tag: &Confirmation) -> bool {
        let key = hmac::Key::new(hmac::HMAC_SHA256, &self.0);
        // The tag of the tag, for ring compares in constant time where it makes the tag itself.
        let ours = hmac::sign(&key, &self.confirm(label, parts));
        hmac::verify(&key, tag, ours.as_ref()).is_ok()
    }

    fn context(&self, label: &str, parts: &[&[u8]]) -> hmac::Context {
        let key = hmac::Key::new(hmac::HMAC_SHA256, &self.0);
        let mut context = hmac::Context::with_key(&key);
        for part in [label.as_bytes()].iter().chain(parts) {
            context.update(&(part.len() as u64).to_le_bytes());
            context.update(part);
        }
        context
    }

    /// Keys of one connection. `hello` tells who, in which epoch, on which channel; the nonces are
    /// what both ends drew for it.
    pub(crate) fn pair(&self, hello: &[u8], nonces: [&[u8; 32]; 2]) -> PairKeys {
        let salt = hkdf::Salt::new(hkdf::HKDF_SHA256, &nonces.map(|nonce| *nonce).concat());
        let random = salt.extract(&self.0);
        let key = |direction: &[u8]| {
            let info = [b"pomona fabric ".as_slice(), direction, hello];
            let mut bytes = [0; 32];
            random
                .expand(&info, hkdf::HKDF_SHA256)
                .and_then(|key| key.fill(&mut bytes))
                .expect("one block of SHA-256 is within HKDF's length");
            bytes
        };
        PairKeys { from_connector: key(b"from connector"), to_connector: key(b"to connector") }
    }
}

impl PairKeys {
    pub(crate) fn of(&self, direction: Direction) -> &[u8; 32] {
        match direction {
            Direction::FromConnector => &self.from_connector,
            Direction::ToConnector => &self.to_connector,
        }
    }
}

/// Without the secret.
impl fmt::Debug for EpochSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("EpochSecret(..)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_connection_direction_and_epoch_has_keys_of_its_own() {
        let (secret, next) = (EpochSecret::generate(), EpochSecret::generate());
        let (a, b) = ([1; 32], [2; 32]);
        let keys = [
            secret.pair(b"0 to 1", [&a, &b]),
            secret.pair(b"0 to 2", [&a, &b]),
            secret.pair(b"0 to 1", [&b, &a]),
            next.pair(b"0 to 1", [&a, &b]),
        ];
        let mut all: Vec<_> =
            keys.iter().flat_map(|keys| [keys.from_connector, keys.to_connector]).collect();
        all.sort();
        all.dedup();
        assert_eq!(all.len(), 8);
        let again = secret.pair(b"0 to 1", [&a, &b]);
        assert_eq!(again.of(Direction::FromConnector), keys[0].of(Direction::FromConnector));
    }

    #[test]
    fn a_confirmation_is_of_one_message() {
        let secret = EpochSecret::generate();
        let tag = secret.confirm("hello", &[b"ab", b"c"]);
        assert!(secret.accepts("hello", &[b"ab", b"c"], &tag));
        assert!(!secret.accepts("hello", &[b"a", b"bc"], &tag));
        assert!(!secret.accepts("welcome", &[b"ab", b"c"], &tag));
        assert!(!EpochSecret::generate().accepts("hello", &[b"ab", b"c"], &tag));
    }
}
