//! How fast a link is: what `pomona fabric` and the calibration of costs ask.
//!
//! Both ranks of a pair call the same function with the same numbers. Nothing else may use the link
//! meanwhile. Both look without sleeping as long as the link's own patience says.

use std::time::{Duration, Instant};

use pomona_types::GroupError;

use crate::link::Link;
use crate::wait::{Awaited, wait};

/// Counters that measurements use: there and back.
const COUNTER: usize = 0;
/// Pieces that may be on their way, each with a place of its own in the arena.
const WINDOW: usize = 8;

/// What to measure between two ranks.
#[derive(Clone, Copy, Debug)]
pub struct Pair {
    /// The other rank.
    pub peer: usize,
    /// Whether this side begins.
    pub first: bool,
    /// Bytes of a put. For a stream the arena holds eight of them.
    pub bytes: usize,
    /// How often.
    pub rounds: u32,
    /// Puts of earlier measurements on this link, from the other rank.
    pub seen: u32,
}

impl Pair {
    fn wait(&self, link: &dyn Link, count: u32) -> Result<(), GroupError> {
        let target = self.seen.wrapping_add(count);
        let limit = Duration::from_secs(30);
        let slow = |waited| {
            let stuck = || GroupError::Ended("a measurement is stuck".to_owned());
            if waited < limit { Ok(()) } else { Err(stuck()) }
        };
        wait(link, Awaited { peer: self.peer, counter: COUNTER, target }, slow)
    }
}

/// Half of a turn there and back, for each round: how long a put takes until it is seen. The other
/// rank's counter has moved by `rounds`.
pub fn one_way(link: &dyn Link, pair: Pair) -> Result<Vec<Duration>, GroupError> {
    let bytes = vec![1; pair.bytes];
    let put = || link.put(pair.peer, 0, &[&bytes], COUNTER);
    let mut times = Vec::with_capacity(pair.rounds as usize);
    for round in 1..=pair.rounds {
        let begun = Instant::now();
        if pair.first {
            put()?;
        }
        pair.wait(link, round)?;
        if !pair.first {
            put()?;
        }
        times.push(begun.elapsed() / 2);
    }
    Ok(times)
}

/// How long a stream of puts took, from the first to the answer to the last. The first side sends;
/// its counter has moved by `rounds`, and so has the other's.
pub fn stream(link: &dyn Link, pair: Pair) -> Result<Duration, GroupError> {
    let bytes = vec![1; pair.bytes];
    let begun = Instant::now();
    for round in 0..pair.rounds {
        if pair.first {
            // The place was read that this one writes.
            pair.wait(link, (round + 1).saturating_sub(WINDOW as u32))?;
            let offset = round as usize % WINDOW * pair.bytes;
            link.put(pair.peer, offset, &[&bytes], COUNTER)?;
        } else {
            pair.wait(link, round + 1)?;
            link.put(pair.peer, 0, &[], COUNTER)?;
        }
    }
    if pair.first {
        pair.wait(link, pair.rounds)?;
    }
    Ok(begun.elapsed())
}
