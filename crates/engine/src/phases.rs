//! How long the engine's thread spends on what, told in its [`Load`](pomona_types::Load).

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use pomona_types::{Micros, StepTimes};

/// What a thread does for a step.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Phase {
    Plan,
    Forward,
    Sample,
    Deliver,
}

/// Nanoseconds of each phase.
#[derive(Default)]
pub(crate) struct Phases([AtomicU64; 4]);

impl Phases {
    /// Does some work that belongs to a phase.
    pub(crate) fn time<T>(&self, phase: Phase, work: impl FnOnce() -> T) -> T {
        let begun = Instant::now();
        let result = work();
        self.0[phase as usize].fetch_add(begun.elapsed().as_nanos() as u64, Relaxed);
        result
    }

    pub(crate) fn so_far(&self) -> StepTimes {
        let of = |phase: Phase| Micros(self.0[phase as usize].load(Relaxed) / 1_000);
        StepTimes {
            plan: of(Phase::Plan),
            forward: of(Phase::Forward),
            sample: of(Phase::Sample),
            deliver: of(Phase::Deliver),
        }
    }
}
