//! The one wait of the crate: it looks for a while, then sleeps, and always sees an abort.

use std::time::Duration;

use pomona_types::GroupError;

use crate::link::Link;

/// A sleep is not longer, so that what is to be done now and then is done.
const PARK: Duration = Duration::from_millis(10);
/// Looks between two looks at the abort word.
const ABORT_EVERY: u32 = 64;

/// So long it may take until all ranks have heard why an epoch ended, or miss who would say so.
const SETTLE: Duration = Duration::from_secs(2);

/// What is waited for: that a peer's counter reaches a number.
#[derive(Clone, Copy, Debug)]
pub struct Awaited {
    /// Whose.
    pub peer: usize,
    /// Which.
    pub counter: usize,
    /// The number. Counters wrap around: those in the half behind it count as reached.
    pub target: u32,
}

/// Waits. `slow` is called now and then while it takes long, with the time since then, and decides
/// when it was too long: its error is the wait's.
pub fn wait(
    link: &dyn Link,
    awaited: Awaited,
    mut slow: impl FnMut(Duration) -> Result<(), GroupError>,
) -> Result<(), GroupError> {
    let Awaited { peer, counter, target } = awaited;
    let reached = |seen: u32| seen.wrapping_sub(target) as i32 >= 0;
    for look in 0..link.spins() {
        if reached(link.count(peer, counter)) {
            return Ok(());
        }
        if look % ABORT_EVERY == ABORT_EVERY - 1
            && let Some(why) = link.aborted()
        {
            return Err(why);
        }
        std::hint::spin_loop();
    }
    let start = link.now();
    loop {
        let seen = link.count(peer, counter);
        if reached(seen) {
            return Ok(());
        }
        if let Some(why) = link.aborted() {
            return Err(why);
        }
        slow(link.now().saturating_sub(start))?;
        link.park(peer, counter, seen, PARK);
    }
}

/// Ends the epoch for a cause, and waits until it is known which cause counts: this one may not
/// have been the first. `peer` is any other rank.
pub fn end(link: &dyn Link, peer: usize, why: GroupError) -> GroupError {
    link.abort(why.clone());
    let start = link.now();
    while link.now().saturating_sub(start) < SETTLE {
        if let Some(first) = link.aborted() {
            return first;
        }
        link.park(peer, 0, link.count(peer, 0), PARK);
    }
    why
}
