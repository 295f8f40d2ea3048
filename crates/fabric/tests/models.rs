//! The lock-free parts of shared memory, in small, with every order of steps that the memory model
//! allows: [loom](https://docs.rs/loom) tries them all. The steps are those of `link/shm.rs`,
//! `coll/exchange.rs` and `coll/messages.rs`; what is changed there is changed here.
#![allow(clippy::unwrap_used)]

use loom::sync::Arc;
use loom::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release, SeqCst};
use loom::sync::atomic::{AtomicU32, fence};
use loom::thread;

/// What `ShmLink::put` and `park` do to a counter, the sleepers and the doorbell.
#[derive(Default)]
struct Bell {
    counter: AtomicU32,
    sleepers: AtomicU32,
    doorbell: AtomicU32,
}

impl Bell {
    fn put(&self) {
        self.counter.fetch_add(1, Release);
        fence(SeqCst);
        if self.sleepers.load(Relaxed) > 0 {
            self.doorbell.fetch_add(1, Release);
        }
    }

    /// Whether the rank would sleep, and the doorbell that it would sleep at.
    fn park(&self) -> Option<u32> {
        let heard = self.doorbell.load(Acquire);
        self.sleepers.fetch_add(1, Relaxed);
        fence(SeqCst);
        (self.counter.load(Acquire) == 0).then_some(heard)
    }
}

#[test]
fn no_put_is_slept_through() {
    loom::model(|| {
        let bell = Arc::new(Bell::default());
        let other = bell.clone();
        let putter = thread::spawn(move || other.put());
        let asleep_at = bell.park();
        putter.join().unwrap();
        // Who sleeps at a doorbell is woken when it has changed, or finds it changed at once.
        if let Some(heard) = asleep_at {
            assert_ne!(bell.doorbell.load(Acquire), heard, "asleep for ever");
        }
    });
}

#[test]
fn the_bytes_of_a_counted_put_are_there() {
    loom::model(|| {
        let (bytes, counter) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicU32::new(0)));
        let (their_bytes, their_counter) = (bytes.clone(), counter.clone());
        let putter = thread::spawn(move || {
            their_bytes.store(7, Relaxed);
            their_counter.fetch_add(1, Release);
        });
        if counter.load(Acquire) == 1 {
            assert_eq!(bytes.load(Relaxed), 7);
        }
        putter.join().unwrap();
    });
}

#[test]
fn all_read_the_whole_cause_of_the_one_abort_that_was_first() {
    loom::model(|| {
        // Each rank's cause, of two words; then the abort word.
        let causes: Arc<[[AtomicU32; 2]; 2]> = Arc::default();
        let word = Arc::new(AtomicU32::new(0));
        let read = |causes: &[[AtomicU32; 2]; 2], word: &AtomicU32| {
            let rank = word.load(Acquire).checked_sub(1)? as usize;
            let [first, second] = &causes[rank];
            assert_eq!(first.load(Relaxed), second.load(Relaxed), "half a cause");
            Some(first.load(Relaxed))
        };
        let abort = |causes: &[[AtomicU32; 2]; 2], word: &AtomicU32, rank: usize| {
            causes[rank].iter().for_each(|part| part.store(rank as u32 + 10, Relaxed));
            let _ = word.compare_exchange(0, rank as u32 + 1, AcqRel, Relaxed);
        };
        let (their_causes, their_word) = (causes.clone(), word.clone());
        let other = thread::spawn(move || {
            abort(&their_causes, &their_word, 1);
            read(&their_causes, &their_word)
        });
        abort(&causes, &word, 0);
        let seen = read(&causes, &word);
        assert!(seen.is_some());
        assert_eq!(other.join().unwrap(), seen, "two causes");
    });
}

/// Two ranks exchange three rounds over so many slots.
fn rounds(slots: usize) {
    let mut model = loom::model::Builder::new();
    // All orders passed too, in half a minute; this many changes of the thread find what goes wrong
    // with one slot.
    model.preemption_bound = Some(2);
    model.check(move || {
        // Of each rank: its slots, which the other reads, and what it has notified.
        let places: Arc<[[AtomicU32; 2]; 2]> = Arc::default();
        let counters: Arc<[AtomicU32; 2]> = Arc::default();
        let rank = move |places: &[[AtomicU32; 2]; 2], counters: &[AtomicU32; 2], me: usize| {
            for round in 0..3 {
                places[me][round as usize % slots].store(round + 1, Relaxed);
                counters[me].fetch_add(1, Release);
                while counters[1 - me].load(Acquire) <= round {
                    thread::yield_now();
                }
                let theirs = places[1 - me][round as usize % slots].load(Relaxed);
                assert_eq!(theirs, round + 1, "another round's bytes");
            }
        };
        let (their_places, their_counters) = (places.clone(), counters.clone());
        let other = thread::spawn(move || rank(&their_places, &their_counters, 1));
        rank(&places, &counters, 0);
        other.join().unwrap();
    });
}

#[test]
fn two_slots_are_enough_for_rounds_without_acknowledgement() {
    rounds(2);
}

#[test]
#[should_panic(expected = "another round's bytes")]
fn one_slot_is_not() {
    rounds(1);
}

/// When a receiver gives slots back.
#[derive(Clone, Copy, PartialEq)]
enum Credit {
    /// It has read what was in them.
    AfterReading,
    /// It knows that something is in them.
    BeforeReading,
}

/// How many credits a sender waits for before it sends a piece.
type Needed = fn(u32) -> u32;

const SLOTS: u32 = 4;
const CREDIT_SLOTS: u32 = 2;

/// As many as it takes for the slot's last piece to be among those that were given back.
fn all_needed(piece: u32) -> u32 {
    (piece + 1).saturating_sub(SLOTS).div_ceil(CREDIT_SLOTS)
}

/// One rank sends messages to another, through the slots and with the credits of
/// `coll/messages.rs`: enough of them to fill each slot twice.
fn messages(credit: Credit, needed: Needed) {
    const PIECES: u32 = 2 * SLOTS;
    let mut model = loom::model::Builder::new();
    // As with rounds: not all orders, and enough to find what goes wrong.
    model.preemption_bound = Some(2);
    model.check(move || {
        let slots: Arc<[AtomicU32; SLOTS as usize]> = Arc::default();
        let filled: Arc<[AtomicU32; SLOTS as usize]> = Arc::default();
        let credits = Arc::new(AtomicU32::new(0));
        let (their_slots, their_filled) = (slots.clone(), filled.clone());
        let their_credits = credits.clone();
        let sender = thread::spawn(move || {
            for piece in 0..PIECES {
                while their_credits.load(Acquire) < needed(piece) {
                    thread::yield_now();
                }
                let slot = (piece % SLOTS) as usize;
                their_slots[slot].store(piece + 1, Relaxed);
                their_filled[slot].fetch_add(1, Release);
            }
        });
        for piece in 0..PIECES {
            let slot = (piece % SLOTS) as usize;
            while filled[slot].load(Acquire) < piece / SLOTS + 1 {
                thread::yield_now();
            }
            let gives = (piece + 1).is_multiple_of(CREDIT_SLOTS);
            if gives && credit == Credit::BeforeReading {
                credits.fetch_add(1, Release);
            }
            assert_eq!(slots[slot].load(Relaxed), piece + 1, "another piece's bytes");
            if gives && credit == Credit::AfterReading {
                credits.fetch_add(1, Release);
            }
        }
        sender.join().unwrap();
    });
}

#[test]
fn credits_keep_pieces_that_were_not_read() {
    messages(Credit::AfterReading, all_needed);
}

#[test]
#[should_panic(expected = "another piece's bytes")]
fn credits_that_are_given_before_reading_do_not() {
    messages(Credit::BeforeReading, all_needed);
}

#[test]
#[should_panic(expected = "another piece's bytes")]
fn a_sender_that_rounds_credits_down_does_not() {
    messages(Credit::AfterReading, |piece| (piece + 1).saturating_sub(SLOTS) / CREDIT_SLOTS);
}
