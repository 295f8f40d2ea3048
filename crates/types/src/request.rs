//! What a client asks of a replica: tokens in, and how the next ones are to be chosen.

use std::sync::Arc;

use crate::{RequestId, TenantId, TokenId};

/// How urgent a request is. Order matters: an earlier class is never preempted for a later one.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub enum QosClass {
    /// Someone is waiting for each token.
    Interactive,
    /// The default.
    #[default]
    Standard,
    /// May wait as long as it takes.
    Batch,
}

/// One sequence to continue. A client's `n` choices are `n` of these, sharing prefix blocks.
#[derive(Clone, Debug)]
pub struct Request {
    /// Unique within the replica.
    pub id: RequestId,
    /// Salts the prefix cache.
    pub tenant: TenantId,
    /// Class first, then `priority`, then arrival.
    pub class: QosClass,
    /// Within a class, lower goes first (as in vLLM). 0 by default.
    pub priority: i32,
    /// The prompt, at least one token.
    pub prompt: Arc<[TokenId]>,
    /// How to choose tokens and when to stop.
    pub sampling: Sampling,
}

/// How tokens are chosen and when a request ends. Field names and meanings are those of vLLM's
/// `SamplingParams` and OpenAI's API.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// 0 is greedy.
    pub temperature: f32,
    /// Keep the k likeliest tokens; 0 keeps all.
    pub top_k: u32,
    /// Keep the smallest set whose probability reaches this; 1 keeps all.
    pub top_p: f32,
    /// Drop tokens below this share of the likeliest one's probability; 0 drops none.
    pub min_p: f32,
    /// Divides (positive) or multiplies (negative) logits of tokens seen in prompt or output.
    pub repetition_penalty: f32,
    /// Subtracted once per occurrence in the output.
    pub frequency_penalty: f32,
    /// Subtracted once if the token occurs in the output.
    pub presence_penalty: f32,
    /// Added to the logits of these tokens.
    pub logit_bias: Vec<(TokenId, f32)>,
    /// Same seed, same tokens. Without one the replica draws a seed from the request id.
    pub seed: Option<u64>,
    /// Most tokens to produce; at least 1.
    pub max_tokens: u32,
    /// End tokens and stop tokens are not sampled before this many.
    pub min_tokens: u32,
    /// Go on past the model's end tokens.
    pub ignore_eos: bool,
    /// End when one of these is sampled (in addition to the model's end tokens).
    pub stop_token_ids: Vec<TokenId>,
    /// Report the sampled token's log-probability and this many likeliest ones.
    pub logprobs: Option<u32>,
    /// The same for each prompt token.
    pub prompt_logprobs: Option<u32>,
}

impl Default for Sampling {
    fn default() -> Self {
        Sampling {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: None,
            max_tokens: 16,
            min_tokens: 0,
            ignore_eos: false,
            stop_token_ids: Vec::new(),
            logprobs: None,
            prompt_logprobs: None,
        }
    }
}

/// Why a request ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FinishReason {
    /// The model's end token, or one of `stop_token_ids` (given).
    Stop(TokenId),
    /// `max_tokens` reached, or the model's context is full.
    Length,
    /// Cancelled by the client or by a stop string found downstream.
    Abort,
    /// The engine failed under it; the text says how.
    Error,
}
