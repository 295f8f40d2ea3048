//! Waiting within a call: how long it may take, who is late, and who calls something else.
//!
//! Marks travel with the bytes, so ranks in the same kind of exchange see at once that they call
//! different things. Ranks whose calls never meet would wait for each other: so whoever has waited
//! for a while tells all others which call it is in and for whom it waits.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use pomona_types::{GroupError, LostCause};

use super::call::{HEADER_BYTES, Header, Mark, Operation, judge};
use super::lanes::{Lanes, STATUS_CELLS};
use crate::wait::{Awaited, wait};

/// Who has waited so long says so. More than a call takes that is only slow.
const TELL_AFTER: Duration = Duration::from_millis(20);
/// For so long who has seen a wrong call waits for what the others say.
const MOMENT: Duration = Duration::from_millis(100);

/// The waits of one call.
pub(super) struct Watch<'a> {
    lanes: &'a Lanes,
    /// The call.
    pub mark: Mark,
    /// How long one wait may take; none for who waits to be told what to do.
    pub limit: Option<Duration>,
    /// How many times this rank has told what it does.
    tellings: &'a AtomicU32,
    /// Whether it has in this call.
    told: bool,
}

impl<'a> Watch<'a> {
    pub fn new(lanes: &'a Lanes, mark: Mark, limit: Duration, tellings: &'a AtomicU32) -> Self {
        Watch { lanes, mark, limit: Some(limit), tellings, told: false }
    }

    /// Waits until a counter that `member` raises has reached `target`.
    pub fn wait(&mut self, member: usize, counter: usize, target: u32) -> Result<(), GroupError> {
        let lanes = self.lanes;
        let awaited = Awaited { peer: lanes.members[member], counter, target };
        wait(&*lanes.link, awaited, |waited| self.look_around(member, waited))
    }

    /// The same for a short time, whatever happens. Says whether the counter got there.
    pub fn wait_a_moment(&self, member: usize, counter: usize, target: u32) -> bool {
        let awaited = Awaited { peer: self.lanes.members[member], counter, target };
        let late = || GroupError::Ended("a moment is over".into());
        let patience = |waited| if waited < MOMENT { Ok(()) } else { Err(late()) };
        wait(&*self.lanes.link, awaited, patience).is_ok()
    }

    /// Ends the epoch, and says why it ended: this may not have been the first cause.
    pub fn fail(&self, why: GroupError) -> GroupError {
        self.lanes.link.abort(why.clone());
        self.lanes.link.aborted().unwrap_or(why)
    }

    /// Ends the epoch because a member calls something else, whose marks `mark_of` knows.
    pub fn judge(&self, mark_of: impl Fn(usize) -> Option<Mark>) -> GroupError {
        let mine = self.lanes.me;
        let mark_of = |member| if member == mine { Some(self.mark) } else { mark_of(member) };
        let marks: Vec<_> = (0..self.lanes.count()).map(mark_of).collect();
        let Some((wrong, right)) = judge(&marks) else {
            return self.fail(GroupError::Ended("calls that differed do so no more".into()));
        };
        let words = |member: usize| marks[member].map(|mark| mark.to_string()).unwrap_or_default();
        self.fail(GroupError::Mismatch {
            rank: self.lanes.members[wrong],
            theirs: words(wrong),
            ours: words(right),
        })
    }

    /// What is done now and then while a wait for `member` takes long.
    fn look_around(&mut self, member: usize, waited: Duration) -> Result<(), GroupError> {
        if waited < TELL_AFTER {
            return Ok(());
        }
        let in_sequence = self.mark.operation != Operation::Send as u32;
        if !self.told {
            self.told = true;
            self.tell(member)?;
        }
        let same_call = |mark: &Mark| mark.sequence == self.mark.sequence;
        let said = |other| self.status(other).map(|status| status.mark).filter(same_call);
        let differs = |other| said(other).is_some_and(|mark| mark != self.mark);
        if in_sequence && self.lanes.others().any(differs) {
            return Err(self.judge(said));
        }
        match self.limit {
            Some(limit) if waited >= limit => Err(self.late(member, limit)),
            _ => Ok(()),
        }
    }

    /// Tells all others which call this rank is in, and for whom it waits.
    fn tell(&self, member: usize) -> Result<(), GroupError> {
        let lanes = self.lanes;
        let cell = self.tellings.fetch_add(1, Ordering::Relaxed) as usize % STATUS_CELLS;
        let waits_for = lanes.members[member] as u32;
        let header = Header { mark: self.mark, piece: 0, whole: 0, waits_for }.encode();
        for other in lanes.others() {
            let at = lanes.status_cell(lanes.me, cell);
            lanes.link.put(lanes.members[other], at, &[&header], lanes.counters.status)?;
        }
        Ok(())
    }

    /// What a member has told last.
    fn status(&self, member: usize) -> Option<Header> {
        let lanes = self.lanes;
        let told = lanes.link.count(lanes.members[member], lanes.counters.status);
        let cell = told.checked_sub(1)? as usize % STATUS_CELLS;
        // SAFETY: a cell; the member writes it again after three others only, each of which takes
        // it longer than this copy does.
        let bytes = unsafe { lanes.own(lanes.status_cell(member, cell), HEADER_BYTES) };
        Some(Header::decode(bytes.first_chunk().expect("a header's length")))
    }

    /// A wait has taken too long. Who waits for somebody else in the same call is not to blame. The
    /// limit is named rather than the time, so that two ranks that notice at once say the same.
    fn late(&self, member: usize, limit: Duration) -> GroupError {
        let lanes = self.lanes;
        let mut to_blame = member;
        for _ in 0..lanes.count() {
            let status = self.status(to_blame).filter(|status| status.mark == self.mark);
            let next = status.and_then(|status| {
                lanes.members.iter().position(|rank| *rank == status.waits_for as usize)
            });
            match next {
                Some(next) if next != lanes.me => to_blame = next,
                _ => break,
            }
        }
        self.fail(GroupError::PeerLost {
            rank: lanes.members[to_blame],
            epoch: lanes.link.epoch(),
            cause: LostCause::Late {
                call: self.mark.to_string(),
                after_ms: limit.as_millis().try_into().unwrap_or(u32::MAX),
            },
        })
    }
}
