//! What goes wrong in a seed, and what has to follow from it.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use pomona_fabric::group::GroupOptions;
use pomona_fabric::link::Link;
use pomona_fabric::link::simulated::{Dice, SimulatedOptions, Simulation, Task};
use pomona_types::{GroupError, LostCause};

use super::cluster::Cluster;
use super::ranks::{LIMIT, Oddity, Record, Seen, a_call_of_all, work};

#[derive(Clone, Debug, PartialEq)]
pub enum Fault {
    Nothing,
    Kill(usize),
    KillCoordinator,
    /// A process is stopped, for so long.
    Stop(usize, Duration),
    /// What a seat says to the coordinator is lost, or what the coordinator says to it.
    CutControl {
        seat: usize,
        from_it: bool,
    },
    /// What one seat puts to another is lost.
    CutData {
        from: usize,
        to: usize,
    },
    /// Nothing goes in or out.
    Partition(usize),
    WrongCall(usize),
    Straggler(usize),
    TooLate(usize),
}

impl Fault {
    pub fn kind(&self) -> String {
        let words = format!("{self:?}");
        words.split(|c: char| !c.is_alphanumeric()).next().unwrap_or_default().to_string()
    }
}

#[derive(Clone, Debug)]
pub struct Scenario {
    seed: u64,
    ranks: usize,
    spares: usize,
    in_place: bool,
    calls: usize,
    pub fault: Fault,
    /// When, for those that come from outside.
    at: Duration,
}

impl Scenario {
    pub fn new(seed: u64) -> Scenario {
        let mut dice = Dice(seed.wrapping_mul(0x5851_f42d_4c95_7f2d) + 1);
        let ranks = match dice.roll(100) {
            0 => 64,
            1..4 => 16 + dice.roll(17),
            4..10 => 6 + dice.roll(4),
            _ => 2 + dice.roll(4),
        };
        let victim = 1 + dice.roll(ranks - 1);
        let other = (victim + 1 + dice.roll(ranks - 1)) % ranks;
        let fault = match dice.roll(11) {
            0 => Fault::Nothing,
            1 | 2 => Fault::Kill(victim),
            3 => Fault::KillCoordinator,
            4 => Fault::Stop(victim, Duration::from_millis(200 + dice.roll(3000) as u64)),
            5 => Fault::CutControl { seat: victim, from_it: dice.roll(2) == 0 },
            6 if other != victim => Fault::CutData { from: victim, to: other },
            7 => Fault::Partition(victim),
            8 => Fault::WrongCall(victim),
            9 => Fault::Straggler(victim),
            _ => Fault::TooLate(victim),
        };
        Scenario {
            seed,
            ranks,
            spares: usize::from(dice.roll(3) == 0),
            in_place: dice.roll(2) == 0,
            calls: if ranks > 8 { 6 } else { 15 + dice.roll(15) },
            fault,
            at: Duration::from_micros(600 + dice.roll(8000) as u64),
        }
    }

    fn odd(&self, seat: usize) -> Option<(usize, Oddity)> {
        let (victim, oddity) = match self.fault {
            Fault::WrongCall(victim) => (victim, Oddity::WrongCall),
            Fault::Straggler(victim) => (victim, Oddity::Pause(LIMIT / 2)),
            Fault::TooLate(victim) => (victim, Oddity::Pause(2 * LIMIT)),
            _ => return None,
        };
        (victim == seat).then(|| (a_call_of_all(self.seed, self.calls), oddity))
    }

    /// What each seat saw, in the order of the simulated world.
    pub fn run(&self) -> Vec<Seen> {
        let seats = self.ranks + self.spares;
        let simulation = Simulation::new(self.seed, seats);
        let memory = SimulatedOptions {
            ranks: self.ranks,
            epoch: 0,
            arena_bytes: 8192 * self.ranks.max(4),
            in_place: self.in_place,
            delay_max: Duration::from_micros(50),
        };
        let cluster = Cluster::new(&simulation, GroupOptions::new(self.ranks), seats, memory);
        let record: Record = Arc::new(Mutex::new(Vec::new()));
        self.arm(&cluster);
        let task = |seat: usize| {
            let (cluster, record) = (cluster.clone(), record.clone());
            Box::new(move || self.follow(&cluster, seat, &record)) as Task<'_>
        };
        simulation.run((0..seats).map(task).collect());
        assert!(simulation.now() < Duration::from_secs(100), "something went on and on");
        std::mem::take(&mut *record.lock().unwrap())
    }

    fn follow(&self, cluster: &Cluster, seat: usize, record: &Record) {
        // Oddities are of the first epoch.
        let mut odd = self.odd(seat);
        while let Ok(link) = cluster.next_epoch(seat) {
            let park = |pause: Duration| {
                let until = cluster.simulation.now() + pause;
                while cluster.simulation.now() < until {
                    cluster.simulation.park(usize::MAX - 1, pause);
                }
            };
            let seen = work(&link, seat, self.seed, self.calls, odd.take(), &park);
            let done = seen.why.is_none();
            record.lock().unwrap().push(seen);
            if done && seat == 0 {
                cluster.stop_group();
            }
            if done {
                // There is nothing left to do but to wait for the end.
                while link.aborted().is_none() {
                    cluster.simulation.park(link.rank(), Duration::from_millis(100));
                }
            }
        }
    }

    /// Has the fault happen at its time, once there is an epoch.
    fn arm(&self, cluster: &Cluster) {
        let (fault, again, scenario) = (self.fault.clone(), cluster.clone(), self.clone());
        cluster.simulation.after(self.at, move |_| {
            if again.rank_of(0).is_none() {
                return scenario.arm(&again);
            }
            match fault {
                Fault::Kill(seat) => again.kill(seat),
                Fault::KillCoordinator => again.kill(0),
                Fault::Stop(seat, pause) => again.stop(seat, pause),
                Fault::CutControl { seat, from_it } => again.cut_control(seat, from_it),
                Fault::CutData { from, to } => again.cut_data(from, to),
                Fault::Partition(seat) => {
                    again.cut_control(seat, true);
                    again.cut_control(seat, false);
                    for other in (0..scenario.ranks).filter(|other| *other != seat) {
                        again.cut_data(seat, other);
                        again.cut_data(other, seat);
                    }
                }
                _ => {}
            }
        });
    }

    /// What has to hold of every seed.
    pub fn check(&self, record: &[Seen]) {
        // Seats that are cut off, dead or stopped may see something else, or nothing.
        let apart = match self.fault {
            Fault::Kill(seat) | Fault::Stop(seat, _) | Fault::Partition(seat) => Some(seat),
            Fault::CutControl { seat, .. } => Some(seat),
            Fault::KillCoordinator => Some(0),
            _ => None,
        };
        let mut causes: BTreeMap<u32, GroupError> = BTreeMap::new();
        for seen in record.iter().filter(|seen| Some(seen.seat) != apart) {
            let Some(why) = &seen.why else { continue };
            let first = causes.entry(seen.epoch).or_insert_with(|| why.clone());
            assert_eq!(first, why, "two causes for epoch {}", seen.epoch);
        }
        let last = record.iter().filter(|seen| seen.seat == 0).max_by_key(|seen| seen.epoch);
        let last = last.expect("the coordinator was in an epoch");
        // Without the coordinator the group is over. Who does not get through to it may say that
        // it is the one that is late.
        let without = |why: &GroupError| matches!(why, GroupError::PeerLost { rank: 0, .. });
        let over = self.fault == Fault::KillCoordinator
            || matches!(self.fault, Fault::CutData { to: 0, .. })
                && causes.get(&1).is_some_and(without);
        if !over {
            assert_eq!((last.why.as_ref(), last.calls), (None, self.calls), "work was not ended");
        }
        if let Some(why) = causes.get(&1) {
            self.check_cause(why, record);
        }
        // Who is lost is replaced by a spare, where there is one.
        if last.epoch == 2 {
            let lost = matches!(causes[&1], GroupError::PeerLost { .. });
            let expected = self.ranks - usize::from(lost && self.spares == 0);
            assert_eq!(last.ranks, expected);
        }
    }

    /// The cause of the first epoch's end names who was made to fail.
    fn check_cause(&self, why: &GroupError, record: &[Seen]) {
        let rank_of = |seat: usize| {
            let mut of_seat = record.iter().filter(|seen| seen.seat == seat && seen.epoch == 1);
            of_seat.next().map_or(seat, |seen| seen.rank)
        };
        let all_done = matches!(why, GroupError::Ended(why) if why == "all is done");
        let lost = |expected: &dyn Fn(&LostCause) -> bool, seats: &[usize]| match why {
            GroupError::PeerLost { rank, epoch: 1, cause } => {
                expected(cause) && seats.iter().any(|seat| rank_of(*seat) == *rank)
            }
            // The work was done before the fault had an effect.
            _ => all_done,
        };
        let exited = |cause: &LostCause| *cause == LostCause::Exited;
        let silent = |cause: &LostCause| matches!(cause, LostCause::Silent(_));
        let late = |cause: &LostCause| matches!(cause, LostCause::Late { .. });
        let fits = match self.fault {
            Fault::Nothing | Fault::Straggler(_) => all_done,
            Fault::Kill(seat) => lost(&exited, &[seat]),
            Fault::KillCoordinator => lost(&exited, &[0]),
            Fault::Stop(seat, _) => lost(&silent, &[seat]),
            // Who hears nothing from the coordinator leaves.
            Fault::CutControl { seat, .. } => lost(&silent, &[seat]),
            Fault::Partition(seat) => lost(&silent, &[seat]),
            Fault::CutData { from, to } => lost(&late, &[from, to]),
            Fault::TooLate(seat) => lost(&late, &[seat]),
            Fault::WrongCall(seat) => match why {
                // Of two, the other may be the one that is wrong.
                GroupError::Mismatch { rank, .. } => *rank == rank_of(seat) || self.ranks == 2,
                // Another may have come first, and left it as the spare.
                _ => all_done && record.iter().all(|seen| (seen.seat, seen.epoch) != (seat, 1)),
            },
        };
        assert!(fits, "{why}");
    }
}
