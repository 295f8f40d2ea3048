//! The seam between a front end and whatever runs a model: submit, cancel, load; answers come back
//! through a [`TokenSink`]. The gateway knows only this, so a replica may be the engine in this
//! process, one on another machine, or a fake in a test.

use std::sync::Arc;

use crate::{ExpertLoads, FinishReason, Micros, Request, RequestId, TokenId};

/// One copy of a model that continues sequences.
pub trait Replica: Send + Sync {
    /// What it serves. Never changes.
    fn info(&self) -> &ReplicaInfo;

    /// Queues a request; answers arrive at `sink` until [`TokenSink::finish`], which is called
    /// exactly once for every accepted request. Does not block.
    fn submit(&self, request: Request, sink: Box<dyn TokenSink>) -> Result<(), Refusal>;

    /// Ends a request at the next step; its blocks are free one step later. Unknown ids are fine.
    fn cancel(&self, id: RequestId);

    /// A snapshot of counters and queues. Cheap; never waits for a step.
    fn load(&self) -> Load;

    /// What layers of experts have counted, as of a second ago or since there was nothing to do.
    /// `None` where there are no such layers. Never waits for a step.
    fn experts(&self) -> Option<Arc<ExpertLoads>> {
        None
    }
}

/// Where a request's tokens go. Called from the engine's thread: must not block.
pub trait TokenSink: Send {
    /// Log-probabilities of the prompt, once, before the first token, if asked for. Element 0 is
    /// `None`: nothing predicts the first token.
    fn prompt_logprobs(&mut self, _logprobs: Vec<Option<TokenLogprobs>>) {}
    /// The next token.
    fn token(&mut self, output: TokenOutput);
    /// The end. Nothing follows.
    fn finish(&mut self, finish: Finish);
}

/// One sampled token.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenOutput {
    /// The token.
    pub token: TokenId,
    /// Present when the request asked for log-probabilities.
    pub logprobs: Option<TokenLogprobs>,
}

/// Log-probability of one token among its alternatives, before temperature and truncation.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprobs {
    /// The token that was sampled (or that stands in the prompt).
    pub token: TokenId,
    /// Its natural log-probability.
    pub logprob: f32,
    /// Its rank, 1 for the likeliest.
    pub rank: u32,
    /// The likeliest tokens, best first; ties by lower id.
    pub top: Vec<(TokenId, f32)>,
}

/// How a request ended and what it cost.
#[derive(Clone, Debug, PartialEq)]
pub struct Finish {
    /// Why.
    pub reason: FinishReason,
    /// For [`FinishReason::Error`]: what went wrong, in a sentence for the client.
    pub message: Option<String>,
    /// Prompt tokens whose KV came from the prefix cache.
    pub cached_tokens: u32,
    /// Time between submission and the first step that worked on it.
    pub queued: Micros,
    /// How many times it was preempted and recomputed.
    pub preemptions: u32,
}

/// Why a request is not accepted. The gateway turns it into an HTTP answer.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Refusal {
    /// The request can never run here: the caller's mistake.
    #[error("{0}")]
    Invalid(String),
    /// Too much is queued: try again later.
    #[error("{waiting} requests are waiting already; retry in {retry_after_s} s")]
    Overloaded {
        /// Queue length found.
        waiting: u32,
        /// A guess at when there will be room.
        retry_after_s: u32,
    },
    /// The replica is draining or has failed.
    #[error("not accepting requests: {0}")]
    Unavailable(String),
}

/// What a replica serves.
#[derive(Clone, Debug)]
pub struct ReplicaInfo {
    /// The model's name as resolved (a path, a repository or a catalogue name).
    pub model: Arc<str>,
    /// Most tokens in a sequence, prompt and output together.
    pub max_model_len: u32,
    /// Number of token ids; every token in a prompt is below it.
    pub vocab_size: u32,
    /// Tokens that end a sequence.
    pub eos_token_ids: Arc<[TokenId]>,
    /// Tokens of KV that fit at once.
    pub kv_tokens: u32,
}

/// A snapshot of a replica: queue lengths, counters since start, and signs of life.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Load {
    /// Requests with work in the current step.
    pub running: u32,
    /// Requests queued.
    pub waiting: u32,
    /// KV blocks referenced by a request.
    pub blocks_used: u32,
    /// KV blocks in all.
    pub blocks_total: u32,
    /// Steps completed.
    pub steps: u64,
    /// Time since the last step ended or since the engine was last seen idle and well. A large
    /// value while requests run means that the engine hangs.
    pub stalled_for: Micros,
    /// Prompt tokens looked up in the prefix cache.
    pub prefix_queries: u64,
    /// Prompt tokens found there.
    pub prefix_hits: u64,
    /// Preemptions.
    pub preemptions: u64,
    /// Prompt tokens computed (cache hits not counted).
    pub prompt_tokens: u64,
    /// Tokens sampled.
    pub generation_tokens: u64,
    /// Times that a request got drafts.
    pub drafts: u64,
    /// Tokens drafted.
    pub draft_tokens: u64,
    /// Tokens drafted and accepted.
    pub accepted_tokens: u64,
    /// Where the time of steps went.
    pub step_times: StepTimes,
    /// It is being started again: what comes now waits for that.
    pub restarting: bool,
    /// Set when the engine has failed or is draining, with the reason.
    pub down: Option<String>,
}

/// Time of the thread that makes steps, by what it did. It does nothing else while requests run.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct StepTimes {
    /// Choosing what runs, preparing it, and taking note of what came out.
    pub plan: Micros,
    /// Drafts, the forward pass and its logits.
    pub forward: Micros,
    /// Logits to tokens.
    pub sample: Micros,
    /// Handing tokens to their sinks.
    pub deliver: Micros,
}

impl StepTimes {
    /// That of two together.
    pub fn plus(self, other: StepTimes) -> StepTimes {
        StepTimes {
            plan: self.plan + other.plan,
            forward: self.forward + other.forward,
            sample: self.sample + other.sample,
            deliver: self.deliver + other.deliver,
        }
    }
}

impl Load {
    /// That of two together: sums, the longest stall. Down when both are.
    pub fn plus(self, other: Load) -> Load {
        Load {
            running: self.running + other.running,
            waiting: self.waiting + other.waiting,
            blocks_used: self.blocks_used + other.blocks_used,
            blocks_total: self.blocks_total + other.blocks_total,
            steps: self.steps + other.steps,
            stalled_for: self.stalled_for.max(other.stalled_for),
            prefix_queries: self.prefix_queries + other.prefix_queries,
            prefix_hits: self.prefix_hits + other.prefix_hits,
            preemptions: self.preemptions + other.preemptions,
            prompt_tokens: self.prompt_tokens + other.prompt_tokens,
            generation_tokens: self.generation_tokens + other.generation_tokens,
            drafts: self.drafts + other.drafts,
            draft_tokens: self.draft_tokens + other.draft_tokens,
            accepted_tokens: self.accepted_tokens + other.accepted_tokens,
            step_times: self.step_times.plus(other.step_times),
            restarting: self.restarting && other.restarting,
            down: self.down.and(other.down),
        }
    }

    /// What was counted, without what passes.
    pub fn counters(self) -> Load {
        Load {
            running: 0,
            waiting: 0,
            blocks_used: 0,
            blocks_total: 0,
            stalled_for: Micros(0),
            restarting: false,
            down: None,
            ..self
        }
    }
}
