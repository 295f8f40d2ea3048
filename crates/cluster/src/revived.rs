//! A replica that is made again when it goes down, and whose clients hear nothing of it: what it
//! was working on is submitted once more, and the tokens that were told already are left out. That
//! they are the same tokens is what all replicas promise.

mod journal;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use pomona_types::{
    ExpertLoads, Load, Refusal, Replica, ReplicaInfo, Request, RequestId, TokenSink,
};

use journal::Journal;

/// How often it is looked after.
const LOOK: Duration = Duration::from_millis(50);
/// Pauses between tries to make it: twice as long after each that failed, up to the last.
const PAUSE: Duration = Duration::from_millis(500);
const PAUSE_MAX: Duration = Duration::from_secs(60);
/// How long requests wait for it to be up again.
const PATIENCE: Duration = Duration::from_secs(60);
/// Requests that may wait while it is down; more are refused.
const WAITING_MAX: usize = 1024;

/// What a replica lives by: dropping it ends the replica.
pub trait Life: Send {
    /// The replica.
    fn replica(&self) -> Arc<dyn Replica>;

    /// Why it cannot go on, if that is so: seen also while it has nothing to do.
    fn down(&self) -> Option<String> {
        self.replica().load().down
    }
}

/// Makes a life, or says why not.
pub type Maker = Box<dyn FnMut() -> Result<Box<dyn Life>, String> + Send>;

/// Lives on.
pub struct Revived {
    seat: Arc<Seat>,
    stop: Option<Sender<()>>,
    keeper: Option<JoinHandle<()>>,
}

/// The replica as others see it.
struct Seat {
    info: ReplicaInfo,
    now: Mutex<Now>,
    journal: Arc<Journal>,
    past: Mutex<Past>,
}

/// What was counted in lives that are over.
#[derive(Default)]
struct Past {
    load: Load,
    experts: Option<Arc<ExpertLoads>>,
}

enum Now {
    Up(Arc<dyn Replica>),
    /// Why it is not, and since when.
    Down(String, Instant),
}

impl Revived {
    /// A replica that is up, and how to make it again.
    ///
    /// # Errors
    /// When the system has no thread left.
    pub fn new(life: Box<dyn Life>, make: Maker) -> std::io::Result<Revived> {
        let replica = life.replica();
        let (info, now) = (replica.info().clone(), Mutex::new(Now::Up(replica)));
        let seat = Arc::new(Seat { info, now, journal: Arc::default(), past: Mutex::default() });
        let (stop, stopped) = channel();
        let keeper = Keeper { seat: seat.clone(), life: Some(life), make };
        let keeper =
            std::thread::Builder::new().name("pomona-keeper".to_owned()).spawn(move || {
                let mut keeper = keeper;
                let mut pause = LOOK;
                while stopped.recv_timeout(pause) == Err(RecvTimeoutError::Timeout) {
                    pause = keeper.look(pause);
                }
            })?;
        Ok(Revived { seat, stop: Some(stop), keeper: Some(keeper) })
    }

    /// The replica, whichever life it lives.
    pub fn replica(&self) -> Arc<dyn Replica> {
        self.seat.clone()
    }
}

impl Drop for Revived {
    fn drop(&mut self) {
        self.seat.journal.close("the replica was stopped");
        drop(self.stop.take());
        if let Some(keeper) = self.keeper.take() {
            // It passes panics of the maker on, which have been printed.
            let _ = keeper.join();
        }
    }
}

/// Who looks after it.
struct Keeper {
    seat: Arc<Seat>,
    life: Option<Box<dyn Life>>,
    make: Maker,
}

impl Keeper {
    /// Sees whether it is up, and makes it again if not. Returns how long to wait now.
    fn look(&mut self, pause: Duration) -> Duration {
        if let Some(life) = &self.life {
            let Some(why) = life.down() else {
                // What came while it went down or up.
                self.seat.journal.replay(life.replica().as_ref());
                return LOOK;
            };
            tracing::warn!("making the replica again: {why}");
            let replica = life.replica();
            let mut now = self.seat.now();
            *now = Now::Down(why, Instant::now());
            self.seat.bury(replica.as_ref());
            drop(now);
            // First the old one, for its memory and its ranks.
            self.life = None;
        }
        let made = catch_unwind(AssertUnwindSafe(|| (self.make)()));
        match made.unwrap_or_else(|_| Err("making it failed (see the log)".to_owned())) {
            Ok(life) => {
                let replica = life.replica();
                *self.seat.now() = Now::Up(replica.clone());
                let again = self.seat.journal.replay(replica.as_ref());
                tracing::info!("the replica is up again, with {again} requests of before");
                self.life = Some(life);
                LOOK
            }
            Err(why) => {
                let pause = (pause * 2).clamp(PAUSE, PAUSE_MAX);
                tracing::warn!("the replica cannot be made again, next try in {pause:?}: {why}");
                let mut late = false;
                if let Now::Down(before, since) = &mut *self.seat.now() {
                    before.clone_from(&why);
                    late = since.elapsed() > PATIENCE;
                }
                if late {
                    self.seat.journal.fail_waiting(&why);
                }
                pause
            }
        }
    }
}

impl Seat {
    fn now(&self) -> MutexGuard<'_, Now> {
        // What is behind it stays whole, whoever panicked.
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn up(&self) -> Option<Arc<dyn Replica>> {
        match &*self.now() {
            Now::Up(replica) => Some(replica.clone()),
            Now::Down(..) => None,
        }
    }
}

impl Seat {
    fn past(&self) -> MutexGuard<'_, Past> {
        self.past.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a life has counted that is over, and those before it.
    fn bury(&self, replica: &dyn Replica) {
        let mut past = self.past();
        past.load = std::mem::take(&mut past.load).plus(replica.load().counters());
        past.experts = sum(past.experts.take(), replica.experts());
    }
}

fn sum(a: Option<Arc<ExpertLoads>>, b: Option<Arc<ExpertLoads>>) -> Option<Arc<ExpertLoads>> {
    match (a, b) {
        (Some(mut a), Some(b)) => {
            Arc::make_mut(&mut a).add(&b);
            Some(a)
        }
        (a, b) => a.or(b),
    }
}

impl Replica for Seat {
    fn info(&self) -> &ReplicaInfo {
        &self.info
    }

    fn submit(&self, request: Request, sink: Box<dyn TokenSink>) -> Result<(), Refusal> {
        let now = self.now();
        match &*now {
            Now::Up(replica) => {
                let replica = replica.clone();
                drop(now);
                self.journal.submit(replica.as_ref(), request, sink)
            }
            Now::Down(why, since) => {
                if since.elapsed() > PATIENCE || self.journal.len() >= WAITING_MAX {
                    let why = format!("it is being started again: {why}");
                    return Err(Refusal::Unavailable(why));
                }
                // Under the lock: it cannot come up before the request is written down.
                self.journal.wait(request, sink)
            }
        }
    }

    fn cancel(&self, id: RequestId) {
        self.journal.cancel(id);
        if let Some(replica) = self.up() {
            replica.cancel(id);
        }
    }

    /// Down only when it has been for longer than requests wait. Counters are those of all lives.
    fn load(&self) -> Load {
        let now = self.now();
        let past = self.past().load.clone();
        match &*now {
            Now::Up(replica) => Load { down: None, ..replica.load().plus(past) },
            Now::Down(why, since) => Load {
                waiting: self.journal.len() as u32,
                restarting: true,
                down: (since.elapsed() > PATIENCE).then(|| why.clone()),
                ..past
            },
        }
    }

    /// Of all lives.
    fn experts(&self) -> Option<Arc<ExpertLoads>> {
        // Under the lock: no life is counted twice.
        let now = self.now();
        let alive = match &*now {
            Now::Up(replica) => replica.experts(),
            Now::Down(..) => None,
        };
        sum(self.past().experts.clone(), alive)
    }
}

#[cfg(test)]
mod tests;
