//! What layers of experts have counted, as the engine's thread tells it: about once a second while
//! there is work, and before it sleeps. Steps do not wait for it.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use pomona_models::ExpertCounts;
use pomona_types::ExpertLoads;

/// How old what is told may be while steps follow each other.
const INTERVAL: Duration = Duration::from_secs(1);

/// Where it is told.
#[derive(Default)]
pub(crate) struct Told(Mutex<Option<Arc<ExpertLoads>>>);

impl Told {
    /// The last of it.
    pub(crate) fn get(&self) -> Option<Arc<ExpertLoads>> {
        // A value that is replaced as a whole is never half done.
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set(&self, loads: &ExpertLoads) {
        let loads = Some(Arc::new(loads.clone()));
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = loads;
    }
}

/// Makes sums of counters that wrap around.
pub(crate) struct ExpertWatch {
    before: Vec<ExpertCounts>,
    loads: ExpertLoads,
    told: Instant,
    /// Whether steps have begun that are not told yet.
    stale: bool,
}

impl ExpertWatch {
    pub(crate) fn new() -> ExpertWatch {
        let (before, loads) = (Vec::new(), ExpertLoads::default());
        // Zeros are told before the first step.
        ExpertWatch { before, loads, told: Instant::now(), stale: true }
    }

    /// A step begins. Whether what its layers count is to be told after it.
    pub(crate) fn step(&mut self) -> bool {
        self.stale = true;
        let due = self.told.elapsed() >= INTERVAL;
        if due {
            // Asked once, though others may begin before the answer.
            self.told = Instant::now();
        }
        due
    }

    /// Whether there is something to tell before the engine sleeps.
    pub(crate) fn is_stale(&self) -> bool {
        self.stale
    }

    /// Adds what was counted since the last time, and tells the sums.
    pub(crate) fn tell(&mut self, counts: Vec<ExpertCounts>, idle: bool, told: &Told) {
        let loads = &mut self.loads;
        for (layer, now) in counts.iter().enumerate() {
            let before = self.before.get(layer);
            if loads.tokens.len() == layer {
                loads.tokens.push(vec![0; now.tokens.len()]);
            }
            add(&mut loads.tokens[layer], &now.tokens, before.map(|b| b.tokens.as_slice()));
            let (first, end) = (now.stage * now.pairs.len(), (now.stage + 1) * now.pairs.len());
            loads.pairs.resize(loads.pairs.len().max(end), 0);
            add(&mut loads.pairs[first..end], &now.pairs, before.map(|b| b.pairs.as_slice()));
            let before = before.map_or(0, |before| before.slowest);
            loads.slowest += u64::from(now.slowest.wrapping_sub(before));
            loads.sharing = now.pairs.len();
        }
        self.before = counts;
        self.stale = !idle;
        told.set(loads);
    }
}

/// Adds differences of counters that wrap around.
fn add(sums: &mut [u64], now: &[u32], before: Option<&[u32]>) {
    for (at, (sum, now)) in sums.iter_mut().zip(now).enumerate() {
        let before = before.and_then(|before| before.get(at)).copied().unwrap_or(0);
        *sum += u64::from(now.wrapping_sub(before));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_that_wrap_around_are_added_up_by_rank() {
        let counts = |stage, n: u32| ExpertCounts {
            stage,
            tokens: vec![n, 5],
            pairs: vec![n, 1],
            slowest: n,
        };
        let (mut watch, told) = (ExpertWatch::new(), Told::default());
        assert!(watch.is_stale() && told.get().is_none());
        watch.tell(vec![counts(0, u32::MAX), counts(1, 7)], false, &told);
        assert!(watch.is_stale());
        watch.tell(vec![counts(0, 2), counts(1, 8)], true, &told);
        assert!(!watch.is_stale());
        let wrapped = u64::from(u32::MAX) + 3;
        assert_eq!(
            *told.get().unwrap(),
            ExpertLoads {
                tokens: vec![vec![wrapped, 5], vec![8, 5]],
                pairs: vec![wrapped, 1, 8, 1],
                sharing: 2,
                slowest: wrapped + 8,
            }
        );
        assert!(!watch.step() && watch.is_stale());
    }
}
