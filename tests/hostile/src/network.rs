//! What other machines send to a rank: frames of data, and messages of those who join.

/// Frames of a data connection, in pieces whose lengths the first bytes say.
pub fn frames(input: &[u8]) {
    pomona_fabric::link::tcp::parse_hostile_frames(input);
}

/// Messages of a control connection in clear.
pub fn messages(input: &[u8]) {
    pomona_fabric::rendezvous::parse_hostile_messages(input);
}
