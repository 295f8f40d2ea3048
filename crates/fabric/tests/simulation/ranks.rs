//! What the ranks of a simulated group do, and the record of it.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use pomona_fabric::coll::{Algorithm, Comm, World};
use pomona_fabric::link::Link;
use pomona_fabric::link::simulated::{Dice, SimulatedLink};
use pomona_types::{Collective, GroupError};

/// The longest wait for a rank that is alive, in simulated time.
pub const LIMIT: Duration = Duration::from_secs(2);

/// What one rank does that the others do not.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Oddity {
    /// It calls something else.
    WrongCall,
    /// It comes so late.
    Pause(Duration),
}

/// What one seat saw of one epoch.
#[derive(Clone, Debug, PartialEq)]
pub struct Seen {
    pub seat: usize,
    pub epoch: u32,
    pub rank: usize,
    pub ranks: usize,
    /// Calls that succeeded.
    pub calls: usize,
    /// Why it was left; none if all calls were made.
    pub why: Option<GroupError>,
    pub at: Duration,
}

pub type Record = Arc<Mutex<Vec<Seen>>>;

/// A call: its kind, an algorithm, and bytes.
type Plan = (usize, usize, usize);

/// Of calls in which a rank waits for the message of another one.
const MESSAGES: usize = 4;

fn plans(seed: u64, epoch: u32, calls: usize) -> Vec<Plan> {
    let mut dice = Dice(seed ^ u64::from(epoch) << 40);
    let plan = |_| (dice.roll(6), dice.roll(4), dice.roll(400) * [1, 1, 1, 40][dice.roll(4)]);
    (0..calls).map(plan).collect()
}

/// A call of the first epoch that all ranks make in the same way: who waits for a message cannot
/// tell whether its sender is wrong or only late.
pub fn a_call_of_all(seed: u64, calls: usize) -> usize {
    let of_all = |(_, plan): &(usize, Plan)| plan.0 != MESSAGES;
    let mut plans = plans(seed, 1, calls).into_iter().enumerate().filter(of_all);
    plans.nth(seed as usize % 3).map_or(0, |(call, _)| call)
}

/// The calls of one epoch, each checked: the same on all ranks, with bytes that belong to this
/// epoch alone.
pub fn work(
    link: &Arc<SimulatedLink>,
    seat: usize,
    seed: u64,
    calls: usize,
    odd: Option<(usize, Oddity)>,
    park: &dyn Fn(Duration),
) -> Seen {
    let (epoch, rank, ranks) = (link.epoch(), link.rank(), link.ranks());
    let seen = |calls, why| Seen { seat, epoch, rank, ranks, calls, why, at: link.now() };
    let mut world = World::new(link.clone()).with_limit(LIMIT);
    let mut comm = world.all(link.arena_bytes()).unwrap();
    for (call, plan) in plans(seed, epoch, calls).into_iter().enumerate() {
        let odd = odd.filter(|(at, _)| *at == call).map(|(_, oddity)| oddity);
        if let Some(Oddity::Pause(pause)) = odd {
            park(pause);
        }
        let done = if odd == Some(Oddity::WrongCall) {
            comm.all_gather(1, &vec![3; ranks], &[1; 3], &mut vec![0; 3 * ranks])
        } else {
            one(&mut comm, plan, call as u8 ^ (epoch as u8) << 5)
        };
        if let Err(why) = done {
            return seen(call, Some(why));
        }
    }
    seen(calls, None)
}

/// One call, with the check of what it gives. `tag` is in every byte that is sent.
fn one(comm: &mut Comm, plan: Plan, tag: u8) -> Result<(), GroupError> {
    let (kind, algorithm, bytes) = plan;
    let (me, ranks) = (comm.rank(), comm.ranks());
    // Ranks of 64 have small slots; their calls stay in a few pieces.
    let bytes = if ranks > 16 { bytes % 400 } else { bytes };
    let byte = |rank: usize, other: usize| tag ^ (rank * 37 + other * 11) as u8;
    match kind {
        0 => comm.barrier(),
        1 => {
            let root = bytes % ranks;
            let mut message = if me == root { vec![byte(root, 0); bytes] } else { Vec::new() };
            comm.broadcast(root, &mut message)?;
            assert_eq!(message, vec![byte(root, 0); bytes]);
            Ok(())
        }
        2 => {
            let widths: Vec<usize> = (0..ranks).map(|rank| bytes / 4 + rank % 3).collect();
            let mut all = vec![0; 2 * widths.iter().sum::<usize>()];
            comm.all_gather(2, &widths, &vec![byte(me, 1); 2 * widths[me]], &mut all)?;
            let row = (0..ranks).flat_map(|rank| std::iter::repeat_n(byte(rank, 1), widths[rank]));
            assert!(all.iter().copied().eq(row.clone().chain(row)));
            Ok(())
        }
        3 => {
            let length = |from: usize, to: usize| bytes / 8 + (from * 5 + to) % 7;
            let sent: Vec<usize> = (0..ranks).map(|to| length(me, to)).collect();
            let received: Vec<usize> = (0..ranks).map(|from| length(from, me)).collect();
            let out = (0..ranks).flat_map(|to| std::iter::repeat_n(byte(me, to), sent[to]));
            let mut into = vec![0; received.iter().sum()];
            comm.all_to_all(&sent, &out.collect::<Vec<_>>(), &received, &mut into)?;
            let expected =
                (0..ranks).flat_map(|from| std::iter::repeat_n(byte(from, me), received[from]));
            assert!(into.into_iter().eq(expected));
            Ok(())
        }
        MESSAGES if ranks > 1 => {
            // Around in a circle.
            let (next, before) = ((me + 1) % ranks, (me + ranks - 1) % ranks);
            comm.send(next, &[byte(me, 2); 30])?;
            let mut got = [0; 30];
            comm.receive(before, &mut got)?;
            assert_eq!(got, [byte(before, 2); 30]);
            comm.barrier()
        }
        _ => {
            comm.force(Some(Algorithm::ALL[algorithm]));
            let number = |rank: usize| f32::from(byte(rank, 3)) * 1.1f32.powi(rank as i32);
            let mut values = vec![number(me); bytes / 4 + 1];
            comm.all_reduce(&mut values)?;
            let sum = (1..ranks).fold(number(0), |sum, rank| sum + number(rank));
            assert!(values.iter().all(|value| value.to_bits() == sum.to_bits()));
            Ok(())
        }
    }
}
