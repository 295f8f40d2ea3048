//! One-sided transfer.

use std::sync::atomic::{AtomicUsize, Ordering};

use pomona_fabric::coll::World;
use pomona_fabric::xfer::{Handle, Transfer};
use pomona_types::{Collective, GroupError};

use super::{Make, each_rank, noise};

const BYTES: usize = 300_000;

/// Runs ranks that have told each other of one region each.
fn each_with_regions(
    make: Make,
    ranks: usize,
    body: impl Fn(usize, &mut Transfer, &[Handle]) + Sync,
) {
    let done = AtomicUsize::new(0);
    each_rank(make(ranks, 4 << 20), |link| {
        let rank = link.rank();
        let mut world = World::new(link);
        let comm = world.all(1 << 20).unwrap();
        let mut transfer = world.transfer(2 << 20).unwrap();
        let own = transfer.register(BYTES).unwrap().encode();
        let mut all = vec![0; ranks * Handle::BYTES];
        comm.all_gather(1, &vec![Handle::BYTES; ranks], &own, &mut all).unwrap();
        let (handles, _) = all.as_chunks::<{ Handle::BYTES }>();
        let handles: Vec<Handle> = handles.iter().map(Handle::decode).collect();
        body(rank, &mut transfer, &handles);
        // Whoever is done still answers the others.
        done.fetch_add(1, Ordering::SeqCst);
        while done.load(Ordering::SeqCst) < ranks {
            transfer.arrival().unwrap();
            std::thread::yield_now();
        }
    });
}

pub fn a_number_arrives_behind_the_bytes_of_its_put(make: Make) {
    each_with_regions(make, 3, |me, transfer, handles| {
        let (next, before) = ((me + 1) % 3, (me + 2) % 3);
        for round in 0..50 {
            // Two parts, at a place that changes; more puts than a ring has room for.
            let bytes = noise(me, 5000, round);
            let (first, rest) = bytes.split_at(round * 50);
            transfer.put(handles[next], round * 5000, &[first, rest], round as u32).unwrap();
        }
        for round in 0..50 {
            let arrival = transfer.arrival_from(before).unwrap();
            assert_eq!((arrival.immediate, arrival.region), (round as u32, handles[me]));
            let mut got = vec![0; 5000];
            transfer.read(handles[me], round * 5000, &mut got).unwrap();
            assert_eq!(got, noise(before, 5000, round));
        }
        assert_eq!(transfer.arrival().unwrap(), None);
    });
}

pub fn bytes_are_got_without_a_call_of_their_owner(make: Make) {
    each_with_regions(make, 2, |me, transfer, handles| {
        let peer = 1 - me;
        transfer.write(handles[me], 0, &noise(me, BYTES, 0)).unwrap();
        // Both have written: each put says so to the other.
        transfer.put(handles[peer], 0, &[], 7).unwrap();
        transfer.arrival_from(peer).unwrap();
        for (offset, bytes) in [(0, BYTES), (1, 70_000), (BYTES - 1, 1), (BYTES, 0)] {
            let mut got = vec![0; bytes];
            transfer.get(handles[peer], offset, &mut got).unwrap();
            assert_eq!(got, noise(peer, BYTES, 0)[offset..][..bytes]);
        }
    });
}

pub fn a_closed_region_is_free_once_all_have_answered(make: Make) {
    each_with_regions(make, 3, |me, transfer, handles| {
        let others = || (0..3).filter(move |other| *other != me);
        for other in others() {
            transfer.put(handles[other], me, &[&[1]], 0).unwrap();
        }
        for other in others() {
            transfer.arrival_from(other).unwrap();
        }
        transfer.close(handles[me]).unwrap();
        assert!(transfer.read(handles[me], 0, &mut [0]).is_err(), "it is closed");
        // When a fence has come back, so has what was before it.
        for other in others() {
            transfer.fence(other).unwrap();
        }
        assert_eq!(transfer.quarantined_bytes(), 0);
        for other in others() {
            transfer.fence(other).unwrap();
            // The other one may have closed its region by now, and then a put is refused.
            let refused = transfer.put(handles[other], BYTES, &[&[0]], 0);
            assert!(matches!(refused, Err(GroupError::Invalid(_))), "{refused:?}");
        }
    });
}

pub fn handles_that_are_no_good_are_refused(make: Make) {
    each_with_regions(make, 2, |me, transfer, handles| {
        let peer = handles[1 - me];
        let changed = |byte: usize, to: u8| {
            let mut bytes = peer.encode();
            bytes[byte] ^= to;
            Handle::decode(&bytes)
        };
        // Of another epoch, and of a rank that is none.
        let (stale, none) = (changed(8, 1), changed(0, 4));
        for (handle, offset, bytes) in [
            (stale, 0, 1),
            (none, 0, 1),
            (handles[me], 0, 1),
            (peer, BYTES, 1),
            (peer, usize::MAX, 1),
        ] {
            let put = transfer.put(handle, offset, &[&vec![0; bytes]], 0);
            let get = transfer.get(handle, offset, &mut vec![0; bytes]);
            for refused in [put, get] {
                assert!(matches!(refused, Err(GroupError::Invalid(_))), "{refused:?}");
            }
        }
        assert!(transfer.register(8 << 20).is_none());
    });
}
