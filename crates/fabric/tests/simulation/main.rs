//! Groups and collectives in a simulated world: everything that can go wrong, by seeds.
//!
//! The code is the one that serves; clock, connections and memory are not. A failing seed is
//! printed, and runs again the same way: `check(SEED)`.
#![allow(clippy::unwrap_used)]

mod cluster;
mod faults;
mod ranks;

use std::time::{Duration, Instant};

use faults::Scenario;
use rustix::time::{ClockId, clock_gettime};

/// What CI runs.
const SEEDS: u64 = 1000;
/// How long all of them may take. Counted is their time on cores, as if there were one: an idle
/// machine of two needs no longer, and one that is busy with other programs is no fault of theirs.
const ALL_SEEDS: Duration = Duration::from_secs(60);

#[test]
fn a_thousand_seeds_keep_the_contract() {
    let (start, used) = (Instant::now(), time_on_cores());
    let mut kinds = std::collections::BTreeMap::new();
    const THREADS: u64 = 2;
    std::thread::scope(|scope| {
        let run = |part: u64| (part..SEEDS).step_by(THREADS as usize).map(check).collect();
        let parts = (0..THREADS).map(|part| scope.spawn(move || -> Vec<String> { run(part) }));
        let parts: Vec<_> = parts.collect();
        for kind in parts.into_iter().flat_map(|part| part.join().unwrap()) {
            *kinds.entry(kind).or_insert(0) += 1;
        }
    });
    let used = time_on_cores() - used;
    println!("{SEEDS} seeds in {:?}, {used:?} on cores: {kinds:?}", start.elapsed());
    assert!(used <= ALL_SEEDS, "{SEEDS} seeds take {used:?}");
    // Each kind of fault was met, and often.
    assert!(kinds.len() >= 8 && kinds.values().all(|count| *count > SEEDS / 50), "{kinds:?}");
}

/// How long the threads of this process have run so far, the few of the other tests among them.
fn time_on_cores() -> Duration {
    clock_gettime(ClockId::ProcessCPUTime).try_into().unwrap()
}

#[test]
fn a_seed_runs_the_same_way_again() {
    for seed in [3, 8, 21] {
        let runs = [(); 2].map(|()| Scenario::new(seed).run());
        assert_eq!(runs[0], runs[1], "seed {seed}");
    }
}

/// Runs a seed, and says which kind of fault it had.
fn check(seed: u64) -> String {
    let scenario = Scenario::new(seed);
    let kind = scenario.fault.kind();
    let checked = std::panic::catch_unwind(|| {
        let record = scenario.run();
        scenario.check(&record);
    });
    assert!(checked.is_ok(), "seed {seed} failed: {scenario:?}");
    kind
}

#[test]
fn transfers_keep_their_order_where_puts_overtake_each_other() {
    use pomona_fabric::coll::World;
    use pomona_fabric::link::simulated::{
        SimulatedEpoch, SimulatedLink, SimulatedOptions, Simulation, Task,
    };
    use pomona_fabric::xfer::Handle;

    for seed in 0..50 {
        let simulation = Simulation::new(seed, 2);
        let delay_max = Duration::from_micros(50);
        let (epoch, arena_bytes) = (1, 1 << 20);
        let options = SimulatedOptions { ranks: 2, epoch, arena_bytes, in_place: false, delay_max };
        let links = SimulatedLink::all(&SimulatedEpoch::new(&simulation, options));
        let rank = |link: SimulatedLink| {
            let me = pomona_fabric::link::Link::rank(&link);
            let link = std::sync::Arc::new(link);
            let mut transfer = World::new(link).transfer(1 << 20).unwrap();
            // Both make the same region first, so each knows the other's.
            let own = transfer.register(4096).unwrap();
            let mut theirs = own.encode();
            theirs[0] ^= 1;
            let theirs = Handle::decode(&theirs);
            for round in 0..40u8 {
                transfer.put(theirs, round as usize * 100, &[&[round ^ me as u8; 100]], 0).unwrap();
            }
            for round in 0..40u8 {
                transfer.arrival_from(1 - me).unwrap();
                let mut got = [0; 100];
                transfer.read(own, round as usize * 100, &mut got).unwrap();
                assert_eq!(got, [round ^ 1 ^ me as u8; 100], "seed {seed}");
            }
            transfer.fence(1 - me).unwrap();
            // The other's fence may not have come yet.
            while simulation.now() < Duration::from_secs(1) {
                transfer.arrival().unwrap();
                simulation.park(me, Duration::from_millis(50));
            }
        };
        let (rank, tasks) = (&rank, links.into_iter());
        simulation.run(tasks.map(|link| Box::new(move || rank(link)) as Task<'_>).collect());
    }
}
