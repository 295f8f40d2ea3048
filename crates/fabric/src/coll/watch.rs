//! Waiting within a call: how long it may take, who is late, and who calls something else.
//!
//! Marks travel with the bytes, so ranks in the same kind of exchange see at once that they call
//! different things. Ranks whose calls never meet would wait for each other: so whoever has waited
//! for a while tells all others which call it is in and for whom it waits.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use pomona_types::{GroupError, LostCause};

use super::call::{HEADER_BYTES, Header, Mark, Past, judge};
use super::lanes::{Lanes, STATUS_CELLS};
use crate::wait::{Awaited, wait};

/// Who has waited so long says so. More than a call takes that is only slow.
const TELL_AFTER: Duration = Duration::from_millis(20);
/// Then it compares what others have said: by now all have who wait too.
const COMPARE_AFTER: Duration = Duration::from_millis(80);
/// For so long who has seen a wrong call waits for what the others say.
const MOMENT: Duration = Duration::from_millis(100);

/// How often a wait that sleeps looks at what no counter tells.
const LOOK_EVERY: Duration = Duration::from_micros(100);

/// What a look at something has shown that no counter tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Seen {
    /// It is done.
    Done,
    /// A member's part is missing.
    Missing(usize),
    /// Something is missing, whose cannot be seen.
    Unknown,
    /// All have come, and it is not done.
    Working,
}

/// Stands in a cell that was written.
const TOLD: usize = 1;

/// What a rank keeps for its waits.
#[derive(Default)]
pub(super) struct Ledger {
    /// How many times it has told what it does.
    tellings: AtomicU32,
    past: Past,
}

impl Ledger {
    /// Remembers a call.
    pub fn note(&self, mark: Mark) {
        if mark.in_sequence() {
            self.past.note(mark);
        }
    }
}

/// The waits of one call.
pub(super) struct Watch<'a> {
    lanes: &'a Lanes,
    /// The call.
    pub mark: Mark,
    /// How long one wait may take; none for who waits to be told what to do.
    pub limit: Option<Duration>,
    ledger: &'a Ledger,
    /// Whether it has in this call.
    told: bool,
}

impl<'a> Watch<'a> {
    pub fn new(lanes: &'a Lanes, mark: Mark, limit: Duration, ledger: &'a Ledger) -> Self {
        ledger.note(mark);
        Watch { lanes, mark, limit: Some(limit), ledger, told: false }
    }

    /// Waits until a counter that `member` raises has reached `target`.
    pub fn wait(&mut self, member: usize, counter: usize, target: u32) -> Result<(), GroupError> {
        let lanes = self.lanes;
        let awaited = Awaited { peer: lanes.members[member], counter, target };
        let missing = Seen::Missing(member);
        wait(&*lanes.link, awaited, |waited| self.look_around(member, waited, missing))
    }

    /// Waits for what no counter tells: `look` is asked again and again.
    pub fn until(
        &mut self,
        mut look: impl FnMut(&mut Self) -> Result<Seen, GroupError>,
    ) -> Result<(), GroupError> {
        let link = &*self.lanes.link;
        let (mut looks, mut since) = (0, None);
        let mut before = Seen::Done;
        loop {
            let seen = look(self)?;
            if seen == Seen::Done {
                return Ok(());
            }
            if let Some(why) = link.aborted() {
                return Err(why);
            }
            if seen != before {
                // Another thing is waited for, which has all its time.
                (before, since) = (seen, None);
            }
            looks += 1;
            if looks < link.spins() {
                std::hint::spin_loop();
                continue;
            }
            let start = *since.get_or_insert_with(|| link.now());
            let waited = link.now().saturating_sub(start);
            let member = match seen {
                Seen::Missing(member) => member,
                _ => self.lanes.me,
            };
            self.look_around(member, waited, seen)?;
            let other = self.lanes.others().next().unwrap_or(self.lanes.me);
            let (peer, counter) = (self.lanes.members[other], self.lanes.counters.status());
            link.park(peer, counter, link.count(peer, counter), LOOK_EVERY);
        }
    }

    /// Something has come from a member with another mark. Who is wrong is found out together: all
    /// who see such a thing tell what they call, and look at what the others tell.
    pub fn mismatch(&mut self, from: usize, theirs: Mark) -> GroupError {
        if let Err(why) = self.tell(from) {
            return why;
        }
        let lanes = self.lanes;
        let own = self.ledger.past.mark(theirs.sequence).unwrap_or(self.mark);
        let told = |member: usize| match member == from {
            true => Some(theirs),
            false => self.told_at(member, own, theirs),
        };
        let start = lanes.link.now();
        let over = || lanes.link.now().saturating_sub(start) >= MOMENT;
        while lanes.others().any(|member| told(member).is_none()) && !over() {
            if let Some(why) = lanes.link.aborted() {
                return why;
            }
            let (peer, counter) = (lanes.members[from], lanes.counters.status());
            lanes.link.park(peer, counter, lanes.link.count(peer, counter), MOMENT / 20);
        }
        self.judge(own, told)
    }

    /// Who is wrong about the call that is `own` here, by what `told` says of others.
    fn judge(&self, own: Mark, told: impl Fn(usize) -> Option<Mark>) -> GroupError {
        let mine = self.lanes.me;
        let mark_of = |member| if member == mine { Some(own) } else { told(member) };
        let marks: Vec<_> = (0..self.lanes.count()).map(mark_of).collect();
        // Of two opinions with as many votes, that of who has come through the call counts.
        let favourite = if own == self.mark { 0 } else { mine };
        let Some((wrong, right)) = judge(&marks, favourite) else {
            return GroupError::Ended("calls that differed do so no more".into());
        };
        let words = |member: usize| marks[member].map(|mark| mark.to_string()).unwrap_or_default();
        GroupError::Mismatch {
            rank: self.lanes.members[wrong],
            theirs: words(wrong),
            ours: words(right),
        }
    }

    /// What is done now and then while a wait takes long, in which a rank says that it waits for
    /// `member`.
    fn look_around(
        &mut self,
        member: usize,
        waited: Duration,
        seen: Seen,
    ) -> Result<(), GroupError> {
        if waited < TELL_AFTER {
            return Ok(());
        }
        if !self.told {
            self.told = true;
            self.tell(member)?;
        }
        if waited >= COMPARE_AFTER {
            self.compare()?;
        }
        match self.limit {
            Some(limit) if waited >= limit => Err(match seen {
                Seen::Missing(member) => self.late(member, limit),
                _ => self.stuck(seen, limit),
            }),
            _ => Ok(()),
        }
    }

    /// A wait has taken too long in which no member was missing by name. Who has not told of this
    /// call, although those who wait do, has not come to it.
    fn stuck(&self, seen: Seen, limit: Duration) -> GroupError {
        let here = |member: &usize| {
            self.told_mark(*member).is_some_and(|mark| mark.sequence >= self.mark.sequence)
        };
        match self.lanes.others().find(|member| !here(member)) {
            Some(member) if seen == Seen::Unknown => self.late(member, limit),
            _ => GroupError::Ended(format!(
                "{} was not done within {} ms, and no rank is missing: a device hangs, or work \
                 in front of the call takes longer than calls may",
                self.mark,
                limit.as_millis()
            )),
        }
    }

    /// Compares what others have told with the own calls. Who is at an earlier one is compared
    /// with that: if it differs, the other one is stuck where this rank has come through.
    fn compare(&self) -> Result<(), GroupError> {
        for other in self.lanes.others() {
            let Some(theirs) = self.told_mark(other) else { continue };
            let Some(own) = self.ledger.past.mark(theirs.sequence) else { continue };
            if own != theirs {
                return Err(self.judge(own, |member| self.told_at(member, own, theirs)));
            }
        }
        Ok(())
    }

    /// What a member told about its call with the number of `own` and `theirs`, which may be the
    /// call before the one that it is in.
    fn told_at(&self, member: usize, own: Mark, theirs: Mark) -> Option<Mark> {
        let status = self.status(member)?;
        if status.mark.sequence == own.sequence {
            return Some(status.mark);
        }
        let came_through = |mark: &Mark| status.whole == mark.hash as usize;
        [own, theirs].into_iter().find(came_through)
    }

    /// The call that a member was in when it told last, if it is one that all make.
    fn told_mark(&self, member: usize) -> Option<Mark> {
        self.status(member).map(|status| status.mark).filter(Mark::in_sequence)
    }

    /// Tells all others which call this rank is in, for whom it waits, and which call was before.
    fn tell(&self, member: usize) -> Result<(), GroupError> {
        let lanes = self.lanes;
        let cell = self.ledger.tellings.fetch_add(1, Ordering::Relaxed) as usize % STATUS_CELLS;
        let waits_for = lanes.members[member] as u32;
        let before = self.ledger.past.before(self.mark);
        let whole = before.map_or(0, |mark| mark.hash as usize);
        let header = Header { mark: self.mark, piece: TOLD, whole, waits_for }.encode();
        for other in lanes.others() {
            let at = lanes.status_cell(lanes.me, cell);
            lanes.link.put(lanes.members[other], at, &[&header], lanes.counters.status())?;
        }
        Ok(())
    }

    /// What a member has told last.
    fn status(&self, member: usize) -> Option<Header> {
        let lanes = self.lanes;
        let told = lanes.link.count(lanes.members[member], lanes.counters.status());
        let cell = told.checked_sub(1)? as usize % STATUS_CELLS;
        // SAFETY: a cell; the member writes it again after three others only, each of which takes
        // it longer than this copy does.
        let bytes = unsafe { lanes.own(lanes.status_cell(member, cell), HEADER_BYTES) };
        let status = Header::decode(bytes.first_chunk().expect("a header's length"));
        // A later one may have overtaken the one that belongs here.
        (status.piece == TOLD).then_some(status)
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
        GroupError::PeerLost {
            rank: lanes.members[to_blame],
            epoch: lanes.link.epoch(),
            cause: LostCause::Late {
                call: self.mark.to_string(),
                after_ms: limit.as_millis().try_into().unwrap_or(u32::MAX),
            },
        }
    }
}
