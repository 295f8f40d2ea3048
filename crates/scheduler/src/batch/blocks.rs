//! The pool of blocks: reference counts and one list of those that nobody holds, least recently
//! used first. All records are made once.

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
    first: u32,
    last: u32,
    free: u32,
    /// Sum of all `refs`.
    held: u64,
}

impl Blocks {
    pub(super) fn new(count: u32) -> Blocks {
        let record = |i: u32| Block {
            refs: 0,
            node: NONE,
            group: 0,
            previous: if i == 0 { NONE } else { i - 1 },
            next: if i + 1 == count { NONE } else { i + 1 },
        };
        let records = (0..count).map(record).collect();
        Blocks { records, first: 0, last: count - 1, free: count, held: 0 }
    }

    /// Blocks that nobody holds, cached ones included.
    pub(super) fn free(&self) -> u32 {
        self.free
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

    /// Takes the least recently used free block, with one reference. If it is still tied to a
    /// node, the caller unties it (`node` says which).
    pub(super) fn take(&mut self) -> Option<u32> {
        let block = self.first;
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
        let (first, last) = (self.first, self.last);
        let cached = self.get(block).node != NONE;
        let (previous, next) = if cached { (last, NONE) } else { (NONE, first) };
        let record = self.record(block);
        record.previous = previous;
        record.next = next;
        self.join(previous, block);
        self.join(block, next);
        self.free += 1;
    }

    fn unlink(&mut self, block: u32) {
        let Block { previous, next, .. } = *self.get(block);
        self.join(previous, next);
        self.free -= 1;
    }

    /// Makes `b` follow `a`; `NONE` stands for the ends.
    fn join(&mut self, a: u32, b: u32) {
        if a == NONE {
            self.first = b;
        } else {
            self.record(a).next = b;
        }
        if b == NONE {
            self.last = a;
        } else {
            self.record(b).previous = a;
        }
    }

    /// Walks everything: for tests.
    #[cfg(test)]
    pub(super) fn check(&self) {
        let mut at = self.first;
        let mut previous = NONE;
        let mut count = 0;
        while at != NONE {
            let block = self.get(at);
            assert_eq!((block.refs, block.previous), (0, previous));
            previous = at;
            at = block.next;
            count += 1;
        }
        assert_eq!(previous, self.last);
        let unheld = self.records.iter().filter(|b| b.refs == 0).count();
        assert_eq!((count, unheld), (self.free, self.free as usize));
        assert_eq!(self.records.iter().map(|b| u64::from(b.refs)).sum::<u64>(), self.held);
    }
}
