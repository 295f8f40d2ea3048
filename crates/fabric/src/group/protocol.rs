//! Who is in the group, in which epoch, and who was lost: decisions without clock or connection.
//!
//! A star. The coordinator is rank 0 and has a connection to each other member. It begins an
//! epoch when enough members are ready, ends it when one is lost, and begins the next when all
//! who are left have come back from the last: without the lost one, or with a spare in its place.
//! Everything else is a sign of life. What belongs to another epoch than the present one is
//! dropped. When the coordinator is lost, the group is over.

use std::time::Duration;

use pomona_types::{GroupError, LostCause};

use super::frame::Frame;

/// Between two signs of life.
pub const ALIVE_EVERY: Duration = Duration::from_millis(50);
/// Without a sign of life for so long, somebody is lost.
pub const SILENT_AFTER: Duration = Duration::from_millis(450);
/// Who looks at the clock later than this was stopped itself, and blames nobody.
pub const PAUSE: Duration = Duration::from_millis(250);

/// An epoch that lacks a rank waits so long for a spare that has not come yet.
const SPARE_LIMIT: Duration = Duration::from_secs(1);

/// What the coordinator wants.
#[derive(Clone, Debug)]
pub struct GroupOptions {
    /// Ranks of the first epoch; who comes beyond them is a spare.
    pub ranks: usize,
    /// With fewer the group is over.
    pub ranks_min: usize,
    /// What every member has to say of itself.
    pub identity: String,
    /// How long the first epoch may take to begin.
    pub begin_limit: Duration,
    /// How long a member may take to come back from an epoch that has ended.
    pub return_limit: Duration,
}

impl GroupOptions {
    /// With limits that suit programs which load models.
    pub fn new(ranks: usize) -> GroupOptions {
        GroupOptions {
            ranks,
            ranks_min: 1,
            identity: String::new(),
            begin_limit: Duration::from_secs(60),
            return_limit: Duration::from_secs(10),
        }
    }
}

/// What happens to the coordinator. Members are named by their seat; its own is 0.
#[derive(Clone, Debug)]
pub enum Event {
    /// A connection was made; its member will say hello.
    Connected(usize),
    /// A member has said something.
    Said(usize, Frame),
    /// A connection is gone.
    Closed(usize, LostCause),
    /// The coordinator's own rank is done with an epoch, and waits for the next.
    Returned {
        /// That epoch; 0 if there was none.
        after: u32,
        /// Why it ended, if that is known.
        why: Option<GroupError>,
    },
    /// The own link saw that the epoch ended.
    Aborted(u32, GroupError),
    /// The group is to end, in these words.
    Stop(String),
    /// Time goes by.
    Tick,
}

/// What the coordinator has to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Say something to a member.
    Say(usize, Frame),
    /// Begin an epoch: the members on these seats get the ranks in this order.
    Begin(u32, Vec<usize>),
    /// End the epoch on the own link.
    End(u32, GroupError),
    /// Have done with a member: close its connection, and end its process if it is ours.
    Remove(usize),
    /// The group is over.
    Over(GroupError),
}

/// The coordinator's view of a member.
#[derive(Clone, Copy, Debug)]
struct Seat {
    phase: SeatPhase,
    heard: Duration,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum SeatPhase {
    /// Connected, and not known yet.
    New,
    /// Known; not done yet with an epoch.
    Busy,
    /// Waits for the next epoch.
    Ready,
    /// Gone.
    Lost,
}

/// Where the group stands.
#[derive(Clone, Debug)]
enum Phase {
    /// Between epochs, since that moment: who had a rank, by rank, and is to have one again.
    Between { ranks: Vec<usize>, since: Duration },
    /// The present epoch's seats, by rank.
    Running { ranks: Vec<usize> },
    /// There is no next epoch.
    Over,
}

/// The coordinator.
#[derive(Debug)]
pub struct Coordinator {
    options: GroupOptions,
    seats: Vec<Option<Seat>>,
    epoch: u32,
    phase: Phase,
    last_tick: Duration,
    last_alive: Duration,
    actions: Vec<Action>,
}

impl Coordinator {
    /// Alone, and waiting for members.
    pub fn new(now: Duration, options: GroupOptions) -> Coordinator {
        let own = Seat { phase: SeatPhase::Busy, heard: now };
        Coordinator {
            options,
            seats: vec![Some(own)],
            epoch: 0,
            phase: Phase::Between { ranks: Vec::new(), since: now },
            last_tick: now,
            last_alive: now,
            actions: Vec::new(),
        }
    }

    /// Takes note of an event, and says what is to be done about it, in this order.
    pub fn step(&mut self, now: Duration, event: Event) -> Vec<Action> {
        if !matches!(self.phase, Phase::Over) {
            self.note(now, event);
            self.begin_if_ready(now);
        }
        std::mem::take(&mut self.actions)
    }

    /// The present epoch, or the last one; 0 if there was none.
    pub fn epoch(&self) -> u32 {
        self.epoch
    }

    fn note(&mut self, now: Duration, event: Event) {
        match event {
            Event::Connected(seat) => {
                if self.seats.len() <= seat {
                    self.seats.resize(seat + 1, None);
                }
                self.seats[seat] = Some(Seat { phase: SeatPhase::New, heard: now });
            }
            Event::Said(seat, frame) => self.said(now, seat, frame),
            Event::Closed(seat, cause) => self.lose(now, seat, cause),
            Event::Returned { after, why } => self.returned(now, 0, after, why),
            Event::Aborted(epoch, why) if epoch == self.epoch => self.end(now, why),
            Event::Aborted(..) => {}
            Event::Stop(why) => self.over(GroupError::Ended(why)),
            Event::Tick => self.tick(now),
        }
    }

    fn seat(&mut self, seat: usize) -> Option<&mut Seat> {
        let seat = self.seats.get_mut(seat)?.as_mut()?;
        (seat.phase != SeatPhase::Lost).then_some(seat)
    }

    fn said(&mut self, now: Duration, seat: usize, frame: Frame) {
        let Some(member) = self.seat(seat) else { return };
        member.heard = now;
        let phase = member.phase;
        match (phase, frame) {
            (SeatPhase::New, Frame::Hello { identity }) if identity == self.options.identity => {
                self.seats[seat] = Some(Seat { phase: SeatPhase::Busy, heard: now });
            }
            (SeatPhase::New, Frame::Hello { identity }) => {
                let ours = &self.options.identity;
                let why = format!("a member is \"{identity}\" where \"{ours}\" is needed");
                self.remove(seat, GroupError::Invalid(why));
            }
            (SeatPhase::Busy | SeatPhase::Ready, Frame::Ready { after, why }) => {
                self.returned(now, seat, after, why);
            }
            (SeatPhase::Busy, Frame::Report { epoch, why }) if epoch == self.epoch => {
                self.end(now, why);
            }
            (_, Frame::Alive | Frame::Report { .. }) => {}
            _ => {
                let cause = LostCause::Failed("it said what makes no sense here".into());
                self.lose(now, seat, cause);
            }
        }
    }

    /// A member is done with an epoch. That it is tells that the epoch is over.
    fn returned(&mut self, now: Duration, seat: usize, after: u32, why: Option<GroupError>) {
        let in_epoch = match &self.phase {
            Phase::Running { ranks } => ranks.iter().position(|at| *at == seat),
            _ => None,
        };
        if let Some(rank) = in_epoch {
            if after != self.epoch {
                return;
            }
            let asked = || GroupError::Ended(format!("rank {rank} asked for another epoch"));
            self.end(now, why.unwrap_or_else(asked));
        }
        if let Some(member) = self.seat(seat) {
            member.phase = SeatPhase::Ready;
        }
    }

    /// A member is gone.
    fn lose(&mut self, now: Duration, seat: usize, cause: LostCause) {
        if self.seat(seat).is_none() {
            return;
        }
        let rank = match &self.phase {
            Phase::Running { ranks } => ranks.iter().position(|at| *at == seat),
            _ => None,
        };
        match rank {
            Some(rank) => self.end(now, GroupError::PeerLost { rank, epoch: self.epoch, cause }),
            None => self.remove(seat, GroupError::Ended(format!("it was lost: {cause}"))),
        }
    }

    /// Ends the present epoch, if one runs.
    fn end(&mut self, now: Duration, why: GroupError) {
        let Phase::Running { ranks } = &self.phase else { return };
        let ranks = ranks.clone();
        self.actions.push(Action::End(self.epoch, why.clone()));
        for seat in ranks.iter().copied().filter(|seat| *seat != 0) {
            let end = Frame::End { epoch: self.epoch, why: why.clone() };
            self.actions.push(Action::Say(seat, end));
        }
        let lost = match why {
            GroupError::PeerLost { rank, .. } => ranks.get(rank).copied(),
            _ => None,
        };
        self.phase = Phase::Between { ranks, since: now };
        match lost {
            Some(0) => self.over(why),
            Some(seat) => self.remove(seat, why),
            None => {}
        }
    }

    /// Has done with a member, and tells it why, for it may be alive.
    fn remove(&mut self, seat: usize, why: GroupError) {
        if let Some(member) = self.seat(seat) {
            member.phase = SeatPhase::Lost;
            self.actions.push(Action::Say(seat, Frame::Over { why }));
            self.actions.push(Action::Remove(seat));
        }
    }

    fn over(&mut self, why: GroupError) {
        if matches!(self.phase, Phase::Running { .. }) {
            self.actions.push(Action::End(self.epoch, why.clone()));
        }
        for seat in self.present() {
            self.actions.push(Action::Say(seat, Frame::Over { why: why.clone() }));
        }
        self.phase = Phase::Over;
        self.actions.push(Action::Over(why));
    }

    /// The seats of members who are connected, without the own one.
    fn present(&self) -> Vec<usize> {
        let here =
            |seat: &usize| self.seats[*seat].is_some_and(|member| member.phase != SeatPhase::Lost);
        (1..self.seats.len()).filter(here).collect()
    }

    fn is(&self, seat: usize, phase: SeatPhase) -> bool {
        self.seats[seat].is_some_and(|member| member.phase == phase)
    }

    fn tick(&mut self, now: Duration) {
        if now.saturating_sub(self.last_tick) > PAUSE {
            for seat in self.seats.iter_mut().flatten() {
                seat.heard = now;
            }
        }
        self.last_tick = now;
        if now.saturating_sub(self.last_alive) >= ALIVE_EVERY {
            self.last_alive = now;
            let say = |seat| Action::Say(seat, Frame::Alive);
            self.actions.extend(self.present().into_iter().map(say));
        }
        for seat in self.present() {
            let silent = self.seats[seat].map_or(Duration::ZERO, |member| now - member.heard);
            // A process that has not said hello yet is on its way.
            let starting = self.is(seat, SeatPhase::New);
            let limit = if starting { self.options.begin_limit } else { SILENT_AFTER };
            if silent >= limit {
                self.lose(now, seat, LostCause::Silent(SILENT_AFTER.as_millis() as u32));
            }
        }
        let Phase::Between { since, .. } = self.phase else { return };
        let waited = now.saturating_sub(since);
        if self.epoch == 0 && waited >= self.options.begin_limit {
            let ready = (0..self.seats.len()).filter(|seat| self.is(*seat, SeatPhase::Ready));
            let (ready, ranks) = (ready.count(), self.options.ranks);
            let why = format!("{ready} of {ranks} ranks came within {waited:?}");
            self.over(GroupError::Ended(why));
        } else if self.epoch > 0 && waited >= self.options.return_limit {
            // Busy with what ended long ago: such a member is of no use.
            for seat in self.present() {
                if !self.is(seat, SeatPhase::Ready) {
                    let why = format!("it did not come back within {waited:?}");
                    self.remove(seat, GroupError::Ended(why));
                }
            }
        }
    }

    /// Begins the next epoch, if all who are to be in it are ready.
    fn begin_if_ready(&mut self, now: Duration) {
        let Phase::Between { ranks, since } = &self.phase else { return };
        let gone = |seat: usize| self.is(seat, SeatPhase::Lost);
        // Who is ready and had no rank: the own seat first, when there was no epoch yet.
        let mut spares = (0..self.seats.len())
            .filter(|seat| self.is(*seat, SeatPhase::Ready) && !ranks.contains(seat));
        let kept = ranks.iter().copied();
        let kept = kept.filter_map(|seat| if gone(seat) { spares.next() } else { Some(seat) });
        let mut next: Vec<usize> = kept.collect();
        next.extend(spares.take(self.options.ranks.saturating_sub(next.len())));
        let first_is_short = self.epoch == 0 && next.len() < self.options.ranks;
        if first_is_short || next.first() != Some(&0) {
            return;
        }
        // A spare may be about to be ready.
        let late = now.saturating_sub(*since) >= SPARE_LIMIT;
        let coming = |seat: &usize| !next.contains(seat) && !ranks.contains(seat);
        let coming = self.epoch > 0 && !late && self.present().iter().any(coming);
        if coming && next.len() < self.options.ranks {
            return;
        }
        if next.iter().any(|seat| !self.is(*seat, SeatPhase::Ready)) {
            return;
        }
        if next.len() < self.options.ranks_min {
            let (left, least) = (next.len(), self.options.ranks_min);
            let why = format!("{left} ranks are left, and {least} are needed");
            return self.over(GroupError::Ended(why));
        }
        self.epoch += 1;
        for seat in &next {
            self.seats[*seat] = Some(Seat { phase: SeatPhase::Busy, heard: now });
        }
        self.actions.push(Action::Begin(self.epoch, next.clone()));
        self.phase = Phase::Running { ranks: next };
    }
}
