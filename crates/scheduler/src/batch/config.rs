//! Limits within which the scheduler works.

use pomona_types::{BLOCK_TOKENS, LayerKind, Micros, TokenId, blocks_of_one_rank};

use super::lanes::Lanes;
use super::{Ordering, Speculation};

/// Fixed for the life of a [`State`](super::State). Names are vLLM's.
#[derive(Clone, Debug)]
pub struct Config {
    /// Most requests in a step.
    pub max_num_seqs: u32,
    /// Most tokens in a step.
    pub max_num_batched_tokens: u32,
    /// How long a step may take, about, when it has prompts beside requests that decode; `None`:
    /// as long as `max_num_batched_tokens` take.
    pub step_target: Option<Micros>,
    /// Steps that may be planned before the first of them is committed: as many as a pipeline has
    /// stages. Requests and tokens are then divided among them.
    pub steps_in_flight: u32,
    /// Most tokens in a sequence, prompt and output.
    pub max_model_len: u32,
    /// Blocks in the pool; a block holds 16 tokens of one layer group.
    pub blocks: u32,
    /// Ranks that keep the splits of a sequence in turn. The rank that keeps a block is the
    /// block's number modulo this.
    pub context: u32,
    /// What the layers of each group see.
    pub groups: Vec<LayerKind>,
    /// Whether blocks of equal prefixes are shared.
    pub prefix_caching: bool,
    /// Who goes first.
    pub ordering: Ordering,
    /// Requests that may wait; more are refused.
    pub max_waiting: u32,
    /// Tokens that end a sequence.
    pub eos_token_ids: Vec<TokenId>,
    /// How decoding rows get drafts, if they do.
    pub speculation: Option<Speculation>,
}

/// A limit that makes no sense; says which.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ConfigError(pub(super) String);

/// Most blocks: the device addresses a token's KV by `block * 16 + offset` in 32 bits.
const BLOCKS_MAX: u32 = (u32::MAX / BLOCK_TOKENS) - 1;

impl Config {
    pub(super) fn check(&self) -> Result<(), ConfigError> {
        let bad = |why: String| Err(ConfigError(why));
        let sizes = [
            ("max_num_seqs", self.max_num_seqs),
            ("max_num_batched_tokens", self.max_num_batched_tokens),
            ("max_model_len", self.max_model_len),
            ("blocks", self.blocks),
            ("steps_in_flight", self.steps_in_flight),
            ("context", self.context),
        ];
        if let Some((name, _)) = sizes.iter().find(|(_, size)| *size == 0) {
            return bad(format!("{name} must be at least 1"));
        }
        if self.blocks > BLOCKS_MAX {
            return bad(format!("blocks is {}, at most {BLOCKS_MAX} are possible", self.blocks));
        }
        if self.blocks < self.context {
            return bad(format!(
                "blocks is {}: each of {} context ranks keeps at least one",
                self.blocks, self.context
            ));
        }
        if self.max_num_batched_tokens < self.max_num_seqs {
            return bad(format!(
                "max_num_batched_tokens ({}) must be at least max_num_seqs ({}): each running \
                 sequence takes a token in each step",
                self.max_num_batched_tokens, self.max_num_seqs
            ));
        }
        if self.groups.is_empty() {
            return bad("a model has at least one layer group".to_owned());
        }
        if self.groups.contains(&LayerKind::Sliding { window: 0 }) {
            return bad("a sliding window holds at least one token".to_owned());
        }
        self.speculation.as_ref().map_or(Ok(()), Speculation::check)
    }

    /// Most tokens in one of the steps in flight: together they have no more than one may.
    pub(super) fn step_tokens(&self) -> u32 {
        (self.max_num_batched_tokens / self.steps_in_flight).max(1)
    }

    pub(super) fn lanes(&self) -> Lanes {
        Lanes(self.context)
    }

    /// Blocks that one sequence of `tokens` tokens needs at most, over all groups: as many of each
    /// lane as of the one that it holds most of.
    pub(super) fn blocks_for(&self, tokens: u32) -> u64 {
        let all = u64::from(tokens.div_ceil(BLOCK_TOKENS));
        let most = |kind| blocks_of_one_rank(all.min(self.blocks_for_group(kind)), self.context);
        let most: u64 = self.groups.iter().map(|kind| most(*kind)).sum();
        most * u64::from(self.context)
    }

    /// Blocks that there are for what [`Config::blocks_for`] counts.
    pub(super) fn blocks_usable(&self) -> u64 {
        u64::from(self.blocks / self.context * self.context)
    }

    /// Blocks of one group that a sequence of any length holds at most.
    pub(super) fn blocks_for_group(&self, kind: LayerKind) -> u64 {
        match kind {
            LayerKind::Full => u64::MAX,
            LayerKind::Sliding { window } => {
                let span = u64::from(window) + u64::from(self.max_num_batched_tokens);
                span.div_ceil(u64::from(BLOCK_TOKENS)) + 1
            }
        }
    }
}

/// First block that a query at `position` still sees.
pub(super) fn first_visible_block(kind: LayerKind, position: u32) -> u32 {
    match kind {
        LayerKind::Full => 0,
        LayerKind::Sliding { window } => (position + 1).saturating_sub(window) / BLOCK_TOKENS,
    }
}

/// The position, beyond `position`, of the first query that sees one block less.
pub(super) fn next_drop(kind: LayerKind, position: u32) -> u32 {
    match kind {
        LayerKind::Full => u32::MAX,
        LayerKind::Sliding { window } => {
            let unseen = (first_visible_block(kind, position) + 1) * BLOCK_TOKENS;
            unseen.saturating_add(window - 1)
        }
    }
}
