//! How many answers of each status went out.

use std::sync::atomic::{AtomicU64, Ordering};

/// One counter per HTTP status, 100 to 599.
pub(crate) struct Responses {
    counts: Vec<AtomicU64>,
}

/// The first status.
const FIRST: u16 = 100;
/// How many there are.
const STATUSES: usize = 500;

impl Responses {
    /// All zero.
    pub(crate) fn new() -> Responses {
        Responses { counts: (0..STATUSES).map(|_| AtomicU64::new(0)).collect() }
    }

    /// Counts one answer.
    pub(crate) fn count(&self, status: u16) {
        if let Some(count) = self.counts.get(usize::from(status.saturating_sub(FIRST))) {
            count.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// The statuses that have occurred, with their counts.
    pub(crate) fn seen(&self) -> impl Iterator<Item = (u16, u64)> {
        let counts = (FIRST..).zip(&self.counts);
        let seen = counts.map(|(status, count)| (status, count.load(Ordering::Relaxed)));
        seen.filter(|(_, count)| *count > 0)
    }
}
