//! The step loop.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use bytemuck::cast_slice_mut;
use pomona_device::{DType, DeviceError, View};
use pomona_kernels::Ops;
use pomona_models::{KvCache, LOGIT_ROWS_MAX, Model, ModelError};
use pomona_scheduler::batch::{Effect, Effects, PlanRow, Sampled, StepPlan, StepResult};
use pomona_types::{
    Finish, FinishReason, Request, RequestId, TokenId, TokenLogprobs, TokenOutput, TokenSink,
};

use crate::EngineError;
use crate::draft::Draft;
use crate::engine::{Next, Shared};
use crate::experts::ExpertWatch;
use crate::input::{Input, Stretch};
use crate::order::Order;
use crate::ranks::Others;
use crate::sampling::{Candidate, Sampler, token_logprobs};

/// Everything the engine's thread owns.
pub(crate) struct Stepper {
    pub(crate) shared: Arc<Shared>,
    pub(crate) model: Box<dyn Model>,
    pub(crate) ops: Arc<dyn Ops>,
    pub(crate) kv: KvCache,
    pub(crate) draft: Option<Draft>,
    pub(crate) input: Input,
    pub(crate) logits: Logits,
    pub(crate) active: HashMap<RequestId, Active>,
    /// The ranks that this one leads, if the model is divided.
    pub(crate) others: Option<Others>,
    /// Where layers consist of experts.
    pub(crate) experts: Option<ExpertWatch>,
    /// Steps that are being computed, in their order: several where the model has stages.
    pub(crate) flights: VecDeque<Flight>,
    /// Memory of steps that are over.
    pub(crate) landed: Vec<Flight>,
    pub(crate) result: StepResult,
    pub(crate) effects: Effects,
}

/// A step from its plan to its commit.
#[derive(Default)]
pub(crate) struct Flight {
    pub(crate) plan: StepPlan,
    order: Order,
    /// Whether what experts have counted by then is to be told.
    counts: bool,
}

/// A request between submission and its end.
pub(crate) struct Active {
    sink: Box<dyn TokenSink>,
    sampler: Sampler,
    prompt: Arc<[TokenId]>,
    /// By position, while they are being collected.
    prompt_logprobs: Option<Vec<Option<TokenLogprobs>>>,
    /// Of the tokens sampled last, until their effects arrive.
    logprobs: VecDeque<TokenLogprobs>,
}

/// Memory for a few rows of logits, on the device and on the host.
pub(crate) struct Logits {
    device: View,
    host: Vec<f32>,
    candidates: Vec<Candidate>,
    vocab: usize,
}

impl Logits {
    pub(crate) fn new(ops: &dyn Ops, vocab: usize) -> Result<Logits, DeviceError> {
        Ok(Logits {
            device: ops.device().alloc_view(DType::F32, &[LOGIT_ROWS_MAX, vocab])?,
            host: vec![0.0; LOGIT_ROWS_MAX * vocab],
            candidates: Vec::new(),
            vocab,
        })
    }

    /// Hands out the logits of the last forward's `outputs` outputs, one by one, with scratch.
    pub(crate) fn each(
        &mut self,
        model: &mut dyn Model,
        ops: &dyn Ops,
        outputs: usize,
        mut take: impl FnMut(&mut [f32], &mut Vec<Candidate>),
    ) -> Result<(), EngineError> {
        model.outputs(ops, outputs)?;
        for start in (0..outputs).step_by(LOGIT_ROWS_MAX) {
            let end = outputs.min(start + LOGIT_ROWS_MAX);
            let view = self.device.rows(0, end - start);
            model.logits(ops, start..end, &view)?;
            let host = &mut self.host[..(end - start) * self.vocab];
            ops.device().download(&view, cast_slice_mut(host))?;
            for logits in host.chunks_exact_mut(self.vocab) {
                take(logits, &mut self.candidates);
            }
        }
        Ok(())
    }
}

impl Active {
    pub(crate) fn new(
        request: &Request,
        sink: Box<dyn TokenSink>,
        seed: u64,
        eos: &[TokenId],
    ) -> Active {
        let wanted = request.sampling.prompt_logprobs.is_some();
        Active {
            sink,
            sampler: Sampler::new(request.sampling.clone(), seed, eos, &request.prompt),
            prompt: request.prompt.clone(),
            prompt_logprobs: wanted.then(|| vec![None; request.prompt.len()]),
            logprobs: VecDeque::new(),
        }
    }

    pub(crate) fn fail(mut self, message: &str) {
        self.sink.finish(Finish {
            reason: FinishReason::Error,
            message: Some(message.to_owned()),
            cached_tokens: 0,
            queued: pomona_types::Micros(0),
            preemptions: 0,
        });
    }
}

impl Stepper {
    /// Steps until told to stop. An error means that the model, a device or a rank failed.
    pub(crate) fn run(&mut self) -> Result<(), EngineError> {
        let stages = self.others.as_ref().map_or(1, Others::stages);
        loop {
            let mut flight = self.landed.pop().unwrap_or_default();
            let idle = self.flights.is_empty();
            let sleeps = idle && !self.experts.as_ref().is_some_and(ExpertWatch::is_stale);
            let (effects, active) = (&mut self.effects, &mut self.active);
            match self.shared.next_plan(sleeps, &mut flight.plan, effects, active) {
                Next::Stop if sleeps => return Ok(()),
                Next::Step => {
                    self.depart(&mut flight)?;
                    self.flights.push_back(flight);
                    if self.flights.len() < stages {
                        self.deliver();
                        continue;
                    }
                }
                Next::Nothing | Next::Stop => self.landed.push(flight),
            }
            if let Some(flight) = self.flights.pop_front() {
                self.arrive(&flight)?;
                let (plan, active) = (&flight.plan, &mut self.active);
                self.shared.commit(plan, &self.result, &mut self.effects, active);
                self.landed.push(flight);
            } else if !sleeps {
                self.ask_experts()?;
                self.tell_experts()?;
            }
            self.deliver();
        }
    }

    /// Begins a step.
    fn depart(&mut self, flight: &mut Flight) -> Result<(), EngineError> {
        let (plan, order) = (&mut flight.plan, &mut flight.order);
        order.take(plan);
        self.input.learn(&order.told, &order.blocks).ok_or(EngineError::Order)?;
        if let Some(draft) = &mut self.draft {
            draft.write(&self.ops, &mut self.input, &mut self.logits, plan)?;
            order.tokens.clone_from(&plan.tokens);
        }
        if let Some(others) = &mut self.others {
            others.step(order)?;
        }
        flight.counts = self.experts.as_mut().is_some_and(ExpertWatch::step);
        if flight.counts {
            self.ask_experts()?;
        }
        let device = self.ops.device().as_ref();
        let Order { tokens, stretches, .. } = &flight.order;
        let batch = self.input.batch(device, tokens, stretches)?;
        Ok(self.model.forward(self.ops.as_ref(), &batch, &self.kv)?)
    }

    /// Asks other stages for what their experts have counted.
    fn ask_experts(&mut self) -> Result<(), EngineError> {
        Ok(self.others.as_mut().map_or(Ok(()), Others::counts)?)
    }

    /// Tells what experts have counted, when other stages were asked.
    fn tell_experts(&mut self) -> Result<(), EngineError> {
        if let Some(watch) = &mut self.experts {
            let counts = self.model.expert_counts(self.ops.as_ref())?;
            watch.tell(counts, self.flights.is_empty(), &self.shared.experts);
        }
        Ok(())
    }

    /// Ends the oldest step: samples after the last known token, and after each draft for as long
    /// as it is the very token that was sampled.
    fn arrive(&mut self, flight: &Flight) -> Result<(), EngineError> {
        let Flight { plan, order, counts } = flight;
        if let Some(others) = &mut self.others {
            others.outputs()?;
        }
        self.result.sampled.clear();
        let outputs = order.outputs();
        let mut walk = OutputWalk::default();
        // The row in which the next outputs follow a wrong draft.
        let mut wrong = None;
        let (active, sampled) = (&mut self.active, &mut self.result.sampled);
        let take = |logits: &mut [f32], candidates: &mut Vec<Candidate>| {
            let (index, offset, next) = walk.next(&order.stretches);
            let row = &plan.rows[index];
            if wrong == Some(index) {
                return;
            }
            let Some(active) = active.get_mut(&row.id) else { return };
            if let Some(token) = active.row(row, offset, logits, candidates) {
                sampled.push(Sampled { row: index as u32, token });
                let draft = (offset + 1 < row.count).then(|| plan.tokens[next]);
                if draft != Some(token) {
                    wrong = Some(index);
                }
            }
        };
        self.logits.each(self.model.as_mut(), self.ops.as_ref(), outputs, take)?;
        if *counts { self.tell_experts() } else { Ok(()) }
    }

    /// Hands tokens and ends to their sinks.
    fn deliver(&mut self) {
        for effect in self.effects.list.drain(..) {
            match effect {
                Effect::Token { id, token } => {
                    if let Some(active) = self.active.get_mut(&id) {
                        let logprobs = active.logprobs.pop_front();
                        active.sink.token(TokenOutput { token, logprobs });
                    }
                }
                Effect::Finished { id, reason, cached_tokens, queued, preemptions } => {
                    if let Some(mut active) = self.active.remove(&id) {
                        let message = None;
                        let finish = Finish { reason, message, cached_tokens, queued, preemptions };
                        active.sink.finish(finish);
                    }
                }
            }
        }
    }
}

impl Active {
    /// Uses the logits of the row's token at `offset`: the prompt's log-probability, the sample,
    /// or both.
    fn row(
        &mut self,
        row: &PlanRow,
        offset: u32,
        logits: &mut [f32],
        candidates: &mut Vec<Candidate>,
    ) -> Option<TokenId> {
        let next = (row.computed + offset + 1) as usize;
        let sampling = self.sampler.sampling();
        if let (Some(list), Some(top)) = (&mut self.prompt_logprobs, sampling.prompt_logprobs)
            && let (Some(entry), Some(token)) = (list.get_mut(next), self.prompt.get(next))
        {
            *entry = Some(token_logprobs(logits, *token, top, candidates));
        }
        if !row.sample || offset + row.drafts + 1 < row.count {
            return None;
        }
        if let Some(list) = self.prompt_logprobs.take() {
            self.sink.prompt_logprobs(list);
        }
        let raw = sampling.logprobs.map(|top| (top, logits.to_vec()));
        let token = self.sampler.sample(logits, candidates);
        if let Some((top, raw)) = raw {
            self.logprobs.push_back(token_logprobs(&raw, token, top, candidates));
        }
        // Unless the request ends before it, the token is its next: the sampler goes on from here.
        self.sampler.accept(token);
        Some(token)
    }
}

/// Walks the wanted logits in the order in which `Input::batch` listed them.
#[derive(Default)]
struct OutputWalk {
    at: usize,
    /// Outputs of the stretch that were seen.
    seen: u32,
    /// Tokens of the batch before the stretch.
    tokens: usize,
}

impl OutputWalk {
    /// The next output's stretch, its token's offset there, and the index among all tokens of the
    /// one after it.
    fn next(&mut self, stretches: &[Stretch]) -> (usize, u32, usize) {
        while self.seen == stretches[self.at].outputs {
            self.tokens += stretches[self.at].count as usize;
            self.at += 1;
            self.seen = 0;
        }
        let stretch = &stretches[self.at];
        let offset = stretch.count - stretch.outputs + self.seen;
        self.seen += 1;
        (self.at, offset, self.tokens + offset as usize + 1)
    }
}

impl From<ModelError> for EngineError {
    fn from(error: ModelError) -> EngineError {
        EngineError::Step(error)
    }
}
