//! What a computed step leads to.

use pomona_types::{BLOCK_TOKENS, FinishReason, Micros, TokenId};

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
        for (at, row) in (0u32..).zip(&plan.rows) {
            let token = sampled.next_if(|s| s.row == at).map(|s| s.token);
            assert_eq!(row.sample, token.is_some(), "row {at} of step {}: sample", plan.step);
            let index = self.index(row.id).expect("a request in a step stays until its commit");
            self.advance(index, row.count);
            if self.record(index).aborted {
                let end = self.end(now, index, FinishReason::Abort);
                effects.list.push(end);
            } else if let Some(token) = token {
                self.accept(now, index, token, effects);
            }
        }
        assert!(sampled.next().is_none(), "step {}: more samples than rows", plan.step);
        self.drain_aborted(effects);
        self.assert_sane();
    }

    fn advance(&mut self, index: u32, count: u32) {
        let record = self.record_mut(index);
        record.in_flight = false;
        let from = record.computed;
        record.computed += count;
        let (tenant, prompt_len) = (record.tenant, record.prompt_len);
        let in_prompt = prompt_len.min(from + count).saturating_sub(from);
        self.counters.prompt_tokens += u64::from(in_prompt);
        self.shares.charge(tenant, count);
        if self.config.prefix_caching {
            self.cache_full_blocks(index);
        }
    }

    /// Ties the blocks that have become full to their prefixes. When all nodes are in use, the
    /// blocks stay private.
    fn cache_full_blocks(&mut self, index: u32) {
        let record = &mut self.records[index as usize];
        let full = (record.computed / BLOCK_TOKENS) as usize;
        while record.chain.len() < full {
            let at = record.chain.len();
            let tokens = &record.tokens[at * BLOCK_TOKENS as usize..][..BLOCK_TOKENS as usize];
            let parent = record.chain.last().copied().unwrap_or(NONE);
            let Some(node) = self.prefixes.intern(parent, record.tenant, tokens) else { return };
            self.prefixes.hold(node);
            if parent != NONE {
                self.prefixes.release(parent);
            }
            record.chain.push(node);
            for (group, table) in record.tables.iter().enumerate() {
                let block = table[at];
                if block != NO_BLOCK && self.prefixes.block(node, group).is_none() {
                    self.prefixes.set_block(node, group, block);
                    self.blocks.set_node(block, node, group as u32);
                }
            }
        }
    }

    fn accept(&mut self, now: Micros, index: u32, token: TokenId, effects: &mut Effects) {
        let ends_model = self.config.eos_token_ids.contains(&token);
        let record = self.record_mut(index);
        record.tokens.push(token);
        effects.list.push(Effect::Token { id: record.id, token });
        let stops = (ends_model && !record.ignore_eos) || record.stop_token_ids.contains(&token);
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
