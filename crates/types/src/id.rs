//! Names of things that travel between crates.

use std::fmt;

/// A position in a model's vocabulary.
pub type TokenId = u32;

/// One request, unique for the life of a replica.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct RequestId(pub u64);

/// Whose request it is. Prefix blocks are shared within a tenant only: the tenant salts the hash
/// chain, so one tenant cannot learn from timing what another one has asked.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct TenantId(pub u64);

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "req-{:x}", self.0)
    }
}
