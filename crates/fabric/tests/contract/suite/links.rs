//! Links without any collective.

use std::time::{Duration, Instant};

use pomona_fabric::link::{COUNTERS, Link};
use pomona_fabric::wait::{Awaited, wait};
use pomona_types::{GroupError, LostCause};

use super::{Make, each_rank, noise};

/// Far more than anything here takes.
const LONG: Duration = Duration::from_secs(60);

fn await_count(link: &dyn Link, peer: usize, counter: usize, target: u32) {
    let start = Instant::now();
    wait(link, Awaited { peer, counter, target }, |_| {
        assert!(start.elapsed() < LONG, "counter {counter} of rank {peer} stands still");
        Ok(())
    })
    .unwrap();
}

pub fn puts_arrive_before_their_notifications(make: Make) {
    const BYTES: usize = 10_000;
    each_rank(make(3, 3 * BYTES), |link| {
        let me = link.rank();
        for round in 0..50 {
            for peer in (0..3).filter(|peer| *peer != me) {
                let bytes = noise(me, BYTES, round);
                let (first, rest) = bytes.split_at(round * 100);
                link.put(peer, me * BYTES, &[first, &[], rest], COUNTERS - 1).unwrap();
            }
            for peer in (0..3).filter(|peer| *peer != me) {
                await_count(&*link, peer, COUNTERS - 1, round as u32 + 1);
                // SAFETY: the peer writes there again after the answer below only.
                let arena =
                    unsafe { std::slice::from_raw_parts(link.arena(me).unwrap(), 3 * BYTES) };
                assert_eq!(arena[peer * BYTES..][..BYTES], noise(peer, BYTES, round));
                link.put(peer, 0, &[], 0).unwrap();
            }
            for peer in (0..3).filter(|peer| *peer != me) {
                await_count(&*link, peer, 0, round as u32 + 1);
            }
        }
    });
}

pub fn a_parked_rank_is_woken_by_a_put(make: Make) {
    each_rank(make(2, 4096), |link| {
        for round in 0..200 {
            let (mine, theirs) = if link.rank() == 0 { (1, 1) } else { (2, 2) };
            if link.rank() == round % 2 {
                link.put(1 - link.rank(), 0, &[], mine).unwrap();
                continue;
            }
            let start = Instant::now();
            let target = round as u32 / 2 + 1;
            loop {
                let seen = link.count(1 - link.rank(), 3 - theirs);
                if seen >= target {
                    break;
                }
                link.park(1 - link.rank(), 3 - theirs, seen, LONG);
            }
            assert!(start.elapsed() < LONG / 2, "slept through a put");
        }
    });
}

pub fn an_abort_wakes_everyone_and_its_first_cause_stays(make: Make) {
    let lost = |rank| GroupError::PeerLost { rank, epoch: 0, cause: LostCause::Silent(500) };
    let causes = each_rank(make(4, 4096), |link| {
        if link.rank() == 2 {
            std::thread::sleep(Duration::from_millis(30));
            link.abort(lost(3));
        }
        let start = Instant::now();
        while link.aborted().is_none() {
            link.park((link.rank() + 1) % 4, 0, 0, LONG);
            assert!(start.elapsed() < LONG / 2, "slept through an abort");
        }
        link.abort(lost(1));
        link.aborted().unwrap()
    });
    assert_eq!(causes, vec![lost(3); 4]);
}

pub fn a_put_outside_of_the_arena_is_refused(make: Make) {
    each_rank(make(2, 4096), |link| {
        let peer = 1 - link.rank();
        for (peer, offset, bytes) in [(peer, 4090, 7), (peer, usize::MAX, 1), (2, 0, 1)] {
            let refusal = link.put(peer, offset, &[&vec![0; bytes]], 0).unwrap_err();
            assert!(matches!(refusal, GroupError::Invalid(_)), "{refusal}");
        }
        link.put(peer, 4090, &[&[0; 6]], 0).unwrap();
        await_count(&*link, peer, 0, 1);
        assert_eq!(link.aborted(), None);
    });
}
