//! Rounds in which every member gives something to every other one.
//!
//! A round has no acknowledgement, and needs none: a rank begins round `k + 1` when it has used up
//! what came in round `k`. So who has seen all others in round `k + 1` knows that they are done
//! with round `k`, and may write over its slots in round `k + 2`: two slots are enough.

use super::call::{HEADER_BYTES, Header, Mark};
use super::lanes::{EXCHANGE_SLOTS, Lanes};
use super::sum::sum_in_order;
use super::watch::Watch;
use pomona_types::GroupError;

/// The rounds of one member so far.
#[derive(Default)]
pub(super) struct Rounds {
    begun: u64,
}

/// A round that this member has begun, until it is dropped: what came is borrowed from it. Whoever
/// begins one takes what comes [`from`](Round::from) every other member.
pub(super) struct Round<'a> {
    lanes: &'a Lanes,
    rounds: &'a mut Rounds,
    /// Whether what a member gave lies in its own arena, for all to read.
    shared: bool,
}

impl Rounds {
    /// Where the next round's own bytes may be made, if the others read them there.
    pub fn stage<'a>(&'a mut self, lanes: &'a Lanes, bytes: usize) -> Option<&'a mut [u8]> {
        if !lanes.in_place || bytes > lanes.exchange_payload {
            return None;
        }
        let at = lanes.exchange_slot(lanes.me, self.next_slot()) + HEADER_BYTES;
        // SAFETY: in the own slot of the next round, which all are done with (see above); who
        // could begin that round or stage it again has to wait until this borrow ends.
        Some(unsafe { lanes.own_mut(at, bytes) })
    }

    fn next_slot(&self) -> usize {
        (self.begun % EXCHANGE_SLOTS as u64) as usize
    }

    fn begin<'a>(&'a mut self, lanes: &'a Lanes, shared: bool) -> Round<'a> {
        self.begun += 1;
        Round { lanes, rounds: self, shared }
    }

    /// Begins a round with what was staged.
    pub fn post_staged<'a>(
        &'a mut self,
        lanes: &'a Lanes,
        mark: Mark,
        bytes: usize,
    ) -> Result<Round<'a>, GroupError> {
        let header = Header { mark, piece: bytes, whole: bytes, waits_for: 0 };
        let slot = self.next_slot();
        let at = lanes.exchange_slot(lanes.me, slot);
        // SAFETY: as in `stage`.
        unsafe { lanes.own_mut(at, HEADER_BYTES) }.copy_from_slice(&header.encode());
        for member in lanes.others() {
            lanes.link.put(lanes.members[member], at, &[], lanes.counters.exchange(slot))?;
        }
        Ok(self.begin(lanes, true))
    }

    /// Begins a round in which all others get the same bytes.
    pub fn post_same<'a>(
        &'a mut self,
        lanes: &'a Lanes,
        mark: Mark,
        bytes: &[u8],
    ) -> Result<Round<'a>, GroupError> {
        if let Some(staged) = self.stage(lanes, bytes.len()) {
            staged.copy_from_slice(bytes);
            return self.post_staged(lanes, mark, bytes.len());
        }
        self.post_each(lanes, mark, |_| bytes)
    }

    /// Begins a round in which each other member gets bytes of its own.
    pub fn post_each<'a, 'b>(
        &'a mut self,
        lanes: &'a Lanes,
        mark: Mark,
        bytes: impl Fn(usize) -> &'b [u8],
    ) -> Result<Round<'a>, GroupError> {
        let slot = self.next_slot();
        let at = lanes.exchange_slot(lanes.me, slot);
        for member in lanes.others() {
            let bytes = bytes(member);
            debug_assert!(bytes.len() <= lanes.exchange_payload);
            let header = Header { mark, piece: bytes.len(), whole: bytes.len(), waits_for: 0 };
            let parts = [&header.encode()[..], bytes];
            lanes.link.put(lanes.members[member], at, &parts, lanes.counters.exchange(slot))?;
        }
        Ok(self.begin(lanes, false))
    }
}

impl Round<'_> {
    /// Whether what `member` gives has come.
    pub fn has_come(&self, member: usize) -> bool {
        let lanes = self.lanes;
        let seen = lanes.link.count(lanes.members[member], lanes.counters.exchange(self.slot()));
        seen.wrapping_sub(self.filled()) as i32 >= 0
    }

    /// Waits for what `member` gives in this round: `bytes` of them.
    pub fn from(
        &self,
        watch: &mut Watch<'_>,
        member: usize,
        bytes: usize,
    ) -> Result<&[u8], GroupError> {
        let lanes = self.lanes;
        watch.wait(member, lanes.counters.exchange(self.slot()), self.filled())?;
        let header = self.header(member);
        if header.mark != watch.mark {
            return Err(watch.mismatch(member, header.mark));
        }
        if header.piece != bytes {
            return Err(GroupError::Ended(format!(
                "rank {} sent {} bytes where {bytes} belong: the versions differ",
                lanes.members[member], header.piece
            )));
        }
        let at = lanes.exchange_slot(member, self.slot()) + HEADER_BYTES;
        // SAFETY: the counter says that the bytes are there, and the member does not write to the
        // slot again before this rank has begun the next round, which this borrow prevents.
        Ok(unsafe { self.bytes(member, at, bytes) })
    }

    /// Adds up what all members give to the same numbers, this rank's in `values`, where the sums
    /// go.
    pub fn sum(&self, watch: &mut Watch<'_>, values: &mut [f32]) -> Result<(), GroupError> {
        let (lanes, bytes) = (self.lanes, values.len() * 4);
        for member in lanes.others() {
            self.from(watch, member, bytes)?;
        }
        sum_in_order(values, lanes.me, lanes.count(), &mut |member| {
            Ok(bytemuck::cast_slice(self.from(watch, member, bytes)?))
        })
    }

    /// What this rank has staged for this round.
    pub fn own(&self, bytes: usize) -> &[u8] {
        let at = self.lanes.exchange_slot(self.lanes.me, self.slot()) + HEADER_BYTES;
        // SAFETY: in the own slot of this round, which nobody writes while it lives.
        unsafe { self.lanes.own(at, bytes) }
    }

    fn slot(&self) -> usize {
        ((self.rounds.begun - 1) % EXCHANGE_SLOTS as u64) as usize
    }

    /// How often the slot was filled when it has this round's bytes.
    fn filled(&self) -> u32 {
        ((self.rounds.begun - 1) / EXCHANGE_SLOTS as u64 + 1) as u32
    }

    fn header(&self, member: usize) -> Header {
        let at = self.lanes.exchange_slot(member, self.slot());
        // SAFETY: as in `from`, which calls it behind the wait.
        let bytes = unsafe { self.bytes(member, at, HEADER_BYTES) };
        Header::decode(bytes.first_chunk().expect("a header's length"))
    }

    /// # Safety
    ///
    /// That of [`Lanes::own`].
    unsafe fn bytes(&self, member: usize, at: usize, length: usize) -> &[u8] {
        // SAFETY: the caller's.
        unsafe {
            match self.shared {
                true => self.lanes.of(member, at, length),
                false => self.lanes.own(at, length),
            }
        }
    }
}
