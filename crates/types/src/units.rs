//! Units. A bare integer never says what it counts; these do.

use std::ops::{Add, Sub};

/// Tokens in one block of KV cache. A block is the unit of allocation, hashing and sharing.
pub const BLOCK_TOKENS: u32 = 16;

/// Blocks in a split of a sequence: attention's partial sums end there, and ranks that keep a
/// sequence together keep whole splits.
pub const SPLIT_BLOCKS: u32 = 16;

/// Most of so many blocks, one after another in a sequence, that one of `ranks` ranks keeps which
/// keep splits in turn.
pub fn blocks_of_one_rank(blocks: u64, ranks: u32) -> u64 {
    let [split, turn] = [SPLIT_BLOCKS, SPLIT_BLOCKS * ranks].map(u64::from);
    (blocks / turn).saturating_mul(split).saturating_add(split.min(blocks % turn))
}

/// A time or a duration in microseconds. Pure crates are handed it; they never read a clock.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Micros(pub u64);

impl Add for Micros {
    type Output = Micros;
    fn add(self, other: Micros) -> Micros {
        Micros(self.0 + other.0)
    }
}

impl Sub for Micros {
    type Output = Micros;
    /// The time since `other`, zero when `other` lies later.
    fn sub(self, other: Micros) -> Micros {
        Micros(self.0.saturating_sub(other.0))
    }
}
