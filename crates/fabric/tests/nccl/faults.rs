//! Ranks that do something else, nothing, or fail: all have the same error, and nothing is left.

use std::fs;
use std::time::{Duration, Instant};

use pomona_fabric::nccl::{Columns, Nccl, NcclComm, NcclError, Number};
use pomona_types::{GroupError, LostCause};

use super::fake::{Fake, Fault};
use super::{PATIENCE, Rank, alone, each_device, each_rank, shm, tcp};

const LIMIT: Duration = Duration::from_secs(1);

/// The one error that all ranks have.
fn the_error(errors: Vec<Result<(), GroupError>>) -> GroupError {
    let errors: Vec<GroupError> = errors.into_iter().map(Result::unwrap_err).collect();
    assert!(errors.windows(2).all(|pair| pair[0] == pair[1]), "{errors:?}");
    errors[0].clone()
}

/// A sum of so many numbers, and the wait for it. When it fails, so does everything else.
fn sum(rank: &mut Rank, count: usize) -> Result<(), GroupError> {
    let Rank { comm, kept, device } = rank;
    kept.push(device.put(&vec![0; 4 * count]));
    let bytes = kept[kept.len() - 1].bytes();
    let called = comm.all_reduce(device.stream(), Number::F32, bytes, bytes);
    let result = called.and_then(|()| comm.wait(device.work()));
    if let Err(why) = &result {
        let (stream, nothing) = (device.stream(), bytes.part(0..0));
        let none = vec![0; comm.ranks()];
        let peer = (comm.rank() + 1) % comm.ranks();
        let further = [
            comm.all_reduce(stream, Number::F32, bytes, bytes),
            comm.reduce_scatter(stream, Number::F32, &none, nothing, nothing),
            comm.all_gather(stream, &none, nothing, nothing),
            comm.all_gather_columns(
                stream,
                Columns { rows: 2, widths: &none },
                nothing,
                nothing,
                nothing,
            ),
            comm.all_to_all(stream, &none, nothing, &none, nothing),
            comm.broadcast(stream, 0, bytes),
            comm.send(stream, peer, bytes),
            comm.receive(stream, peer, bytes),
            comm.wait(device.work()),
            comm.barrier(device.work()),
        ];
        for result in further {
            assert_eq!(result.as_ref(), Err(why));
        }
    }
    result
}

/// Waits until the epoch is over, as a rank does that does not come.
fn stay_away(rank: &mut Rank) -> Result<(), GroupError> {
    let link = rank.comm.link().clone();
    while link.aborted().is_none() {
        std::thread::sleep(Duration::from_millis(1));
    }
    rank.comm.wait(rank.device.work())
}

#[test]
fn a_gpu_rank_that_calls_something_else_is_named_on_all() {
    let _alone = alone();
    let fake = Fake::new();
    for (wrong, links) in [shm(3), tcp(3), shm(3)].into_iter().enumerate() {
        let error = the_error(each_rank(&fake.paths(), links, PATIENCE, |rank| {
            sum(rank, 5)?;
            let count = if rank.comm.rank() == wrong { 2 } else { 1 };
            sum(rank, count)
        }));
        let GroupError::Mismatch { rank, theirs, ours } = error else { panic!("{error}") };
        assert_eq!(rank, wrong);
        assert!(theirs.starts_with("a wait after all_reduce of 8 bytes"), "{theirs}");
        assert!(ours.starts_with("a wait after all_reduce of 4 bytes"), "{ours}");
    }
    fake.check();
}

#[test]
fn a_gpu_rank_that_waits_too_early_is_named_on_all() {
    let _alone = alone();
    let fake = Fake::new();
    let error = the_error(each_rank(&fake.paths(), shm(3), PATIENCE, |rank| {
        let Rank { comm, kept, device } = rank;
        kept.push(device.put(&[0; 8]));
        let bytes = kept[0].bytes();
        comm.broadcast(device.stream(), 0, bytes)?;
        if comm.rank() == 2 {
            comm.wait(device.work())?;
        }
        comm.broadcast(device.stream(), 1, bytes)?;
        comm.wait(device.work())
    }));
    let GroupError::Mismatch { rank: 2, theirs, ours } = error else { panic!("{error}") };
    assert!(theirs.starts_with("a wait after broadcast of 8 bytes (call 5"), "{theirs}");
    assert!(ours.contains("broadcast of 8 bytes (call "), "{ours}");
    fake.check();
}

#[test]
fn different_calls_that_nccl_does_not_notice_are_noticed() {
    let _alone = alone();
    let fake = Fake::new();
    // Of no bytes, so that nothing hangs, and each rank's stream is done.
    let error = the_error(each_rank(&fake.paths(), shm(3), PATIENCE, |rank| {
        let Rank { comm, kept, device } = rank;
        kept.push(device.room(0));
        let nothing = kept[0].bytes();
        match comm.rank() {
            1 => comm.all_gather(device.stream(), &[0; 3], nothing, nothing)?,
            _ => comm.all_reduce(device.stream(), Number::F32, nothing, nothing)?,
        }
        comm.wait(device.work())
    }));
    assert!(matches!(error, GroupError::Mismatch { rank: 1, .. }), "{error}");
    fake.check();
}

#[test]
fn a_gpu_rank_that_does_not_come_is_named_on_all() {
    let _alone = alone();
    let fake = Fake::new();
    let error = the_error(each_rank(&fake.paths(), shm(4), LIMIT, |rank| match rank.comm.rank() {
        2 => stay_away(rank),
        _ => sum(rank, 100),
    }));
    let GroupError::PeerLost { rank: 2, epoch: 1, cause } = &error else { panic!("{error}") };
    let LostCause::Late { call, after_ms: 1000 } = cause else { panic!("{error}") };
    assert!(call.starts_with("a wait after all_reduce of 400 bytes"), "{call}");
    fake.check();
}

#[test]
fn a_message_that_nobody_takes_names_the_peer() {
    let _alone = alone();
    let fake = Fake::new();
    let error = the_error(each_rank(&fake.paths(), shm(3), LIMIT, |rank| {
        if rank.comm.rank() != 0 {
            return stay_away(rank);
        }
        let Rank { comm, kept, device } = rank;
        kept.push(device.put(&vec![0; 100_000]));
        comm.send(device.stream(), 2, kept[0].bytes())?;
        comm.wait(device.work())
    }));
    let GroupError::PeerLost { rank: 2, cause, .. } = &error else { panic!("{error}") };
    assert!(matches!(cause, LostCause::Late { after_ms: 1000, .. }), "{error}");
    fake.check();
}

#[test]
fn a_rank_that_does_not_join_is_named_on_all() {
    let _alone = alone();
    let fake = Fake::new();
    let nccl = Nccl::open(&fake.paths()).unwrap();
    let error = the_error(each_device(&fake.paths(), shm(3), LIMIT, |control, _device| {
        let link = control.link().clone();
        if link.rank() != 1 {
            return NcclComm::begin(&nccl, control).map(drop);
        }
        while link.aborted().is_none() {
            std::thread::sleep(Duration::from_millis(1));
        }
        NcclComm::begin(&nccl, control).map(drop)
    }));
    assert!(matches!(error, GroupError::PeerLost { rank: 1, .. }), "{error}");
    fake.check();
}

#[test]
fn a_device_that_hangs_ends_the_epoch() {
    let _alone = alone();
    let fake = Fake::new();
    fake.fault(Fault { rank: 1, code: 0, job: 1 });
    let error = the_error(each_rank(&fake.paths(), shm(3), LIMIT, |rank| {
        sum(rank, 3)?;
        sum(rank, 3)
    }));
    let GroupError::Ended(why) = &error else { panic!("{error}") };
    assert!(why.contains("within 1000 ms, and no rank is missing"), "{why}");
    fake.check();
}

#[test]
fn a_gpu_rank_whose_nccl_fails_is_named_on_all() {
    let _alone = alone();
    let fake = Fake::new();
    fake.fault(Fault { rank: 2, code: 1, job: 3 });
    let error = the_error(each_rank(&fake.paths(), shm(3), PATIENCE, |rank| {
        (0..9).try_for_each(|_| sum(rank, 3))
    }));
    let GroupError::PeerLost { rank: 2, epoch: 1, cause } = &error else { panic!("{error}") };
    let LostCause::Failed(why) = cause else { panic!("{error}") };
    assert!(why.contains("a device's error of the fake (the last error)"), "{why}");
    fake.check();
}

#[test]
fn a_peer_that_nccl_misses_is_left_to_the_group_to_name() {
    let _alone = alone();
    let fake = Fake::new();
    // Rank 0 hears of its peer's end by NCCL, before the group knows.
    fake.fault(Fault { rank: 0, code: 6, job: 0 });
    let lost = GroupError::PeerLost { rank: 2, epoch: 1, cause: LostCause::Exited };
    let error = the_error(each_rank(&fake.paths(), shm(3), PATIENCE, |rank| {
        if rank.comm.rank() == 1 {
            std::thread::sleep(Duration::from_millis(100));
            rank.comm.link().abort(lost.clone());
        }
        if rank.comm.rank() > 0 {
            return stay_away(rank);
        }
        sum(rank, 3)
    }));
    assert_eq!(error, lost);
    // Where the group knows of nothing, it is the rank itself.
    let error = the_error(each_rank(&fake.paths(), shm(2), PATIENCE, |rank| sum(rank, 3)));
    let GroupError::PeerLost { rank: 0, cause, .. } = &error else { panic!("{error}") };
    assert!(cause.to_string().contains("a peer's error of the fake"), "{error}");
    fake.check();
}

#[test]
fn an_end_that_hangs_delays_no_error_and_is_told() {
    let _alone = alone();
    let fake = Fake::new();
    fake.hang_ends(true);
    let nccl = Nccl::open(&fake.paths()).unwrap();
    each_device(&fake.paths(), shm(2), LIMIT, |control, device| {
        let comm = NcclComm::begin(&nccl, control).unwrap();
        let ended = GroupError::Ended("for a test".into());
        let link = comm.link().clone();
        link.abort(ended.clone());
        let mut rank = Rank { comm, kept: Vec::new(), device };
        let start = Instant::now();
        assert_eq!(sum(&mut rank, 1), Err(ended));
        assert!(start.elapsed() < Duration::from_secs(10));
        let closed = rank.comm.close();
        assert!(matches!(&closed, Err(NcclError::Left(why)) if why.contains("within 1500 ms")));
    });
    fake.hang_ends(false);
    let start = Instant::now();
    while fake.left() > 0 && start.elapsed() < PATIENCE {
        std::thread::sleep(Duration::from_millis(1));
    }
    fake.check();
}

#[test]
fn nothing_is_left_of_communicators() {
    let _alone = alone();
    let fake = Fake::new();
    let mut before = None;
    for round in 0..4 {
        // Every other epoch is aborted in the middle of a call.
        fake.fault(Fault { rank: round % 2, code: 0, job: 2 });
        each_rank(&fake.paths(), shm(3), LIMIT, |rank| {
            sum(rank, 30_000).unwrap();
            if round % 2 == 0 {
                assert!((0..2).try_for_each(|_| sum(rank, 30_000)).is_err());
            }
        });
        fake.check();
        let now = belongings();
        assert_eq!(*before.get_or_insert(now), now, "descriptors, threads, mappings");
        assert_eq!(now[1..], [0, 0]);
    }
}

/// Descriptors of this process, threads of communicators and streams, and boards of the stand-in.
fn belongings() -> [usize; 3] {
    let threads = fs::read_dir("/proc/self/task").unwrap().filter(|task| {
        let name = fs::read_to_string(task.as_ref().unwrap().path().join("comm"));
        let name = name.unwrap_or_default();
        name.starts_with("fabric-") || name.starts_with("fake-")
    });
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let maps = maps.lines().filter(|line| line.contains("/fake-nccl-"));
    [fs::read_dir("/proc/self/fd").unwrap().count(), threads.count(), maps.count()]
}
