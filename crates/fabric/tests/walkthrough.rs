//! A tour of the crate: ranks, what they do together, and how it ends.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;

use pomona_fabric::coll::World;
use pomona_fabric::link::shm::{ShmEpoch, ShmOptions};
use pomona_types::{Collective, GroupError};

/// One rank of four: two halves of a model, each split over two.
fn rank(mut world: World) -> Result<f32, GroupError> {
    let me = world.link().rank();
    // Every rank makes the same divisions, in the same order. Each has its own part of the arenas.
    let tensor = world.divide(&[&[0, 1], &[2, 3]], 64 << 10)?.expect("all ranks are in one");
    let stages = world.divide(&[&[0, 2], &[1, 3]], 64 << 10)?.expect("all ranks are in one");
    let all = world.all(64 << 10)?;

    // Rank 0 tells the others what to do. They wait for it as long as it is alive.
    let mut plan = if me == 0 { b"a step".to_vec() } else { Vec::new() };
    all.broadcast(0, &mut plan)?;
    assert_eq!(plan, b"a step");

    // Two rows of columns: rank 0 of a pair has one number in each, rank 1 has two.
    let (widths, own) = ([4, 8], vec![me as u8; [8, 16][tensor.rank()]]);
    let mut rows = [0; 24];
    tensor.all_gather(2, &widths, &own, &mut rows)?;
    let (first, second) = (me as u8 & 2, me as u8 | 1);
    assert_eq!(rows[..12], [[first; 4], [second; 4], [second; 4]].concat());

    // Sums are added in order of ranks; every rank has the same bits.
    let mut sum = [1.0 + me as f32];
    tensor.all_reduce(&mut sum)?;

    // The first half gives its result to the second.
    match stages.rank() {
        0 => stages.send(1, &sum[0].to_le_bytes())?,
        _ => {
            let mut before = [0; 4];
            stages.receive(0, &mut before)?;
            sum[0] += f32::from_le_bytes(before);
        }
    }

    // A call that is made again and again is prepared: here numbers are made where the others
    // read them, and nothing is allocated.
    let mut total = sum;
    let mut reduce = all.plan_reduce(1);
    reduce.run(|own| own.copy_from_slice(&sum), &mut total)?;
    Ok(total[0])
}

#[test]
fn four_ranks_are_divided_into_groups() {
    // One piece of shared memory, for ranks that are threads here; its descriptor could be given
    // to other processes.
    let epoch = ShmEpoch::create(ShmOptions::new(4, 1 << 20)).unwrap();
    std::thread::scope(|scope| {
        let ranks = (0..4).map(|rank| epoch.link(rank).unwrap());
        let ranks = ranks.map(|link| scope.spawn(|| self::rank(World::new(Arc::new(link)))));
        for rank in ranks.collect::<Vec<_>>() {
            assert_eq!(rank.join().unwrap(), Ok(2.0 * 3.0 + 2.0 * 10.0));
        }
    });
}

#[test]
fn a_rank_that_calls_something_else_ends_the_epoch_for_all() {
    let epoch = ShmEpoch::create(ShmOptions::new(2, 64 << 10)).unwrap();
    let call = |rank: usize| {
        let comm = World::new(Arc::new(epoch.link(rank).unwrap())).all(64 << 10).unwrap();
        comm.all_reduce(&mut vec![1.0; 1 + rank])
    };
    std::thread::scope(|scope| {
        let (first, second) = (scope.spawn(|| call(0)), scope.spawn(|| call(1)));
        let why = first.join().unwrap().unwrap_err();
        assert_eq!(second.join().unwrap(), Err(why.clone()));
        let why = why.to_string();
        assert!(why.starts_with("rank 1 called all_reduce of 8 bytes"), "{why}");
        assert!(why.contains("others called all_reduce of 4 bytes"), "{why}");
    });
}
