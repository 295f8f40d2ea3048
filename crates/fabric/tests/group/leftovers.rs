//! What is left of groups that came and went: nothing.

use std::fs;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pomona_fabric::coll::World;
use pomona_fabric::link::Link;
use pomona_fabric::link::ofi::provider;
use pomona_fabric::rendezvous::{EpochPlan, JoinOptions, Lobby, LobbyOptions, Transport, join};
use pomona_fabric::secure::{Policy, Token};
use pomona_types::{Collective, GroupError};

use super::rank::{End, work};
use super::{alone, options, spawn};

/// Nothing takes longer, on however busy a machine.
const PATIENCE: Duration = Duration::from_secs(30);
/// How the names of all threads begin that this crate starts.
const THREADS: [&str; 5] = ["fabric-", "pulse ", "handshake", "lobby", "examination"];
/// Epochs between machines, and which of them a rank aborts.
const EPOCHS: u32 = 4;
const ABORTED: u32 = 2;

/// Descriptors, threads, children, and mappings of this process.
fn belongings() -> [usize; 4] {
    let count = |path: &str| fs::read_dir(path).unwrap().count();
    let children = fs::read_dir("/proc/self/task").unwrap().map(|task| {
        let path = task.unwrap().path().join("children");
        fs::read_to_string(path).unwrap_or_default().split_whitespace().count()
    });
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let maps = maps.lines().filter(|line| line.contains("pomona-fabric")).count();
    // The tests that wait for this one have threads too; those of a group have its names.
    let threads = fs::read_dir("/proc/self/task").unwrap().filter(|task| {
        let path = task.as_ref().unwrap().path().join("comm");
        let name = fs::read_to_string(path).unwrap_or_default();
        THREADS.iter().any(|begin| name.starts_with(begin))
    });
    [count("/proc/self/fd"), threads.count(), children.sum(), maps]
}

/// The same once there are so many threads: they get their names, and end, when they can run.
fn belongings_when(enough: impl Fn(usize) -> bool) -> [usize; 4] {
    let begun = Instant::now();
    loop {
        let now = belongings();
        if enough(now[1]) || begun.elapsed() > PATIENCE {
            return now;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn nothing_is_left_of_groups_that_lost_ranks() {
    let _alone = alone();
    let mut before = None;
    for round in 0..3 {
        let group = spawn(&options(3, 1));
        let mut last = End::default();
        for epoch in 1..3 {
            let link = group.next_epoch().unwrap();
            assert_eq!(link.epoch(), epoch);
            let look = &mut |roll: &super::rank::Roll| {
                let process = roll.process_ids[2] as i32;
                let process = rustix::process::Pid::from_raw(process).unwrap();
                rustix::process::kill_process(process, rustix::process::Signal::KILL).unwrap();
            };
            last = work(link, &last, Some((round, look))).unwrap().1;
        }
        drop(group);
        // The first round opens what stays for the life of the process.
        let now = belongings_when(|threads| threads == 0);
        assert_eq!(*before.get_or_insert(now), now, "descriptors, threads, children, mappings");
        assert_eq!(now[1..], [0, 0, 0]);
    }
}

#[test]
fn nothing_is_left_of_epochs_between_machines() {
    let _alone = alone();
    let mut transports = vec![Transport::Tcp];
    match provider(Ipv4Addr::LOCALHOST.into()) {
        Ok(provider) => transports.push(Transport::Libfabric { provider: provider.to_owned() }),
        Err(why) => {
            let required = std::env::var("POMONA_REQUIRE").unwrap_or_default();
            assert!(required.split(',').all(|name| name != "libfabric"), "it is required: {why}");
            println!("SKIPPED: {why}");
        }
    }
    for transport in transports {
        let mut before = None;
        for _ in 0..3 {
            epochs(&transport);
            // As above.
            let now = belongings_when(|threads| threads == 0);
            assert_eq!(*before.get_or_insert(now), now, "{transport:?}");
            assert_eq!(now[1..], [0, 0, 0], "{transport:?}");
        }
    }
}

/// A leader and two nodes, as threads, meet in several epochs.
fn epochs(transport: &Transport) {
    let token = Token::generate();
    let options = LobbyOptions {
        token: token.clone(),
        policy: Policy::Auth,
        version: "a version".to_owned(),
        task: String::new(),
        fingerprint: [7; 32],
        preparation: PATIENCE,
    };
    let lobby = Lobby::open("127.0.0.1:0", options).unwrap();
    let options = JoinOptions {
        leader: lobby.address().to_string(),
        token,
        policy: Policy::Auth,
        version: "a version".to_owned(),
        data: None,
        patience: PATIENCE,
        admission: PATIENCE,
    };
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let seat = join(&options, |_| Ok([7; 32])).unwrap();
                // Until the leader lets go of its end.
                while let Ok(started) = seat.start(None) {
                    meet(started.link);
                }
            });
        }
        let members = lobby.take(2, PATIENCE).unwrap();
        for epoch in 1..=EPOCHS {
            let (transport, timeout) = (transport.clone(), PATIENCE);
            let (arena_bytes, task) = (super::ARENA_BYTES, String::new());
            let plan = EpochPlan { epoch, transport, arena_bytes, timeout, task };
            let link = lobby.start(&members, &plan).unwrap();
            // Those of the lobby and of the own pulse are seen, so the check can fail.
            let [_, threads, ..] = belongings_when(|threads| threads >= 2);
            assert!(threads >= 2, "{threads} threads have the names of the fabric's");
            meet(link);
        }
    });
}

/// Some sums, or sums until the epoch is aborted.
fn meet(link: Arc<dyn Link>) {
    let comm = World::new(link.clone()).with_limit(PATIENCE).all(super::ARENA_BYTES).unwrap();
    if link.epoch() != ABORTED {
        // A busy machine may end it before: what is left has to be the same.
        let _ = (0..20).try_for_each(|_| comm.all_reduce(&mut [1.0; 2000]));
        return;
    }
    let all_here = comm.barrier().is_ok();
    if comm.rank() == 1 && all_here {
        link.abort(GroupError::Ended("for a test".into()));
    }
    while comm.all_reduce(&mut [1.0; 2000]).is_ok() {}
}
