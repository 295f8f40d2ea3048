//! The thread that watches the children, and does what the coordinator decides.

use std::collections::VecDeque;
use std::io;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use pomona_types::LostCause;

use super::socket::{Socket, wait_for};
use super::{Desk, LocalOptions};
use crate::group::{Action, Coordinator, Event, Frame, TICK};
use crate::link::Link;
use crate::link::shm::{ShmEpoch, ShmLink, ShmOptions};

/// How long children may take to end when the group is over, before they are killed.
const END_LIMIT: Duration = Duration::from_secs(5);

pub(super) struct ParentWatcher {
    desk: Arc<Desk>,
    arena_bytes: usize,
    coordinator: Coordinator,
    start: Instant,
    /// By seat, from 1 on.
    seats: Vec<Option<Seat>>,
    /// Children that were killed, and are not gone yet.
    dying: Vec<Child>,
    link: Option<Arc<ShmLink>>,
    /// The epoch whose end the coordinator knows.
    ended: u32,
    events: VecDeque<Event>,
}

struct Seat {
    control: Socket,
    child: Child,
}

impl ParentWatcher {
    pub fn new(options: &LocalOptions, desk: Arc<Desk>) -> ParentWatcher {
        let start = Instant::now();
        ParentWatcher {
            desk,
            arena_bytes: options.arena_bytes,
            coordinator: Coordinator::new(start.elapsed(), options.group.clone()),
            start,
            seats: Vec::new(),
            dying: Vec::new(),
            link: None,
            ended: 0,
            events: VecDeque::new(),
        }
    }

    /// Starts the process of the next seat.
    pub fn start(&mut self, seat: usize, mut command: Command) -> io::Result<()> {
        let (control, theirs) = Socket::pair()?;
        let child = command.stdin(Stdio::from(theirs)).spawn()?;
        self.seats.push(Some(Seat { control, child }));
        self.events.push_back(Event::Connected(seat));
        Ok(())
    }

    /// Until the group is over, and all children are gone.
    pub fn run(mut self) {
        while self.desk.papers().over.is_none() {
            self.listen();
            while let Some(event) = self.events.pop_front() {
                for action in self.coordinator.step(self.start.elapsed(), event) {
                    self.act(action);
                }
            }
            self.dying.retain_mut(|child| matches!(child.try_wait(), Ok(None)));
        }
    }

    /// Collects what has happened, the own link first: what it knows came before what follows
    /// from it, such as processes that end.
    fn listen(&mut self) {
        let sockets = self.seats.iter().flatten().map(|seat| &seat.control);
        wait_for(&self.desk.bell, sockets, TICK);
        let epoch = self.coordinator.epoch();
        let why = self.link.as_ref().and_then(|link| link.aborted());
        if let Some(why) = why.clone()
            && self.ended < epoch
        {
            self.ended = epoch;
            self.events.push_back(Event::Aborted(epoch, why));
        }
        let (returned, stop) = self.desk.collect();
        if returned {
            self.events.push_back(Event::Returned { after: epoch, why });
        }
        if stop {
            self.events.push_back(Event::Stop("rank 0 has left it".into()));
        }
        let mut buffer = Vec::new();
        for (index, seat) in self.seats.iter().enumerate() {
            let Some(seat) = seat else { continue };
            let event = loop {
                match seat.control.receive(&mut buffer) {
                    Ok(Some((frame, _))) => self.events.push_back(Event::Said(index + 1, frame)),
                    Ok(None) => break None,
                    Err(_) => break Some(Event::Closed(index + 1, LostCause::Exited)),
                }
            };
            self.events.extend(event);
        }
        self.events.push_back(Event::Tick);
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::Say(seat, frame) => {
                if let Some(Some(seat)) = self.seats.get(seat - 1) {
                    seat.control.send(&frame, None);
                }
            }
            Action::Begin(epoch, seats) => self.begin(epoch, &seats),
            Action::End(epoch, why) => {
                self.ended = epoch;
                if let Some(link) = &self.link {
                    link.abort(why);
                }
            }
            Action::Remove(seat) => {
                if let Some(mut seat) = self.seats.get_mut(seat - 1).and_then(Option::take) {
                    // It fails when the process is gone already.
                    let _ = seat.child.kill();
                    self.dying.push(seat.child);
                }
            }
            Action::Over(why) => self.desk.over(why),
        }
    }

    fn begin(&mut self, epoch: u32, seats: &[usize]) {
        let options = ShmOptions { epoch, ..ShmOptions::new(seats.len(), self.arena_bytes) };
        let shared = match ShmEpoch::create(options) {
            Ok(shared) => shared,
            Err(error) => {
                let why = format!("no shared memory for epoch {epoch}: {error}");
                return self.events.push_back(Event::Stop(why));
            }
        };
        let ranks = seats.len();
        for (rank, seat) in seats.iter().copied().enumerate().skip(1) {
            let frame = Frame::Begin { epoch, rank, ranks, connect: Vec::new() };
            if let Some(Some(seat)) = self.seats.get(seat - 1) {
                seat.control.send(&frame, Some(shared.descriptor()));
            }
        }
        let link = Arc::new(shared.link(0).expect("there is a rank 0"));
        self.link = Some(link.clone());
        self.desk.begin(link);
    }
}

impl Drop for ParentWatcher {
    /// Closes the connections, waits for the children, and kills who does not end.
    fn drop(&mut self) {
        let limit = Instant::now() + END_LIMIT;
        let seats = std::mem::take(&mut self.seats);
        self.dying.extend(seats.into_iter().flatten().map(|seat| seat.child));
        while !self.dying.is_empty() {
            self.dying.retain_mut(|child| matches!(child.try_wait(), Ok(None)));
            if Instant::now() >= limit {
                for child in &mut self.dying {
                    let _ = child.kill();
                    let _ = child.wait();
                }
                self.dying.clear();
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}
