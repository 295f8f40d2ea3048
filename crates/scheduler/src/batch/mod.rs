//! Requests to steps.
mod plan;
pub use plan::{Effect, Effects, PlanRow, Sampled, StepPlan, StepResult};
