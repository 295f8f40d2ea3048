//! The ranks of a divided model: how the leader moves the others, and what these do.

use std::sync::Arc;
use std::time::Duration;

use pomona_device::{DType, View};
use pomona_fabric::coll::{Choices, World};
use pomona_fabric::link::Link;
use pomona_kernels::Ops;
use pomona_models::{Division, Groups, LOGIT_ROWS_MAX, Model, Parallel, Ranks};
use pomona_types::{Collective, GroupError};

use crate::EngineError;
use crate::input::{Input, Keeper};
use crate::kv::kv_cache;
use crate::order::{Kind, Order};

/// The rank that leads.
const LEADER: usize = 0;
/// An arena is divided among all ranks, those that share layers, those that keep sequences
/// together, and stages.
const PARTS: usize = 4;
/// Smaller arenas make pieces of what ranks gather.
const ARENA_BYTES_MIN: usize = 256 << 20;
/// Longest wait for a rank that is alive: more than the slowest step takes on the slowest rank.
const STEP_LIMIT: Duration = Duration::from_secs(600);

/// A rank's place in a divided model, with all that it needs to talk to the others.
pub struct Seat {
    /// All ranks.
    pub world: Arc<dyn Collective>,
    /// Those that it exchanges activations with.
    pub ranks: Ranks,
}

impl Seat {
    /// Bytes of each rank's arena with which ranks do not wait for each other longer than they have
    /// to, and never in a circle: what is on its way between stages, one way and the other, is at
    /// most the tokens of the steps in flight, and has room. Only what is used takes memory.
    pub fn arena_bytes(division: &Division, hidden: u32, max_num_batched_tokens: u32) -> usize {
        let step = max_num_batched_tokens as usize * hidden as usize * size_of::<f32>();
        // Messages have a third of each member's lane in one of the parts.
        let lanes = 2 * 3 * PARTS * division.layers.len();
        (step * lanes).max(ARENA_BYTES_MIN)
    }

    /// Takes the place that a link has. All ranks have to, at about the same time, and with the
    /// same choice of algorithms.
    ///
    /// # Errors
    /// When the link has another number of ranks than the division, too small arenas, or has ended.
    pub fn take(
        link: Arc<dyn Link>,
        division: &Division,
        choices: Choices,
    ) -> Result<Seat, GroupError> {
        let (rank, parallel) = (link.rank(), division.parallel);
        if link.ranks() != parallel.ranks() {
            let (there, asked) = (link.ranks(), parallel.ranks());
            return Err(GroupError::Invalid(format!("{there} ranks for a model over {asked}")));
        }
        // In whole cache lines, as parts begin.
        let bytes = link.arena_bytes() / PARTS / 64 * 64;
        let mut division_of = World::new(link).with_limit(STEP_LIMIT).with_choices(choices);
        let world = Arc::new(division_of.all(bytes)?);
        let mut groups = |of: fn(&Parallel, usize) -> Vec<usize>| {
            let mut groups: Vec<_> = (0..parallel.ranks()).map(|r| of(&parallel, r)).collect();
            groups.sort();
            groups.dedup();
            let groups: Vec<&[usize]> = groups.iter().map(Vec::as_slice).collect();
            let own = division_of.divide(&groups, bytes)?.filter(|own| own.ranks() > 1);
            Ok::<_, GroupError>(own.map(|own| Arc::new(own) as Arc<dyn Collective>))
        };
        let tensor = groups(Parallel::tensor_group)?;
        let context = groups(Parallel::context_group)?;
        let groups = Groups { tensor, context, pipeline: groups(Parallel::pipeline_group)? };
        let (division, place) = (division.clone(), parallel.place(rank));
        Ok(Seat { world, ranks: Ranks { division, place, groups } })
    }
}

/// The other ranks, as the leader moves them.
pub struct Others {
    world: Arc<dyn Collective>,
    stages: usize,
    message: Vec<u8>,
}

impl Others {
    /// All ranks of a model, the leader's own included, which has so many stages.
    pub fn new(world: Arc<dyn Collective>, stages: usize) -> Others {
        Others { world, stages, message: Vec::new() }
    }

    /// Steps that are computed at a time.
    pub(crate) fn stages(&self) -> usize {
        self.stages
    }

    pub(crate) fn step(&mut self, order: &Order) -> Result<(), GroupError> {
        order.write(&mut self.message);
        self.world.broadcast(LEADER, &mut self.message)
    }

    /// The oldest step's logits are wanted. Without stages, they are taken after each step.
    pub(crate) fn outputs(&mut self) -> Result<(), GroupError> {
        self.ask(Kind::Outputs)
    }

    /// What experts have counted is wanted. Without stages, the leader knows it by itself.
    pub(crate) fn counts(&mut self) -> Result<(), GroupError> {
        self.ask(Kind::Counts)
    }

    /// Asks for what only other stages have.
    fn ask(&mut self, kind: Kind) -> Result<(), GroupError> {
        if self.stages == 1 {
            return Ok(());
        }
        kind.write(&mut self.message);
        self.world.broadcast(LEADER, &mut self.message)
    }

    pub(crate) fn end(&mut self) {
        Kind::End.write(&mut self.message);
        // Those who are gone need not be told, and the others see that the group is at its end.
        // When all have heard it, it does not matter in which order the rest goes.
        let told = self.world.broadcast(LEADER, &mut self.message);
        let _ = told.and_then(|()| self.world.barrier());
    }
}

/// What a rank that follows is told beside its model.
#[derive(Clone, Debug)]
pub struct FollowConfig {
    /// As the leader's.
    pub max_num_seqs: u32,
    /// As the leader's.
    pub max_num_batched_tokens: u32,
    /// As the leader's.
    pub kv_dtype: DType,
    /// As the leader's.
    pub kv_blocks: u32,
    /// In how many stages the model is cut.
    pub stages: usize,
}

/// Runs what the leader orders, until it says that nothing follows.
///
/// # Errors
/// When memory is short, a step fails, or the ranks lose each other.
pub fn follow(
    config: &FollowConfig,
    model: Box<dyn Model>,
    ops: &dyn Ops,
    world: &dyn Collective,
) -> Result<(), EngineError> {
    let spec = model.spec();
    let device = ops.device().as_ref();
    let max_tokens = config.max_num_batched_tokens as usize;
    let groups = spec.layer_groups().len();
    let keeper = Keeper::of(model.part());
    let blocks = keeper.blocks(config.kv_blocks);
    let kv = kv_cache(device, spec, model.part(), config.kv_dtype, blocks)?;
    let room = (max_tokens, config.max_num_seqs as usize);
    let mut input = Input::new(device, room, groups, keeper)?;
    let mut logits = Taken {
        room: device.alloc_view(DType::F32, &[LOGIT_ROWS_MAX, spec.vocab as usize])?,
        outputs: Vec::new(),
        model,
    };
    let (mut message, mut order) = (Vec::new(), Order::default());
    loop {
        world.broadcast(LEADER, &mut message)?;
        match Kind::read(&message).ok_or(EngineError::Order)? {
            (Kind::End, _) => {
                // The leader waits for it; if it is gone already, that is an end as well.
                let _ = world.barrier();
                return Ok(());
            }
            (Kind::Outputs, _) => logits.take(ops)?,
            (Kind::Counts, _) => drop(logits.model.expert_counts(ops)?),
            (Kind::Step, rest) => {
                order.read(rest).ok_or(EngineError::Order)?;
                if order.tokens.is_empty() || order.tokens.len() > max_tokens {
                    return Err(EngineError::Order);
                }
                input.learn(&order.told, &order.blocks).ok_or(EngineError::Order)?;
                let batch = input.batch(device, &order.tokens, &order.stretches)?;
                logits.model.forward(ops, &batch, &kv)?;
                logits.outputs.push(order.outputs());
                if config.stages == 1 {
                    logits.take(ops)?;
                }
            }
        }
    }
}

/// A rank's part in the logits of steps that have been run.
struct Taken {
    model: Box<dyn Model>,
    room: View,
    /// How many each of them has, the oldest first.
    outputs: Vec<usize>,
}

impl Taken {
    /// Does the rank's part for the oldest step.
    fn take(&mut self, ops: &dyn Ops) -> Result<(), EngineError> {
        if self.outputs.is_empty() {
            return Err(EngineError::Order);
        }
        let outputs = self.outputs.remove(0);
        self.model.outputs(ops, outputs)?;
        for start in (0..outputs).step_by(LOGIT_ROWS_MAX) {
            let end = outputs.min(start + LOGIT_ROWS_MAX);
            self.model.logits(ops, start..end, &self.room.rows(0, end - start))?;
        }
        Ok(())
    }
}
