//! A rank's own regions: open, in quarantine, or free.

use std::collections::BTreeMap;
use std::ops::Range;

/// Regions begin at multiples of this.
const ALIGNMENT: usize = 64;

/// What names a region to other ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Handle {
    /// Whose it is.
    pub rank: usize,
    /// In which epoch.
    pub(super) epoch: u32,
    /// No two regions of a rank have the same.
    pub(super) generation: u64,
    /// Where it is in the arena.
    pub(super) at: usize,
    /// How large it is.
    pub bytes: usize,
}

impl Handle {
    /// How long one is, to be sent.
    pub const BYTES: usize = 40;

    /// As bytes.
    pub fn encode(&self) -> [u8; Handle::BYTES] {
        let mut bytes = [0; Handle::BYTES];
        let numbers = [
            self.rank as u64,
            u64::from(self.epoch),
            self.generation,
            self.at as u64,
            self.bytes as u64,
        ];
        for (place, number) in bytes.chunks_exact_mut(8).zip(numbers) {
            place.copy_from_slice(&number.to_le_bytes());
        }
        bytes
    }

    /// The handle that these bytes are. One that makes no sense is refused where it is used.
    pub fn decode(bytes: &[u8; Handle::BYTES]) -> Handle {
        let (numbers, _) = bytes.as_chunks::<8>();
        let number = |index: usize| u64::from_le_bytes(numbers[index]);
        Handle {
            rank: number(0) as usize,
            epoch: number(1) as u32,
            generation: number(2),
            at: number(3) as usize,
            bytes: number(4) as usize,
        }
    }
}

/// The regions of one rank.
pub(super) struct Regions {
    rank: usize,
    epoch: u32,
    ranks: usize,
    next_generation: u64,
    /// By their start: the length.
    free: BTreeMap<usize, usize>,
    /// By generation.
    open: BTreeMap<u64, Handle>,
    /// Closed ones, with how many ranks have not answered.
    quarantine: BTreeMap<u64, (Handle, usize)>,
}

impl Regions {
    /// All of a part of the arena is free.
    pub fn new(rank: usize, epoch: u32, ranks: usize, part: Range<usize>) -> Regions {
        let start = part.start.next_multiple_of(ALIGNMENT);
        Regions {
            rank,
            epoch,
            ranks,
            next_generation: 1,
            free: BTreeMap::from([(start, part.end.saturating_sub(start))]),
            open: BTreeMap::new(),
            quarantine: BTreeMap::new(),
        }
    }

    /// The first free place that is large enough.
    pub fn register(&mut self, bytes: usize) -> Option<Handle> {
        let taken = bytes.checked_next_multiple_of(ALIGNMENT)?.max(ALIGNMENT);
        let (at, length) = self.free.iter().find(|(_, length)| **length >= taken)?;
        let (at, length) = (*at, *length);
        self.free.remove(&at);
        if length > taken {
            self.free.insert(at + taken, length - taken);
        }
        let generation = self.next_generation;
        self.next_generation += 1;
        let handle = Handle { rank: self.rank, epoch: self.epoch, generation, at, bytes };
        self.open.insert(generation, handle);
        Some(handle)
    }

    pub fn is_open(&self, region: Handle) -> bool {
        self.open.get(&region.generation) == Some(&region)
    }

    /// Puts an open region into quarantine. Says whether it was one.
    pub fn close(&mut self, region: Handle) -> bool {
        if !self.is_open(region) {
            return false;
        }
        self.open.remove(&region.generation);
        self.quarantine.insert(region.generation, (region, self.ranks - 1));
        if self.ranks == 1 {
            self.free_region(region);
        }
        true
    }

    /// One more rank will put nothing more into a closed region.
    pub fn released(&mut self, region: Handle) {
        let Some((closed, waiting)) = self.quarantine.get_mut(&region.generation) else { return };
        let closed = *closed;
        *waiting -= 1;
        if *waiting == 0 {
            self.free_region(closed);
        }
    }

    pub fn quarantined_bytes(&self) -> usize {
        self.quarantine.values().map(|(region, _)| region.bytes).sum()
    }

    /// Joins a region with the free places beside it.
    fn free_region(&mut self, region: Handle) {
        self.quarantine.remove(&region.generation);
        let mut at = region.at;
        let mut length = region.bytes.next_multiple_of(ALIGNMENT).max(ALIGNMENT);
        if let Some(after) = self.free.remove(&(at + length)) {
            length += after;
        }
        if let Some((before, bytes)) = self.free.range(..at).next_back()
            && before + bytes == at
        {
            at = *before;
            length += bytes;
        }
        self.free.insert(at, length);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn closed_regions_are_not_given_out_before_all_have_answered() {
        let mut regions = Regions::new(0, 1, 3, 100..128 + 640);
        let all = regions.register(640).unwrap();
        assert_eq!((all.at, regions.register(1)), (128, None));
        assert!(regions.close(all) && !regions.close(all) && !regions.is_open(all));
        for _ in 1..3 {
            assert_eq!(regions.register(1), None);
            assert_eq!(regions.quarantined_bytes(), 640);
            regions.released(all);
        }
        assert_eq!(regions.quarantined_bytes(), 0);
        // Free places join again, in any order.
        let parts: Vec<Handle> = (0..10).map(|_| regions.register(60).unwrap()).collect();
        assert_eq!(regions.register(1), None);
        for index in [3, 1, 2, 9, 8, 0, 5, 7, 6, 4] {
            regions.close(parts[index]);
            regions.released(parts[index]);
            regions.released(parts[index]);
        }
        let again = regions.register(640).unwrap();
        assert_eq!(again.at, 128);
        assert_ne!(again.generation, all.generation);
    }
}
