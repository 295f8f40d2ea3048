//! What the next step computes.

use pomona_types::{BLOCK_TOKENS, Micros, QosClass, TokenId, blocks_of_one_rank};

use super::State;
use super::blocks::NONE;
use super::config::{first_visible_block, next_drop};
use super::ordering::STARVATION_AFTER;
use super::pace::Flight;
use super::plan::{NO_BLOCK, PlanRow, StepPlan};
use super::record::{Record, Status};
use super::speculation::Method;

/// Blocks are kept back for the growth of running requests, at most this share of the pool.
const RESERVE_SHARE: u32 = 50;

/// What is left of a step.
struct Budget {
    tokens: u32,
    /// Rows: of several steps in flight, each takes its share of the requests.
    rows: u32,
    /// Tokens of prompts, which are rows with more than one token due.
    prompts: u32,
    prompts_taken: u32,
}

impl Budget {
    /// Most tokens of a row with so many due.
    fn for_due(&self, due: u32) -> u32 {
        if due > 1 { self.tokens.min(self.prompts) } else { self.tokens }
    }

    fn take(&mut self, due: u32, count: u32) {
        self.rows -= 1;
        self.tokens -= count;
        if due > 1 {
            self.prompts -= count;
            self.prompts_taken += count;
        }
    }
}

impl State {
    /// Fills `plan` with the next step: running requests first, in order, then waiting ones if
    /// nothing had to be preempted. Returns whether there is anything to compute. A request is in
    /// one plan at a time, until its commit, and plans are committed in their order.
    ///
    /// # Panics
    /// When [`Config::steps_in_flight`](super::Config::steps_in_flight) plans await their commit
    /// already: a bug of the caller.
    pub fn plan(&mut self, now: Micros, plan: &mut StepPlan) -> bool {
        let most = self.config.steps_in_flight as usize;
        assert!(self.in_flight.len() < most, "step {} must be committed first", self.step);
        plan.rows.clear();
        plan.tokens.clear();
        plan.blocks.clear();
        plan.preempted.clear();
        let mut budget = self.budget();
        let enough = self.plan_running(plan, &mut budget);
        if enough && plan.preempted.is_empty() {
            self.plan_waiting(now, plan, &mut budget);
        }
        if plan.rows.is_empty() {
            assert!(
                !self.in_flight.is_empty() || (self.running.is_empty() && self.waiting.is_empty()),
                "requests wait, nothing runs, and nothing was planned"
            );
            return false;
        }
        self.step += 1;
        plan.step = self.step;
        let prompt_tokens = budget.prompts_taken;
        self.in_flight.push_back(Flight { step: self.step, begun: now, prompt_tokens });
        true
    }

    /// What the next step may compute. While somebody decodes, prompts get what the target leaves.
    fn budget(&self) -> Budget {
        let decodes = |index: &u32| self.record(*index).due() == 1;
        let prompts = match self.config.step_target {
            Some(target) if self.running.iter().any(decodes) => self.pace.prompt_tokens(target),
            _ => u32::MAX,
        };
        let steps = self.config.steps_in_flight;
        let requests = (self.running.len() + self.waiting.len()) as u32;
        let requests = requests.min(self.config.max_num_seqs);
        Budget {
            tokens: self.config.step_tokens(),
            rows: requests.div_ceil(steps),
            prompts,
            prompts_taken: 0,
        }
    }

    /// Plans running requests; `false` if one must wait for the blocks of a step in flight.
    fn plan_running(&mut self, plan: &mut StepPlan, budget: &mut Budget) -> bool {
        let speculates = self.config.speculation.is_some();
        // Tokens that the step computes: all that is known, and what is drafted on the way.
        let mut tokens = if speculates { self.tokens_due(budget.tokens) } else { 0 };
        let mut at = 0;
        while at < self.running.len() && budget.tokens.min(budget.rows) > 0 {
            let index = self.running[at];
            let record = &mut self.records[index as usize];
            if record.in_flight {
                at += 1;
                continue;
            }
            if record.only_decodes() && !speculates {
                emit(record, 1, Drafts::NONE, false, plan);
                budget.rows -= 1;
                budget.tokens -= 1;
                at += 1;
                continue;
            }
            let due = record.due();
            let most = budget.for_due(due);
            if most == 0 {
                at += 1;
                continue;
            }
            self.drop_unseen(index);
            let count = self.affordable(index, most);
            if count > 0 {
                let drafts = self.drafts(index, tokens);
                tokens += drafts.count;
                self.extend(index, count + drafts.count);
                emit(self.record_mut(index), count, drafts, false, plan);
                budget.tokens -= drafts.count;
                budget.take(due, count);
                at += 1;
            } else {
                let Some(victim) = self.victim(at) else { return false };
                self.preempt(victim, plan);
            }
        }
        true
    }

    /// Tokens of a running request that the budget and the free blocks allow.
    fn affordable(&self, index: u32, budget: u32) -> u32 {
        let record = self.record(index);
        let room = self.entries_max(record, 0).saturating_mul(BLOCK_TOKENS) - record.computed;
        record.due().min(budget).min(room)
    }

    /// How many entries a running request's tables can grow to, by free blocks of which `kept` in
    /// each lane and group are kept for others.
    fn entries_max(&self, record: &Record, kept: u32) -> u32 {
        let (lanes, groups) = (self.config.lanes(), self.config.groups.len() as u32);
        let (origin, entries) = (record.origin, record.table_len);
        let most = |lane: u32| {
            let spare = (self.blocks.free_in(lane) / groups).saturating_sub(kept);
            lanes.entry(origin, lane, lanes.count(origin, lane, entries) + spare)
        };
        (0..lanes.0).map(most).min().unwrap_or(entries)
    }

    /// Tokens that are known and not computed, within a budget; all of it if requests wait.
    fn tokens_due(&self, budget: u32) -> u32 {
        if !self.waiting.is_empty() && !self.slots.is_empty() {
            return budget;
        }
        let records = self.running.iter().map(|index| self.record(*index));
        let due = records.filter(|record| !record.in_flight).map(|record| record.due());
        u64::from(budget).min(due.map(u64::from).sum()) as u32
    }

    /// Drafts for a running request in a step that computes `tokens` tokens without them. They
    /// take no token of the budget and no block that others need for what they know.
    fn drafts(&mut self, index: u32, tokens: u32) -> Drafts {
        let Some(speculation) = &self.config.speculation else { return Drafts::NONE };
        let entries = self.entries_max(self.record(index), self.running.len() as u32);
        let record = &mut self.records[index as usize];
        if record.computed + 1 != record.len() || record.wants_prompt_logits() {
            return Drafts::NONE;
        }
        let worthwhile = speculation.worthwhile(record.acceptance, tokens);
        if worthwhile == 0 {
            record.acceptance.forget();
            return Drafts::NONE;
        }
        let room = entries.saturating_mul(BLOCK_TOKENS);
        let most = worthwhile
            .min(self.config.step_tokens().saturating_sub(tokens))
            .min(room.saturating_sub(record.len()))
            // One more token than there are drafts comes of them.
            .min(record.len_max - record.len() - 1);
        let Method::Lookup(lookup) = &speculation.method else {
            return Drafts { count: most, from: None };
        };
        record.settle();
        match lookup.find(&record.tokens) {
            Some((from, count)) => Drafts { count: count.min(most), from: Some(from) },
            None => Drafts::NONE,
        }
    }

    /// Whom to preempt, as an index into `running`, from `at` on (earlier ones are planned): the
    /// least urgent, then the one that loses least work. The first in order is spared unless it is
    /// alone, so that somebody always gets to the end. None of a step in flight.
    fn victim(&self, at: usize) -> Option<usize> {
        let key = |i: usize| {
            let record = self.record(self.running[i]);
            let (class, priority, _) = self.config.ordering.running(record);
            (class, priority, std::cmp::Reverse(record.computed), record.arrival)
        };
        let from = if at == 0 && self.running.len() > 1 { 1 } else { at };
        let free = |i: &usize| !self.record(self.running[*i]).in_flight;
        (from..self.running.len()).filter(free).max_by_key(|i| key(*i))
    }

    fn preempt(&mut self, at: usize, plan: &mut StepPlan) {
        let index = self.running.remove(at);
        self.release(index);
        self.record_mut(index).preemptions += 1;
        self.waiting.push(index);
        self.counters.preemptions += 1;
        plan.preempted.push(self.record(index).id);
    }

    fn plan_waiting(&mut self, now: Micros, plan: &mut StepPlan, budget: &mut Budget) {
        while budget.tokens.min(budget.prompts).min(budget.rows) > 0 && !self.slots.is_empty() {
            let Some(at) = self.next_waiting(now) else { return };
            let index = self.waiting[at];
            if !self.admit(now, index) {
                return;
            }
            self.waiting.swap_remove(at);
            self.enter_running(index);
            let due = self.record(index).due();
            let count = self.affordable(index, budget.for_due(due));
            assert!(count > 0, "an admitted request has room for a token");
            self.extend(index, count);
            emit(self.record_mut(index), count, Drafts::NONE, true, plan);
            budget.take(due, count);
        }
    }

    /// Who is admitted next, as an index into `waiting`.
    fn next_waiting(&mut self, now: Micros) -> Option<usize> {
        for i in 0..self.waiting.len() {
            let record = &mut self.records[self.waiting[i] as usize];
            if now - record.submitted > STARVATION_AFTER {
                record.class = QosClass::Interactive;
                record.priority = i32::MIN;
            }
        }
        let rank =
            |i: &usize| self.config.ordering.waiting(self.record(self.waiting[*i]), &self.shares);
        (0..self.waiting.len()).min_by_key(rank)
    }

    /// Gives a waiting request a slot and the blocks of its cached prefix, if all it has to
    /// compute would fit into free blocks.
    fn admit(&mut self, now: Micros, index: u32) -> bool {
        let hit = self.match_prefix(index);
        let record = self.record(index);
        let beginning = &record.tokens[..record.tokens.len().min(BLOCK_TOKENS as usize)];
        let origin = self.config.lanes().origin(record.tenant, beginning);
        let lane_blocks = self.blocks.total() / self.config.context;
        let growth = (self.running.len() * self.config.groups.len()) as u32;
        let reserve = u64::from(growth.min(lane_blocks / RESERVE_SHARE));
        let fits = |lane| {
            let needed = self.blocks_needed(record, hit, (origin, lane));
            needed + reserve <= u64::from(self.blocks.free_in(lane))
        };
        if !self.running.is_empty() && !(0..self.config.context).all(fits) {
            return false;
        }
        let Some(slot) = self.slots.pop() else { return false };
        self.hold_prefix(index, hit);
        self.by_slot[slot as usize] = index;
        let first_time = self.record(index).started.is_none();
        let record = self.record_mut(index);
        record.status = Status::Running { slot };
        record.origin = origin;
        record.computed = hit * BLOCK_TOKENS;
        if first_time {
            record.started = Some(now);
            record.cached_tokens = hit * BLOCK_TOKENS;
            let (queries, hits) = (record.len(), record.cached_tokens);
            self.counters.prefix_queries += u64::from(queries);
            self.counters.prefix_hits += u64::from(hits);
        }
        true
    }

    /// Blocks of a lane that a waiting request would take, the first `hit` of whose blocks are
    /// cached.
    fn blocks_needed(&self, record: &Record, hit: u32, (origin, lane): (u32, u32)) -> u64 {
        let lanes = self.config.lanes();
        let total = record.len().div_ceil(BLOCK_TOKENS);
        let mut needed = 0;
        for (group, kind) in self.config.groups.iter().enumerate() {
            let visible = first_visible_block(*kind, hit * BLOCK_TOKENS).min(hit);
            let [before, all] = [visible, total].map(|n| lanes.count(origin, lane, n));
            let most = blocks_of_one_rank(self.config.blocks_for_group(*kind), lanes.0);
            let fresh = u64::from(all - before).min(most);
            let held = (visible..hit)
                .filter(|b| {
                    let block = self.prefixes.block(self.matched[*b as usize], group);
                    block.is_some_and(|block| {
                        self.blocks.lane(block) == lane && self.blocks.get(block).refs > 0
                    })
                })
                .count() as u64;
            needed += fresh.saturating_sub(held);
        }
        needed
    }

    fn enter_running(&mut self, index: u32) {
        let rank = self.config.ordering.running(self.record(index));
        let at =
            self.running.partition_point(|i| self.config.ordering.running(self.record(*i)) < rank);
        self.running.insert(at, index);
    }

    /// Finds the longest cached prefix that leaves at least one token to compute; its nodes are
    /// then in `matched`. Returns its length in blocks.
    fn match_prefix(&mut self, index: u32) -> u32 {
        self.matched.clear();
        let record = &self.records[index as usize];
        if !self.config.prefix_caching || record.wants_prompt_logits() {
            return 0;
        }
        let most = (record.len() - 1) / BLOCK_TOKENS;
        let tokens = record.tokens.chunks_exact(BLOCK_TOKENS as usize).take(most as usize);
        let mut parent = NONE;
        let mut best = 0;
        let mut run = [0u32; GROUPS_INLINE];
        let mut run_more = Vec::new();
        let run: &mut [u32] = match self.config.groups.len() {
            few if few <= GROUPS_INLINE => &mut run[..few],
            many => {
                run_more.resize(many, 0);
                &mut run_more
            }
        };
        for (n, tokens) in (1u32..).zip(tokens) {
            let Some(node) = self.prefixes.find(parent, record.tenant, tokens) else { break };
            let mut usable = true;
            for (group, kind) in self.config.groups.iter().enumerate() {
                let cached = self.prefixes.block(node, group).is_some();
                run[group] = if cached { run[group] + 1 } else { 0 };
                usable &= run[group] >= n - first_visible_block(*kind, n * BLOCK_TOKENS).min(n);
            }
            self.matched.push(node);
            parent = node;
            if usable {
                best = n;
            }
        }
        self.matched.truncate(best as usize);
        best
    }

    /// Puts the matched blocks that are still visible into the request's tables.
    fn hold_prefix(&mut self, index: u32, hit: u32) {
        let record = &mut self.records[index as usize];
        for (group, kind) in self.config.groups.iter().enumerate() {
            let visible = first_visible_block(*kind, hit * BLOCK_TOKENS).min(hit);
            record.dropped[group] = visible;
            for (b, node) in (0u32..).zip(&self.matched) {
                let block = if b < visible {
                    NO_BLOCK
                } else {
                    self.prefixes.block(*node, group).expect("matched nodes are cached")
                };
                if block != NO_BLOCK {
                    self.blocks.hold(block);
                    record.held += 1;
                    self.entries += 1;
                }
                record.tables[group].push(block);
            }
        }
        record.table_len = hit;
        record.chain.extend_from_slice(&self.matched);
        record.chained = hit;
        if let Some(last) = self.matched.last() {
            self.prefixes.hold(*last);
        }
    }

    /// Gives back blocks that no later query sees.
    fn drop_unseen(&mut self, index: u32) {
        let record = &mut self.records[index as usize];
        if record.computed < record.next_drop {
            return;
        }
        record.next_drop = u32::MAX;
        for (group, kind) in self.config.groups.iter().enumerate() {
            let visible = first_visible_block(*kind, record.computed);
            while record.dropped[group] < visible {
                let entry = &mut record.tables[group][record.dropped[group] as usize];
                self.blocks.release(std::mem::replace(entry, NO_BLOCK));
                record.dropped[group] += 1;
                record.held -= 1;
                self.entries -= 1;
            }
            let next = next_drop(*kind, record.computed);
            record.next_drop = record.next_drop.min(next);
        }
    }

    /// Appends the blocks that `count` more tokens need; the caller knows that they are free.
    fn extend(&mut self, index: u32, count: u32) {
        let record = self.record(index);
        let (before, after) = (record.table_len, (record.computed + count).div_ceil(BLOCK_TOKENS));
        if after <= before {
            return;
        }
        let (groups, lanes, origin) =
            (self.config.groups.len(), self.config.lanes(), record.origin);
        for group in 0..groups {
            for entry in before..after {
                let lane = lanes.of(origin, entry);
                let block = self.take_block(lane).expect("affordable() counted the free blocks");
                self.record_mut(index).tables[group].push(block);
            }
        }
        let record = self.record_mut(index);
        record.table_len = after;
        let taken = (after - before) * groups as u32;
        record.held += taken;
        self.entries += u64::from(taken);
    }
}

/// Guesses at a request's next tokens.
#[derive(Clone, Copy)]
struct Drafts {
    count: u32,
    /// Where among its tokens they stand, or `None` if a model is to make them.
    from: Option<usize>,
}

impl Drafts {
    const NONE: Drafts = Drafts { count: 0, from: None };

    /// Appends them to `tokens`, or zeros in their place. What they copy may reach into themselves.
    fn write(self, known: &[TokenId], tokens: &mut Vec<TokenId>) {
        let first = tokens.len();
        for i in 0..self.count as usize {
            let token = self.from.map_or(0, |from| match known.get(from + i) {
                Some(token) => *token,
                None => tokens[first + from + i - known.len()],
            });
            tokens.push(token);
        }
    }
}

/// Adds a request's row, with what it has of new blocks.
fn emit(record: &mut Record, known: u32, drafts: Drafts, first: bool, plan: &mut StepPlan) {
    record.in_flight = true;
    let Status::Running { slot } = record.status else {
        unreachable!("only running requests are planned")
    };
    let (end, len) = (record.computed + known, record.len());
    let (told, table_len) = (record.told, (end + drafts.count).div_ceil(BLOCK_TOKENS));
    plan.rows.push(PlanRow {
        id: record.id,
        slot,
        computed: record.computed,
        count: known + drafts.count,
        drafts: drafts.count,
        sample: end == len,
        prompt_logits: record.wants_prompt_logits(),
        first,
        known: told,
        table_len,
        added: plan.blocks.len() as u32,
    });
    if known == 1 && end == len {
        plan.tokens.push(record.last);
    } else {
        record.settle();
        plan.tokens.extend_from_slice(&record.tokens[record.computed as usize..end as usize]);
    }
    if drafts.count > 0 {
        drafts.write(&record.tokens, &mut plan.tokens);
    }
    if told < table_len {
        for table in &record.tables {
            plan.blocks.extend_from_slice(&table[told as usize..table_len as usize]);
        }
        record.told = table_len;
    }
}

/// Layer groups whose run lengths need no allocation.
const GROUPS_INLINE: usize = 16;
