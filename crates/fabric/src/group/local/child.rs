//! The thread that watches the connection to the parent.

use std::sync::Arc;
use std::time::Instant;

use pomona_types::{GroupError, LostCause};

use super::Desk;
use super::socket::{Socket, wait_for};
use crate::group::{Member, MemberAction, MemberEvent, TICK};
use crate::link::Link;
use crate::link::shm::{ShmEpoch, ShmLink};

pub(super) struct ChildWatcher {
    control: Socket,
    desk: Arc<Desk>,
    member: Member,
    start: Instant,
    link: Option<Arc<ShmLink>>,
}

impl ChildWatcher {
    pub fn new(control: Socket, desk: Arc<Desk>, identity: &str) -> ChildWatcher {
        let start = Instant::now();
        let (member, hello) = Member::new(start.elapsed(), identity.to_string());
        control.send(&hello, None);
        ChildWatcher { control, desk, member, start, link: None }
    }

    /// Until the rank leaves or the group is over.
    pub fn run(mut self) {
        let mut buffer = Vec::new();
        loop {
            wait_for(&self.desk.bell, std::iter::once(&self.control), TICK);
            let (returned, stop) = self.desk.collect();
            if stop {
                return;
            }
            if returned {
                let why = self.link.take().and_then(|link| link.aborted());
                self.step(MemberEvent::Returned { why }, None);
            }
            loop {
                match self.control.receive(&mut buffer) {
                    Ok(Some((frame, memory))) => self.step(MemberEvent::Said(frame), memory),
                    Ok(None) => break,
                    Err(_) => {
                        self.step(MemberEvent::Closed(LostCause::Exited), None);
                        break;
                    }
                }
            }
            self.step(MemberEvent::Tick, None);
            if self.desk.papers().over.is_some() {
                return;
            }
        }
    }

    fn step(&mut self, event: MemberEvent, mut memory: Option<std::os::fd::OwnedFd>) {
        for action in self.member.step(self.start.elapsed(), event) {
            match action {
                MemberAction::Say(frame) => self.control.send(&frame, None),
                MemberAction::Begin { epoch, rank, .. } => {
                    self.begin(epoch, rank, memory.take());
                }
                MemberAction::End(_, why) => {
                    if let Some(link) = &self.link {
                        link.abort(why);
                    }
                }
                MemberAction::Over(why) => self.desk.over(why),
            }
        }
    }

    fn begin(&mut self, epoch: u32, rank: usize, memory: Option<std::os::fd::OwnedFd>) {
        let opened = memory.ok_or_else(|| std::io::Error::other("no memory came with the epoch"));
        match opened.and_then(ShmEpoch::open) {
            Ok(shared) if shared.ranks() > rank => {
                let link = shared.link(rank).map(Arc::new);
                let link = link.expect("it has the rank");
                self.link = Some(link.clone());
                self.desk.begin(link);
            }
            failed => {
                let why = failed.err().map_or("no such rank".into(), |error| error.to_string());
                let cause = LostCause::Failed(format!("to map the epoch's memory: {why}"));
                let why = GroupError::PeerLost { rank, epoch, cause };
                self.step(MemberEvent::Aborted(epoch, why), None);
            }
        }
    }
}
