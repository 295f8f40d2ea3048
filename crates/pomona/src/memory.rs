//! What a model will need in memory, and how much of it goes to keys and values. Decides with
//! numbers it is given; measures and allocates nothing.

use anyhow::{Result, bail};
use pomona_types::{BLOCK_TOKENS, ExpertsSpec, LayerKind, ModelSpec, blocks_of_one_rank};
use serde::{Deserialize, Serialize};

use crate::models::progress::human_bytes;

/// Tokens of KV that each running sequence gets by default.
const TOKENS_PER_SEQUENCE: u32 = 1024;
/// Share of the free memory that KV may take by default, as a divisor.
const KV_SHARE_DIVISOR: u64 = 4;
/// For the program itself, its stacks, tokenizer and buffers of connections.
const PROGRAM_BYTES: u64 = 64 << 20;
/// For partial sums of attention on their way between context ranks: those that a rank has
/// computed, has packed, and gets.
pub const CONTEXT_BYTES: u64 = 48 << 20;

/// What is wanted and what there is.
#[derive(Clone, Copy, Debug)]
pub struct Wishes {
    /// What all that runs on this machine needs.
    pub needs: Needs,
    /// Bytes that can be used without swapping, caches given up.
    pub available_bytes: u64,
    /// Longest sequence, if the user says.
    pub max_model_len: Option<u32>,
    /// Sequences at once.
    pub max_num_seqs: u32,
    /// Tokens in a step.
    pub max_num_batched_tokens: u32,
    /// Ranks that keep the splits of a sequence in turn.
    pub context: u32,
    /// Memory for KV, if the user says.
    pub kv_bytes: Option<u64>,
}

/// What a model needs, one rank's part of it, or several of them together with a draft model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Needs {
    /// Bytes of weights.
    pub weight_bytes: u64,
    /// Bytes of KV for each block.
    pub block_bytes: u64,
    /// Bytes of activations, and of the program.
    pub scratch_bytes: u64,
}

impl Needs {
    /// What a process needs beside the model.
    pub fn program() -> Needs {
        Needs { scratch_bytes: PROGRAM_BYTES, ..Needs::default() }
    }

    /// What either needs at most, of each.
    pub fn max(self, other: Needs) -> Needs {
        Needs {
            weight_bytes: self.weight_bytes.max(other.weight_bytes),
            block_bytes: self.block_bytes.max(other.block_bytes),
            scratch_bytes: self.scratch_bytes.max(other.scratch_bytes),
        }
    }
}

impl std::ops::Add for Needs {
    type Output = Needs;

    fn add(self, other: Needs) -> Needs {
        Needs {
            weight_bytes: self.weight_bytes.saturating_add(other.weight_bytes),
            block_bytes: self.block_bytes + other.block_bytes,
            scratch_bytes: self.scratch_bytes + other.scratch_bytes,
        }
    }
}

impl std::iter::Sum for Needs {
    fn sum<I: Iterator<Item = Needs>>(all: I) -> Needs {
        all.fold(Needs::default(), std::ops::Add::add)
    }
}

/// What will be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fit {
    /// Longest sequence.
    pub max_model_len: u32,
    /// Blocks of KV.
    pub kv_blocks: u32,
    /// Their bytes. Touched only as far as they are used.
    pub kv_bytes: u64,
    /// Bytes of weights.
    pub weight_bytes: u64,
    /// Bytes of activations and of the program, estimated.
    pub scratch_bytes: u64,
}

impl Fit {
    /// All of it.
    pub fn total_bytes(&self) -> u64 {
        self.weight_bytes + self.kv_bytes + self.scratch_bytes
    }
}

/// Finds room for a model.
///
/// # Errors
/// When there is none, or the wishes contradict the model or each other; says what to change.
pub fn fit(spec: &ModelSpec, wishes: &Wishes) -> Result<Fit> {
    if wishes.max_num_batched_tokens < wishes.max_num_seqs {
        bail!(
            "--max-num-batched-tokens {} is less than --max-num-seqs {}: each running sequence \
             takes a token in each step, so raise the one or lower the other",
            wishes.max_num_batched_tokens,
            wishes.max_num_seqs
        );
    }
    let (step, context) = (wishes.max_num_batched_tokens, wishes.context);
    let Needs { weight_bytes, block_bytes, scratch_bytes } = wishes.needs;
    let block_bytes = block_bytes.max(1);
    let fixed = weight_bytes.saturating_add(scratch_bytes);
    let free = wishes.available_bytes.saturating_sub(fixed);
    let least = blocks_for(spec, BLOCK_TOKENS, step, context) * block_bytes;
    if free < least {
        bail!(
            "not enough memory: the model needs {} for weights and {} beside them, and {} are \
             available. Stop other programs, or choose a smaller or more quantised model",
            human_bytes(weight_bytes),
            human_bytes(scratch_bytes + least),
            human_bytes(wishes.available_bytes),
        );
    }
    let budget = match wishes.kv_bytes {
        Some(bytes) if bytes > free => bail!(
            "--kv-cache-memory {} is more than the {} that weights and activations leave of {} \
             available: choose less, or leave the flag out to have it fitted",
            human_bytes(bytes),
            human_bytes(free),
            human_bytes(wishes.available_bytes),
        ),
        Some(bytes) => bytes,
        None => free / KV_SHARE_DIVISOR,
    };
    let max_model_len = max_model_len(spec, wishes, budget, free)?;
    let longest = blocks_for(spec, max_model_len, step, context);
    let blocks = match wishes.kv_bytes {
        Some(bytes) => bytes / block_bytes,
        None => {
            let each = TOKENS_PER_SEQUENCE.min(max_model_len);
            let comfortable =
                blocks_for(spec, each, step, context) * u64::from(wishes.max_num_seqs);
            comfortable.min(budget / block_bytes).max(longest)
        }
    };
    // A token's place in the pool is a 32-bit number.
    const BLOCKS_MAX: u32 = u32::MAX / BLOCK_TOKENS - 1;
    let kv_blocks = u32::try_from(blocks).unwrap_or(BLOCKS_MAX).min(BLOCKS_MAX);
    // Context ranks have equally many.
    let kv_blocks = kv_blocks / context * context;
    Ok(Fit {
        max_model_len,
        kv_blocks,
        kv_bytes: u64::from(kv_blocks) * block_bytes,
        weight_bytes,
        scratch_bytes,
    })
}

/// The wished length, or the longest that the model allows and the budget holds.
fn max_model_len(spec: &ModelSpec, wishes: &Wishes, budget: u64, free: u64) -> Result<u32> {
    let block_bytes = wishes.needs.block_bytes.max(1);
    let (step, context) = (wishes.max_num_batched_tokens, wishes.context);
    let longest_that_fits = |bytes: u64| {
        let blocks = bytes / block_bytes;
        // Blocks grow with length: the last length, in whole blocks, that fits.
        let (mut low, mut high) = (0u32, spec.max_position.div_ceil(BLOCK_TOKENS));
        while low < high {
            let middle = high - (high - low) / 2;
            if blocks_for(spec, middle * BLOCK_TOKENS, step, context) <= blocks {
                low = middle;
            } else {
                high = middle - 1;
            }
        }
        (low * BLOCK_TOKENS).min(spec.max_position)
    };
    match wishes.max_model_len {
        Some(len) if len > spec.max_position => bail!(
            "--max-model-len {len} is longer than the {} tokens that the model declares: choose \
             at most that",
            spec.max_position
        ),
        Some(len) => {
            let room = wishes.kv_bytes.unwrap_or(free);
            let needed = blocks_for(spec, len, step, context) * block_bytes;
            if needed > room {
                bail!(
                    "one sequence of --max-model-len {len} needs {} of keys and values, and there \
                     is room for {}: choose at most --max-model-len {}{}",
                    human_bytes(needed),
                    human_bytes(room),
                    longest_that_fits(room),
                    if wishes.kv_bytes.is_some() { " or more --kv-cache-memory" } else { "" },
                );
            }
            Ok(len)
        }
        None => match longest_that_fits(budget) {
            0 => bail!(
                "{} of keys and values do not hold a single block of {BLOCK_TOKENS} tokens: \
                 give more --kv-cache-memory (a block needs {})",
                human_bytes(budget),
                human_bytes(blocks_for(spec, BLOCK_TOKENS, step, context) * block_bytes),
            ),
            len => Ok(len),
        },
    }
}

/// Blocks that one sequence of `tokens` needs at most, over all layer groups, when a step computes
/// up to `step_tokens`. The scheduler counts the same way when it admits a request: a sliding layer
/// keeps its window, the tokens of the step, and the block that both begin in the middle of. Of
/// several context ranks, each has as many as the one that keeps most of the sequence.
pub fn blocks_for(spec: &ModelSpec, tokens: u32, step_tokens: u32, context: u32) -> u64 {
    let all = u64::from(tokens.div_ceil(BLOCK_TOKENS));
    let of_kind = |kind: LayerKind| match kind {
        LayerKind::Full => all,
        LayerKind::Sliding { window } => {
            let span = u64::from(window) + u64::from(step_tokens);
            all.min(span.div_ceil(u64::from(BLOCK_TOKENS)) + 1)
        }
    };
    let of_rank = |kind| blocks_of_one_rank(of_kind(kind), context);
    let most: u64 = spec.layer_groups().iter().map(|group| of_rank(group.kind)).sum();
    most * u64::from(context)
}

/// KV bytes of one token in all layers, sliding windows not yet left behind.
pub fn kv_token_bytes(spec: &ModelSpec, row_bytes: u32) -> u64 {
    spec.layer_groups().len() as u64 * spec.block_bytes(row_bytes) / u64::from(BLOCK_TOKENS)
}

/// KV bytes that a decode step reads for one sequence of `tokens`: whole layers read all of them,
/// sliding layers their window.
pub fn kv_read_bytes(spec: &ModelSpec, row_bytes: u32, tokens: f64) -> f64 {
    let token = 2.0 * f64::from(spec.kv_heads * row_bytes);
    let seen = |kind: &LayerKind| match kind {
        LayerKind::Full => tokens,
        LayerKind::Sliding { window } => tokens.min(f64::from(*window)),
    };
    spec.layers.iter().map(|kind| token * seen(kind)).sum()
}

/// Activations of a step: the residual stream and its norm, queries and outputs, keys and values,
/// gate and up, a few rows of logits, all f32. What a rank, which has `part` of the model, computes
/// a part of and gathers is there twice: its own columns, and all. With experts, a token has gates
/// and results for each that it meets, and a logit for each that there is.
pub fn scratch_bytes(spec: &ModelSpec, part: &ModelSpec, tokens: u32) -> u64 {
    let gathered = |all: u32, own: u32| all + if own < all { own } else { 0 };
    let heads = gathered(spec.heads, part.heads) + part.heads + 2 * part.kv_heads;
    let mut ffn = u64::from(gathered(spec.ffn, part.ffn) + part.ffn);
    if let Some(ExpertsSpec { count, per_token }) = spec.experts {
        let [count, per_token] = [count, per_token].map(u64::from);
        // Two indices and a weight beside the result, and the rank's columns of it.
        let results = if part.heads < spec.heads { 2 * spec.hidden } else { spec.hidden };
        ffn = (ffn + u64::from(results) + 3) * per_token + count;
    }
    let own_hidden = if part.heads < spec.heads { 2 * u64::from(spec.hidden) } else { 0 };
    let row =
        4 * u64::from(spec.hidden) + own_hidden + u64::from(heads) * u64::from(spec.head_dim) + ffn;
    const LOGIT_ROWS: u64 = 64;
    let logits = LOGIT_ROWS.min(u64::from(tokens)) * u64::from(spec.vocab);
    (row * u64::from(tokens) + logits) * 4
}

/// What lies in a rank's arena at most: the widest activations of two exchanges.
pub fn exchanged_bytes(spec: &ModelSpec, tokens: u32, ranks: usize) -> u64 {
    let widest = u64::from(spec.hidden.max(spec.ffn).max(spec.heads * spec.head_dim));
    if ranks > 1 { 2 * widest * u64::from(tokens) * 4 } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The sizes of SmolLM2 135M.
    fn spec() -> ModelSpec {
        ModelSpec {
            architecture: "llama".into(),
            hidden: 576,
            ffn: 1536,
            experts: None,
            heads: 9,
            kv_heads: 3,
            head_dim: 64,
            vocab: 49152,
            max_position: 8192,
            layers: vec![LayerKind::Full; 30],
        }
    }

    fn wishes() -> Wishes {
        Wishes {
            needs: Needs {
                weight_bytes: 98 << 20,
                block_bytes: spec().block_bytes(2 * spec().head_dim),
                scratch_bytes: scratch_bytes(&spec(), &spec(), 512),
            } + Needs::program(),
            available_bytes: 12 << 30,
            max_model_len: None,
            max_num_seqs: 64,
            max_num_batched_tokens: 512,
            context: 1,
            kv_bytes: None,
        }
    }

    fn refusal(wishes: Wishes) -> String {
        fit(&spec(), &wishes).unwrap_err().to_string()
    }

    #[test]
    fn a_roomy_machine_gives_the_whole_context_and_room_for_all() {
        let fit = fit(&spec(), &wishes()).unwrap();
        assert_eq!(fit.max_model_len, 8192);
        assert_eq!(fit.kv_blocks, 64 * 64);
        assert_eq!(fit.kv_bytes, 64 * 1024 * 2 * 30 * 2 * 3 * 64);
    }

    #[test]
    fn a_tight_machine_shortens_the_context() {
        let tight = Wishes { available_bytes: 700 << 20, ..wishes() };
        let fit = fit(&spec(), &tight).unwrap();
        assert!((1024..8192).contains(&fit.max_model_len), "{fit:?}");
        assert!(u64::from(fit.kv_blocks) * 16 >= u64::from(fit.max_model_len));
        assert!(fit.total_bytes() <= tight.available_bytes);
    }

    #[test]
    fn too_little_memory_names_all_three_numbers() {
        let text = refusal(Wishes { available_bytes: 120 << 20, ..wishes() });
        assert!(text.contains("98 MiB for weights") && text.contains("120 MiB are available"));
    }

    #[test]
    fn wishes_that_contradict_are_refused_with_a_number_that_works() {
        let long = refusal(Wishes { max_model_len: Some(10_000), ..wishes() });
        assert!(long.contains("8192 tokens that the model declares"), "{long}");
        let text =
            refusal(Wishes { max_model_len: Some(8192), kv_bytes: Some(50 << 20), ..wishes() });
        assert!(text.contains("--max-model-len 2272 or more --kv-cache-memory"), "{text}");
        let ok = Wishes { max_model_len: Some(2272), kv_bytes: Some(50 << 20), ..wishes() };
        assert!(fit(&spec(), &ok).is_ok());
        assert!(refusal(Wishes { kv_bytes: Some(64 << 30), ..wishes() }).contains("is more than"));
        assert!(refusal(Wishes { kv_bytes: Some(9), ..wishes() }).contains("single block"));
    }

    #[test]
    fn context_ranks_lengthen_the_context_of_tight_machines() {
        let tight = Wishes { available_bytes: 250 << 20, ..wishes() };
        let alone = fit(&spec(), &tight).unwrap();
        // What a block costs each of four ranks.
        let needs = Needs { block_bytes: tight.needs.block_bytes / 4, ..tight.needs };
        let four = fit(&spec(), &Wishes { needs, context: 4, ..tight }).unwrap();
        assert!(four.max_model_len > 3 * alone.max_model_len, "{alone:?} {four:?}");
        assert!(four.kv_blocks.is_multiple_of(4) && four.total_bytes() <= tight.available_bytes);
    }

    #[test]
    fn a_draft_model_shortens_the_context_of_a_tight_machine() {
        let tight = Wishes { available_bytes: 700 << 20, ..wishes() };
        let alone = fit(&spec(), &tight).unwrap();
        let block_bytes = spec().block_bytes(2 * spec().head_dim);
        let needs = tight.needs + Needs { block_bytes, ..Needs::default() };
        let with = fit(&spec(), &Wishes { needs, ..tight }).unwrap();
        assert!(with.max_model_len <= alone.max_model_len / 2 + 16, "{with:?}");
        assert!(with.total_bytes() <= tight.available_bytes);
    }

    #[test]
    fn a_length_that_is_asked_for_gets_its_blocks() {
        let fit = fit(&spec(), &Wishes { max_num_seqs: 1, ..wishes() }).unwrap();
        assert_eq!(fit.kv_blocks, 8192 / 16);
    }

    #[test]
    fn sliding_layers_need_blocks_for_their_window_only() {
        let mut spec = spec();
        spec.layers = vec![LayerKind::Sliding { window: 512 }; 4];
        spec.layers.push(LayerKind::Full);
        // Four groups of one sliding layer each, and one full.
        assert_eq!(blocks_for(&spec, 160, 64, 1), 5 * 10);
        assert_eq!(blocks_for(&spec, 16_000, 64, 1), 4 * 37 + 1000);
    }

    #[test]
    fn a_step_has_room_for_every_sequence() {
        let text = refusal(Wishes { max_num_batched_tokens: 32, ..wishes() });
        assert!(text.contains("raise the one or lower the other"), "{text}");
    }

    #[test]
    fn a_rank_has_room_for_its_columns_and_for_those_of_all() {
        let part = ModelSpec { heads: 5, kv_heads: 2, ffn: 768, ..spec() };
        let whole = scratch_bytes(&spec(), &spec(), 1);
        let rows = |bytes: u64| bytes / 4 - u64::from(spec().vocab);
        assert_eq!(rows(whole), 4 * 576 + (18 + 6) * 64 + 2 * 1536);
        let own = scratch_bytes(&spec(), &part, 1);
        assert_eq!(rows(own), 6 * 576 + (9 + 5 + 5 + 4) * 64 + 1536 + 2 * 768);
    }

    #[test]
    fn each_expert_that_a_token_meets_has_room_for_it() {
        let experts = Some(ExpertsSpec { count: 8, per_token: 2 });
        let moe = ModelSpec { experts, ..spec() };
        let more = scratch_bytes(&moe, &moe, 1) - scratch_bytes(&spec(), &spec(), 1);
        assert_eq!(more / 4, 2 * 1536 + 2 * (576 + 3) + 8);
    }

    #[test]
    fn kv_of_a_token_counts_every_layer() {
        assert_eq!(kv_token_bytes(&spec(), 2 * 64), 30 * 2 * 3 * 64 * 2);
        assert_eq!(kv_read_bytes(&spec(), 2 * 64, 10.0), 10.0 * 30.0 * 2.0 * 3.0 * 64.0 * 2.0);
    }
}
