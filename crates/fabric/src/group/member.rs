//! The other end of [`Coordinator`](super::Coordinator): what a member makes of what it hears.

use std::time::Duration;

use pomona_types::{GroupError, LostCause};

use super::frame::Frame;
use super::protocol::{ALIVE_EVERY, PAUSE, SILENT_AFTER};

/// What happens to a member.
#[derive(Clone, Debug)]
pub enum MemberEvent {
    /// The coordinator has said something.
    Said(Frame),
    /// The connection to the coordinator is gone.
    Closed(LostCause),
    /// The own rank is done with an epoch, and waits for the next.
    Returned {
        /// Why it ended, if that is known.
        why: Option<GroupError>,
    },
    /// The own link has a cause to end an epoch, of which the others may not know.
    Aborted(u32, GroupError),
    /// Time goes by.
    Tick,
}

/// What a member has to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MemberAction {
    /// Say something to the coordinator.
    Say(Frame),
    /// Take part in an epoch.
    Begin {
        /// Its number.
        epoch: u32,
        /// The own rank.
        rank: usize,
        /// How many ranks it has.
        ranks: usize,
        /// What else the transport needs to connect the ranks.
        connect: Vec<u8>,
    },
    /// End the epoch on the own link.
    End(u32, GroupError),
    /// The group is over.
    Over(GroupError),
}

/// A member that is not the coordinator.
#[derive(Debug)]
pub struct Member {
    epoch: u32,
    over: bool,
    heard: Duration,
    last_tick: Duration,
    last_alive: Duration,
}

impl Member {
    /// Connected, and what it says first.
    pub fn new(now: Duration, identity: String) -> (Member, Frame) {
        let member = Member { epoch: 0, over: false, heard: now, last_tick: now, last_alive: now };
        (member, Frame::Hello { identity })
    }

    /// Takes note of an event, and says what is to be done about it, in this order.
    pub fn step(&mut self, now: Duration, event: MemberEvent) -> Vec<MemberAction> {
        if self.over {
            return Vec::new();
        }
        match event {
            MemberEvent::Said(frame) => {
                self.heard = now;
                self.said(frame)
            }
            MemberEvent::Closed(cause) => self.lost(cause),
            MemberEvent::Returned { why } => {
                vec![MemberAction::Say(Frame::Ready { after: self.epoch, why })]
            }
            MemberEvent::Aborted(epoch, why) if epoch == self.epoch => {
                vec![MemberAction::Say(Frame::Report { epoch, why })]
            }
            MemberEvent::Aborted(..) => Vec::new(),
            MemberEvent::Tick => self.tick(now),
        }
    }

    /// The present epoch, or the last one; 0 if there was none.
    pub fn epoch(&self) -> u32 {
        self.epoch
    }

    fn said(&mut self, frame: Frame) -> Vec<MemberAction> {
        match frame {
            Frame::Begin { epoch, rank, ranks, connect } if epoch > self.epoch => {
                self.epoch = epoch;
                vec![MemberAction::Begin { epoch, rank, ranks, connect }]
            }
            Frame::End { epoch, why } if epoch == self.epoch => {
                vec![MemberAction::End(epoch, why)]
            }
            Frame::Over { why } => self.ended(why),
            _ => Vec::new(),
        }
    }

    /// Without the coordinator there is no group.
    fn lost(&mut self, cause: LostCause) -> Vec<MemberAction> {
        self.ended(GroupError::PeerLost { rank: 0, epoch: self.epoch, cause })
    }

    fn ended(&mut self, why: GroupError) -> Vec<MemberAction> {
        self.over = true;
        vec![MemberAction::End(self.epoch, why.clone()), MemberAction::Over(why)]
    }

    fn tick(&mut self, now: Duration) -> Vec<MemberAction> {
        if now.saturating_sub(self.last_tick) > PAUSE {
            self.heard = now;
        }
        self.last_tick = now;
        let silent = now.saturating_sub(self.heard);
        if silent >= SILENT_AFTER {
            return self.lost(LostCause::Silent(SILENT_AFTER.as_millis() as u32));
        }
        if now.saturating_sub(self.last_alive) < ALIVE_EVERY {
            return Vec::new();
        }
        self.last_alive = now;
        vec![MemberAction::Say(Frame::Alive)]
    }
}
