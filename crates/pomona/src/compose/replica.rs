//! One replica at work: an engine, and the other ranks of its model if that is divided.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result, anyhow};
use pomona_cluster::{Life, Replicas, Revived};
use pomona_engine::{Engine, EngineConfig, Others, Seat};
use pomona_models::Checkpoint;
use pomona_scheduler::batch::Ordering;
use pomona_types::{Collective, Micros, Replica};

use super::follow::{self, Setup};
use super::{Prepared, Weights};
use crate::cli::Policy;
use crate::crew::{Crew, Door};
use crate::models::progress::human_bytes;
use crate::models::weight_cache::Finishing;

/// A replica whose weights are in their place.
pub(super) struct Placed {
    replica: usize,
    weights: Weights,
    world: Option<Arc<dyn Collective>>,
    crew: Option<Crew>,
}

/// An engine with all that it needs.
pub(super) struct Started {
    engine: Engine,
    /// Packed weights are still on their way to the disk, perhaps.
    _finishing: Finishing,
    /// The other ranks. Behind the engine, which tells them that it is over.
    crew: Option<Crew>,
}

impl Life for Started {
    fn replica(&self) -> Arc<dyn Replica> {
        self.engine.replica()
    }

    fn down(&self) -> Option<String> {
        let lost = || Some(self.crew.as_ref()?.link().aborted()?.to_string());
        self.engine.replica().load().down.or_else(lost)
    }
}

/// A replica at work. One with other ranks is made again when one of them is lost.
pub(super) enum Running {
    Alone(Started),
    Divided(Revived),
}

impl Running {
    fn replica(&self) -> Arc<dyn Replica> {
        match self {
            Running::Alone(started) => started.replica(),
            Running::Divided(revived) => revived.replica(),
        }
    }
}

/// Several replicas as one.
pub(super) fn as_one(running: &[Running]) -> Result<Arc<dyn Replica>> {
    let mut all: Vec<_> = running.iter().map(Running::replica).collect();
    match all.len() {
        1 => Ok(all.remove(0)),
        _ => Ok(Arc::new(Replicas::new(all).context("no replica runs")?)),
    }
}

/// Where nodes come to, if there are such.
pub(super) type SharedDoor = Option<Arc<Mutex<Door>>>;

impl Prepared {
    /// Opens the door for nodes, if they are wanted.
    pub(super) fn door(&self) -> Result<SharedDoor> {
        let Some(address) = &self.args.nodes.node_listen else { return Ok(None) };
        let door = Door::open(address, &self.name, &self.args, self.digest()?)?;
        Ok(Some(Arc::new(Mutex::new(door))))
    }

    /// Loads all replicas.
    pub(super) fn place_all(&self, door: &SharedDoor) -> Result<Vec<Placed>> {
        let replicas = 0..self.args.parallel.data_parallel_size as usize;
        replicas.map(|replica| self.place(replica, door)).collect()
    }

    /// Starts a replica, to be made again if it has ranks to lose.
    pub(super) fn run(
        self: &Arc<Self>,
        placed: Placed,
        ends: &Arc<[u32]>,
        door: &SharedDoor,
    ) -> Result<Running> {
        let (replica, divided) = (placed.replica, placed.crew.is_some());
        let started = self.start(placed, ends)?;
        if !divided {
            return Ok(Running::Alone(started));
        }
        let (prepared, ends, door) = (self.clone(), ends.clone(), door.clone());
        let again = move || -> Result<Box<dyn Life>, String> {
            let placed = prepared.place(replica, &door);
            let started = placed.and_then(|placed| prepared.start(placed, &ends));
            started.map(|started| Box::new(started) as Box<dyn Life>).map_err(|e| format!("{e:#}"))
        };
        Ok(Running::Divided(Revived::new(Box::new(started), Box::new(again))?))
    }

    /// Finds the other ranks of a replica, and loads what this process has of it.
    fn place(&self, replica: usize, door: &SharedDoor) -> Result<Placed> {
        let crew = match self.division.parallel.ranks() {
            1 => None,
            _ => {
                let mut door = door.as_ref().map(|door| lock(door));
                let (hidden, tokens) =
                    (self.checkpoint.spec().hidden, self.args.max_num_batched_tokens);
                let arena = Seat::arena_bytes(&self.division, hidden, tokens);
                let who = (self.name.as_str(), replica);
                Some(Crew::find(who, &self.args, arena, door.as_deref_mut())?)
            }
        };
        let seat =
            crew.as_ref().map(|crew| Seat::take(crew.link(), &self.division, crew.choices()));
        let seat = seat.transpose()?;
        let (world, ranks) = seat.map(|seat| (seat.world, seat.ranks)).unzip();
        if let Some(world) = &world {
            Setup::of(self)?.send(world.as_ref())?;
        }
        let weights = self.on_its_cores(replica, || self.load_weights_of(ranks))?;
        Ok(Placed { replica, weights, world, crew })
    }

    /// Starts the engine, when all ranks have loaded.
    fn start(&self, placed: Placed, ends: &[u32]) -> Result<Started> {
        let Placed { replica, weights, world, crew } = placed;
        if let Some(world) = &world {
            follow::await_all(world.as_ref())
                .context("not all ranks have loaded their part of the model")?;
        }
        let stages = self.division.parallel.pipeline as usize;
        let others = world.map(|world| Others::new(world, stages));
        let Weights { model, draft, ops, finishing } = weights;
        let config = self.engine_config(ends.to_vec());
        let start = || {
            Engine::lead(config, model, draft, ops, others).with_context(|| {
                format!(
                    "cannot start with {} of keys and values: if memory is short, choose less \
                     --kv-cache-memory or a smaller --max-model-len, or stop other programs",
                    human_bytes(self.fit.kv_bytes)
                )
            })
        };
        let engine = self.on_its_cores(replica, start)?;
        Ok(Started { engine, _finishing: finishing, crew })
    }

    /// Runs something on the cores that a replica's first rank has, where there are several ranks:
    /// the threads that it starts stay there.
    fn on_its_cores<T: Send>(
        &self,
        replica: usize,
        work: impl FnOnce() -> Result<T> + Send,
    ) -> Result<T> {
        if self.args.parallel.processes() == 1 || self.args.nodes.apart() {
            return work();
        }
        let run = || {
            take_cores(replica * self.division.parallel.ranks(), self.threads);
            work()
        };
        std::thread::scope(|scope| {
            scope.spawn(run).join().unwrap_or_else(|_| Err(anyhow!("loading failed")))
        })
    }

    fn engine_config(&self, eos_token_ids: Vec<u32>) -> EngineConfig {
        EngineConfig {
            name: self.resolved.name.as_str().into(),
            max_model_len: self.fit.max_model_len,
            max_num_seqs: self.args.max_num_seqs,
            max_num_batched_tokens: self.args.max_num_batched_tokens,
            kv_dtype: self.args.kv_cache_dtype.0,
            kv_blocks: self.fit.kv_blocks,
            prefix_caching: self.args.prefix_caching(),
            ordering: match self.args.scheduling_policy {
                Policy::Fcfs => Ordering::Fcfs,
                Policy::Priority => Ordering::Priority,
                Policy::Fair => Ordering::Fair,
            },
            max_waiting: self.args.max_waiting,
            step_target: match self.args.step_target_ms {
                0 => None,
                ms => Some(Micros(1000 * u64::from(ms))),
            },
            eos_token_ids,
            seed: self.args.seed,
            speculation: self.args.drafting().map(|mut drafting| {
                // Making a draft is reading the draft model's weights.
                let bytes = self.draft.as_ref().map_or(0, Checkpoint::active_bytes);
                let share = bytes as f32 / self.checkpoint.active_bytes().max(1) as f32;
                drafting.speculation.draft_cost = share;
                drafting.speculation
            }),
        }
    }
}

pub(super) fn lock(door: &Mutex<Door>) -> MutexGuard<'_, Door> {
    // Nodes come and go, whoever panicked.
    door.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Restricts the thread to the cores of one of the ranks of this machine, all replicas' counted.
pub(super) fn take_cores(rank: usize, count: usize) {
    let cores = pomona_device::usable_cores();
    let first = rank * count % cores.len().max(1);
    pomona_device::restrict_to(&cores[first..cores.len().min(first + count)]);
}
