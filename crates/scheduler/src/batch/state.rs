//! The scheduler's memory, and how requests enter and leave it.

use std::collections::{BTreeMap, VecDeque};

use pomona_types::{BLOCK_TOKENS, FinishReason, Micros, Refusal, Request, RequestId};

use super::blocks::{Blocks, NONE};
use super::ordering::Shares;
use super::pace::{Flight, Pace};
use super::plan::{Effect, Effects, NO_BLOCK};
use super::prefix::PrefixTree;
use super::record::{RECENT, Record, Status};
use super::speculation::Acceptance;
use super::{Config, ConfigError};

/// Waiting requests of 256 tokens or so finish at about this rate per running slot: a first guess
/// for `Retry-After`, nothing more.
const RETRY_AFTER_S: u32 = 2;

/// All requests, blocks and prefixes of one replica.
#[derive(Clone, Debug)]
pub struct State {
    pub(super) config: Config,
    pub(super) records: Vec<Record>,
    unused: Vec<u32>,
    by_id: BTreeMap<RequestId, u32>,
    pub(super) waiting: Vec<u32>,
    /// In planning order.
    pub(super) running: Vec<u32>,
    /// Free ones.
    pub(super) slots: Vec<u32>,
    /// Which record has a slot.
    pub(super) by_slot: Vec<u32>,
    pub(super) blocks: Blocks,
    /// Entries in the block tables of all requests.
    pub(super) entries: u64,
    pub(super) prefixes: PrefixTree,
    pub(super) shares: Shares,
    /// Plans whose commits are awaited, in their order.
    pub(super) in_flight: VecDeque<Flight>,
    pub(super) step: u64,
    arrivals: u64,
    /// Ends of requests that were aborted outside a step.
    ended: Vec<Effect>,
    pub(super) counters: Stats,
    pub(super) pace: Pace,
    /// Scratch for prefix matches.
    pub(super) matched: Vec<u32>,
}

/// Queue lengths now, counters since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Requests with blocks.
    pub running: u32,
    /// Requests without.
    pub waiting: u32,
    /// Blocks that some request holds.
    pub blocks_used: u32,
    /// Blocks in all.
    pub blocks_total: u32,
    /// Prompt tokens looked up in the prefix cache.
    pub prefix_queries: u64,
    /// Prompt tokens found.
    pub prefix_hits: u64,
    /// Preemptions.
    pub preemptions: u64,
    /// Prompt tokens computed.
    pub prompt_tokens: u64,
    /// Tokens sampled.
    pub generation_tokens: u64,
    /// Rows with drafts.
    pub drafts: u64,
    /// Drafts in them.
    pub draft_tokens: u64,
    /// Drafts that were right.
    pub accepted_tokens: u64,
}

impl State {
    /// An empty scheduler. Takes all of its block and prefix memory now: about 200 bytes a block.
    ///
    /// # Errors
    /// When a limit is zero or contradicts another.
    pub fn new(config: Config) -> Result<State, ConfigError> {
        State::with_hash_mask(config, u64::MAX)
    }

    pub(super) fn with_hash_mask(config: Config, hash_mask: u64) -> Result<State, ConfigError> {
        config.check()?;
        let groups = config.groups.len();
        let nodes = if config.prefix_caching { config.blocks } else { 1 };
        Ok(State {
            records: Vec::new(),
            unused: Vec::new(),
            by_id: BTreeMap::new(),
            waiting: Vec::new(),
            running: Vec::with_capacity(config.max_num_seqs as usize),
            slots: (0..config.max_num_seqs).rev().collect(),
            by_slot: vec![NONE; config.max_num_seqs as usize],
            blocks: Blocks::new(config.blocks, config.lanes()),
            entries: 0,
            prefixes: PrefixTree::new(nodes, groups, hash_mask),
            shares: Shares::default(),
            in_flight: VecDeque::with_capacity(config.steps_in_flight as usize),
            step: 0,
            arrivals: 0,
            ended: Vec::new(),
            counters: Stats::default(),
            pace: Pace::default(),
            matched: Vec::new(),
            config,
        })
    }

    /// Queues a request.
    ///
    /// # Errors
    /// Refuses what can never run here, and more than `max_waiting` at a time.
    pub fn submit(&mut self, now: Micros, request: Request) -> Result<(), Refusal> {
        let sampling = &request.sampling;
        let prompt_len = request.prompt.len() as u64;
        let max_len = u64::from(self.config.max_model_len);
        let invalid = |why: String| Err(Refusal::Invalid(why));
        if prompt_len == 0 {
            return invalid("the prompt is empty: it needs at least one token".to_owned());
        }
        if sampling.max_tokens == 0 {
            return invalid("max_tokens must be at least 1".to_owned());
        }
        if prompt_len >= max_len {
            return invalid(format!(
                "the prompt has {prompt_len} tokens, the model's context is {max_len} tokens \
                 with the answer: shorten the prompt or raise --max-model-len"
            ));
        }
        if self.by_id.contains_key(&request.id) {
            return invalid(format!("{} is in use", request.id));
        }
        let len_max = (prompt_len + u64::from(sampling.max_tokens)).min(max_len) as u32;
        let needed = self.config.blocks_for(len_max);
        if needed > self.config.blocks_usable() {
            return invalid(format!(
                "{len_max} tokens need {needed} blocks of KV cache, there are {}: lower \
                 max_tokens, shorten the prompt, or give the server more --kv-cache-memory",
                self.config.blocks
            ));
        }
        let waiting = self.waiting.len() as u32;
        if waiting >= self.config.max_waiting {
            return Err(Refusal::Overloaded { waiting, retry_after_s: RETRY_AFTER_S });
        }
        self.enqueue(now, request, len_max);
        Ok(())
    }

    fn enqueue(&mut self, now: Micros, request: Request, len_max: u32) {
        let Request { id, tenant, class, priority, prompt, sampling } = request;
        let mut tokens = Vec::with_capacity(len_max as usize);
        tokens.extend_from_slice(&prompt);
        let groups = self.config.groups.len();
        let table = || Vec::with_capacity(len_max.div_ceil(BLOCK_TOKENS) as usize);
        self.arrivals += 1;
        let prompt_len = tokens.len() as u32;
        let record = Record {
            id,
            tenant,
            class,
            priority,
            arrival: self.arrivals,
            submitted: now,
            started: None,
            status: Status::Waiting,
            prompt_len,
            last: *tokens.last().expect("submit() refuses empty prompts"),
            tokens,
            recent: [0; RECENT],
            recent_len: 0,
            len_max,
            min_tokens: sampling.min_tokens,
            ignore_eos: sampling.ignore_eos,
            settled: prompt_len,
            chained: 0,
            origin: 0,
            has_stop_tokens: !sampling.stop_token_ids.is_empty(),
            stop_token_ids: sampling.stop_token_ids.into(),
            prompt_logprobs: sampling.prompt_logprobs.is_some(),
            computed: 0,
            table_len: 0,
            told: 0,
            held: 0,
            next_drop: 0,
            tables: (0..groups).map(|_| table()).collect(),
            dropped: vec![0; groups].into(),
            chain: table(),
            cached_tokens: 0,
            preemptions: 0,
            acceptance: Acceptance::new(),
            in_flight: false,
            aborted: false,
        };
        let index = match self.unused.pop() {
            Some(index) => {
                self.records[index as usize] = record;
                index
            }
            None => {
                self.records.push(record);
                self.records.len() as u32 - 1
            }
        };
        self.by_id.insert(id, index);
        self.waiting.push(index);
        self.shares.enter(tenant);
    }

    /// Ends a request, at any moment. In a step, its blocks stay until the commit; otherwise they
    /// are free on return, and [`State::drain_aborted`] tells its end. Unknown ids are fine.
    pub fn abort(&mut self, now: Micros, id: RequestId) {
        let Some(index) = self.index(id) else { return };
        if self.record(index).in_flight {
            self.record_mut(index).aborted = true;
        } else {
            let end = self.end(now, index, FinishReason::Abort);
            self.ended.push(end);
        }
    }

    /// Moves the ends of requests that were aborted outside a step to `effects`.
    pub fn drain_aborted(&mut self, effects: &mut Effects) {
        effects.list.append(&mut self.ended);
    }

    /// Queue lengths and counters.
    pub fn stats(&self) -> Stats {
        Stats {
            running: self.running.len() as u32,
            waiting: self.waiting.len() as u32,
            blocks_used: self.blocks.total() - self.blocks.free(),
            blocks_total: self.blocks.total(),
            ..self.counters
        }
    }

    pub(super) fn index(&self, id: RequestId) -> Option<u32> {
        self.by_id.get(&id).copied()
    }

    pub(super) fn record(&self, index: u32) -> &Record {
        &self.records[index as usize]
    }

    pub(super) fn record_mut(&mut self, index: u32) -> &mut Record {
        &mut self.records[index as usize]
    }

    /// Forgets a request and gives everything it holds back.
    pub(super) fn end(&mut self, now: Micros, index: u32, reason: FinishReason) -> Effect {
        match self.record(index).status {
            Status::Waiting => self.waiting.retain(|i| *i != index),
            Status::Running { .. } => {
                self.running.retain(|i| *i != index);
                self.release(index);
            }
        }
        let record = self.record(index);
        let (id, tenant) = (record.id, record.tenant);
        let effect = Effect::Finished {
            id,
            reason,
            cached_tokens: record.cached_tokens,
            queued: record.started.unwrap_or(now) - record.submitted,
            preemptions: record.preemptions,
        };
        self.by_id.remove(&id);
        self.shares.leave(tenant);
        let record = self.record_mut(index);
        record.tokens = Vec::new();
        record.tables = Box::default();
        self.unused.push(index);
        effect
    }

    /// Gives back the blocks, the prefix chain and the slot of a request that was running. Later
    /// blocks first, so that the ends of prefixes are reused before their beginnings.
    pub(super) fn release(&mut self, index: u32) {
        let record = &mut self.records[index as usize];
        let Status::Running { slot } = record.status else {
            unreachable!("only running requests hold blocks")
        };
        record.settle();
        for table in &mut record.tables {
            for block in table.drain(..).rev().filter(|block| *block != NO_BLOCK) {
                self.blocks.release(block);
            }
        }
        record.dropped.fill(0);
        self.entries -= u64::from(record.held);
        (record.table_len, record.told, record.held, record.next_drop) = (0, 0, 0, 0);
        if let Some(last) = record.chain.last() {
            self.prefixes.release(*last);
        }
        record.chain.clear();
        record.chained = 0;
        record.computed = 0;
        record.status = Status::Waiting;
        self.slots.push(slot);
        self.by_slot[slot as usize] = NONE;
    }

    /// Takes a lane's free block; whatever prefix it held is forgotten.
    pub(super) fn take_block(&mut self, lane: u32) -> Option<u32> {
        let block = self.blocks.take(lane)?;
        let record = self.blocks.get(block);
        let (node, group) = (record.node, record.group);
        if node != NONE {
            self.prefixes.clear_block(node, group as usize);
            self.blocks.set_node(block, NONE, 0);
        }
        Some(block)
    }

    /// Cheap invariants, asserted after each step, in release too.
    pub(super) fn assert_sane(&self) {
        assert_eq!(self.entries, self.blocks.held(), "blocks held and blocks in tables differ");
        let slots = self.running.len() + self.slots.len();
        assert_eq!(slots, self.config.max_num_seqs as usize, "a slot was lost");
        assert_eq!(
            self.running.len() + self.waiting.len(),
            self.by_id.len(),
            "a request is neither running nor waiting"
        );
    }

    /// All invariants, slowly: for tests.
    #[cfg(test)]
    pub(super) fn check(&self) {
        self.assert_sane();
        self.blocks.check();
        let held = |index: &u32| u64::from(self.record(*index).held);
        assert_eq!(self.entries, self.running.iter().map(held).sum::<u64>());
        for index in &self.running {
            let record = self.record(*index);
            assert!(matches!(record.status, Status::Running { .. }));
            assert_eq!(record.chain.len(), record.chained as usize);
            assert_eq!(record.tokens.len(), record.settled as usize);
            if !record.in_flight {
                assert_eq!(record.table_len, record.computed.div_ceil(BLOCK_TOKENS));
            }
            let entries = record.tables.iter().flatten().filter(|block| **block != NO_BLOCK);
            assert_eq!(entries.count(), record.held as usize);
            for (table, dropped) in record.tables.iter().zip(&record.dropped) {
                assert_eq!(table.len(), record.table_len as usize);
                assert!(table[..*dropped as usize].iter().all(|b| *b == NO_BLOCK));
                assert!(table[*dropped as usize..].iter().all(|b| *b != NO_BLOCK));
                for (entry, block) in (0u32..).zip(table).filter(|(_, b)| **b != NO_BLOCK) {
                    let lane = self.config.lanes().of(record.origin, entry);
                    assert_eq!(self.blocks.lane(*block), lane);
                }
            }
        }
        for index in &self.waiting {
            let record = self.record(*index);
            assert_eq!(record.status, Status::Waiting);
            assert!(record.tables.iter().all(Vec::is_empty));
        }
        if self.running.is_empty() {
            assert_eq!(self.blocks.free(), self.blocks.total());
        }
    }
}
