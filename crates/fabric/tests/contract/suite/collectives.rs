//! Collectives against plain loops.

use std::time::{Duration, Instant};

use pomona_fabric::coll::{Algorithm, Comm, World};
use pomona_types::{Collective, GroupError, LostCause};

use super::{Make, bits, each_member, each_rank, noise, numbers, sums};

/// Far more than anything here takes.
const LONG: Duration = Duration::from_secs(60);

/// Small, so that edges of slots are near: with three ranks a slot has about 9,700 bytes.
const PART: usize = 90_048;

/// Sizes in bytes around the edges of a communicator's slots.
fn sizes(ranks: usize) -> Vec<usize> {
    let exchange = (PART / ranks - 256) / 3 / 64 * 64 - 64;
    let message = (exchange + 64) / 4 / 64 * 64 - 64;
    let mut sizes = vec![0, 4, 8, 60, 64, 68, 1000];
    for edge in [exchange, message, 2 * exchange, 5 * message] {
        sizes.extend([edge - 4, edge, edge + 4]);
    }
    sizes.push(5 * PART);
    sizes
}

pub fn gathers_join_columns(make: Make) {
    for ranks in 1..=5 {
        each_member(make, ranks, PART, |comm| {
            for (salt, bytes) in sizes(ranks).into_iter().enumerate() {
                for rows in [1, 3] {
                    let width = |rank: usize| (bytes / rows + rank * 5) * usize::from(rank != 3);
                    let widths: Vec<usize> = (0..ranks).map(width).collect();
                    let own = noise(comm.rank(), rows * widths[comm.rank()], salt);
                    let mut all = vec![0; rows * widths.iter().sum::<usize>()];
                    comm.all_gather(rows, &widths, &own, &mut all).unwrap();
                    let theirs = |rank: usize| noise(rank, rows * widths[rank], salt);
                    let theirs: Vec<_> = (0..ranks).map(theirs).collect();
                    let expected = (0..rows).flat_map(|row| {
                        let widths = &widths;
                        theirs.iter().enumerate().flat_map(move |(rank, bytes)| {
                            bytes[row * widths[rank]..][..widths[rank]].to_vec()
                        })
                    });
                    assert!(all.into_iter().eq(expected), "{ranks} ranks, {rows} rows, {bytes}");
                }
            }
        });
    }
}

pub fn sums_are_those_in_order_of_ranks_by_every_algorithm(make: Make) {
    for ranks in 1..=5 {
        each_member(make, ranks, PART, |mut comm| {
            for algorithm in Algorithm::ALL.map(Some).into_iter().chain([None]) {
                comm.force(algorithm);
                for (salt, bytes) in sizes(ranks).into_iter().enumerate() {
                    let mut values = numbers(comm.rank(), bytes / 4, salt);
                    comm.all_reduce(&mut values).unwrap();
                    let expected = bits(&sums(ranks, bytes / 4, salt));
                    assert!(bits(&values) == expected, "{ranks} ranks, {bytes}, {algorithm:?}");
                }
            }
        });
    }
}

pub fn parts_of_sums_are_scattered(make: Make) {
    for ranks in 1..=4 {
        each_member(make, ranks, PART, |comm| {
            for (salt, bytes) in sizes(ranks).into_iter().enumerate() {
                let count = |rank: usize| (bytes / 4 + rank * 3) * usize::from(rank != 1);
                let counts: Vec<usize> = (0..ranks).map(count).collect();
                let total = counts.iter().sum();
                let mut own = vec![0.0; counts[comm.rank()]];
                let values = numbers(comm.rank(), total, salt);
                comm.reduce_scatter(&values, &counts, &mut own).unwrap();
                let start: usize = counts[..comm.rank()].iter().sum();
                let expected = &sums(ranks, total, salt)[start..][..own.len()];
                assert_eq!(bits(&own), bits(expected));
            }
        });
    }
}

pub fn parts_are_exchanged(make: Make) {
    for ranks in 1..=4 {
        each_member(make, ranks, PART, |comm| {
            let me = comm.rank();
            for (salt, bytes) in sizes(ranks).into_iter().enumerate() {
                // Nobody but rank 1 sends to the last rank.
                let length = |from: usize, to: usize| {
                    (bytes / 2 + from * 11 + to) * usize::from(to != ranks - 1 || from == 1)
                };
                let sent: Vec<usize> = (0..ranks).map(|to| length(me, to)).collect();
                let received: Vec<usize> = (0..ranks).map(|from| length(from, me)).collect();
                let part = |from: usize, to: usize| noise(from * 17 + to, length(from, to), salt);
                let out: Vec<u8> = (0..ranks).flat_map(|to| part(me, to)).collect();
                let mut into = vec![0; received.iter().sum()];
                comm.all_to_all(&sent, &out, &received, &mut into).unwrap();
                assert!(into.into_iter().eq((0..ranks).flat_map(|from| part(from, me))));
            }
        });
    }
}

pub fn broadcasts_have_any_length(make: Make) {
    for ranks in 1..=4 {
        each_member(make, ranks, PART, |comm| {
            for (salt, bytes) in sizes(ranks).into_iter().enumerate() {
                let root = salt % ranks;
                let mut message =
                    noise(comm.rank(), if comm.rank() == root { bytes } else { 9 }, salt);
                comm.broadcast(root, &mut message).unwrap();
                assert!(message == noise(root, bytes, salt), "{ranks} ranks, {bytes} bytes");
            }
        });
    }
}

pub fn messages_go_from_one_to_another(make: Make) {
    each_member(make, 3, PART, |comm| {
        let (next, before) = ((comm.rank() + 1) % 3, (comm.rank() + 2) % 3);
        for (salt, bytes) in sizes(3).into_iter().enumerate() {
            let mut got = vec![0; bytes];
            // What fits into the slots does not wait for the receiver.
            if comm.rank() > 0 {
                comm.receive(before, &mut got).unwrap();
                assert!(got == noise(before, bytes, salt));
            }
            comm.send(next, &noise(comm.rank(), bytes, salt)).unwrap();
            if comm.rank() == 0 {
                comm.receive(before, &mut got).unwrap();
                assert!(got == noise(before, bytes, salt));
            }
        }
        for salt in 0..3 {
            comm.send(next, &[salt; 5]).unwrap();
        }
        for salt in 0..3 {
            let mut got = [9; 5];
            comm.receive(before, &mut got).unwrap();
            assert_eq!(got, [salt; 5]);
        }
    });
}

pub fn nobody_leaves_a_barrier_before_all_came(make: Make) {
    use std::sync::atomic::{AtomicUsize, Ordering};
    let came = AtomicUsize::new(0);
    each_member(make, 4, PART, |comm| {
        for round in 1..100 {
            came.fetch_add(1, Ordering::SeqCst);
            comm.barrier().unwrap();
            assert!(came.load(Ordering::SeqCst) >= 4 * round);
        }
    });
}

pub fn calls_follow_each_other_in_any_order(make: Make) {
    each_member(make, 3, PART, |mut comm| {
        let me = comm.rank();
        for step in 0..300usize {
            // The same on all ranks, and in no pattern.
            let dice = (step as u32 + 1).wrapping_mul(2_654_435_761) >> 7;
            let bytes = [4, 400, 12_000, 40_000][dice as usize % 4];
            comm.force(Some(Algorithm::ALL[dice as usize / 4 % 4]));
            let mut values = numbers(me, bytes / 4, step);
            match dice / 16 % 6 {
                0 => comm.barrier().unwrap(),
                1 => {
                    let mut message = noise(me, bytes, step);
                    comm.broadcast(step % 3, &mut message).unwrap();
                    assert!(message == noise(step % 3, bytes, step));
                }
                2 => {
                    let mut all = vec![0; 3 * bytes];
                    comm.all_gather(1, &[bytes; 3], &noise(me, bytes, step), &mut all).unwrap();
                    assert!(all[2 * bytes..] == noise(2, bytes, step));
                }
                3 => {
                    let mut into = vec![0; 3 * bytes];
                    let out = noise(me, 3 * bytes, step);
                    comm.all_to_all(&[bytes; 3], &out, &[bytes; 3], &mut into).unwrap();
                    assert!(
                        into[bytes..2 * bytes] == noise(1, 3 * bytes, step)[me * bytes..][..bytes]
                    );
                }
                4 if me < 2 => {
                    let mut got = vec![0; bytes.min(400)];
                    comm.send(1 - me, &noise(me, got.len(), step)).unwrap();
                    comm.receive(1 - me, &mut got).unwrap();
                    assert!(got == noise(1 - me, got.len(), step));
                }
                4 => {}
                _ => {
                    comm.all_reduce(&mut values).unwrap();
                    assert!(bits(&values) == bits(&sums(3, bytes / 4, step)));
                }
            }
        }
    });
}

pub fn groups_of_one_world_do_not_meet(make: Make) {
    each_rank(make(4, 4 * PART + 4096), |link| {
        let me = link.rank();
        let mut world = World::new(link);
        let tensor = world.divide(&[&[0, 1], &[2, 3]], PART).unwrap().unwrap();
        let stages = world.divide(&[&[2, 0], &[1, 3]], PART).unwrap().unwrap();
        let some = world.divide(&[&[3, 1, 0]], PART).unwrap();
        let all = world.all(PART).unwrap();
        assert_eq!((tensor.rank(), tensor.ranks()), (me % 2, 2));
        assert_eq!(stages.rank(), [1, 0, 0, 1][me]);
        assert_eq!(some.as_ref().map(|comm| comm.rank()), [Some(2), Some(1), None, Some(0)][me]);
        for _ in 0..20 {
            let sum = |comm: &Comm| {
                let mut value = [10f32.powi(me as i32)];
                comm.all_reduce(&mut value).unwrap();
                value[0]
            };
            assert_eq!(sum(&tensor), [11.0, 11.0, 1100.0, 1100.0][me]);
            assert_eq!(sum(&stages), [101.0, 1010.0, 101.0, 1010.0][me]);
            assert_eq!(some.as_ref().map_or(1011.0, sum), 1011.0);
            assert_eq!(sum(&all), 1111.0);
        }
        let refused: [(&[&[usize]], usize); 4] =
            [(&[&[0, 1], &[1, 2]], 4096), (&[&[4]], 4096), (&[&[0]], PART), (&[&[0]], 64)];
        for (groups, bytes) in refused {
            let refused = world.divide(groups, bytes);
            assert!(matches!(refused, Err(GroupError::Invalid(_))), "{groups:?}, {bytes}");
        }
        assert!(world.divide(&[&[me]], 4096).unwrap().is_some());
    });
}

pub fn plans_give_what_calls_give(make: Make) {
    for ranks in 1..=3 {
        each_member(make, ranks, PART, |comm| {
            let me = comm.rank();
            for bytes in [0, 8, 4000, PART] {
                let mut reduce = comm.plan_reduce(bytes / 4);
                let widths: Vec<usize> = (0..ranks).map(|rank| bytes / 2 + rank).collect();
                let mut gather = comm.plan_gather(2, &widths).unwrap();
                for salt in 0..5 {
                    let mut values = vec![0.0; bytes / 4];
                    let make = |own: &mut [f32]| own.copy_from_slice(&numbers(me, own.len(), salt));
                    reduce.run(make, &mut values).unwrap();
                    assert!(bits(&values) == bits(&sums(ranks, bytes / 4, salt)));

                    let own = noise(me, 2 * widths[me], salt);
                    let mut called = vec![0; 2 * widths.iter().sum::<usize>()];
                    let mut planned = called.clone();
                    comm.all_gather(2, &widths, &own, &mut called).unwrap();
                    gather.run(|place| place.copy_from_slice(&own), &mut planned).unwrap();
                    assert!(called == planned);
                }
            }
        });
    }
}

pub fn calls_allocate_nothing(make: Make) {
    const COUNT: usize = 1000;
    each_member(make, 3, PART, |mut comm| {
        let me = comm.rank();
        let mut values = vec![0.0; COUNT];
        let mut message = vec![0; COUNT];
        let (own, mut all) = (vec![0; COUNT], vec![0; 3 * COUNT]);
        let (mut sent, mut sums) = (vec![0; 3 * COUNT], vec![0.0; COUNT]);
        let mut turn = |comm: &mut Comm| {
            for algorithm in Algorithm::ALL {
                comm.force(Some(algorithm));
                comm.all_reduce(&mut values).unwrap();
            }
            comm.all_gather(1, &[COUNT; 3], &own, &mut all).unwrap();
            comm.all_to_all(&[COUNT; 3], &all, &[COUNT; 3], &mut sent).unwrap();
            comm.reduce_scatter(&values, &[COUNT, 0, 0], share_of(me, &mut sums)).unwrap();
            comm.broadcast(1, &mut message).unwrap();
            // Around in a circle, in two pieces, which do not wait for the receiver.
            comm.send((me + 1) % 3, &all).unwrap();
            comm.receive((me + 2) % 3, &mut sent).unwrap();
            comm.barrier().unwrap();
        };
        // The first round may make room for those that follow.
        turn(&mut comm);
        let allocated = allocation_counter::measure(|| (0..5).for_each(|_| turn(&mut comm)));
        assert_eq!(allocated.count_total, 0, "{allocated:?}");

        let mut reduce = comm.plan_reduce(COUNT);
        let mut gather = comm.plan_gather(1, &[COUNT; 3]).unwrap();
        let allocated = allocation_counter::measure(|| {
            for _ in 0..5 {
                reduce.run(|own| own.fill(1.0), &mut values).unwrap();
                gather.run(|own| own.fill(1), &mut all).unwrap();
            }
        });
        assert_eq!(allocated.count_total, 0, "{allocated:?}");
    });
}

/// All of the place on rank 0, nothing on others.
fn share_of(rank: usize, place: &mut [f32]) -> &mut [f32] {
    let length = if rank == 0 { place.len() } else { 0 };
    &mut place[..length]
}

pub fn the_caller_is_told_about_lengths_that_do_not_fit(make: Make) {
    each_member(make, 2, PART, |comm| {
        let me = comm.rank();
        let refused = [
            comm.all_gather(1, &[1, 1], &[0], &mut [0; 3]),
            comm.all_gather(1, &[1], &[0], &mut [0; 2]),
            comm.all_gather(2, &[usize::MAX; 2], &[0], &mut [0; 2]),
            comm.reduce_scatter(&[0.0; 3], &[2, 2], &mut [0.0; 2]),
            comm.all_to_all(&[1, 1], &[0; 3], &[1, 1], &mut [0; 2]),
            comm.broadcast(2, &mut Vec::new()),
            comm.send(me, &[]),
            comm.receive(2, &mut []),
            comm.plan_reduce(3).run(|_| {}, &mut [0.0; 2]),
            comm.plan_gather(usize::MAX, &[2, 2]).map(drop),
        ];
        for refused in refused {
            assert!(matches!(refused, Err(GroupError::Invalid(_))), "{refused:?}");
        }
        // Nothing was sent, and nothing is lost.
        comm.barrier().unwrap();
    });
}

/// The one error that all ranks have.
fn the_error(errors: Vec<Result<(), GroupError>>) -> GroupError {
    let errors: Vec<GroupError> = errors.into_iter().map(Result::unwrap_err).collect();
    assert!(errors.windows(2).all(|pair| pair[0] == pair[1]), "{errors:?}");
    errors[0].clone()
}

pub fn a_rank_that_calls_something_else_is_named_on_all(make: Make) {
    for wrong in 0..3 {
        let error = the_error(each_member(make, 3, PART, |comm| {
            comm.barrier().unwrap();
            let width = if comm.rank() == wrong { 8 } else { 4 };
            comm.all_gather(1, &[width; 3], &vec![0; width], &mut vec![0; 3 * width])?;
            comm.barrier()
        }));
        let GroupError::Mismatch { rank, theirs, ours } = error else { panic!("{error}") };
        assert_eq!(rank, wrong);
        assert!(theirs.starts_with("all_gather of 24 bytes"), "{theirs}");
        assert!(ours.starts_with("all_gather of 12 bytes"), "{ours}");
    }
}

pub fn a_rank_that_waits_elsewhere_is_named_on_all(make: Make) {
    // Rank 2 waits for a broadcast that nobody makes; the marks never meet.
    let error = the_error(each_member(make, 3, PART, |comm| match comm.rank() {
        2 => comm.broadcast(0, &mut Vec::new()),
        _ => comm.all_reduce(&mut [1.0]).and_then(|()| comm.barrier()),
    }));
    let GroupError::Mismatch { rank: 2, theirs, ours } = error else { panic!("{error}") };
    assert!(theirs.starts_with("broadcast"), "{theirs}");
    assert!(ours.starts_with("all_reduce of 4 bytes"), "{ours}");
}

pub fn a_rank_that_does_not_come_is_named_on_all(make: Make) {
    let sum = "all_reduce of 400 bytes";
    for algorithm in Algorithm::ALL {
        a_late_rank_is_named(make, sum, |comm| {
            comm.force(Some(algorithm));
            comm.all_reduce(&mut [1.0; 100])
        });
    }
    a_late_rank_is_named(make, sum, |comm| {
        comm.plan_reduce(100).run(|own| own.fill(1.0), &mut [0.0; 100])
    });
    a_late_rank_is_named(make, "all_gather of 400 bytes", |comm| {
        comm.plan_gather(1, &[100; 4])?.run(|own| own.fill(1), &mut [0; 400])
    });
}

/// Rank 2 of four does not come to a call, which all name as `words`.
fn a_late_rank_is_named(
    make: Make,
    words: &str,
    call: impl Fn(&mut Comm) -> Result<(), GroupError> + Sync,
) {
    let limit = Duration::from_millis(300);
    let error = the_error(each_rank(make(4, PART), |link| {
        let late = link.rank() == 2;
        let mut comm = World::new(link.clone()).with_limit(limit).all(PART).unwrap();
        let start = Instant::now();
        // It does not come, and learns of the end as the others do.
        while late && link.aborted().is_none() {
            link.park(0, 63, 0, limit);
            assert!(start.elapsed() < LONG, "{words}: nobody has ended the epoch");
        }
        let result = call(&mut comm);
        assert_eq!(comm.barrier(), result, "{words}: the next call has another end");
        result
    }));
    let GroupError::PeerLost { rank: 2, cause, .. } = &error else { panic!("{words}: {error}") };
    let LostCause::Late { call, after_ms: 300.. } = cause else { panic!("{words}: {error}") };
    assert!(call.starts_with(words), "{call}");
}

pub fn every_call_fails_once_the_epoch_is_over(make: Make) {
    let over = GroupError::Ended("for a test".into());
    each_rank(make(2, PART), |link| {
        let comm = World::new(link.clone()).all(PART).unwrap();
        let (mut sum, mut gather) = (comm.plan_reduce(1), comm.plan_gather(1, &[1, 1]).unwrap());
        comm.barrier().unwrap();
        link.abort(over.clone());
        let results = [
            comm.all_gather(1, &[1, 1], &[0], &mut [0; 2]),
            comm.all_reduce(&mut [0.0]),
            comm.reduce_scatter(&[0.0; 2], &[1, 1], &mut [0.0]),
            comm.all_to_all(&[1, 1], &[0; 2], &[1, 1], &mut [0; 2]),
            comm.broadcast(0, &mut Vec::new()),
            comm.receive(1 - comm.rank(), &mut [0]),
            comm.send(1 - comm.rank(), &[0]),
            comm.barrier(),
            sum.run(|own| own.fill(1.0), &mut [0.0]),
            gather.run(|own| own.fill(1), &mut [0; 2]),
        ];
        for result in results {
            assert_eq!(result, Err(over.clone()));
        }
    });
}
