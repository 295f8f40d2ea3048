//! The pool of blocks: reference counts and, for each lane, one list of those that nobody holds,
//! least recently used first. All records are made once.

use super::lanes::Lanes;

/// No block, no node, end of a list.
pub(super) const NONE: u32 = u32::MAX;

#[derive(Clone, Debug)]
pub(super) struct Block {
    /// Requests that hold it.
    pub(super) refs: u32,
    /// The prefix node whose KV it holds for `group`, or `NONE`.
    pub(super) node: u32,
    pub(super) group: u32,
    previous: u32,
    next: u32,
}

/// Blocks by index. Those with `refs == 0` are linked in the free list.
#[derive(Clone, Debug)]
pub(super) struct Blocks {
    records: Vec<Block>,
    /// By lane.
    lists: Vec<List>,
    /// Sum of all `refs`.
    held: u64,
}

/// Blocks of a lane that nobody holds.
#[derive(Clone, Debug)]
struct List {
    first: u32,
    last: u32,
    len: u32,
}

impl Blocks {
    /// So many blocks, at least one for each lane.
    pub(super) fn new(count: u32, Lanes(lanes): Lanes) -> Blocks {
        let record = |i: u32| Block {
            refs: 0,
            node: NONE,
            group: 0,
            previous: i.checked_sub(lanes).unwrap_or(NONE),
            next: if count - i <= lanes { NONE } else { i + lanes },
        };
        let records = (0..count).map(record).collect();
        let list = |lane: u32| {
            let len = (count - lane).div_ceil(lanes);
            List { first: lane, last: lane + (len - 1) * lanes, len }
        };
        Blocks { records, lists: (0..lanes).map(list).collect(), held: 0 }
    }

    /// Blocks that nobody holds, cached ones included.
    pub(super) fn free(&self) -> u32 {
        self.lists.iter().map(|list| list.len).sum()
    }

    /// Those of a lane.
    pub(super) fn free_in(&self, lane: u32) -> u32 {
        self.lists[lane as usize].len
    }

    /// The lane of a block.
    pub(super) fn lane(&self, block: u32) -> u32 {
        block % self.lists.len() as u32
    }

    fn list(&mut self, block: u32) -> &mut List {
        let lane = self.lane(block);
        &mut self.lists[lane as usize]
    }

    pub(super) fn total(&self) -> u32 {
        self.records.len() as u32
    }

    /// References in all: what the tables of all requests must add up to.
    pub(super) fn held(&self) -> u64 {
        self.held
    }

    pub(super) fn get(&self, block: u32) -> &Block {
        &self.records[block as usize]
    }

    fn record(&mut self, block: u32) -> &mut Block {
        &mut self.records[block as usize]
    }

    /// Ties a held block to the prefix node whose KV it holds.
    pub(super) fn set_node(&mut self, block: u32, node: u32, group: u32) {
        let record = self.record(block);
        record.node = node;
        record.group = group;
    }

    /// Takes a lane's least recently used free block, with one reference. If it is still tied to a
    /// node, the caller unties it (`node` says which).
    pub(super) fn take(&mut self, lane: u32) -> Option<u32> {
        let block = self.lists[lane as usize].first;
        if block == NONE {
            return None;
        }
        self.unlink(block);
        self.record(block).refs = 1;
        self.held += 1;
        Some(block)
    }

    /// Adds a reference; the block leaves the free list if it was there.
    pub(super) fn hold(&mut self, block: u32) {
        if self.get(block).refs == 0 {
            self.unlink(block);
        }
        self.record(block).refs += 1;
        self.held += 1;
    }

    /// Gives a reference back. Cached blocks go to the end of the free list, others to its front.
    pub(super) fn release(&mut self, block: u32) {
        let record = self.record(block);
        assert!(record.refs > 0, "block {block} released more often than held");
        record.refs -= 1;
        self.held -= 1;
        if self.get(block).refs == 0 {
            self.link(block);
        }
    }

    fn link(&mut self, block: u32) {
        let &mut List { first, last, .. } = self.list(block);
        let cached = self.get(block).node != NONE;
        let (previous, next) = if cached { (last, NONE) } else { (NONE, first) };
        let record = self.record(block);
        record.previous = previous;
        record.next = next;
        self.join(previous, block, block);
        self.join(block, next, block);
        self.list(block).len += 1;
    }

    fn unlink(&mut self, block: u32) {
        let Block { previous, next, .. } = *self.get(block);
        self.join(previous, next, block);
        self.list(block).len -= 1;
    }

    /// Makes `b` follow `a` in the list of `of`; `NONE` stands for the ends.
    fn join(&mut self, a: u32, b: u32, of: u32) {
        if a == NONE {
            self.list(of).first = b;
        } else {
            self.record(a).next = b;
        }
        if b == NONE {
            self.list(of).last = a;
        } else {
            self.record(b).previous = a;
        }
    }

    /// Walks everything: for tests.
    #[cfg(test)]
    pub(super) fn check(&self) {
        for (lane, list) in (0u32..).zip(&self.lists) {
            let mut at = list.first;
            let mut previous = NONE;
            let mut count = 0;
            while at != NONE {
                let block = self.get(at);
                assert_eq!((block.refs, block.previous, self.lane(at)), (0, previous, lane));
                previous = at;
                at = block.next;
                count += 1;
            }
            assert_eq!((previous, count), (list.last, list.len));
        }
        let unheld = self.records.iter().filter(|b| b.refs == 0).count();
        assert_eq!(unheld, self.free() as usize);
        assert_eq!(self.records.iter().map(|b| u64::from(b.refs)).sum::<u64>(), self.held);
    }
}
