//! Ranks over wires that misbehave: results are right or the epoch ends, on all ranks, and soon.
#![allow(clippy::unwrap_used)]

mod emulator;

use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::{Duration, Instant};

use emulator::{Emulator, Trick, Way, Wire};
use pomona_fabric::coll::{Comm, World};
use pomona_fabric::link::mesh::MeshOptions;
use pomona_fabric::link::tcp::{TcpLink, TcpOptions};
use pomona_fabric::secure::{EpochSecret, Policy};
use pomona_types::{Collective, GroupError, LostCause};

const ARENA: usize = 1 << 20;
/// Nothing takes longer, on however busy a machine.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long a rank may be silent here.
const SILENT: Duration = Duration::from_secs(1);

/// Runs `work` on each of three ranks, with a wire of its own from each rank to each below it.
/// `wire_of` says which; `meddle` has the wires in its hands meanwhile.
fn epoch<T: Send>(
    policy: Policy,
    wire: Wire,
    work: impl Fn(&Comm) -> T + Sync,
    meddle: impl FnOnce(&dyn Fn(usize, usize) -> Arc<Emulator>),
) -> Vec<T> {
    const RANKS: usize = 3;
    let listeners: Vec<_> = (0..RANKS).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
    let own = |rank: usize| listeners[rank].local_addr().unwrap();
    let wires: Vec<Vec<Arc<Emulator>>> = (0..RANKS)
        .map(|from| (0..from).map(|to| Arc::new(Emulator::to(own(to), wire))).collect())
        .collect();
    let secret = EpochSecret::generate();
    let rank = |rank: usize| {
        let addresses: Vec<SocketAddr> = (0..RANKS)
            .map(|to| wires[rank].get(to).map_or_else(|| own(to), |wire| wire.address()))
            .collect();
        let (secret, timeout) = (secret.clone(), PATIENCE);
        let mesh = MeshOptions { rank, addresses, epoch: 1, secret, policy, timeout };
        let options = TcpOptions { silent_after: SILENT, ..TcpOptions::new(mesh, ARENA) };
        let link = Arc::new(TcpLink::connect(&listeners[rank], &options).unwrap());
        work(&World::new(link).with_limit(PATIENCE).all(ARENA).unwrap())
    };
    std::thread::scope(|scope| {
        let rank = &rank;
        let ranks: Vec<_> = (0..RANKS).map(|at| scope.spawn(move || rank(at))).collect();
        meddle(&|from: usize, to: usize| wires[from][to].clone());
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

/// A sum whose result is known; says what went wrong.
fn sum(comm: &Comm, round: usize, count: usize) -> Result<(), GroupError> {
    let mut values: Vec<f32> =
        (0..count).map(|at| (comm.rank() + 1) as f32 * (at % 1000 + round) as f32).collect();
    comm.all_reduce(&mut values)?;
    let right = (0..count).all(|at| values[at] == 6.0 * (at % 1000 + round) as f32);
    assert!(right, "round {round}: a sum is wrong");
    Ok(())
}

/// Sums until it fails.
fn sum_for_ever(comm: &Comm) -> GroupError {
    (0..).find_map(|round| sum(comm, round, 3000).err()).unwrap()
}

#[test]
fn slow_and_stalling_wires_change_no_result() {
    for seed in 0..4 {
        let wire = Wire {
            seed,
            delay: Duration::from_micros(300),
            rate: Some(200 << 20),
            stall_every: Some(40),
            stall: Duration::from_millis(20),
        };
        let policy = [Policy::Off, Policy::Auth, Policy::Seal][seed as usize % 3];
        let sums = |comm: &Comm| -> Result<(), GroupError> {
            (0..10).try_for_each(|round| sum(comm, round, 1 + round * 4000))
        };
        let results = epoch(policy, wire, sums, |_| {});
        assert_eq!(results, vec![Ok(()); 3], "seed {seed}");
    }
}

/// Who was lost, on each rank.
fn lost(errors: &[GroupError]) -> Vec<(usize, LostCause)> {
    let one = |error: &GroupError| match error {
        GroupError::PeerLost { rank, cause, .. } => (*rank, cause.clone()),
        other => panic!("{other}"),
    };
    errors.iter().map(one).collect()
}

#[test]
fn a_rank_behind_a_dead_wire_is_named_by_both_others() {
    let begun = Instant::now();
    let errors = epoch(Policy::Seal, Wire::default(), sum_for_ever, |wire| {
        std::thread::sleep(Duration::from_millis(200));
        for to in 0..2 {
            wire(2, to).cut(Way::Forth);
            wire(2, to).cut(Way::Back);
        }
    });
    let silent = LostCause::Silent(SILENT.as_millis() as u32);
    let lost = lost(&errors);
    assert_eq!(lost[..2], [(2, silent.clone()), (2, silent)]);
    // It cannot know that it is the one that is gone.
    assert_ne!(lost[2].0, 2);
    assert!(begun.elapsed() < PATIENCE);
}

#[test]
fn a_wire_cut_in_one_direction_ends_the_epoch_everywhere() {
    for (way, blamed) in [(Way::Forth, 2), (Way::Back, 0)] {
        let errors = epoch(Policy::Auth, Wire::default(), sum_for_ever, |wire| {
            std::thread::sleep(Duration::from_millis(200));
            wire(2, 0).cut(way);
        });
        // Who hears nothing blames the other, and tells all whom it reaches.
        let silent = LostCause::Silent(SILENT.as_millis() as u32);
        assert_eq!(lost(&errors), vec![(blamed, silent); 3], "{way:?}");
    }
}

#[test]
fn changed_and_repeated_records_end_the_epoch() {
    for trick in [Trick::Tamper, Trick::Replay] {
        let errors = epoch(Policy::Seal, Wire::default(), sum_for_ever, |wire| {
            let wire = wire(2, 1);
            wire.trick(trick);
            let begun = Instant::now();
            while !wire.is_played() {
                assert!(begun.elapsed() < PATIENCE);
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        for (rank, cause) in lost(&errors) {
            let LostCause::Disconnected(why) = cause else { panic!("{cause}") };
            assert_eq!(rank, 2, "{trick:?}");
            assert!(why.contains("record"), "{trick:?}: {why}");
        }
    }
}

/// The reverse: without sealing the same goes unnoticed, so the test above can fail.
#[test]
fn a_changed_byte_in_clear_is_not_noticed_by_the_link() {
    let changed = epoch(
        Policy::Off,
        Wire::default(),
        |comm| {
            let mut wrong = false;
            for _ in 0..50 {
                let mut message = vec![7; 100_000];
                comm.broadcast(2, &mut message).unwrap();
                wrong |= message != [7; 100_000];
            }
            wrong
        },
        |wire| wire(2, 1).trick(Trick::Tamper),
    );
    assert_eq!(changed, [false, true, false]);
}
