//! The secret with which ranks join: shown by the leader, given to each node.
//!
//! Both sides prove that they know it without sending it. The proof is bound to the connection it
//! is made on (the exporter of its TLS session, RFC 8446, 7.5), so nobody between can pass it on.

use std::fmt;
use std::str::FromStr;

use ring::hmac;

use super::{hex, random};

/// Shortest token, in characters. Whoever attacks a connection can try tokens against a recorded
/// proof without asking anybody, so a password will not do; 16 characters of base 16 are 64 bits.
const CHARACTERS_MIN: usize = 16;
/// Longest.
const CHARACTERS_MAX: usize = 256;

/// The secret of a group.
#[derive(Clone, PartialEq, Eq)]
pub struct Token(String);

/// What proves knowledge of a token on one connection.
pub type Proof = [u8; 32];

/// Which side of a connection proves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    Leader,
    Node,
}

/// A text that is no token.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "a token has {CHARACTERS_MIN} to {CHARACTERS_MAX} letters, digits or dashes; \
     the leader prints one that is good"
)]
pub struct TokenError;

impl Token {
    /// A new one of 128 random bits.
    pub fn generate() -> Token {
        Token(hex(&random::<16>()))
    }

    /// The text to give to nodes.
    pub fn reveal(&self) -> &str {
        &self.0
    }

    fn tag(&self, side: Side, binding: &[u8]) -> (hmac::Key, Vec<u8>) {
        let label: &[u8] = match side {
            Side::Leader => b"pomona join leader\0",
            Side::Node => b"pomona join node\0",
        };
        (hmac::Key::new(hmac::HMAC_SHA256, self.0.as_bytes()), [label, binding].concat())
    }

    pub(crate) fn prove(&self, side: Side, binding: &[u8]) -> Proof {
        let (key, text) = self.tag(side, binding);
        let tag = hmac::sign(&key, &text);
        tag.as_ref().try_into().expect("HMAC-SHA256 has 32 bytes")
    }

    /// Compares in constant time.
    pub(crate) fn accepts(&self, side: Side, binding: &[u8], proof: &Proof) -> bool {
        let (key, text) = self.tag(side, binding);
        hmac::verify(&key, &text, proof).is_ok()
    }
}

impl FromStr for Token {
    type Err = TokenError;

    fn from_str(text: &str) -> Result<Token, TokenError> {
        let text = text.trim();
        let fits = (CHARACTERS_MIN..=CHARACTERS_MAX).contains(&text.len());
        let plain = text.chars().all(|c| c.is_ascii_alphanumeric() || c == '-');
        if fits && plain { Ok(Token(text.to_owned())) } else { Err(TokenError) }
    }
}

/// Without the secret, lest it ends up in a log.
impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(..)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_proof_holds_for_its_token_side_and_connection_only() {
        let (token, other) = (Token::generate(), Token::generate());
        let proof = token.prove(Side::Node, b"this connection");
        assert!(token.accepts(Side::Node, b"this connection", &proof));
        assert!(!token.accepts(Side::Leader, b"this connection", &proof));
        assert!(!token.accepts(Side::Node, b"another connection", &proof));
        assert!(!other.accepts(Side::Node, b"this connection", &proof));
    }

    #[test]
    fn short_tokens_are_refused() {
        assert!("secret".parse::<Token>().is_err());
        assert!("0123456789abcde ".parse::<Token>().is_err());
        assert!("0123456789abcdef".parse::<Token>().is_ok());
        assert!(Token::generate().reveal().parse::<Token>().is_ok());
    }

    #[test]
    fn a_token_does_not_print_itself() {
        let token = Token::generate();
        assert!(!format!("{token:?}").contains(token.reveal()));
    }
}
