//! Calls that another library makes for a group, over wires of its own: they get marks as the
//! group's own calls do, and are waited for with the group's deadline, abort and causes.
//!
//! Such calls return before they are done. Their marks are compared where ranks wait for them,
//! which they do at the same places: so nothing is sent for each call.

use std::sync::Arc;
use std::time::Duration;

use pomona_types::{GroupError, LostCause};

use super::call::{Mark, Operation};
use super::watch::Seen;
use super::{Comm, Turn};
use crate::link::Link;

impl Comm {
    /// Takes note of a call that all members make.
    pub(crate) fn note(
        &self,
        operation: Operation,
        bytes: usize,
        shape: impl IntoIterator<Item = usize>,
    ) -> Result<Mark, GroupError> {
        let mark = self.turn()?.calls.note(operation, bytes, shape);
        self.ledger.note(mark);
        Ok(mark)
    }

    /// Waits until `done` says so; `while_not` is whom that needs, as far as it is known.
    pub(crate) fn until(
        &self,
        call: Mark,
        while_not: Seen,
        mut done: impl FnMut() -> Result<bool, GroupError>,
    ) -> Result<(), GroupError> {
        self.watch(call).until(|_| Ok(if done()? { Seen::Done } else { while_not }))
    }

    /// Waits until all members are here after the same calls, of which `last` was the last, and
    /// `done` says so too.
    pub(crate) fn meet_when(
        &self,
        last: Mark,
        mut done: impl FnMut() -> Result<bool, GroupError>,
    ) -> Result<(), GroupError> {
        let Turn { calls, rounds, .. } = &mut *self.turn()?;
        let mut watch = self.watch(calls.note_wait(last));
        let round = rounds.post_same(&self.lanes, watch.mark, &[])?;
        let mut missing = self.lanes.others().peekable();
        watch.until(|watch| {
            let done = done()?;
            while let Some(member) = missing.peek().copied() {
                if !round.has_come(member) {
                    return Ok(Seen::Missing(member));
                }
                round.from(watch, member, 0)?;
                missing.next();
            }
            Ok(if done { Seen::Done } else { Seen::Working })
        })
    }

    /// Ends the epoch, unless it has ended. Returns the cause that all ranks have.
    pub(crate) fn end(&self, why: GroupError) -> GroupError {
        self.settle(Err(why.clone())).err().unwrap_or(why)
    }

    /// This rank cannot go on.
    pub(crate) fn failed(&self, why: String) -> GroupError {
        let (rank, epoch) = (self.lanes.members[self.lanes.me], self.lanes.link.epoch());
        GroupError::PeerLost { rank, epoch, cause: LostCause::Failed(why) }
    }

    /// The link of the world that this group is in.
    pub fn link(&self) -> &Arc<dyn Link> {
        &self.lanes.link
    }

    /// How long a wait may take.
    pub(crate) fn limit(&self) -> Duration {
        self.limit
    }
}
