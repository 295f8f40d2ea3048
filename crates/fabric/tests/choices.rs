//! Sums follow the algorithms that were measured to be the quickest, if ranks are given such.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::time::Duration;

use pomona_fabric::coll::{Algorithm, Choices, Comm, World};
use pomona_fabric::link::shm::{ShmEpoch, ShmOptions};
use pomona_types::{Collective, GroupError};

const ARENA: usize = 1 << 20;
const RANKS: usize = 2;

/// Runs ranks with lists of their own, and returns what they made of it.
fn with<T: Send>(lists: [&str; RANKS], run: impl Fn(&Comm) -> T + Sync) -> Vec<T> {
    let epoch = ShmEpoch::create(ShmOptions::new(RANKS, ARENA)).unwrap();
    std::thread::scope(|scope| {
        let ranks = lists.iter().enumerate().map(|(rank, list)| {
            let link = Arc::new(epoch.link(rank).unwrap());
            let choices: Choices = list.parse().unwrap();
            let run = &run;
            scope.spawn(move || {
                let world = World::new(link).with_limit(Duration::from_secs(30));
                run(&world.with_choices(choices).all(ARENA).unwrap())
            })
        });
        let ranks: Vec<_> = ranks.collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

/// Sums on both sides of a change of algorithms.
fn sums(comm: &Comm) -> Result<Vec<Vec<f32>>, GroupError> {
    let mut all = Vec::new();
    for count in [1, 16, 17, 1000, 100_000] {
        let mut values: Vec<f32> = (0..count).map(|at| 0.1 * (at + comm.rank()) as f32).collect();
        comm.all_reduce(&mut values)?;
        all.push(values);
    }
    Ok(all)
}

#[test]
fn results_are_the_same_whatever_is_chosen() {
    let constants = with(["", ""], |comm| sums(comm).unwrap());
    assert_eq!(constants[0], constants[1]);
    for first in Algorithm::ALL {
        for then in Algorithm::ALL {
            let list = format!("2:64:{},2:*:{}", first.name(), then.name());
            assert_eq!(with([&list, &list], |comm| sums(comm).unwrap()), constants, "{list}");
        }
    }
}

#[test]
fn ranks_with_different_lists_find_out() {
    let outcomes = with(["2:*:one-shot", "2:*:two-shot"], |comm| sums(comm).unwrap_err());
    for error in outcomes {
        assert!(matches!(error, GroupError::Mismatch { rank: 1, .. }), "{error}");
    }
}
