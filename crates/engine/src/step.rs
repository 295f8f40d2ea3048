//! The step loop.

use std::collections::HashMap;
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
use crate::engine::Shared;
use crate::input::Input;
use crate::sampling::{Candidate, Sampler, token_logprobs};

/// Rows of logits computed and sampled at a time: bounds their memory to 32 vocabularies.
pub(crate) const LOGIT_ROWS: usize = 32;

/// Everything the engine's thread owns.
pub(crate) struct Stepper {
    pub(crate) shared: Arc<Shared>,
    pub(crate) model: Box<dyn Model>,
    pub(crate) ops: Arc<dyn Ops>,
    pub(crate) kv: KvCache,
    pub(crate) input: Input,
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
    /// Of the token sampled last, until its effect arrives.
    logprobs: Option<TokenLogprobs>,
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
            logprobs: None,
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

    /// Runs the plan and samples.
    fn compute(&mut self) -> Result<(), EngineError> {
        let batch = self.input.batch(self.ops.device().as_ref(), &self.plan)?;
        self.model.forward(self.ops.as_ref(), &batch, &self.kv)?;
        self.result.sampled.clear();
        let outputs = batch.logit_rows.shape()[0];
        let mut walk = OutputWalk::default();
        for start in (0..outputs).step_by(LOGIT_ROWS) {
            let end = outputs.min(start + LOGIT_ROWS);
            let view = self.logits.device.rows(0, end - start);
            self.model.logits(self.ops.as_ref(), start..end, &view)?;
            let used = (end - start) * self.logits.vocab;
            let host = &mut self.logits.host[..used];
            self.ops.device().download(&view, cast_slice_mut(host))?;
            for logits in host.chunks_exact_mut(self.logits.vocab) {
                let (index, offset) = walk.next(&self.plan.rows);
                let row = &self.plan.rows[index];
                let Some(active) = self.active.get_mut(&row.id) else { continue };
                let token = active.row(row, offset, logits, &mut self.logits.candidates);
                let sampled = token.map(|token| Sampled { row: index as u32, token });
                self.result.sampled.extend(sampled);
            }
        }
        Ok(())
    }

    /// Hands tokens and ends to their sinks.
    fn deliver(&mut self) {
        for effect in self.effects.list.drain(..) {
            match effect {
                Effect::Token { id, token } => {
                    if let Some(active) = self.active.get_mut(&id) {
                        active.sampler.accept(token);
                        let logprobs = active.logprobs.take();
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
        if !row.sample || offset + 1 != row.count {
            return None;
        }
        if let Some(list) = self.prompt_logprobs.take() {
            self.sink.prompt_logprobs(list);
        }
        let Some(top) = sampling.logprobs else {
            return Some(self.sampler.sample(logits, candidates));
        };
        let raw = logits.to_vec();
        let token = self.sampler.sample(logits, candidates);
        self.logprobs = Some(token_logprobs(&raw, token, top, candidates));
        Some(token)
    }
}

/// Walks the wanted logits in the order in which `Input::batch` listed them.
#[derive(Default)]
struct OutputWalk {
    row: usize,
    offset: u32,
}

impl OutputWalk {
    /// The next output's row and its token's offset within the row.
    fn next(&mut self, rows: &[PlanRow]) -> (usize, u32) {
        loop {
            let row = &rows[self.row];
            if !row.prompt_logits && row.sample {
                self.offset = self.offset.max(row.count - 1);
            }
            if (row.prompt_logits || row.sample) && self.offset < row.count {
                self.offset += 1;
                return (self.row, self.offset - 1);
            }
            self.row += 1;
            self.offset = 0;
        }
    }
}

impl From<ModelError> for EngineError {
    fn from(error: ModelError) -> EngineError {
        EngineError::Step(error)
    }
}
