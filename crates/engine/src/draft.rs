//! The draft model: a small model that guesses what the engine's model will say. Its keys and
//! values are kept for the same tokens in the same blocks, so that prefix hits, preemption and
//! wrong drafts need nothing of their own.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use pomona_kernels::Ops;
use pomona_models::{KvCache, Model};
use pomona_scheduler::batch::StepPlan;
use pomona_types::TokenId;

use crate::EngineError;
use crate::input::{Input, Stretch};
use crate::logits::{Logits, Output, Row};
use crate::phases::{Phase, Phases};
use crate::sampling::argmax;

pub(crate) struct Draft {
    pub(crate) model: Box<dyn Model>,
    pub(crate) kv: KvCache,
    tokens: Vec<TokenId>,
    stretches: Vec<Stretch>,
    /// Where the next drafts go, as indices into the plan's tokens.
    places: Vec<usize>,
}

impl Draft {
    pub(crate) fn new(model: Box<dyn Model>, kv: KvCache) -> Draft {
        Draft { model, kv, tokens: Vec::new(), stretches: Vec::new(), places: Vec::new() }
    }

    /// Computes the plan's known tokens and writes its drafts, the likeliest token each. A forward
    /// for each draft, and one more: the last draft's KV must be there if it turns out right.
    pub(crate) fn write(
        &mut self,
        ops: &Arc<dyn Ops>,
        input: &mut Input,
        logits: &mut Logits,
        plan: &mut StepPlan,
        phases: &Phases,
    ) -> Result<(), EngineError> {
        let most = plan.rows.iter().map(|row| row.drafts).max().unwrap_or(0);
        for round in 0..=most {
            self.choose(plan, round);
            let batch = input.batch(ops.device().as_ref(), &self.tokens, &self.stretches)?;
            let forward = || self.model.forward(ops.as_ref(), &batch, &self.kv);
            phases.time(Phase::Forward, forward)?;
            let chosen: Vec<AtomicU32> = self.places.iter().map(|_| AtomicU32::new(0)).collect();
            let choose = |output: Output, row: Row<'_>| {
                chosen[output.group].store(argmax(row.logits), Ordering::Relaxed);
                true
            };
            let groups = chosen.iter().map(|_| 1);
            logits.each(self.model.as_mut(), ops.as_ref(), groups, phases, &choose)?;
            for (place, token) in self.places.iter().zip(chosen) {
                plan.tokens[*place] = token.into_inner();
            }
        }
        Ok(())
    }

    /// What a round computes: known tokens at first, then each row's newest draft.
    fn choose(&mut self, plan: &StepPlan, round: u32) {
        self.tokens.clear();
        self.stretches.clear();
        self.places.clear();
        let mut first = 0;
        for row in &plan.rows {
            let known = row.count - row.drafts;
            let (skipped, count) = if round == 0 { (0, known) } else { (known + round - 1, 1) };
            if round <= row.drafts {
                let outputs = u32::from(round < row.drafts);
                let start = row.computed + skipped;
                self.stretches.push(Stretch { slot: row.slot, start, count, outputs });
                let begin = first + skipped as usize;
                self.tokens.extend_from_slice(&plan.tokens[begin..begin + count as usize]);
                if outputs > 0 {
                    self.places.push(begin + count as usize);
                }
            }
            first += row.count as usize;
        }
    }
}
