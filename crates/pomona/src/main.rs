//! The Pomona command.
fn main() {}
