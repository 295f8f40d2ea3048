//! Ranks as threads, over the loopback interface.

use std::net::{SocketAddr, TcpStream};
use std::sync::Barrier;

use super::*;
use crate::secure::{EpochSecret, Policy};

const ARENA: usize = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(20);
const POLICIES: [Policy; 3] = [Policy::Off, Policy::Auth, Policy::Seal];

fn listeners(ranks: usize) -> (Vec<TcpListener>, Vec<SocketAddr>) {
    let all: Vec<_> = (0..ranks).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
    let addresses = all.iter().map(|listener| listener.local_addr().unwrap()).collect();
    (all, addresses)
}

fn options(rank: usize, addresses: &[SocketAddr], secret: &EpochSecret) -> TcpOptions {
    let mesh = MeshOptions {
        rank,
        addresses: addresses.to_vec(),
        epoch: 7,
        secret: secret.clone(),
        policy: Policy::Off,
        timeout: PATIENCE,
    };
    // Long enough for a machine that has other things to do.
    TcpOptions { silent_after: PATIENCE, ..TcpOptions::new(mesh, ARENA) }
}

/// Runs `work` on each rank of an epoch and returns what they returned.
fn epoch<T: Send>(
    ranks: usize,
    policy: Policy,
    work: impl Fn(TcpLink) -> T + Send + Sync,
) -> Vec<T> {
    let (listeners, addresses) = listeners(ranks);
    let secret = EpochSecret::generate();
    let one = |rank: usize| {
        let mut options = options(rank, &addresses, &secret);
        options.mesh.policy = policy;
        work(TcpLink::connect(&listeners[rank], &options).unwrap())
    };
    std::thread::scope(|scope| {
        let one = &one;
        let threads: Vec<_> = (0..ranks).map(|rank| scope.spawn(move || one(rank))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// Waits as the layer above does, without its politeness.
fn wait(link: &TcpLink, peer: usize, counter: usize, until: u32) -> Result<(), GroupError> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let seen = link.count(peer, counter);
        if seen >= until {
            return Ok(());
        }
        if let Some(why) = link.aborted() {
            return Err(why);
        }
        assert!(Instant::now() < deadline, "rank {peer} did not come");
        link.park(peer, counter, seen, Duration::from_millis(100));
    }
}

fn bytes(link: &TcpLink, offset: usize, bytes: usize) -> Vec<u8> {
    let start = link.arena(link.rank()).unwrap();
    assert!(offset + bytes <= link.arena_bytes());
    // SAFETY: inside of the arena, and the counters said that nobody writes there now.
    unsafe { std::slice::from_raw_parts(start.add(offset), bytes) }.to_vec()
}

#[test]
fn puts_of_all_sizes_arrive_from_everyone() {
    const SIZES: [usize; 7] = [0, 1, 24, 8191, 8193, 70_000, 300_000];
    for policy in POLICIES {
        epoch(3, policy, |link| {
            let pattern = |rank: usize, size: usize| vec![(rank * 31 + size % 251) as u8; size];
            let others = |rank: usize| (0..3).filter(move |other| *other != rank);
            for (round, size) in SIZES.into_iter().enumerate() {
                let own = pattern(link.rank(), size);
                let (first, second) = own.split_at(size / 3);
                for peer in others(link.rank()) {
                    link.put(peer, link.rank() * 300_000, &[first, second], 9).unwrap();
                }
                for peer in others(link.rank()) {
                    wait(&link, peer, 9, round as u32 + 1).unwrap();
                    assert_eq!(bytes(&link, peer * 300_000, size), pattern(peer, size), "{policy}");
                    link.put(peer, 0, &[], 10).unwrap();
                }
                // Nobody writes before all have looked.
                for peer in others(link.rank()) {
                    wait(&link, peer, 10, round as u32 + 1).unwrap();
                }
            }
        });
    }
}

#[test]
fn two_ranks_that_send_much_at_once_both_get_on() {
    for policy in [Policy::Off, Policy::Seal] {
        epoch(2, policy, |link| {
            let much = vec![link.rank() as u8 + 1; ARENA];
            let peer = 1 - link.rank();
            for _ in 0..40 {
                link.put(peer, 0, &[&much], 0).unwrap();
            }
            wait(&link, peer, 0, 40).unwrap();
            assert_eq!(bytes(&link, 0, ARENA), vec![peer as u8 + 1; ARENA]);
        });
    }
}

#[test]
fn a_rank_whose_process_ends_is_named_by_all_others() {
    let causes = epoch(4, Policy::Seal, |link| {
        if link.rank() == 2 {
            for peer in link.peers.iter().flatten() {
                peer.connection.shutdown(std::net::Shutdown::Both).unwrap();
            }
            link.pulse.cut();
            return None;
        }
        // Rank 0 waits for the dead, the others for each other.
        let peer = [2, 3, 0, 1][link.rank()];
        wait(&link, peer, 0, 1).err()
    });
    for rank in [0, 1, 3] {
        let lost = matches!(
            causes[rank],
            Some(GroupError::PeerLost { rank: 2, epoch: 7, cause: LostCause::Disconnected(_) })
        );
        assert!(lost, "rank {rank}: {:?}", causes[rank]);
    }
}

#[test]
fn a_cause_is_waited_for_while_the_machine_is_busy() {
    let why = GroupError::PeerLost { rank: 9, epoch: 7, cause: LostCause::Exited };
    let causes = epoch(2, Policy::Seal, |link| {
        if link.rank() == 0 {
            // The pulse of the other stands still by now, and its data ends before it hears why.
            std::thread::sleep(Duration::from_millis(200));
            link.abort(why.clone());
            return None;
        }
        std::thread::scope(|scope| {
            scope.spawn(|| link.pulse.stall(Duration::from_millis(600)));
            wait(&link, 0, 0, 1).err()
        })
    });
    assert_eq!(causes[1], Some(why));
}

#[test]
fn an_abort_reaches_everybody_who_waits() {
    let why = GroupError::PeerLost { rank: 9, epoch: 7, cause: LostCause::Exited };
    for policy in POLICIES {
        let causes = epoch(3, policy, |link| {
            if link.rank() == 1 {
                link.abort(why.clone());
                link.abort(GroupError::Ended("a second cause".into()));
            }
            wait(&link, (link.rank() + 1) % 3, 0, 1).err()
        });
        assert_eq!(causes, vec![Some(why.clone()); 3]);
    }
}

#[test]
fn a_put_that_nobody_takes_ends_with_the_abort() {
    let ended = GroupError::Ended("enough".into());
    let errors = epoch(2, Policy::Off, |link| {
        if link.rank() == 1 {
            std::thread::sleep(Duration::from_millis(100));
            link.abort(ended.clone());
            return link.put(0, 0, &[b"late"], 0).err();
        }
        let much = vec![0; ARENA];
        (0..100).find_map(|_| link.put(1, 0, &[&much], 0).err())
    });
    assert_eq!(errors, vec![Some(ended.clone()); 2]);
}

#[test]
fn who_leaves_after_its_work_is_no_fault() {
    let all_here = Barrier::new(3);
    epoch(3, Policy::Auth, |link| {
        all_here.wait();
        if link.rank() == 0 {
            link.put(1, 0, &[&[5; 100_000]], 0).unwrap();
            return;
        }
        std::thread::sleep(Duration::from_millis(600));
        if link.rank() == 1 {
            wait(&link, 0, 0, 1).unwrap();
            link.put(2, 0, &[], 0).unwrap();
        } else {
            wait(&link, 1, 0, 1).unwrap();
        }
        assert_eq!(link.aborted(), None);
    });
}

#[test]
fn a_put_outside_of_the_arena_is_the_callers_mistake() {
    epoch(2, Policy::Off, |link| {
        let peer = 1 - link.rank();
        for (to, offset, counter) in [
            (peer, ARENA, 0),
            (peer, usize::MAX, 0),
            (peer, 0, COUNTERS),
            (5, 0, 0),
            (link.rank(), 0, 0),
        ] {
            let put = link.put(to, offset, &[b"x"], counter);
            assert!(matches!(put, Err(GroupError::Invalid(_))), "{to} {offset} {counter}: {put:?}");
        }
    });
}

#[test]
fn strangers_and_other_epochs_are_turned_away() {
    let (listeners, addresses) = listeners(2);
    let secret = EpochSecret::generate();
    let stranger = || {
        // Silent ones, and one that says something.
        let silent: Vec<_> = (0..5).map(|_| TcpStream::connect(addresses[0]).unwrap()).collect();
        let mut loud = TcpStream::connect(addresses[0]).unwrap();
        std::io::Write::write_all(&mut loud, &[0xa5; 500]).unwrap();
        (silent, loud)
    };
    let kept = stranger();
    let stale = |change: fn(&mut TcpOptions)| {
        let mut options = options(1, &addresses, &secret);
        options.mesh.timeout = Duration::from_millis(300);
        change(&mut options);
        TcpLink::connect(&listeners[1], &options).err()
    };
    std::thread::scope(|scope| {
        let good = scope.spawn(|| {
            let link = TcpLink::connect(&listeners[0], &options(0, &addresses, &secret)).unwrap();
            wait(&link, 1, 0, 1)
        });
        let refused = [
            stale(|options| options.mesh.epoch = 6),
            stale(|options| options.mesh.policy = Policy::Seal),
            stale(|options| options.mesh.secret = EpochSecret::generate()),
        ];
        for refusal in refused {
            assert!(matches!(refusal, Some(MeshError::Missing { .. })), "{refusal:?}");
        }
        let link = TcpLink::connect(&listeners[1], &options(1, &addresses, &secret)).unwrap();
        link.put(0, 0, &[b"here"], 0).unwrap();
        good.join().unwrap().unwrap();
    });
    drop(kept);
}

#[test]
fn who_does_not_come_is_named() {
    let (listeners, addresses) = listeners(3);
    let secret = EpochSecret::generate();
    let mut options = options(0, &addresses, &secret);
    options.mesh.timeout = Duration::from_millis(100);
    let Err(MeshError::Missing { missing, .. }) = TcpLink::connect(&listeners[0], &options) else {
        panic!("nobody is there")
    };
    assert_eq!(missing, [1, 2]);
}
