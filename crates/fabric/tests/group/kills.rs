//! Ranks that are killed or stopped in the middle of collectives.

use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use super::rank::{Dice, End, now_us, work};
use super::{alone, options, spawn};

/// What became of one kill, in microseconds after it.
struct Outcome {
    /// When each survivor had its error.
    reported: Vec<u64>,
    /// When the ranks of the next epoch had met.
    rebuilt: u64,
}

/// A group of `ranks`, one of whose processes gets `signal` while they work.
fn kill_one(seed: u64, ranks: usize, spares: usize, signal: Signal) -> Outcome {
    let mut dice = Dice(seed);
    let group = spawn(&options(ranks, spares));
    let victim = 1 + dice.roll(ranks - 1);
    let after = Duration::from_micros(dice.roll(20_000) as u64);
    let mut killed_us = 0;
    let mut killer = None;
    let link = group.next_epoch().unwrap();
    let (roll, own) = work(
        link,
        &End::default(),
        Some((seed, &mut |roll| {
            let process = Pid::from_raw(roll.process_ids[victim] as i32).unwrap();
            killer = Some(std::thread::spawn(move || {
                std::thread::sleep(after);
                let at_us = now_us();
                kill_process(process, signal).unwrap();
                at_us
            }));
        })),
    )
    .unwrap();
    assert_eq!(roll.process_ids.len(), ranks);
    if let Some(killer) = killer {
        killed_us = killer.join().unwrap();
    }

    // The survivors meet again, and compare how the last epoch ended for them.
    let link = group.next_epoch().unwrap();
    assert_eq!((link.epoch(), link.ranks()), (2, if spares > 0 { ranks } else { ranks - 1 }));
    let mut again = None;
    let stop = link.clone();
    let look = &mut |roll: &super::rank::Roll| {
        again = Some(roll.clone());
        stop.abort(pomona_types::GroupError::Ended("enough seen".into()));
    };
    // The epoch is over as soon as the roll was called.
    let _ = work(link, &own, Some((seed, look)));
    let roll = again.unwrap();
    let expected = if signal == Signal::STOP { "no sign of life for" } else { "its process ended" };
    let mut reported = Vec::new();
    for end in roll.ends.iter().filter(|end| **end != End::default()) {
        assert_eq!(end.why, own.why);
        assert!(end.why.starts_with(&format!("rank {victim} was lost in epoch 1: {expected}")));
        reported.push(end.at_us - killed_us);
    }
    assert_eq!(reported.len(), ranks - 1);
    Outcome { reported, rebuilt: roll.begun_us - killed_us }
}

#[test]
fn survivors_of_a_killed_rank_name_it_and_go_on_without_it() {
    let _alone = alone();
    for seed in 0..4 {
        kill_one(seed, 3 + seed as usize % 2, 0, Signal::KILL);
    }
}

#[test]
fn a_spare_takes_the_place_of_a_killed_rank() {
    let _alone = alone();
    for seed in 0..2 {
        kill_one(seed, 3, 1, Signal::KILL);
    }
}

#[test]
fn survivors_of_a_stopped_rank_name_it_and_go_on_without_it() {
    let _alone = alone();
    let outcome = kill_one(7, 3, 0, Signal::STOP);
    // Generous: it is 500 ms where nobody else has the cores.
    assert!(outcome.reported.iter().all(|us| *us < 5_000_000), "{:?}", outcome.reported);
}

#[test]
#[ignore = "a measurement of a minute; see the head of this target"]
fn hundred_kills() {
    let _alone = alone();
    for (name, signal, kills, limit_us) in
        [("kill -9", Signal::KILL, 100, 10_000), ("SIGSTOP", Signal::STOP, 20, 600_000)]
    {
        let (mut reported, mut rebuilt) = (Vec::new(), Vec::new());
        for seed in 0..kills {
            let spares = seed as usize / 2 % 2;
            let outcome = kill_one(seed, 3 + seed as usize % 2, spares, signal);
            reported.extend(outcome.reported);
            rebuilt.push(outcome.rebuilt);
        }
        reported.sort();
        rebuilt.sort();
        let at = |times: &[u64], share: f64| times[((times.len() - 1) as f64 * share) as usize];
        println!(
            "{name}: {kills} kills; reported after {} us (p50), {} us (p99), {} us (max); rebuilt \
             after {} us (p50), {} us (max)",
            at(&reported, 0.5),
            at(&reported, 0.99),
            at(&reported, 1.0),
            at(&rebuilt, 0.5),
            at(&rebuilt, 1.0)
        );
        assert!(at(&reported, 0.99) <= limit_us, "{name}: over the promise of {limit_us} us");
        assert!(at(&rebuilt, 1.0) <= 2_000_000, "{name}: rebuilding takes more than 2 s");
    }
}
