//! What ranks do in these tests: collectives in a random order, until the epoch ends; then they
//! tell each other how it did.

use std::sync::Arc;

use pomona_fabric::coll::{Algorithm, Comm, World};
use pomona_fabric::group::local::LocalMember;
use pomona_fabric::link::Link;
use pomona_types::{Collective, GroupError};
use rustix::time::{ClockId, clock_gettime};

use super::ARENA_BYTES;

pub const IDENTITY: &str = "ranks of a test";

/// The clock that all processes share.
pub fn now_us() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000 + now.tv_nsec as u64 / 1000
}

/// A child: takes part in epoch after epoch, until the group is over.
pub fn follow(member: &LocalMember) {
    let mut last = End::default();
    while let Ok(link) = member.next_epoch() {
        match work(link, &last, None) {
            Ok((_, ended)) | Err(ended) => last = ended,
        }
    }
}

/// How a rank's epoch ended: when, and in which words.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct End {
    pub at_us: u64,
    pub why: String,
}

/// What all ranks said at the beginning of an epoch.
#[derive(Clone, Debug)]
pub struct Roll {
    pub process_ids: Vec<u32>,
    /// How the last epoch ended for them; default for who was in none.
    pub ends: Vec<End>,
    /// When this one had begun for all.
    pub begun_us: u64,
}

/// What rank 0 has: a seed, and a look at the roll.
pub type Lead<'a> = (u64, &'a mut dyn FnMut(&Roll));

/// Calls the roll, then does what the seed says until the epoch ends. Fails if it ended before the
/// roll was complete.
pub fn work(link: Arc<dyn Link>, last: &End, lead: Option<Lead<'_>>) -> Result<(Roll, End), End> {
    let end = |why: GroupError| End { at_us: now_us(), why: why.to_string() };
    let comm = World::new(link).all(ARENA_BYTES).unwrap();
    let roll = call_roll(&comm, last).map_err(end)?;
    let seed = match lead {
        Some((seed, look)) => {
            look(&roll);
            seed
        }
        None => 0,
    };
    let mut message = seed.to_le_bytes().to_vec();
    if let Err(why) = comm.broadcast(0, &mut message) {
        // The look may have killed somebody, who is missed already.
        return Ok((roll, end(why)));
    }
    let seed = u64::from_le_bytes(message[..8].try_into().unwrap());
    Ok((roll, end(collectives(comm, seed))))
}

fn call_roll(comm: &Comm, last: &End) -> Result<Roll, GroupError> {
    const WORDS: usize = 400;
    let ranks = comm.ranks();
    let mut own = vec![0; 12 + WORDS];
    own[..4].copy_from_slice(&std::process::id().to_le_bytes());
    own[4..12].copy_from_slice(&last.at_us.to_le_bytes());
    own[12..12 + last.why.len()].copy_from_slice(last.why.as_bytes());
    let mut all = vec![0; ranks * own.len()];
    comm.all_gather(1, &vec![own.len(); ranks], &own, &mut all)?;
    let begun_us = now_us();
    let rows = all.chunks(own.len());
    let ends = rows.clone().map(|row| End {
        at_us: u64::from_le_bytes(row[4..12].try_into().unwrap()),
        why: String::from_utf8_lossy(&row[12..]).trim_end_matches('\0').into(),
    });
    let process_ids = rows.map(|row| u32::from_le_bytes(row[..4].try_into().unwrap()));
    Ok(Roll { process_ids: process_ids.collect(), ends: ends.collect(), begun_us })
}

/// The same calls in the same order on all ranks, and the check of each, without end.
fn collectives(mut comm: Comm, seed: u64) -> GroupError {
    let (me, ranks) = (comm.rank(), comm.ranks());
    let mut dice = Dice(seed);
    loop {
        let bytes = [64, 4 << 10, 64 << 10, 1 << 20][dice.roll(4)];
        comm.force(Some(Algorithm::ALL[dice.roll(4)]));
        let result = match dice.roll(5) {
            0 => comm.barrier(),
            1 => {
                let mut message = vec![7; bytes];
                comm.broadcast(dice.roll(ranks), &mut message)
            }
            2 => {
                let mut all = vec![0; ranks * bytes];
                let result =
                    comm.all_gather(1, &vec![bytes; ranks], &vec![me as u8; bytes], &mut all);
                let expected = (0..ranks).flat_map(|rank| std::iter::repeat_n(rank as u8, bytes));
                assert!(result.is_err() || all.into_iter().eq(expected));
                result
            }
            3 => {
                let lengths = vec![bytes / ranks; ranks];
                let out = vec![me as u8; bytes / ranks * ranks];
                let mut into = vec![0; out.len()];
                comm.all_to_all(&lengths, &out, &lengths, &mut into)
            }
            _ => {
                let mut values = vec![me as f32; bytes / 4];
                let result = comm.all_reduce(&mut values);
                let sum = (ranks * (ranks - 1) / 2) as f32;
                assert!(result.is_err() || values.iter().all(|value| *value == sum));
                result
            }
        };
        if let Err(why) = result {
            return why;
        }
    }
}

/// Numbers in no pattern, by Knuth's linear congruential generator (MMIX).
pub struct Dice(pub u64);

impl Dice {
    pub fn roll(&mut self, sides: usize) -> usize {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % sides
    }
}
