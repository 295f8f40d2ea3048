//! Groups and collectives in a simulated world: everything that can go wrong, by seeds.
//!
//! The code is the one that serves; clock, connections and memory are not. A failing seed is
//! printed, and runs again the same way: `check(SEED)`.
#![allow(clippy::unwrap_used)]

mod cluster;
mod faults;
mod ranks;

use faults::Scenario;

/// What CI runs.
const SEEDS: u64 = 1000;

#[test]
fn a_thousand_seeds_keep_the_contract() {
    let start = std::time::Instant::now();
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
    println!("{SEEDS} seeds in {:?}: {kinds:?}", start.elapsed());
    // Each kind of fault was met, and often.
    assert!(kinds.len() >= 8 && kinds.values().all(|count| *count > SEEDS / 50), "{kinds:?}");
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
