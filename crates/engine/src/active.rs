//! A request between submission and its end, as the step loop has it.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pomona_scheduler::batch::PlanRow;
use pomona_types::{
    Finish, FinishReason, Micros, Request, RequestId, TokenId, TokenLogprobs, TokenOutput,
    TokenSink,
};

use crate::logits::Row;
use crate::sampling::{Sampler, token_logprobs};

/// All of them. The threads that sample a step's rows take one each.
pub(crate) type Actives = HashMap<RequestId, Mutex<Active>>;

/// For one of several threads.
pub(crate) fn locked(active: &Mutex<Active>) -> MutexGuard<'_, Active> {
    // A panic while a row is sampled ends the engine, which then tells each request so.
    active.lock().unwrap_or_else(PoisonError::into_inner)
}

/// For the only thread.
pub(crate) fn exclusive(active: &mut Mutex<Active>) -> &mut Active {
    active.get_mut().unwrap_or_else(PoisonError::into_inner)
}

pub(crate) struct Active {
    sink: Box<dyn TokenSink>,
    sampler: Sampler,
    prompt: Arc<[TokenId]>,
    /// By position, until the first token is told.
    prompt_logprobs: Option<Vec<Option<TokenLogprobs>>>,
    /// Of the tokens sampled last, until their effects arrive.
    logprobs: VecDeque<TokenLogprobs>,
    /// What the current step has sampled so far.
    pub(crate) sampled: Vec<TokenId>,
    /// Whether the step's next output, if there is one, follows what was sampled.
    right: bool,
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
            sampled: Vec::new(),
            right: true,
        }
    }

    /// The first output of a step comes.
    pub(crate) fn begin(&mut self) {
        self.right = true;
    }

    /// Uses the logits of the row's token at `offset`, which `draft` follows in the batch: the
    /// prompt's log-probability, the sample, or both. Whether the row's next output is of use.
    pub(crate) fn row(
        &mut self,
        row: &PlanRow,
        offset: u32,
        draft: Option<TokenId>,
        Row { logits, candidates }: Row<'_>,
    ) -> bool {
        if !self.right {
            return false;
        }
        let next = (row.computed + offset + 1) as usize;
        let sampling = self.sampler.sampling();
        if let (Some(list), Some(top)) = (&mut self.prompt_logprobs, sampling.prompt_logprobs)
            && let (Some(entry), Some(token)) = (list.get_mut(next), self.prompt.get(next))
        {
            *entry = Some(token_logprobs(logits, *token, top, candidates));
        }
        if !row.sample || offset + row.drafts + 1 < row.count {
            return true;
        }
        let raw = sampling.logprobs.map(|top| (top, logits.to_vec()));
        let token = self.sampler.sample(logits, candidates);
        if let Some((top, raw)) = raw {
            self.logprobs.push_back(token_logprobs(&raw, token, top, candidates));
        }
        // Unless the request ends before it, the token is its next: the sampler goes on from here.
        self.sampler.accept(token);
        self.sampled.push(token);
        self.right = draft == Some(token);
        self.right
    }

    /// Tells a token that was committed.
    pub(crate) fn token(&mut self, token: TokenId) {
        if let Some(list) = self.prompt_logprobs.take() {
            self.sink.prompt_logprobs(list);
        }
        let logprobs = self.logprobs.pop_front();
        self.sink.token(TokenOutput { token, logprobs });
    }

    /// Tells the end.
    pub(crate) fn finish(&mut self, finish: Finish) {
        self.sink.finish(finish);
    }

    /// Tells an end that is nobody's wish.
    pub(crate) fn fail(&mut self, message: &str) {
        self.finish(Finish {
            reason: FinishReason::Error,
            message: Some(message.to_owned()),
            cached_tokens: 0,
            queued: Micros(0),
            preemptions: 0,
        });
    }
}
