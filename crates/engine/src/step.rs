//! The step loop.

use std::collections::VecDeque;
use std::sync::Arc;

use pomona_kernels::Ops;
use pomona_models::{KvCache, Model, ModelError};
use pomona_scheduler::batch::{Effect, Effects, Sampled, StepPlan, StepResult};
use pomona_types::Finish;

use crate::EngineError;
use crate::active::{Actives, exclusive, locked};
use crate::draft::Draft;
use crate::engine::{Next, Shared};
use crate::experts::ExpertWatch;
use crate::input::Input;
use crate::logits::{Logits, Output, Row};
use crate::order::Order;
use crate::phases::Phase;
use crate::ranks::Others;

/// Everything the engine's thread owns.
pub(crate) struct Stepper {
    pub(crate) shared: Arc<Shared>,
    pub(crate) model: Box<dyn Model>,
    pub(crate) ops: Arc<dyn Ops>,
    pub(crate) kv: KvCache,
    pub(crate) draft: Option<Draft>,
    pub(crate) input: Input,
    pub(crate) logits: Logits,
    pub(crate) active: Actives,
    /// The ranks that this one leads, if the model is divided.
    pub(crate) others: Option<Others>,
    /// Where layers consist of experts.
    pub(crate) experts: Option<ExpertWatch>,
    /// Steps that are being computed, in their order: several where the model has stages.
    pub(crate) flights: VecDeque<Flight>,
    /// Memory of steps that are over.
    pub(crate) landed: Vec<Flight>,
    pub(crate) result: StepResult,
    pub(crate) effects: Effects,
}

/// A step from its plan to its commit.
#[derive(Default)]
pub(crate) struct Flight {
    pub(crate) plan: StepPlan,
    order: Order,
    /// Whether what experts have counted by then is to be told.
    counts: bool,
}

impl Stepper {
    /// Steps until told to stop. An error means that the model, a device or a rank failed.
    pub(crate) fn run(&mut self) -> Result<(), EngineError> {
        let stages = self.others.as_ref().map_or(1, Others::stages);
        loop {
            let mut flight = self.landed.pop().unwrap_or_default();
            let idle = self.flights.is_empty();
            let sleeps = idle && !self.experts.as_ref().is_some_and(ExpertWatch::is_stale);
            let (effects, active) = (&mut self.effects, &mut self.active);
            match self.shared.next_plan(sleeps, &mut flight.plan, effects, active) {
                Next::Stop if sleeps => return Ok(()),
                Next::Step => {
                    self.depart(&mut flight)?;
                    self.flights.push_back(flight);
                    if self.flights.len() < stages {
                        self.deliver();
                        continue;
                    }
                }
                Next::Nothing | Next::Stop => self.landed.push(flight),
            }
            if let Some(flight) = self.flights.pop_front() {
                self.arrive(&flight)?;
                let (plan, active) = (&flight.plan, &mut self.active);
                self.shared.commit(plan, &self.result, &mut self.effects, active);
                self.landed.push(flight);
            } else if !sleeps {
                self.ask_experts()?;
                self.tell_experts()?;
            }
            self.deliver();
        }
    }

    /// Begins a step.
    fn depart(&mut self, flight: &mut Flight) -> Result<(), EngineError> {
        let (plan, order, phases) = (&mut flight.plan, &mut flight.order, &self.shared.phases);
        phases.time(Phase::Plan, || {
            order.take(plan);
            self.input.learn(&order.told, &order.blocks).ok_or(EngineError::Order)
        })?;
        if let Some(draft) = &mut self.draft {
            draft.write(&self.ops, &mut self.input, &mut self.logits, plan, phases)?;
            order.tokens.clone_from(&plan.tokens);
        }
        if let Some(others) = &mut self.others {
            others.step(order)?;
        }
        flight.counts = self.experts.as_mut().is_some_and(ExpertWatch::step);
        if flight.counts {
            self.ask_experts()?;
        }
        let phases = &self.shared.phases;
        let device = self.ops.device().as_ref();
        let Order { tokens, stretches, .. } = &flight.order;
        let batch = phases.time(Phase::Plan, || self.input.batch(device, tokens, stretches))?;
        let forward = || self.model.forward(self.ops.as_ref(), &batch, &self.kv);
        Ok(phases.time(Phase::Forward, forward)?)
    }

    /// Asks other stages for what their experts have counted.
    fn ask_experts(&mut self) -> Result<(), EngineError> {
        Ok(self.others.as_mut().map_or(Ok(()), Others::counts)?)
    }

    /// Tells what experts have counted, when other stages were asked.
    fn tell_experts(&mut self) -> Result<(), EngineError> {
        if let Some(watch) = &mut self.experts {
            let counts = self.model.expert_counts(self.ops.as_ref())?;
            watch.tell(counts, self.flights.is_empty(), &self.shared.experts);
        }
        Ok(())
    }

    /// Ends the oldest step: samples after the last known token, and after each draft for as long
    /// as it is the very token that was sampled.
    fn arrive(&mut self, flight: &Flight) -> Result<(), EngineError> {
        let Flight { plan, order, counts } = flight;
        if let Some(others) = &mut self.others {
            others.outputs()?;
        }
        let firsts: Vec<usize> = plan
            .rows
            .iter()
            .scan(0, |tokens, row| Some(std::mem::replace(tokens, *tokens + row.count as usize)))
            .collect();
        let active = &self.active;
        let take = |output: Output, logits: Row<'_>| {
            let (row, stretch) = (&plan.rows[output.group], &order.stretches[output.group]);
            let Some(active) = active.get(&row.id) else { return false };
            let mut active = locked(active);
            if output.index == 0 {
                active.begin();
            }
            let offset = stretch.count - stretch.outputs + output.index;
            let next = firsts[output.group] + offset as usize + 1;
            let draft = (offset + 1 < row.count).then(|| plan.tokens[next]);
            active.row(row, offset, draft, logits)
        };
        let groups = order.stretches.iter().map(|stretch| stretch.outputs);
        let (model, phases) = (self.model.as_mut(), &self.shared.phases);
        self.logits.each(model, self.ops.as_ref(), groups, phases, &take)?;
        self.result.sampled.clear();
        for (index, row) in (0u32..).zip(&plan.rows) {
            let Some(active) = self.active.get_mut(&row.id) else { continue };
            let sampled = exclusive(active).sampled.drain(..);
            self.result.sampled.extend(sampled.map(|token| Sampled { row: index, token }));
        }
        if *counts { self.tell_experts() } else { Ok(()) }
    }

    /// Hands tokens and ends to their sinks.
    fn deliver(&mut self) {
        let (effects, active) = (&mut self.effects, &mut self.active);
        self.shared.phases.time(Phase::Deliver, || {
            for effect in effects.list.drain(..) {
                match effect {
                    Effect::Token { id, token } => {
                        if let Some(active) = active.get_mut(&id) {
                            exclusive(active).token(token);
                        }
                    }
                    Effect::Finished { id, reason, cached_tokens, queued, preemptions } => {
                        if let Some(mut active) = active.remove(&id) {
                            let message = None;
                            let finish =
                                Finish { reason, message, cached_tokens, queued, preemptions };
                            exclusive(&mut active).finish(finish);
                        }
                    }
                }
            }
        });
    }
}

impl From<ModelError> for EngineError {
    fn from(error: ModelError) -> EngineError {
        EngineError::Step(error)
    }
}
