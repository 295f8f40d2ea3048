//! One-sided transfer: regions of an arena that others write and read without a call there.
//!
//! A rank registers a region and gives its [`Handle`] to others, by whatever way it talks to them.
//! They put bytes into it, with a number that arrives behind them, or get bytes from it. Handles
//! carry the epoch and a generation, so one of an earlier life is refused. A region that is closed
//! stays in quarantine until every other rank has said that no put of its is on its way; only then
//! are its bytes given out again.
//!
//! Each pair has a ring of notices beside the regions. They are taken in the order in which they
//! were given, whatever order they arrive in, each when the bytes that it is about are in place:
//! so a notice also says that all before it is done. Whoever waits here, or calls
//! [`Transfer::arrival`], answers the others; where arenas can be reached in place, a get needs
//! nobody.

use std::collections::{BTreeSet, VecDeque};
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use pomona_types::{GroupError, LostCause};

use crate::link::Link;
use crate::wait::{self, Awaited};

mod notice;
mod regions;

use self::notice::{Kind, NOTICE_BYTES, Notice};
pub use self::regions::Handle;
use self::regions::Regions;

/// Notices of a pair that can be on their way.
const RING: usize = 8;
/// So many are given back at once.
const CREDIT: u64 = RING as u64 / 2;
/// Counters: two for each place of the ring, for its notice and its bytes, which may overtake
/// each other and the next ones; credits; answers.
pub(crate) const COUNTERS_TAKEN: usize = 2 * RING + 2;
/// What an answer to a get has room for.
const ANSWER_BYTES: usize = 64 << 10;
/// Numbers that have arrived and were not asked for. With more, senders wait.
const ARRIVALS_MAX: usize = 1024;

/// A number that has arrived behind the bytes of a put.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arrival {
    /// Who put them.
    pub from: usize,
    /// Where.
    pub region: Handle,
    /// The number.
    pub immediate: u32,
}

/// What all ranks of an epoch use to reach into each other's regions.
pub struct Transfer {
    link: Arc<dyn Link>,
    limit: Duration,
    first_counter: usize,
    rings_at: usize,
    answers_at: usize,
    regions: Regions,
    pairs: Vec<Pair>,
    arrivals: VecDeque<Arrival>,
    /// Regions of others that are closed: rank, generation.
    closed: BTreeSet<(usize, u64)>,
}

/// Notices to and from one rank so far.
#[derive(Clone, Copy, Default)]
struct Pair {
    given: u64,
    taken: u64,
    /// Answers that were asked for; and fences of ours that are done.
    answers: u32,
    fenced: u64,
}

impl Transfer {
    /// In `part` of everyone's arena, with the counters from `first_counter` on.
    pub(crate) fn new(
        link: Arc<dyn Link>,
        limit: Duration,
        part: Range<usize>,
        first_counter: usize,
    ) -> Result<Transfer, GroupError> {
        let ranks = link.ranks();
        let answers_at = part.start + ranks * RING * NOTICE_BYTES;
        let regions_at = answers_at + ranks * ANSWER_BYTES;
        if regions_at >= part.end {
            let (least, given) = (regions_at - part.start, part.len());
            return Err(GroupError::Invalid(format!(
                "{given} bytes for transfers among {ranks} ranks: {least} are taken by notices"
            )));
        }
        let regions = Regions::new(link.rank(), link.epoch(), ranks, regions_at..part.end);
        Ok(Transfer {
            limit,
            first_counter,
            rings_at: part.start,
            answers_at,
            regions,
            pairs: vec![Pair::default(); ranks],
            arrivals: VecDeque::new(),
            closed: BTreeSet::new(),
            link,
        })
    }

    /// Makes a region of the own arena that others may reach. None if no room is left, now that
    /// those in quarantine count too.
    pub fn register(&mut self, bytes: usize) -> Option<Handle> {
        self.regions.register(bytes)
    }

    /// Ends a region: others are told, and its bytes are free when all have answered.
    pub fn close(&mut self, region: Handle) -> Result<(), GroupError> {
        if !self.regions.close(region) {
            return Err(GroupError::Invalid(format!("{region:?} is no open region of this rank")));
        }
        self.others().try_for_each(|rank| self.give(rank, Kind::Close, region, 0, 0))
    }

    /// Bytes of regions that are closed and not yet free.
    pub fn quarantined_bytes(&self) -> usize {
        self.regions.quarantined_bytes()
    }

    /// Reads bytes of an own region.
    pub fn read(&self, region: Handle, offset: usize, out: &mut [u8]) -> Result<(), GroupError> {
        let at = self.own_place(region, offset, out.len())?;
        self.copy_from(self.link.rank(), at, out);
        Ok(())
    }

    /// Writes bytes of an own region.
    pub fn write(&mut self, region: Handle, offset: usize, bytes: &[u8]) -> Result<(), GroupError> {
        let at = self.own_place(region, offset, bytes.len())?;
        let own = self.link.arena(self.link.rank()).expect("the own arena is in place");
        // SAFETY: a region is within the arena, and the offset was checked. That nobody reads or
        // writes the same bytes now is what those agree on who share the region.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), own.add(at), bytes.len()) };
        Ok(())
    }

    /// Puts bytes into a region of another rank, and a number behind them.
    pub fn put(
        &mut self,
        region: Handle,
        offset: usize,
        parts: &[&[u8]],
        immediate: u32,
    ) -> Result<(), GroupError> {
        let length = parts.iter().map(|part| part.len()).sum();
        self.check(region, offset, length)?;
        self.wait_for_room(region.rank)?;
        let counter = self.bytes_counter(self.pairs[region.rank].given);
        self.link.put(region.rank, region.at + offset, parts, counter)?;
        self.give(region.rank, Kind::Put, region, offset, u64::from(immediate))
    }

    /// Gets bytes of a region of another rank.
    pub fn get(
        &mut self,
        region: Handle,
        offset: usize,
        into: &mut [u8],
    ) -> Result<(), GroupError> {
        self.check(region, offset, into.len())?;
        if self.link.arena(region.rank).is_some() {
            self.copy_from(region.rank, region.at + offset, into);
            return Ok(());
        }
        for (index, piece) in into.chunks_mut(ANSWER_BYTES).enumerate() {
            let (at, length) = (offset + index * ANSWER_BYTES, piece.len() as u64);
            self.give(region.rank, Kind::Get, region, at, length)?;
            self.pairs[region.rank].answers += 1;
            let target = self.pairs[region.rank].answers;
            self.wait(region.rank, self.answer_counter(), target)?;
            let at = self.answers_at + region.rank * ANSWER_BYTES;
            self.copy_from(self.link.rank(), at, piece);
        }
        Ok(())
    }

    /// Returns when all that was put to a rank so far is in place there.
    pub fn fence(&mut self, rank: usize) -> Result<(), GroupError> {
        let nothing = Handle { rank, epoch: self.link.epoch(), generation: 0, at: 0, bytes: 0 };
        let done = self.pairs[rank].fenced + 1;
        self.give(rank, Kind::Fence, nothing, 0, 0)?;
        while self.pairs[rank].fenced < done {
            self.wait_for_notice(rank)?;
            self.serve()?;
        }
        Ok(())
    }

    /// The next number that has arrived. Does not wait; answers what others want of this rank.
    pub fn arrival(&mut self) -> Result<Option<Arrival>, GroupError> {
        self.serve()?;
        Ok(self.arrivals.pop_front())
    }

    /// Waits for a number from `rank`; those of others are kept for later.
    pub fn arrival_from(&mut self, rank: usize) -> Result<Arrival, GroupError> {
        loop {
            self.serve()?;
            let from = |arrival: &Arrival| arrival.from == rank;
            if let Some(index) = self.arrivals.iter().position(from) {
                return Ok(self.arrivals.remove(index).expect("it was just found"));
            }
            self.wait_for_notice(rank)?;
        }
    }

    fn own_place(&self, region: Handle, offset: usize, length: usize) -> Result<usize, GroupError> {
        let fits = offset.checked_add(length).is_some_and(|end| end <= region.bytes);
        if !fits || !self.regions.is_open(region) {
            let why = format!("{length} bytes at {offset} of {region:?}, which is not open");
            return Err(GroupError::Invalid(why));
        }
        Ok(region.at + offset)
    }

    /// A handle of this epoch, of another rank, open as far as is known here, and large enough.
    fn check(&self, region: Handle, offset: usize, length: usize) -> Result<(), GroupError> {
        let why = if region.epoch != self.link.epoch() {
            format!("it is of epoch {}, and this is {}", region.epoch, self.link.epoch())
        } else if region.rank >= self.pairs.len() || region.rank == self.link.rank() {
            "it is of no other rank".into()
        } else if self.closed.contains(&(region.rank, region.generation)) {
            "it is closed".into()
        } else if offset.checked_add(length).is_none_or(|end| end > region.bytes) {
            format!("{length} bytes at {offset} are not in it")
        } else if let Some(why) = self.link.aborted() {
            return Err(why);
        } else {
            return Ok(());
        };
        Err(GroupError::Invalid(format!("{region:?}: {why}")))
    }

    fn copy_from(&self, rank: usize, at: usize, out: &mut [u8]) {
        let arena = self.link.arena(rank).expect("asked for where it can be reached");
        assert!(at.checked_add(out.len()).is_some_and(|end| end <= self.link.arena_bytes()));
        // SAFETY: within the arena, as just asserted. That nobody writes the same bytes now is
        // what those agree on who share the region.
        unsafe { std::ptr::copy_nonoverlapping(arena.add(at), out.as_mut_ptr(), out.len()) };
    }

    fn others(&self) -> impl Iterator<Item = usize> + use<> {
        let own = self.link.rank();
        (0..self.pairs.len()).filter(move |rank| *rank != own)
    }

    fn notice_counter(&self, index: u64) -> usize {
        self.first_counter + (index % RING as u64) as usize
    }

    fn bytes_counter(&self, index: u64) -> usize {
        self.first_counter + RING + (index % RING as u64) as usize
    }

    fn credit_counter(&self) -> usize {
        self.first_counter + 2 * RING
    }

    fn answer_counter(&self) -> usize {
        self.first_counter + 2 * RING + 1
    }

    /// The counter of the next notice from a rank, and what it is when that is there.
    fn notice_due(&self, rank: usize) -> (usize, u32) {
        let taken = self.pairs[rank].taken;
        (self.notice_counter(taken), (taken / RING as u64 + 1) as u32)
    }

    /// Waits, and answers others meanwhile.
    fn wait(&mut self, peer: usize, counter: usize, target: u32) -> Result<(), GroupError> {
        let (link, limit) = (self.link.clone(), self.limit);
        let waited = wait::wait(&*link, Awaited { peer, counter, target }, |waited| {
            self.serve()?;
            if waited < limit {
                return Ok(());
            }
            let (call, after_ms) = ("a transfer".into(), waited.as_millis() as u32);
            let cause = LostCause::Late { call, after_ms };
            Err(GroupError::PeerLost { rank: peer, epoch: link.epoch(), cause })
        });
        waited.map_err(|why| wait::end(&*self.link, peer, why))
    }

    /// Waits for a rank's next notice, and for the bytes that it is about.
    fn wait_for_notice(&mut self, rank: usize) -> Result<(), GroupError> {
        let (counter, target) = self.notice_due(rank);
        let bytes = self.bytes_counter(self.pairs[rank].taken);
        self.wait(rank, counter, target)?;
        self.wait(rank, bytes, target)
    }

    /// Waits until the ring to a rank has a free place. Answers that are given meanwhile take
    /// places too, so it looks again after each wait.
    fn wait_for_room(&mut self, rank: usize) -> Result<(), GroupError> {
        loop {
            let given_back = (self.pairs[rank].given + 1).saturating_sub(RING as u64);
            let target = given_back.div_ceil(CREDIT) as u32;
            let credits = self.link.count(rank, self.credit_counter());
            if credits.wrapping_sub(target) as i32 >= 0 {
                return Ok(());
            }
            self.wait(rank, self.credit_counter(), target)?;
        }
    }

    /// Gives a notice to a rank.
    fn give(
        &mut self,
        rank: usize,
        kind: Kind,
        region: Handle,
        offset: usize,
        value: u64,
    ) -> Result<(), GroupError> {
        self.wait_for_room(rank)?;
        let notice = Notice { kind, region, offset: offset as u64, value };
        let given = self.pairs[rank].given;
        let slot = (given % RING as u64) as usize;
        let at = self.rings_at + (self.link.rank() * RING + slot) * NOTICE_BYTES;
        self.link.put(rank, at, &[&notice.encode()], self.notice_counter(given))?;
        if kind != Kind::Put {
            // Each place of the ring has had as many bytes as notices.
            self.link.put(rank, at, &[], self.bytes_counter(given))?;
        }
        self.pairs[rank].given += 1;
        Ok(())
    }

    /// Takes all notices that are due, and does what they ask for.
    fn serve(&mut self) -> Result<(), GroupError> {
        for rank in self.others() {
            while self.arrivals.len() < ARRIVALS_MAX && self.is_due(rank) {
                self.take(rank)?;
            }
        }
        Ok(())
    }

    /// Whether a rank's next notice is there, and the bytes that it is about.
    fn is_due(&self, rank: usize) -> bool {
        let (counter, target) = self.notice_due(rank);
        let bytes = self.bytes_counter(self.pairs[rank].taken);
        let there = |counter| self.link.count(rank, counter).wrapping_sub(target) as i32 >= 0;
        there(counter) && there(bytes)
    }

    fn take(&mut self, rank: usize) -> Result<(), GroupError> {
        let taken = self.pairs[rank].taken;
        let slot = (taken % RING as u64) as usize;
        let mut bytes = [0; NOTICE_BYTES];
        let at = self.rings_at + (rank * RING + slot) * NOTICE_BYTES;
        self.copy_from(self.link.rank(), at, &mut bytes);
        self.pairs[rank].taken += 1;
        if self.pairs[rank].taken.is_multiple_of(CREDIT) {
            self.link.put(rank, at, &[], self.credit_counter())?;
        }
        let Some(Notice { kind, region, offset, value }) = Notice::decode(&bytes) else {
            let cause = LostCause::Failed("it gave a notice that is none".into());
            let why = GroupError::PeerLost { rank, epoch: self.link.epoch(), cause };
            return Err(wait::end(&*self.link, rank, why));
        };
        match kind {
            // One that was closed in the meantime has nobody who waits for it.
            Kind::Put if self.regions.is_open(region) => {
                let immediate = value as u32;
                self.arrivals.push_back(Arrival { from: rank, region, immediate });
                Ok(())
            }
            Kind::Put => Ok(()),
            Kind::Get => self.answer(rank, region, offset as usize, value as usize),
            Kind::Fence => self.give(rank, Kind::Fenced, region, 0, 0),
            Kind::Fenced => {
                self.pairs[rank].fenced += 1;
                Ok(())
            }
            Kind::Close => {
                self.closed.insert((rank, region.generation));
                self.give(rank, Kind::Closed, region, 0, 0)
            }
            Kind::Closed => {
                self.regions.released(region);
                Ok(())
            }
        }
    }

    /// Puts what a rank wants to get where it waits for it. Of a region that was closed in the
    /// meantime it gets zeros.
    fn answer(
        &mut self,
        rank: usize,
        region: Handle,
        offset: usize,
        length: usize,
    ) -> Result<(), GroupError> {
        let mut bytes = vec![0; length.min(ANSWER_BYTES)];
        if let Ok(at) = self.own_place(region, offset, bytes.len()) {
            self.copy_from(self.link.rank(), at, &mut bytes);
        }
        let at = self.answers_at + self.link.rank() * ANSWER_BYTES;
        self.link.put(rank, at, &[&bytes], self.answer_counter())
    }
}
