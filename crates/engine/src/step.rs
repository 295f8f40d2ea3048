//! The step loop.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use bytemuck::cast_slice_mut;
use pomona_device::{DType, DeviceError, View};
use pomona_kernels::Ops;
use pomona_models::{KvCache, Model, ModelError};
use pomona_scheduler::batch::{Effect, Effects, PlanRow, Sampled, StepPlan, StepResult};
use pomona_types::{
    Finish, FinishReason, Request, RequestId, TokenId, TokenLogprobs, TokenOutput, TokenSink,
};

use crate::EngineError;
use crate::draft::Draft;
use crate::engine::Shared;
use crate::input::{Input, Stretch};
use crate::sampling::{Candidate, Sampler, token_logprobs};

/// Rows of logits computed and sampled at a time: bounds their memory to 32 vocabularies.
pub(crate) const LOGIT_ROWS: usize = 32;

/// Everything the engine's thread owns.
pub(crate) struct Stepper {
    pub(crate) shared: Arc<Shared>,
    pub(crate) model: Box<dyn Model>,
    pub(crate) ops: Arc<dyn Ops>,
    pub(crate) kv: KvCache,
    pub(crate) draft: Option<Draft>,
    pub(crate) input: Input,
    pub(crate) stretches: Vec<Stretch>,
    pub(crate) logits: Logits,
    pub(crate) active: HashMap<RequestId, Active>,
    pub(crate) plan: StepPlan,
    pub(crate) result: StepResult,
    pub(crate) effects: Effects,
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
            device: ops.device().alloc_view(DType::F32, &[LOGIT_ROWS, vocab])?,
            host: vec![0.0; LOGIT_ROWS * vocab],
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
        for start in (0..outputs).step_by(LOGIT_ROWS) {
            let end = outputs.min(start + LOGIT_ROWS);
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
    /// Steps until told to stop. An error means that the model or a device failed.
    pub(crate) fn run(&mut self) -> Result<(), EngineError> {
        while self.shared.await_work(&mut self.plan, &mut self.effects, &mut self.active) {
            if !self.plan.rows.is_empty() {
                self.compute()?;
                self.shared.commit(&self.plan, &self.result, &mut self.effects, &mut self.active);
            }
            self.deliver();
        }
        Ok(())
    }

    /// Runs the plan and samples: after the last known token, and after each draft for as long as
    /// it is the very token that was sampled.
    fn compute(&mut self) -> Result<(), EngineError> {
        self.input.learn(&self.plan);
        if let Some(draft) = &mut self.draft {
            draft.write(&self.ops, &mut self.input, &mut self.logits, &mut self.plan)?;
        }
        let plan = &self.plan;
        self.stretches.clear();
        self.stretches.extend(plan.rows.iter().map(Stretch::from));
        let device = self.ops.device().as_ref();
        let batch = self.input.batch(device, &plan.tokens, &self.stretches)?;
        self.model.forward(self.ops.as_ref(), &batch, &self.kv)?;
        self.result.sampled.clear();
        let outputs = batch.logit_rows.shape()[0];
        let mut walk = OutputWalk::default();
        // The row in which the next outputs follow a wrong draft.
        let mut wrong = None;
        let (active, sampled) = (&mut self.active, &mut self.result.sampled);
        let take = |logits: &mut [f32], candidates: &mut Vec<Candidate>| {
            let (index, offset, next) = walk.next(&self.stretches);
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
        self.logits.each(self.model.as_mut(), self.ops.as_ref(), outputs, take)
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
