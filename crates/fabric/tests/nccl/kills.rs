//! Ranks in processes of their own, one of which is killed in the middle of a call.
//!
//! Rank 0 is the test; the others are this binary again, running one of the tests at the end.

use std::process::{Command, Stdio};
use std::sync::Arc;

use pomona_fabric::coll::World;
use pomona_fabric::group::GroupOptions;
use pomona_fabric::group::local::{LocalGroup, LocalMember, LocalOptions};
use pomona_fabric::link::Link;
use pomona_fabric::nccl::{Nccl, NcclComm, Number, Paths, survey};
use pomona_types::{Collective, GroupError};
use rustix::process::{Pid, Signal, kill_process};

use super::device::{Device, Driver};
use super::fake::{self, Fake};
use super::{ARENA_BYTES, PATIENCE, Rank, alone};

const IDENTITY: &str = "ranks with devices";
/// A rank's words about the end of the last epoch, behind its process.
const WORDS: usize = 300;

/// Sums without end. Before them, ranks tell each other their processes and what they saw last.
fn work(
    paths: &Paths,
    link: Arc<dyn Link>,
    last: &str,
    look: impl FnOnce(&[u32], &[String]),
) -> GroupError {
    let mut world = World::new(link).with_limit(PATIENCE);
    let (me, ranks) = (world.link().rank(), world.link().ranks());
    let all = world.all(ARENA_BYTES).unwrap();
    let control = world.all(ARENA_BYTES).unwrap();
    let mut own = vec![0; 4 + WORDS];
    own[..4].copy_from_slice(&std::process::id().to_le_bytes());
    own[4..4 + last.len()].copy_from_slice(last.as_bytes());
    let mut told = vec![0; ranks * own.len()];
    if let Err(why) = all.all_gather(1, &vec![own.len(); ranks], &own, &mut told) {
        return why;
    }
    let rows = || told.chunks(4 + WORDS);
    let words = |row: &[u8]| String::from_utf8_lossy(&row[4..]).trim_end_matches('\0').to_owned();
    let processes: Vec<u32> =
        rows().map(|row| u32::from_le_bytes(row[..4].try_into().unwrap())).collect();
    let device = Device::open(Driver::open(&paths.driver), me);
    let comm = match NcclComm::begin(&Nccl::open(paths).unwrap(), control) {
        Ok(comm) => comm,
        Err(why) => return why,
    };
    let mut rank = Rank { comm, kept: vec![device.put(&[0; 400_000])], device };
    // The look may kill somebody, but not before all have joined.
    if let Err(why) = all.barrier() {
        return why;
    }
    look(&processes, &rows().map(words).collect::<Vec<_>>());
    let Rank { comm, kept, device } = &mut rank;
    let bytes = kept[0].bytes();
    loop {
        let called = comm.all_reduce(device.stream(), Number::F32, bytes, bytes);
        if let Err(why) = called.and_then(|()| comm.wait(device.work())) {
            return why;
        }
    }
}

/// Follows the parent from epoch to epoch.
fn follow(paths: &Paths) {
    let member = LocalMember::join(IDENTITY).unwrap();
    let mut last = String::new();
    while let Ok(link) = member.next_epoch() {
        last = work(paths, link, &last, |_, _| {}).to_string();
    }
}

/// Starts `ranks` and kills one; the others say the same of it, and go on in a second epoch.
fn kill_one(paths: &Paths, child: &str, ranks: usize, victim: usize, signal: Signal) {
    let group = GroupOptions { identity: IDENTITY.into(), ..GroupOptions::new(ranks) };
    let options = LocalOptions { group, spares: 0, arena_bytes: 2 * ARENA_BYTES };
    let group = LocalGroup::spawn(&options, |_| {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--ignored", "--exact", child]).stdout(Stdio::null());
        command
    })
    .unwrap();
    let mut killer = None;
    let link = group.next_epoch().unwrap();
    let why = work(paths, link, "", |processes, _| {
        let process = Pid::from_raw(processes[victim] as i32).unwrap();
        killer = Some(std::thread::spawn(move || {
            std::thread::sleep(std::time::Duration::from_millis(20));
            kill_process(process, signal).unwrap();
        }));
    });
    killer.unwrap().join().unwrap();
    let why = why.to_string();
    let expected = if signal == Signal::STOP { "no sign of life for" } else { "its process ended" };
    let lost = format!("rank {victim} was lost in epoch 1: {expected}");
    assert!(why.starts_with(&lost), "{why}");

    let link = group.next_epoch().unwrap();
    assert_eq!((link.epoch(), link.ranks()), (2, ranks - 1));
    let over = GroupError::Ended("enough seen".into());
    let mut told = Vec::new();
    let ending = link.clone();
    let end = work(paths, link, &why, |_, words| {
        told = words.to_vec();
        ending.abort(over.clone());
    });
    assert_eq!(end, over);
    assert_eq!(told, vec![why; ranks - 1]);
}

#[test]
fn survivors_of_a_killed_gpu_rank_name_it_and_go_on_without_it() {
    let _alone = alone();
    let fake = Fake::new();
    for (ranks, victim) in [(3, 1), (4, 3)] {
        kill_one(&fake.paths(), "kills::rank_process", ranks, victim, Signal::KILL);
    }
    fake.check();
}

#[test]
fn survivors_of_a_stopped_gpu_rank_name_it_and_go_on_without_it() {
    let _alone = alone();
    let fake = Fake::new();
    kill_one(&fake.paths(), "kills::rank_process", 3, 2, Signal::STOP);
    fake.check();
}

#[test]
#[ignore = "needs two GPUs and libnccl.so.2, see the head of this target"]
fn a_rank_is_lost_on_a_gpu() {
    let _alone = alone();
    let paths = Paths::default();
    let ranks = survey(&paths).devices.unwrap().names.len();
    if ranks < 2 {
        println!("SKIPPED: two devices are needed, there are {ranks}");
        return;
    }
    kill_one(&paths, "kills::rank_process_with_a_gpu", ranks, ranks - 1, Signal::KILL);
}

#[test]
#[ignore = "a rank of the other tests, which start it"]
fn rank_process() {
    follow(&fake::paths());
}

#[test]
#[ignore = "a rank of the other tests, which start it"]
fn rank_process_with_a_gpu() {
    follow(&Paths::default());
}
