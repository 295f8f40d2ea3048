//! What the scheduler knows of one request.

use pomona_types::{BLOCK_TOKENS, Micros, QosClass, RequestId, TenantId, TokenId};

use super::speculation::Acceptance;

/// Tokens that a record keeps at hand.
pub(super) const RECENT: usize = 8;

/// Where a request stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Status {
    Waiting,
    /// Has a slot and blocks.
    Running {
        slot: u32,
    },
}

/// Fields in the order in which steps use them: a decode step of thousands of requests is bound by
/// the cache lines that it touches, and needs the first two of each.
#[derive(Clone, Debug)]
#[repr(C, align(64))]
pub(super) struct Record {
    pub(super) id: RequestId,
    pub(super) status: Status,
    /// Tokens whose KV is in its blocks.
    pub(super) computed: u32,
    /// Entries of each of its block tables.
    pub(super) table_len: u32,
    /// Those that plans have told.
    pub(super) told: u32,
    /// How many tokens must be computed before a block leaves a sliding window.
    pub(super) next_drop: u32,
    /// The newest of its tokens.
    pub(super) last: TokenId,
    pub(super) recent_len: u32,
    pub(super) prompt_len: u32,
    /// Length at which it ends.
    pub(super) len_max: u32,
    pub(super) min_tokens: u32,
    /// Length of `tokens`.
    pub(super) settled: u32,
    pub(super) has_stop_tokens: bool,
    pub(super) ignore_eos: bool,
    pub(super) prompt_logprobs: bool,
    /// In the plan that is being computed.
    pub(super) in_flight: bool,
    pub(super) aborted: bool,
    /// Length of `chain`.
    pub(super) chained: u32,
    pub(super) tenant: TenantId,
    /// The newest tokens, `recent_len` of them: here a step need not touch a page of memory for
    /// each request.
    pub(super) recent: [TokenId; RECENT],
    /// Blocks that it holds, over all groups.
    pub(super) held: u32,
    /// Prompt and output, but for the newest.
    pub(super) tokens: Vec<TokenId>,
    /// Prefix nodes of its first full blocks; one reference held on the last.
    pub(super) chain: Vec<u32>,
    pub(super) stop_token_ids: Box<[TokenId]>,
    /// For each group, block ids by block index; `NO_BLOCK` before a window.
    pub(super) tables: Box<[Vec<u32>]>,
    /// For each group, entries below this are `NO_BLOCK`.
    pub(super) dropped: Box<[u32]>,
    /// The lane of its tables' first split.
    pub(super) origin: u32,
    /// Prompt tokens found in the prefix cache at first admission.
    pub(super) cached_tokens: u32,
    pub(super) preemptions: u32,
    /// As asked for, or raised after long waiting.
    pub(super) class: QosClass,
    pub(super) priority: i32,
    /// Counts submissions: the order of arrival.
    pub(super) arrival: u64,
    pub(super) submitted: Micros,
    pub(super) started: Option<Micros>,
    /// How well its drafts do.
    pub(super) acceptance: Acceptance,
}

impl Record {
    /// Tokens known.
    #[inline]
    pub(super) fn len(&self) -> u32 {
        self.settled + self.recent_len
    }

    /// Whether the request ends at this token by its own wish.
    #[inline]
    pub(super) fn is_stop_token(&self, token: TokenId) -> bool {
        self.has_stop_tokens && self.stop_token_ids.contains(&token)
    }

    /// Appends a token.
    #[inline]
    pub(super) fn push(&mut self, token: TokenId) {
        if self.recent_len as usize == RECENT {
            self.settle();
        }
        self.recent[self.recent_len as usize] = token;
        self.recent_len += 1;
        self.last = token;
    }

    /// Brings all tokens together in `tokens`.
    pub(super) fn settle(&mut self) {
        self.tokens.extend_from_slice(&self.recent[..self.recent_len as usize]);
        self.settled += self.recent_len;
        self.recent_len = 0;
    }

    /// Tokens produced.
    pub(super) fn produced(&self) -> u32 {
        self.len() - self.prompt_len
    }

    /// Tokens that are known and not computed.
    #[inline]
    pub(super) fn due(&self) -> u32 {
        self.len() - self.computed
    }

    /// Whether the next step computes its newest token and touches no block table.
    #[inline]
    pub(super) fn only_decodes(&self) -> bool {
        self.computed + 1 == self.len()
            && self.len() <= self.table_len * BLOCK_TOKENS
            && self.computed < self.next_drop
    }

    /// Whether a block has become full that is not tied to its prefix.
    #[inline]
    pub(super) fn has_full_block_to_cache(&self) -> bool {
        self.computed / BLOCK_TOKENS > self.chained
    }

    /// Whether logits of the prompt are still to be collected.
    pub(super) fn wants_prompt_logits(&self) -> bool {
        self.prompt_logprobs && self.produced() == 0
    }
}
