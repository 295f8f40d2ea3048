//! The engine as others see it: started with a model, used as a [`Replica`], stopped.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use pomona_device::{DType, Device, DeviceError};
use pomona_kernels::Ops;
use pomona_models::{Model, ModelError};
use pomona_scheduler::batch::{
    Config, Effects, Method, Ordering, Speculation, State, StepPlan, StepResult,
};
use pomona_types::{
    ExpertLoads, GroupError, Load, Micros, ModelSpec, Refusal, Replica, ReplicaInfo, Request,
    RequestId, Sampling, TokenId, TokenSink,
};

use crate::active::{Active, Actives, exclusive};
use crate::draft::Draft;
use crate::experts::{ExpertWatch, Told};
use crate::input::{Input, Keeper};
use crate::kv::{draft_kv_cache, kv_cache};
use crate::logits::Logits;
use crate::phases::{Phase, Phases};
use crate::ranks::Others;
use crate::step::Stepper;

/// Most alternatives per token that a request may ask for (vLLM's default is 20).
const LOGPROBS_MAX: u32 = 20;

/// What to run and within which limits. Names are vLLM's.
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// The model's name as resolved.
    pub name: Arc<str>,
    /// Most tokens in a sequence.
    pub max_model_len: u32,
    /// Most sequences in a step.
    pub max_num_seqs: u32,
    /// Most tokens in a step; the model must have been loaded for as many.
    pub max_num_batched_tokens: u32,
    /// Element type of keys and values: F32, F16, BF16 or I8.
    pub kv_dtype: DType,
    /// Blocks of KV, 16 tokens of one layer group each.
    pub kv_blocks: u32,
    /// Share blocks of equal prefixes.
    pub prefix_caching: bool,
    /// Who goes first.
    pub ordering: Ordering,
    /// Requests that may wait before more are refused.
    pub max_waiting: u32,
    /// About how long a step with prompts may take while others decode.
    pub step_target: Option<Micros>,
    /// Tokens that end a sequence.
    pub eos_token_ids: Vec<TokenId>,
    /// Seeds requests that bring none.
    pub seed: u64,
    /// How requests get drafts, if they do.
    pub speculation: Option<Speculation>,
}

/// Why an engine cannot start or go on.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// Limits that cannot work together.
    #[error("{0}")]
    Config(String),
    /// No memory, usually.
    #[error("cannot set up the engine's memory")]
    Memory(#[from] DeviceError),
    /// A forward pass failed.
    #[error("a step failed: {0}")]
    Step(#[source] ModelError),
    /// A message of the leader that is none: a bug, or another version.
    #[error("a step was ordered that cannot be: ranks of one model must be of one version")]
    Order,
    /// The ranks of a divided model lost each other.
    #[error("the ranks that the model is divided over cannot go on")]
    Group(#[from] GroupError),
    /// The operating system gave no thread.
    #[error("cannot start the engine's thread")]
    Thread(#[from] std::io::Error),
}

/// A running engine. Dropping it stops it.
pub struct Engine {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// What the engine's thread and its callers share.
pub(crate) struct Shared {
    info: ReplicaInfo,
    seed: u64,
    started: Instant,
    inner: Mutex<Inner>,
    wake: Condvar,
    /// When the engine last finished a step or found nothing to do, in microseconds.
    progress: AtomicU64,
    steps: AtomicU64,
    pub(crate) phases: Phases,
    pub(crate) experts: Told,
}

struct Inner {
    state: State,
    arrivals: Vec<(RequestId, Mutex<Active>)>,
    working: bool,
    stop: bool,
    down: Option<String>,
}

impl Inner {
    fn new(state: State) -> Inner {
        Inner { state, arrivals: Vec::new(), working: false, stop: false, down: None }
    }
}

/// What the step loop does next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Next {
    /// Begins the planned step.
    Step,
    /// Nothing new.
    Nothing,
    /// Ends what is being computed, and then itself.
    Stop,
}

impl Engine {
    /// Takes a loaded model, and the draft model if speculation has one, allocates KV memory and
    /// starts the step loop on a thread of its own.
    ///
    /// # Errors
    /// When the limits contradict each other, the models do not belong together or memory is short.
    pub fn start(
        config: EngineConfig,
        model: Box<dyn Model>,
        draft: Option<Box<dyn Model>>,
        ops: Arc<dyn Ops>,
    ) -> Result<Engine, EngineError> {
        Engine::lead(config, model, draft, ops, None)
    }

    /// The same for a model that is divided over ranks, of which this is the first: all of them
    /// are told of each step through `world`, and have to [`follow`](crate::follow).
    ///
    /// # Errors
    /// As [`Engine::start`].
    pub fn lead(
        config: EngineConfig,
        model: Box<dyn Model>,
        draft: Option<Box<dyn Model>>,
        ops: Arc<dyn Ops>,
        others: Option<Others>,
    ) -> Result<Engine, EngineError> {
        let spec = model.spec().clone();
        let groups = spec.layer_groups();
        let state = State::new(Config {
            max_num_seqs: config.max_num_seqs,
            max_num_batched_tokens: config.max_num_batched_tokens,
            max_model_len: config.max_model_len,
            blocks: config.kv_blocks,
            context: model.part().context_ranks,
            groups: groups.iter().map(|g| g.kind).collect(),
            prefix_caching: config.prefix_caching,
            ordering: config.ordering,
            max_waiting: config.max_waiting,
            step_target: config.step_target,
            steps_in_flight: others.as_ref().map_or(1, Others::stages) as u32,
            eos_token_ids: config.eos_token_ids.clone(),
            speculation: config.speculation.clone(),
        })
        .map_err(|e| EngineError::Config(e.to_string()))?;
        let device = ops.device().clone();
        let keeper = Keeper::of(model.part());
        let blocks = keeper.blocks(config.kv_blocks);
        let kv = kv_cache(device.as_ref(), &spec, model.part(), config.kv_dtype, blocks)?;
        if draft.is_some() && model.part().context_ranks > 1 {
            let why = "a draft model needs the keys and values of all ranks: leave out \
                       --context-parallel-size, or take drafts from the text itself";
            return Err(EngineError::Config(why.to_owned()));
        }
        let draft = draft_for(&config, &spec, draft, device.as_ref())?;
        let room = (config.max_num_batched_tokens as usize, config.max_num_seqs as usize);
        let input = Input::new(device.as_ref(), room, groups.len(), keeper)?;
        let logits = Logits::new(ops.as_ref(), spec.vocab as usize)?;
        let shared = Arc::new(Shared {
            info: ReplicaInfo {
                model: config.name,
                max_model_len: config.max_model_len,
                vocab_size: spec.vocab,
                eos_token_ids: config.eos_token_ids.into(),
                kv_tokens: config.kv_blocks / groups.len().max(1) as u32 * 16,
            },
            seed: config.seed,
            started: Instant::now(),
            inner: Mutex::new(Inner::new(state)),
            wake: Condvar::new(),
            progress: AtomicU64::new(0),
            steps: AtomicU64::new(0),
            phases: Phases::default(),
            experts: Told::default(),
        });
        let stepper = Stepper {
            shared: shared.clone(),
            experts: spec.experts.map(|_| ExpertWatch::new()),
            model,
            ops,
            kv,
            draft,
            input,
            logits,
            active: Actives::new(),
            others,
            flights: VecDeque::new(),
            landed: Vec::new(),
            result: StepResult::default(),
            effects: Effects::default(),
        };
        let thread = std::thread::Builder::new()
            .name("pomona-engine".to_owned())
            .spawn(move || run_to_end(stepper))?;
        Ok(Engine { shared, thread: Some(thread) })
    }

    /// The engine as a front end sees it.
    pub fn replica(&self) -> Arc<dyn Replica> {
        self.shared.clone()
    }

    /// Ends all requests and joins the thread. Takes at most one step.
    pub fn stop(mut self) {
        self.shutdown();
    }

    fn shutdown(&mut self) {
        self.shared.lock().stop = true;
        self.shared.wake.notify_all();
        if let Some(thread) = self.thread.take() {
            // The thread catches its own panics; there is nothing to learn from a second one.
            let _ = thread.join();
        }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.shutdown();
    }
}

/// The draft model with its KV memory.
fn draft_for(
    config: &EngineConfig,
    spec: &ModelSpec,
    model: Option<Box<dyn Model>>,
    device: &dyn Device,
) -> Result<Option<Draft>, EngineError> {
    let refuse = |why: String| Err(EngineError::Config(why));
    let wanted = config.speculation.as_ref().is_some_and(|s| s.method == Method::DraftModel);
    let Some(model) = model.filter(|_| wanted) else {
        return match wanted {
            true => refuse("speculation with a draft model needs one".to_owned()),
            false => Ok(None),
        };
    };
    let draft = model.spec();
    if draft.vocab != spec.vocab {
        return refuse(format!(
            "the draft model has {} tokens, the model {}: choose one with the same vocabulary",
            draft.vocab, spec.vocab
        ));
    }
    match draft_kv_cache(device, spec, draft, config.kv_dtype, config.kv_blocks) {
        Some(kv) => Ok(Some(Draft::new(model, kv?))),
        None => refuse(
            "the draft model's layers see further back than the model's: choose one with the same \
             sliding windows or smaller ones"
                .to_owned(),
        ),
    }
}

/// The thread's life: step until stopped or failed, then tell everyone who still waits.
fn run_to_end(mut stepper: Stepper) {
    let message = match catch_unwind(AssertUnwindSafe(|| stepper.run())) {
        Ok(Ok(())) => {
            if let Some(others) = &mut stepper.others {
                others.end();
            }
            "the engine was stopped".to_owned()
        }
        Ok(Err(error)) => {
            tracing::error!(error = &error as &dyn std::error::Error, "the engine stopped");
            format!("the engine stopped: {error}")
        }
        Err(_) => "the engine stopped: a bug in it was caught (see the log)".to_owned(),
    };
    let arrivals = {
        let mut inner = stepper.shared.lock();
        inner.down = Some(message.clone());
        std::mem::take(&mut inner.arrivals)
    };
    stepper.active.extend(arrivals);
    for (_, mut active) in stepper.active.drain() {
        exclusive(&mut active).fail(&message);
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        // A panic under the lock leaves the engine down, which every caller checks.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> Micros {
        Micros(self.started.elapsed().as_micros() as u64)
    }

    /// Plans the next step, or says that there is none now. With `wait`, comes back only when there
    /// is a plan, an effect to deliver, or the order to stop.
    pub(crate) fn next_plan(
        &self,
        wait: bool,
        plan: &mut StepPlan,
        effects: &mut Effects,
        active: &mut Actives,
    ) -> Next {
        let mut inner = self.lock();
        loop {
            if inner.stop {
                return Next::Stop;
            }
            inner.working = !wait;
            active.extend(inner.arrivals.drain(..));
            let now = self.now();
            self.progress.store(now.0, Relaxed);
            let planned = self.phases.time(Phase::Plan, || inner.state.plan(now, plan));
            inner.state.drain_aborted(effects);
            if planned {
                inner.working = true;
                return Next::Step;
            }
            if !wait || !effects.list.is_empty() {
                return Next::Nothing;
            }
            inner = self.wake.wait(inner).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Gives the scheduler what a step found. Takes arrivals in first: a request that came and was
    /// cancelled during the step ends here, and its sink must be there to be told.
    pub(crate) fn commit(
        &self,
        plan: &StepPlan,
        result: &StepResult,
        effects: &mut Effects,
        active: &mut Actives,
    ) {
        let now = self.now();
        let mut inner = self.lock();
        active.extend(inner.arrivals.drain(..));
        self.phases.time(Phase::Plan, || inner.state.commit(now, plan, result, effects));
        drop(inner);
        self.steps.fetch_add(1, Relaxed);
        self.progress.store(now.0, Relaxed);
    }

    /// Refuses what the scheduler cannot judge: token ids and sampling parameters.
    fn check(&self, request: &Request) -> Result<(), Refusal> {
        let vocab = self.info.vocab_size;
        let invalid = |why: String| Err(Refusal::Invalid(why));
        if let Some(token) = request.prompt.iter().find(|t| **t >= vocab) {
            return invalid(format!("token id {token} is not in the vocabulary of {vocab} tokens"));
        }
        let s: &Sampling = &request.sampling;
        if let Some((token, _)) = s.logit_bias.iter().find(|(t, _)| *t >= vocab) {
            return invalid(format!("logit_bias names token {token}, beyond {vocab} tokens"));
        }
        let most = s.logprobs.max(s.prompt_logprobs).unwrap_or(0);
        if most > LOGPROBS_MAX {
            return invalid(format!("{most} logprobs asked for, at most {LOGPROBS_MAX} possible"));
        }
        let finite = [
            ("temperature", s.temperature, 0.0..=f32::MAX),
            ("top_p", s.top_p, f32::MIN_POSITIVE..=1.0),
            ("min_p", s.min_p, 0.0..=1.0),
            ("repetition_penalty", s.repetition_penalty, f32::MIN_POSITIVE..=f32::MAX),
            ("frequency_penalty", s.frequency_penalty, f32::MIN..=f32::MAX),
            ("presence_penalty", s.presence_penalty, f32::MIN..=f32::MAX),
        ];
        match finite.iter().find(|(_, value, range)| !range.contains(value)) {
            Some((name, value, _)) => invalid(format!("{name} cannot be {value}")),
            None => Ok(()),
        }
    }
}

impl Replica for Shared {
    fn info(&self) -> &ReplicaInfo {
        &self.info
    }

    fn submit(&self, request: Request, sink: Box<dyn TokenSink>) -> Result<(), Refusal> {
        self.check(&request)?;
        let seed = self.seed ^ request.id.0.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let active = Active::new(&request, sink, seed, &self.info.eos_token_ids);
        let id = request.id;
        let mut inner = self.lock();
        if let Some(why) = &inner.down {
            return Err(Refusal::Unavailable(why.clone()));
        }
        inner.state.submit(self.now(), request)?;
        inner.arrivals.push((id, Mutex::new(active)));
        drop(inner);
        self.wake.notify_all();
        Ok(())
    }

    fn cancel(&self, id: RequestId) {
        let now = self.now();
        self.lock().state.abort(now, id);
        self.wake.notify_all();
    }

    fn load(&self) -> Load {
        let inner = self.lock();
        let stats = inner.state.stats();
        let since = self.now() - Micros(self.progress.load(Relaxed));
        Load {
            running: stats.running,
            waiting: stats.waiting,
            blocks_used: stats.blocks_used,
            blocks_total: stats.blocks_total,
            steps: self.steps.load(Relaxed),
            stalled_for: if inner.working { since } else { Micros(0) },
            prefix_queries: stats.prefix_queries,
            prefix_hits: stats.prefix_hits,
            preemptions: stats.preemptions,
            prompt_tokens: stats.prompt_tokens,
            generation_tokens: stats.generation_tokens,
            drafts: stats.drafts,
            draft_tokens: stats.draft_tokens,
            accepted_tokens: stats.accepted_tokens,
            step_times: self.phases.so_far(),
            restarting: false,
            down: inner.down.clone(),
        }
    }

    fn experts(&self) -> Option<Arc<ExpertLoads>> {
        self.experts.get()
    }
}
