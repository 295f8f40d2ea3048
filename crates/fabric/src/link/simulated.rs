//! Ranks in a simulated world: virtual time, seeded delays, and everything that can go wrong.
//!
//! Each rank runs on a thread of its own, but only one runs at a time: the others wait until it
//! parks, and who is next is the seed's choice. Time stands still while a rank runs, and jumps to
//! the next event when all are parked. So a run depends on its seed alone, however long its waits
//! are, and takes no longer than what it computes. Puts take different times, and overtake each
//! other; ranks can be killed or stopped, and directions between two cut.

use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use pomona_types::GroupError;

use super::memory::Memory;
use super::{COUNTERS, Link};

/// What a task does when nobody else can run.
pub type Task<'a> = Box<dyn FnOnce() + Send + 'a>;
/// What is done at a time, by the world itself.
type Call = Box<dyn FnOnce(&Simulation) + Send>;

/// A world of its own, with a clock of its own.
#[derive(Clone)]
pub struct Simulation {
    world: Arc<World>,
}

struct World {
    state: Mutex<State>,
    /// For each task, that it may run.
    turns: Vec<Condvar>,
    over: Condvar,
}

struct State {
    now: Duration,
    dice: Dice,
    /// By time, then in the order in which they were made.
    events: BTreeMap<(Duration, u64), Event>,
    made: u64,
    tasks: Vec<TaskState>,
    running: Option<usize>,
}

enum Event {
    Deliver(Delivery),
    Call(Call),
    /// The end of a task's park, if it is still that one.
    Wake(usize, u64),
}

struct Delivery {
    epoch: Arc<SimulatedEpoch>,
    from: usize,
    to: usize,
    offset: usize,
    bytes: Vec<u8>,
    counter: usize,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum TaskState {
    Runnable,
    /// Until something happens to this rank; the number tells this park from others.
    Parked(usize, u64),
    /// Until the world ends.
    Stopped,
    Done,
}

/// Numbers that depend on a seed: SplitMix64.
#[derive(Clone, Debug)]
pub struct Dice(pub u64);

impl Dice {
    /// The next number.
    fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// One of so many.
    pub fn roll(&mut self, sides: usize) -> usize {
        (self.number() % sides.max(1) as u64) as usize
    }
}

impl Simulation {
    /// A world for so many tasks.
    pub fn new(seed: u64, tasks: usize) -> Simulation {
        let state = State {
            now: Duration::ZERO,
            dice: Dice(seed),
            events: BTreeMap::new(),
            made: 0,
            tasks: vec![TaskState::Runnable; tasks],
            running: None,
        };
        let turns = (0..tasks).map(|_| Condvar::new()).collect();
        Simulation {
            world: Arc::new(World { state: Mutex::new(state), turns, over: Condvar::new() }),
        }
    }

    /// Runs the tasks until all are done. Panics with the first that does.
    pub fn run(&self, tasks: Vec<Task<'_>>) {
        assert_eq!(tasks.len(), self.world.turns.len(), "the world was made for other tasks");
        std::thread::scope(|scope| {
            for (index, task) in tasks.into_iter().enumerate() {
                scope.spawn(move || {
                    let turn = Turn { simulation: self, index };
                    self.wait_for_turn(self.state(), index);
                    task();
                    drop(turn);
                });
            }
            let mut state = self.next_turn(self.state());
            while state.tasks.iter().any(|task| *task != TaskState::Done) {
                state = self.world.over.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
        });
    }

    /// The time in this world.
    pub fn now(&self) -> Duration {
        self.state().now
    }

    /// One of so many, by the seed.
    pub fn roll(&self, sides: usize) -> usize {
        self.state().dice.roll(sides)
    }

    /// Has something done after a while. It is done by the world, and must not park.
    pub fn after(&self, delay: Duration, call: impl FnOnce(&Simulation) + Send + 'static) {
        self.state().add(delay, Event::Call(Box::new(call)));
    }

    /// Lets the task that runs sleep until something happens to `rank`, `at_most` so long.
    pub fn park(&self, rank: usize, at_most: Duration) {
        let mut state = self.state();
        let Some(task) = state.running else { return };
        let park = state.made;
        state.tasks[task] = TaskState::Parked(rank, park);
        state.add(at_most, Event::Wake(task, park));
        let state = self.next_turn(state);
        self.wait_for_turn(state, task);
    }

    /// Wakes the tasks that sleep until something happens to `rank`.
    pub fn wake(&self, rank: usize) {
        self.state().wake(rank);
    }

    /// Takes a task's turns away, as a signal stops a process, until [`resume`](Self::resume).
    /// When nothing else can happen, it is resumed all the same.
    pub fn stop(&self, task: usize) {
        let mut state = self.state();
        if state.tasks[task] != TaskState::Done {
            state.tasks[task] = TaskState::Stopped;
        }
    }

    /// Undoes [`stop`](Self::stop).
    pub fn resume(&self, task: usize) {
        let mut state = self.state();
        if state.tasks[task] == TaskState::Stopped {
            state.tasks[task] = TaskState::Runnable;
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.world.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait_for_turn(&self, mut state: MutexGuard<'_, State>, task: usize) {
        while state.running != Some(task) {
            let turn = &self.world.turns[task];
            state = turn.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Lets events happen until a task can run, and lets it.
    fn next_turn<'a>(&'a self, mut state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        state.running = None;
        loop {
            let runnable = |task: &TaskState| *task == TaskState::Runnable;
            let count = state.tasks.iter().filter(|task| runnable(task)).count();
            if count > 0 {
                let chosen = state.dice.roll(count);
                let tasks = state.tasks.iter().enumerate();
                let mut tasks = tasks.filter(|(_, task)| runnable(task));
                let (task, _) = tasks.nth(chosen).expect("so many are runnable");
                state.running = Some(task);
                self.world.turns[task].notify_one();
                return state;
            }
            if state.tasks.iter().all(|task| *task == TaskState::Done) {
                self.world.over.notify_one();
                return state;
            }
            match state.events.pop_first() {
                Some(((at, _), event)) => {
                    state.now = at;
                    state = self.happen(state, event);
                }
                None => state.resume_all(),
            }
        }
    }

    fn happen<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        event: Event,
    ) -> MutexGuard<'a, State> {
        match event {
            Event::Wake(task, park) => {
                if matches!(state.tasks[task], TaskState::Parked(_, this) if this == park) {
                    state.tasks[task] = TaskState::Runnable;
                }
            }
            Event::Deliver(delivery) => {
                let to = delivery.to;
                if delivery.arrive() {
                    state.wake(to);
                }
            }
            Event::Call(call) => {
                drop(state);
                call(self);
                state = self.state();
            }
        }
        state
    }
}

impl State {
    fn add(&mut self, delay: Duration, event: Event) {
        self.made += 1;
        self.events.insert((self.now + delay, self.made), event);
    }

    fn wake(&mut self, rank: usize) {
        for task in &mut self.tasks {
            if matches!(task, TaskState::Parked(who, _) if *who == rank) {
                *task = TaskState::Runnable;
            }
        }
    }

    fn resume_all(&mut self) {
        for task in self.tasks.iter_mut().filter(|task| **task == TaskState::Stopped) {
            *task = TaskState::Runnable;
        }
    }
}

/// Ends a task's part, however it ended.
struct Turn<'a> {
    simulation: &'a Simulation,
    index: usize,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut state = self.simulation.state();
        state.tasks[self.index] = TaskState::Done;
        drop(self.simulation.next_turn(state));
    }
}

/// What the ranks of one epoch have in the simulated world.
pub struct SimulatedEpoch {
    simulation: Simulation,
    options: SimulatedOptions,
    arenas: Vec<Memory>,
    shared: Mutex<EpochState>,
}

struct EpochState {
    /// By receiver, sender, counter.
    counters: Vec<u32>,
    /// Directions in which nothing arrives: from, to.
    cut: Vec<(usize, usize)>,
    /// Ranks that are dead, and what they are told if they should look.
    dead: Vec<bool>,
    aborted: Vec<Option<GroupError>>,
}

/// How an epoch is made.
#[derive(Clone, Copy, Debug)]
pub struct SimulatedOptions {
    /// How many ranks.
    pub ranks: usize,
    /// Which life of the group.
    pub epoch: u32,
    /// Bytes of each arena.
    pub arena_bytes: usize,
    /// Whether arenas of others can be reached in place.
    pub in_place: bool,
    /// The longest time that a put takes.
    pub delay_max: Duration,
}

impl SimulatedEpoch {
    /// With empty arenas.
    pub fn new(simulation: &Simulation, options: SimulatedOptions) -> Arc<SimulatedEpoch> {
        let ranks = options.ranks;
        Arc::new(SimulatedEpoch {
            simulation: simulation.clone(),
            options,
            arenas: (0..ranks).map(|_| Memory::new(options.arena_bytes)).collect(),
            shared: Mutex::new(EpochState {
                counters: vec![0; ranks * ranks * COUNTERS],
                cut: Vec::new(),
                dead: vec![false; ranks],
                aborted: vec![None; ranks],
            }),
        })
    }

    /// Cuts a direction, for puts on their way too.
    pub fn cut(&self, from: usize, to: usize) {
        self.shared().cut.push((from, to));
    }

    /// Kills a rank: nothing that it does has an effect any more, and every call that it waits in
    /// ends.
    pub fn kill(&self, rank: usize) {
        self.shared().dead[rank] = true;
        self.abort_at(rank, GroupError::Ended("it is dead, in this simulation".into()));
    }

    /// Raises the abort word that one rank sees.
    pub fn abort_at(&self, rank: usize, why: GroupError) {
        self.shared().aborted[rank].get_or_insert(why);
        self.simulation.wake(rank);
    }

    fn shared(&self) -> MutexGuard<'_, EpochState> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Delivery {
    /// Writes the bytes and raises the counter, unless a cut or a death prevents it.
    fn arrive(self) -> bool {
        let Delivery { epoch, from, to, offset, bytes, counter } = self;
        let mut shared = epoch.shared();
        if shared.cut.contains(&(from, to)) || shared.dead[from] || shared.dead[to] {
            return false;
        }
        epoch.arenas[to].write(offset, &bytes);
        let ranks = epoch.options.ranks;
        let count = &mut shared.counters[(to * ranks + from) * COUNTERS + counter];
        *count = count.wrapping_add(1);
        true
    }
}

/// What is done when a rank's link is told to abort: the rank, and the cause.
pub type OnAbort = Arc<dyn Fn(usize, GroupError) + Send + Sync>;

/// One rank's ends in the simulated world.
pub struct SimulatedLink {
    rank: usize,
    epoch: Arc<SimulatedEpoch>,
    on_abort: OnAbort,
}

impl SimulatedLink {
    /// Those of a rank; `on_abort` tells whoever has to end the epoch for all.
    pub fn new(rank: usize, epoch: Arc<SimulatedEpoch>, on_abort: OnAbort) -> SimulatedLink {
        SimulatedLink { rank, epoch, on_abort }
    }

    /// Links of all ranks, among which an abort reaches everyone at once.
    pub fn all(epoch: &Arc<SimulatedEpoch>) -> Vec<SimulatedLink> {
        let everyone = epoch.clone();
        let on_abort: OnAbort = Arc::new(move |_, why: GroupError| {
            for rank in 0..everyone.options.ranks {
                everyone.abort_at(rank, why.clone());
            }
        });
        let link = |rank| SimulatedLink::new(rank, epoch.clone(), on_abort.clone());
        (0..epoch.options.ranks).map(link).collect()
    }
}

impl Link for SimulatedLink {
    fn rank(&self) -> usize {
        self.rank
    }

    fn ranks(&self) -> usize {
        self.epoch.options.ranks
    }

    fn epoch(&self) -> u32 {
        self.epoch.options.epoch
    }

    fn arena_bytes(&self) -> usize {
        self.epoch.options.arena_bytes
    }

    fn put(
        &self,
        peer: usize,
        offset: usize,
        parts: &[&[u8]],
        counter: usize,
    ) -> Result<(), GroupError> {
        let bytes = parts.concat();
        let end = offset.checked_add(bytes.len());
        if peer >= self.ranks() || end.is_none_or(|end| end > self.arena_bytes()) {
            let why = format!("{} bytes at {offset} of rank {peer}", bytes.len());
            return Err(GroupError::Invalid(why));
        }
        let (from, to) = (self.rank, peer);
        let delivery = Delivery { epoch: self.epoch.clone(), from, to, offset, bytes, counter };
        let mut state = self.epoch.simulation.state();
        let delay = state.dice.roll(self.epoch.options.delay_max.as_nanos() as usize + 1);
        state.add(Duration::from_nanos(delay as u64), Event::Deliver(delivery));
        Ok(())
    }

    fn count(&self, peer: usize, counter: usize) -> u32 {
        let at = (self.rank * self.ranks() + peer) * COUNTERS + counter;
        self.epoch.shared().counters[at]
    }

    fn park(&self, peer: usize, counter: usize, seen: u32, at_most: Duration) {
        if self.count(peer, counter) == seen && self.aborted().is_none() {
            self.epoch.simulation.park(self.rank, at_most);
        }
    }

    fn spins(&self) -> u32 {
        0
    }

    fn now(&self) -> Duration {
        self.epoch.simulation.now()
    }

    fn arena(&self, rank: usize) -> Option<*mut u8> {
        let reached = self.epoch.options.in_place || rank == self.rank;
        self.epoch.arenas.get(rank).filter(|_| reached).map(Memory::start)
    }

    fn aborted(&self) -> Option<GroupError> {
        self.epoch.shared().aborted[self.rank].clone()
    }

    fn abort(&self, why: GroupError) {
        if !self.epoch.shared().dead[self.rank] {
            (self.on_abort)(self.rank, why);
        }
    }
}
