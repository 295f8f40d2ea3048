//! What the scheduler hands out and takes back: a [`StepPlan`] to execute, a [`StepResult`] of it,
//! and the [`Effects`] that follow. All are reused from step to step, so that a steady state
//! allocates nothing.

use pomona_types::{FinishReason, Micros, RequestId, TokenId};

/// A missing block: before a sliding window, or beyond the allocated part.
pub const NO_BLOCK: u32 = u32::MAX;

/// One forward pass over a batch. Rows of the flattened arrays follow `rows` in order.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepPlan {
    /// Counts up from 1; `commit` takes the plan with the number it expects.
    pub step: u64,
    /// What each request does in this step.
    pub rows: Vec<PlanRow>,
    /// Input tokens, `rows[i].count` for each row, concatenated. Drafts of a draft model are 0: the
    /// executor writes them in.
    pub tokens: Vec<TokenId>,
    /// What was added to block tables. The executor keeps a table per slot and layer group: it cuts
    /// those of row `i` to `rows[i].known` entries, then appends block ids (`NO_BLOCK` before a
    /// sliding window) up to `rows[i].table_len`. Those of group `g` start at
    /// `rows[i].added + g * (rows[i].table_len - rows[i].known)`.
    pub blocks: Vec<u32>,
    /// Requests preempted while planning; their sampler state stays valid.
    pub preempted: Vec<RequestId>,
}

/// One request's share of a step.
#[derive(Clone, Debug, PartialEq)]
pub struct PlanRow {
    /// Whose.
    pub id: RequestId,
    /// A dense index below `max_num_seqs`, stable from admission to the end or preemption.
    pub slot: u32,
    /// Tokens whose KV is there already: the position of this row's first token.
    pub computed: u32,
    /// Tokens to compute now, drafts included, at least 1.
    pub count: u32,
    /// How many of them, at the end, are drafts.
    pub drafts: u32,
    /// Whether the logits of the last known token, and then those of drafts, are to be sampled.
    pub sample: bool,
    /// Whether logits of all of this row's tokens are wanted (prompt log-probabilities).
    pub prompt_logits: bool,
    /// Set on the first row of a request since it was admitted or readmitted.
    pub first: bool,
    /// Entries of its block tables that earlier plans told; 0 on the first row.
    pub known: u32,
    /// Length of each of its block tables: `ceil((computed + count) / 16)`.
    pub table_len: u32,
    /// Where the new entries start in [`StepPlan::blocks`].
    pub added: u32,
}

/// What execution found.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepResult {
    /// For each row with `sample`, in row order: the token after its last known one, and as long as
    /// the draft there equals it, the token after that draft.
    pub sampled: Vec<Sampled>,
}

/// A token sampled for a row.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampled {
    /// Index into [`StepPlan::rows`].
    pub row: u32,
    /// The token.
    pub token: TokenId,
}

/// What a commit leads to, in order.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Effects {
    /// One entry per token and per end.
    pub list: Vec<Effect>,
}

/// Something to tell a request's owner.
#[derive(Clone, Debug, PartialEq)]
pub enum Effect {
    /// A token was accepted. Not sent for rows whose request was aborted meanwhile.
    Token {
        /// Whose.
        id: RequestId,
        /// The token.
        token: TokenId,
    },
    /// The request is over, its blocks released. Follows its last token. Sent for aborts as well.
    Finished {
        /// Whose.
        id: RequestId,
        /// Why.
        reason: FinishReason,
        /// Prompt tokens that came from the prefix cache (at first admission).
        cached_tokens: u32,
        /// Time from submission to the first plan that held it.
        queued: Micros,
        /// Times it was preempted.
        preemptions: u32,
    },
}
