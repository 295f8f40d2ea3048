//! What a computed step leads to.

use pomona_types::{BLOCK_TOKENS, FinishReason, Micros, TenantId, TokenId};

use super::State;
use super::blocks::NONE;
use super::plan::{Effect, Effects, NO_BLOCK, PlanRow, Sampled, StepPlan, StepResult};

impl State {
    /// Takes note of a step: computed tokens, sampled tokens, ends. Appends to `effects`.
    ///
    /// # Panics
    /// When the plan is not the oldest that awaits its commit, or the result does not belong to it:
    /// bugs of the caller.
    pub fn commit(
        &mut self,
        now: Micros,
        plan: &StepPlan,
        result: &StepResult,
        effects: &mut Effects,
    ) {
        let flight = self.in_flight.pop_front().expect("a plan is committed once");
        assert_eq!(flight.step, plan.step, "plans are committed in their order");
        self.pace.learn(flight, now);
        let mut sampled = result.sampled.as_slice();
        let mut charge = (TenantId(0), 0);
        for (at, row) in (0u32..).zip(&plan.rows) {
            let most = usize::from(row.sample) + row.drafts as usize;
            let own = sampled.iter().take(most).take_while(|s| s.row == at).count();
            let tokens;
            (tokens, sampled) = sampled.split_at(own);
            assert_eq!(row.sample, own > 0, "row {at} of step {}: sample", plan.step);
            let kept = own as u32 - u32::from(row.sample);
            let index = self.by_slot[row.slot as usize];
            let record = &mut self.records[index as usize];
            assert!(record.id == row.id, "a request in a step stays until its commit");
            // Neighbours are often one tenant's, whose share is looked up once then.
            if record.tenant != charge.0 {
                self.shares.charge(charge.0, charge.1);
                charge = (record.tenant, 0);
            }
            let known = row.count - row.drafts;
            charge.1 += known + kept;
            let from = record.computed;
            record.in_flight = false;
            record.computed += known;
            let in_prompt = record.prompt_len.min(record.computed).saturating_sub(from);
            self.counters.prompt_tokens += u64::from(in_prompt);
            let aborted = record.aborted;
            if self.config.prefix_caching && record.has_full_block_to_cache() {
                self.cache_full_blocks(index);
            }
            if aborted {
                let end = self.end(now, index, FinishReason::Abort);
                effects.list.push(end);
            } else if row.drafts > 0 {
                self.accept_run(now, row, tokens, effects);
            } else if let [sampled] = tokens {
                self.accept(now, index, sampled.token, effects);
            }
        }
        self.shares.charge(charge.0, charge.1);
        assert!(sampled.is_empty(), "step {}: more samples than rows", plan.step);
        self.drain_aborted(effects);
        self.assert_sane();
    }

    /// Ties the blocks that have become full to their prefixes. When all nodes are in use, the
    /// blocks stay private.
    fn cache_full_blocks(&mut self, index: u32) {
        let record = &mut self.records[index as usize];
        let full = (record.computed / BLOCK_TOKENS) as usize;
        record.settle();
        // A prompt shorter than a block says less of where equal beginnings start.
        let beginning = &record.tokens[..BLOCK_TOKENS as usize];
        if self.config.lanes().origin(record.tenant, beginning) != record.origin {
            return;
        }
        while record.chain.len() < full {
            let at = record.chain.len();
            let tokens = &record.tokens[at * BLOCK_TOKENS as usize..][..BLOCK_TOKENS as usize];
            let parent = record.chain.last().copied().unwrap_or(NONE);
            let Some(node) = self.prefixes.descend(parent, record.tenant, tokens) else { return };
            record.chain.push(node);
            record.chained += 1;
            for (group, table) in record.tables.iter().enumerate() {
                let block = table[at];
                if block != NO_BLOCK && self.prefixes.block(node, group).is_none() {
                    self.prefixes.set_block(node, group, block);
                    self.blocks.set_node(block, node, group as u32);
                }
            }
        }
    }

    /// Accepts the tokens of a row with drafts one by one, as steps without drafts would have, and
    /// gives back the blocks of wrong drafts. The request may end on the way.
    fn accept_run(
        &mut self,
        now: Micros,
        row: &PlanRow,
        tokens: &[Sampled],
        effects: &mut Effects,
    ) {
        let index = self.by_slot[row.slot as usize];
        let kept = tokens.len() as u32 - 1;
        self.counters.drafts += 1;
        self.counters.draft_tokens += u64::from(row.drafts);
        self.counters.accepted_tokens += u64::from(kept);
        self.record_mut(index).acceptance.learn(row.drafts, kept);
        for (draft, sampled) in tokens.iter().enumerate() {
            if draft > 0 {
                let record = &mut self.records[index as usize];
                record.computed += 1;
                if self.config.prefix_caching && record.has_full_block_to_cache() {
                    self.cache_full_blocks(index);
                }
            }
            if !self.accept(now, index, sampled.token, effects) {
                return;
            }
        }
        let record = &mut self.records[index as usize];
        let kept_blocks = record.computed.div_ceil(BLOCK_TOKENS);
        for table in &mut record.tables {
            for block in table.drain(kept_blocks as usize..) {
                self.blocks.release(block);
                record.held -= 1;
                self.entries -= 1;
            }
        }
        record.table_len = kept_blocks;
        record.told = record.told.min(kept_blocks);
    }

    /// Appends a token; `false` if the request ends with it.
    #[inline]
    fn accept(&mut self, now: Micros, index: u32, token: TokenId, effects: &mut Effects) -> bool {
        let ends_model = self.config.eos_token_ids.contains(&token);
        let record = &mut self.records[index as usize];
        record.push(token);
        effects.list.push(Effect::Token { id: record.id, token });
        let stops = (ends_model && !record.ignore_eos) || record.is_stop_token(token);
        let reason = if stops && record.produced() > record.min_tokens {
            Some(FinishReason::Stop(token))
        } else if record.len() >= record.len_max {
            Some(FinishReason::Length)
        } else {
            None
        };
        self.counters.generation_tokens += 1;
        if let Some(reason) = reason {
            let end = self.end(now, index, reason);
            effects.list.push(end);
        }
        reason.is_none()
    }
}
