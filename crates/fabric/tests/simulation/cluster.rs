//! The processes of a simulated group: what the watchers of real ones do, over simulated
//! connections.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use pomona_fabric::group::{
    Action, Coordinator, Event, Frame, GroupOptions, Member, MemberAction, MemberEvent, TICK,
};
use pomona_fabric::link::Link;
use pomona_fabric::link::simulated::{
    OnAbort, SimulatedEpoch, SimulatedLink, SimulatedOptions, Simulation,
};
use pomona_types::{GroupError, LostCause};

/// The longest that a frame takes, in microseconds.
const FRAME_US: usize = 300;

#[derive(Clone)]
pub struct Cluster {
    pub simulation: Simulation,
    inner: Arc<Mutex<Inner>>,
}

struct Inner {
    coordinator: Coordinator,
    seats: Vec<Seat>,
    epochs: BTreeMap<u32, (Arc<SimulatedEpoch>, Vec<usize>)>,
    memory: SimulatedOptions,
    /// Until when each direction's last frame is on its way: frames do not overtake each other.
    busy: BTreeMap<(usize, usize), Duration>,
}

struct Seat {
    /// None for the coordinator.
    member: Option<Member>,
    link: Option<Arc<SimulatedLink>>,
    over: Option<GroupError>,
    dead: bool,
    stopped: bool,
    /// What came while it was stopped.
    inbox: Vec<MemberEvent>,
    /// Whether frames from it, and to it, get lost.
    cut: [bool; 2],
}

impl Cluster {
    pub fn new(
        simulation: &Simulation,
        options: GroupOptions,
        seats: usize,
        memory: SimulatedOptions,
    ) -> Cluster {
        let now = Duration::ZERO;
        let seat = |index: usize| Seat {
            member: (index > 0).then(|| Member::new(now, options.identity.clone()).0),
            link: None,
            over: None,
            dead: false,
            stopped: false,
            inbox: Vec::new(),
            cut: [false; 2],
        };
        let cluster = Cluster {
            simulation: simulation.clone(),
            inner: Arc::new(Mutex::new(Inner {
                coordinator: Coordinator::new(now, options.clone()),
                seats: (0..seats).map(seat).collect(),
                epochs: BTreeMap::new(),
                memory,
                busy: BTreeMap::new(),
            })),
        };
        for seat in 0..seats {
            if seat > 0 {
                cluster.coordinate(Event::Connected(seat));
                cluster.say(seat, 0, Frame::Hello { identity: options.identity.clone() });
            }
            cluster.tick(seat);
        }
        cluster
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap()
    }

    /// What a rank calls: leaves the last epoch, and waits for the next.
    pub fn next_epoch(&self, seat: usize) -> Result<Arc<SimulatedLink>, GroupError> {
        let why = self.inner().seats[seat].link.take().and_then(|link| link.aborted());
        match seat {
            0 => {
                let after = self.inner().coordinator.epoch();
                self.coordinate(Event::Returned { after, why });
            }
            _ => self.follow(seat, MemberEvent::Returned { why }),
        }
        loop {
            {
                let inner = self.inner();
                let seat = &inner.seats[seat];
                let dead = || GroupError::Ended("it is dead, in this simulation".into());
                if let Some(why) = seat.over.clone().or_else(|| seat.dead.then(dead)) {
                    return Err(why);
                }
                if let Some(link) = &seat.link {
                    return Ok(link.clone());
                }
            }
            self.simulation.park(usize::MAX, Duration::from_millis(10));
        }
    }

    /// Ends the group.
    pub fn stop_group(&self) {
        self.coordinate(Event::Stop("all is done".into()));
    }

    /// Which rank a seat has in the present epoch.
    pub fn rank_of(&self, seat: usize) -> Option<usize> {
        let inner = self.inner();
        let (_, seats) = inner.epochs.get(&inner.coordinator.epoch())?;
        seats.iter().position(|at| *at == seat)
    }

    /// Kills a process.
    pub fn kill(&self, seat: usize) {
        {
            let mut inner = self.inner();
            inner.seats[seat].dead = true;
            for (epoch, seats) in inner.epochs.values() {
                if let Some(rank) = seats.iter().position(|at| *at == seat) {
                    epoch.kill(rank);
                }
            }
        }
        let others: Vec<usize> = match seat {
            0 => (1..self.inner().seats.len()).collect(),
            _ => vec![0],
        };
        for other in others {
            self.close(other, seat);
        }
    }

    /// Stops a process for a while.
    pub fn stop(&self, seat: usize, pause: Duration) {
        self.inner().seats[seat].stopped = true;
        self.simulation.stop(seat);
        let cluster = self.clone();
        self.simulation.after(pause, move |_| {
            let inbox = {
                let mut inner = cluster.inner();
                inner.seats[seat].stopped = false;
                std::mem::take(&mut inner.seats[seat].inbox)
            };
            cluster.simulation.resume(seat);
            inbox.into_iter().for_each(|event| cluster.follow(seat, event));
        });
    }

    /// Loses what a seat says to the coordinator, or what the coordinator says to it.
    pub fn cut_control(&self, seat: usize, from_it: bool) {
        self.inner().seats[seat].cut[usize::from(!from_it)] = true;
    }

    /// Loses what one seat puts to another.
    pub fn cut_data(&self, from: usize, to: usize) {
        for (epoch, seats) in self.inner().epochs.values() {
            let rank = |seat| seats.iter().position(|at| *at == seat);
            if let (Some(from), Some(to)) = (rank(from), rank(to)) {
                epoch.cut(from, to);
            }
        }
    }

    /// The end of a process's connection reaches the other side, behind all that it has said.
    fn close(&self, at: usize, of: usize) {
        let cluster = self.clone();
        let delay = self.arrival(of, at);
        self.simulation.after(delay, move |_| match at {
            0 => cluster.coordinate(Event::Closed(of, LostCause::Exited)),
            _ => cluster.follow(at, MemberEvent::Closed(LostCause::Exited)),
        });
    }

    /// A frame from one side of a connection to the other.
    fn say(&self, from: usize, to: usize, frame: Frame) {
        let (member, direction) = if from == 0 { (to, 1) } else { (from, 0) };
        let inner = self.inner();
        if inner.seats[from].dead || inner.seats[member].cut[direction] {
            return;
        }
        drop(inner);
        let (delay, cluster) = (self.arrival(from, to), self.clone());
        // As bytes, as it would be.
        let bytes = frame.encode();
        self.simulation.after(delay, move |_| {
            let frame = Frame::decode(&bytes).unwrap();
            match to {
                0 => cluster.coordinate(Event::Said(from, frame)),
                _ => cluster.follow(to, MemberEvent::Said(frame)),
            }
        });
    }

    /// How long the next thing takes on a connection, where nothing overtakes.
    fn arrival(&self, from: usize, to: usize) -> Duration {
        let now = self.simulation.now();
        let delay = Duration::from_micros(self.simulation.roll(FRAME_US) as u64);
        let mut inner = self.inner();
        let busy = inner.busy.entry((from, to)).or_default();
        *busy = (*busy).max(now + delay) + Duration::from_nanos(1);
        *busy - now
    }

    fn tick(&self, seat: usize) {
        let over = {
            let inner = self.inner();
            let seat = &inner.seats[seat];
            seat.dead || seat.over.is_some()
        };
        if over {
            return;
        }
        match seat {
            0 => self.coordinate(Event::Tick),
            _ if self.inner().seats[seat].stopped => {}
            _ => self.follow(seat, MemberEvent::Tick),
        }
        let cluster = self.clone();
        let jitter = Duration::from_micros(self.simulation.roll(1000) as u64);
        self.simulation.after(TICK + jitter, move |_| cluster.tick(seat));
    }

    fn coordinate(&self, event: Event) {
        let actions = {
            let mut inner = self.inner();
            if inner.seats[0].dead {
                return;
            }
            inner.coordinator.step(self.simulation.now(), event)
        };
        for action in actions {
            match action {
                Action::Say(seat, frame) => self.say(0, seat, frame),
                Action::Begin(epoch, seats) => self.begin(epoch, seats),
                Action::End(epoch, why) => self.end(epoch, 0, why),
                Action::Remove(seat) => self.close(seat, 0),
                Action::Over(why) => {
                    self.inner().seats[0].over = Some(why);
                    self.simulation.wake(usize::MAX);
                }
            }
        }
    }

    fn follow(&self, seat: usize, event: MemberEvent) {
        let actions = {
            let mut inner = self.inner();
            let place = &mut inner.seats[seat];
            if place.dead {
                return;
            }
            if place.stopped {
                return place.inbox.push(event);
            }
            place.member.as_mut().unwrap().step(self.simulation.now(), event)
        };
        for action in actions {
            match action {
                MemberAction::Say(frame) => self.say(seat, 0, frame),
                MemberAction::Begin { epoch, rank, .. } => self.enter(seat, epoch, rank),
                MemberAction::End(epoch, why) => self.end(epoch, seat, why),
                MemberAction::Over(why) => {
                    self.inner().seats[seat].over = Some(why);
                    self.simulation.wake(usize::MAX);
                }
            }
        }
    }

    fn begin(&self, epoch: u32, seats: Vec<usize>) {
        let ranks = seats.len();
        {
            let mut inner = self.inner();
            let options = SimulatedOptions { ranks, epoch, ..inner.memory };
            let memory = SimulatedEpoch::new(&self.simulation, options);
            inner.epochs.insert(epoch, (memory, seats.clone()));
        }
        for (rank, seat) in seats.into_iter().enumerate().skip(1) {
            self.say(0, seat, Frame::Begin { epoch, rank, ranks, connect: Vec::new() });
        }
        self.enter(0, epoch, 0);
    }

    fn enter(&self, seat: usize, epoch: u32, rank: usize) {
        let cluster = self.clone();
        // The own link knows a cause; the coordinator decides which counts.
        let on_abort: OnAbort = Arc::new(move |_, why| {
            let again = cluster.clone();
            cluster.simulation.after(Duration::ZERO, move |_| match seat {
                0 => again.coordinate(Event::Aborted(epoch, why)),
                _ => again.follow(seat, MemberEvent::Aborted(epoch, why)),
            });
        });
        let mut inner = self.inner();
        let memory = inner.epochs[&epoch].0.clone();
        inner.seats[seat].link = Some(Arc::new(SimulatedLink::new(rank, memory, on_abort)));
        drop(inner);
        self.simulation.wake(usize::MAX);
    }

    fn end(&self, epoch: u32, seat: usize, why: GroupError) {
        let inner = self.inner();
        if let Some((memory, seats)) = inner.epochs.get(&epoch)
            && let Some(rank) = seats.iter().position(|at| *at == seat)
        {
            memory.abort_at(rank, why);
        }
    }
}
