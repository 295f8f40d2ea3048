//! What a computed step leads to.

use pomona_types::{BLOCK_TOKENS, FinishReason, Micros, TenantId, TokenId};

use super::State;
use super::blocks::NONE;
use super::plan::{Effect, Effects, NO_BLOCK, StepPlan, StepResult};

impl State {
    /// Takes note of a step: computed tokens, sampled tokens, ends. Appends to `effects`.
    ///
    /// # Panics
    /// When the plan is not the one that [`State::plan`] made last, or the result does not belong
    /// to it: bugs of the caller.
    pub fn commit(
        &mut self,
        now: Micros,
        plan: &StepPlan,
        result: &StepResult,
        effects: &mut Effects,
    ) {
        assert_eq!(self.in_flight.take(), Some(plan.step), "another plan is being computed");
        let mut sampled = result.sampled.iter().peekable();
        let mut charge = (TenantId(0), 0);
        for (at, row) in (0u32..).zip(&plan.rows) {
            let token = sampled.next_if(|s| s.row == at).map(|s| s.token);
            assert_eq!(row.sample, token.is_some(), "row {at} of step {}: sample", plan.step);
            let index = self.by_slot[row.slot as usize];
            let record = &mut self.records[index as usize];
            assert!(record.id == row.id, "a request in a step stays until its commit");
            // Neighbours are often one tenant's, whose share is looked up once then.
            if record.tenant != charge.0 {
                self.shares.charge(charge.0, charge.1);
                charge = (record.tenant, 0);
            }
            charge.1 += row.count;
            let from = record.computed;
            record.in_flight = false;
            record.computed += row.count;
            let in_prompt = record.prompt_len.min(record.computed).saturating_sub(from);
            self.counters.prompt_tokens += u64::from(in_prompt);
            let aborted = record.aborted;
            if self.config.prefix_caching && record.has_full_block_to_cache() {
                self.cache_full_blocks(index);
            }
            if aborted {
                let end = self.end(now, index, FinishReason::Abort);
                effects.list.push(end);
            } else if let Some(token) = token {
                self.accept(now, index, token, effects);
            }
        }
        self.shares.charge(charge.0, charge.1);
        assert!(sampled.next().is_none(), "step {}: more samples than rows", plan.step);
        self.drain_aborted(effects);
        self.assert_sane();
    }

    /// Ties the blocks that have become full to their prefixes. When all nodes are in use, the
    /// blocks stay private.
    fn cache_full_blocks(&mut self, index: u32) {
        let record = &mut self.records[index as usize];
        let full = (record.computed / BLOCK_TOKENS) as usize;
        record.settle();
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

    #[inline]
    fn accept(&mut self, now: Micros, index: u32, token: TokenId, effects: &mut Effects) {
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
    }
}
