//! What the scheduler knows of one request.

use pomona_types::{Micros, QosClass, RequestId, TenantId, TokenId};

/// Where a request stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Status {
    Waiting,
    /// Has a slot and blocks.
    Running {
        slot: u32,
    },
}

#[derive(Clone, Debug)]
pub(super) struct Record {
    pub(super) id: RequestId,
    pub(super) tenant: TenantId,
    /// As asked for, or raised after long waiting.
    pub(super) class: QosClass,
    pub(super) priority: i32,
    /// Counts submissions: the order of arrival.
    pub(super) arrival: u64,
    pub(super) submitted: Micros,
    pub(super) started: Option<Micros>,
    pub(super) status: Status,
    /// Prompt and output.
    pub(super) tokens: Vec<TokenId>,
    pub(super) prompt_len: u32,
    /// Length at which it ends.
    pub(super) len_max: u32,
    pub(super) min_tokens: u32,
    pub(super) ignore_eos: bool,
    pub(super) stop_token_ids: Vec<TokenId>,
    pub(super) prompt_logprobs: bool,
    /// Tokens whose KV is in its blocks.
    pub(super) computed: u32,
    /// For each group, block ids by block index; `NO_BLOCK` before a window.
    pub(super) tables: Vec<Vec<u32>>,
    /// For each group, entries below this are `NO_BLOCK`.
    pub(super) dropped: Vec<u32>,
    /// Prefix nodes of its first full blocks; one reference held on the last.
    pub(super) chain: Vec<u32>,
    /// Prompt tokens found in the prefix cache at first admission.
    pub(super) cached_tokens: u32,
    pub(super) preemptions: u32,
    /// In the plan that is being computed.
    pub(super) in_flight: bool,
    pub(super) aborted: bool,
}

impl Record {
    /// Tokens known.
    pub(super) fn len(&self) -> u32 {
        self.tokens.len() as u32
    }

    /// Tokens produced.
    pub(super) fn produced(&self) -> u32 {
        self.len() - self.prompt_len
    }

    /// Whether logits of the prompt are still to be collected.
    pub(super) fn wants_prompt_logits(&self) -> bool {
        self.prompt_logprobs && self.produced() == 0
    }
}
