//! Which rank of a context group keeps which block. Ranks keep whole splits of a sequence in turn,
//! and a block's number says whose it is: its lane is the number modulo the ranks. Without such a
//! group there is one lane.

use pomona_types::{SPLIT_BLOCKS, TenantId, TokenId};

/// The lanes that blocks and block tables have.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Lanes(pub(super) u32);

impl Lanes {
    /// Where a sequence's first split is kept. Equal beginnings, which may share blocks, get the
    /// same lane, now and after a preemption.
    pub(super) fn origin(self, tenant: TenantId, beginning: &[TokenId]) -> u32 {
        if self.0 == 1 {
            return 0;
        }
        // Fowler, Noll and Vo's hash (FNV-1a) over words, whose upper half is well mixed.
        let step = |hash: u64, word: u64| (hash ^ word).wrapping_mul(0x0100_0000_01b3);
        let words = beginning.iter().map(|token| u64::from(*token));
        let hash = words.fold(step(0xcbf2_9ce4_8422_2325, tenant.0), step);
        (hash >> 32) as u32 % self.0
    }

    /// The lane of a table's entry.
    pub(super) fn of(self, origin: u32, entry: u32) -> u32 {
        (origin + entry / SPLIT_BLOCKS) % self.0
    }

    /// How many of a table's first `entries` are in a lane.
    pub(super) fn count(self, origin: u32, lane: u32, entries: u32) -> u32 {
        let (split, turn) = (entries / SPLIT_BLOCKS, self.turn(origin, lane));
        let whole = split.saturating_sub(turn).div_ceil(self.0) * SPLIT_BLOCKS;
        if split % self.0 == turn { whole + entries % SPLIT_BLOCKS } else { whole }
    }

    /// The table's entry that comes behind `count` others of its lane.
    pub(super) fn entry(self, origin: u32, lane: u32, count: u32) -> u32 {
        let split = count / SPLIT_BLOCKS * self.0 + self.turn(origin, lane);
        split.saturating_mul(SPLIT_BLOCKS).saturating_add(count % SPLIT_BLOCKS)
    }

    /// A lane's first split.
    fn turn(self, origin: u32, lane: u32) -> u32 {
        (lane + self.0 - origin) % self.0
    }
}

#[cfg(test)]
mod tests {
    use pomona_types::blocks_of_one_rank;

    use super::*;

    #[test]
    fn counts_agree_with_the_lane_of_each_entry() {
        for lanes in (1..=4).map(Lanes) {
            for origin in 0..lanes.0 {
                let table: Vec<u32> = (0..150).map(|entry| lanes.of(origin, entry)).collect();
                for lane in 0..lanes.0 {
                    let own = (0u32..).zip(&table).filter(|(_, of)| **of == lane);
                    for (count, (entry, _)) in (0u32..).zip(own) {
                        assert_eq!(lanes.entry(origin, lane, count), entry);
                        assert_eq!(lanes.count(origin, lane, entry), count);
                        assert_eq!(lanes.count(origin, lane, entry + 1), count + 1);
                    }
                }
                for entries in 1..table.len() {
                    let windows = table.windows(entries);
                    let most = windows.flat_map(|window| {
                        (0..lanes.0).map(|lane| window.iter().filter(|of| **of == lane).count())
                    });
                    let bound = blocks_of_one_rank(entries as u64, lanes.0);
                    assert!(most.max().unwrap_or(0) as u64 <= bound);
                }
            }
        }
        assert_eq!(blocks_of_one_rank(u64::MAX, 1), u64::MAX);
    }

    #[test]
    fn beginnings_are_spread_over_lanes_and_equal_ones_stay_together() {
        let lanes = Lanes(3);
        let origin = |i: u32| lanes.origin(TenantId(7), &[i, i + 1, 5]);
        let mut counts = [0; 3];
        (0..300).for_each(|i| counts[origin(i) as usize] += 1);
        assert!(counts.iter().all(|count| (60..140).contains(count)), "{counts:?}");
        assert!((0..300).all(|i| origin(i) == origin(i)));
    }
}
