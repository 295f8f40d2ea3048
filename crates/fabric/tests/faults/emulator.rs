//! A wire that misbehaves: a proxy for TCP in user space, for what the kernel cannot emulate here.
//!
//! Delay, rate, stalls from a seed; cuts of one direction or both; and, for sealed records, bytes
//! that are changed or come twice. Loss, order and duplicates of packets are TCP's own business,
//! so at this level they are delays: see docs/decisions/2026-11-22-links-are-reliable.md.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// How often a wire that holds bytes back looks whether it still has to.
const LOOK: Duration = Duration::from_millis(1);
/// Read at once.
const CHUNK_BYTES: usize = 64 << 10;

/// What a wire does to all bytes.
#[derive(Clone, Copy, Debug)]
pub struct Wire {
    /// Decides jitter and stalls.
    pub seed: u64,
    /// Each piece arrives so much later, and up to as much again by chance.
    pub delay: Duration,
    /// At most so many bytes a second; none: as many as there are.
    pub rate: Option<u64>,
    /// One piece in so many waits for [`stall`](Wire::stall); none: none does.
    pub stall_every: Option<u64>,
    /// How long a stalled piece waits, and what is behind it.
    pub stall: Duration,
}

impl Default for Wire {
    fn default() -> Wire {
        let none = Duration::ZERO;
        Wire { seed: 1, delay: none, rate: None, stall_every: None, stall: none }
    }
}

/// Which way, seen from who connects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    Forth,
    Back,
}

/// Something done to one piece of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trick {
    /// A bit of it is changed.
    Tamper,
    /// It comes twice.
    Replay,
}

/// All connections through one wire.
pub struct Emulator {
    address: SocketAddr,
    shared: Arc<Shared>,
}

struct Shared {
    wire: Wire,
    target: SocketAddr,
    /// Nothing passes, and nobody is told: the cable is out. By way.
    cut: [AtomicBool; 2],
    /// To be done to the next large piece on its way forth.
    trick: Mutex<Option<Trick>>,
    done: AtomicBool,
    serial: AtomicU64,
}

impl Emulator {
    /// A wire to `target`; who connects to its address is connected there.
    pub fn to(target: SocketAddr, wire: Wire) -> Emulator {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let shared = Arc::new(Shared {
            wire,
            target,
            cut: Default::default(),
            trick: Mutex::default(),
            done: AtomicBool::new(false),
            serial: AtomicU64::new(0),
        });
        let own = shared.clone();
        std::thread::spawn(move || {
            for near in listener.incoming().flatten() {
                if own.done.load(Ordering::Relaxed) {
                    return;
                }
                let Ok(far) = TcpStream::connect(own.target) else { continue };
                let ends = [(Way::Forth, &near, &far), (Way::Back, &far, &near)];
                for (way, from, to) in ends {
                    let (from, to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
                    let own = own.clone();
                    std::thread::spawn(move || own.pump(way, from, to));
                }
            }
        });
        Emulator { address, shared }
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Holds everything back that goes this way from now on.
    pub fn cut(&self, way: Way) {
        self.shared.cut[way as usize].store(true, Ordering::Relaxed);
    }

    /// Does this once, to the next large piece on its way forth.
    pub fn trick(&self, trick: Trick) {
        *self.shared.trick.lock().unwrap() = Some(trick);
    }

    /// Whether the trick was played.
    pub fn is_played(&self) -> bool {
        self.shared.trick.lock().unwrap().is_none()
    }
}

impl Drop for Emulator {
    fn drop(&mut self) {
        self.shared.done.store(true, Ordering::Relaxed);
        // Wakes who accepts.
        let _ = TcpStream::connect(self.address);
    }
}

impl Shared {
    fn pump(&self, way: Way, mut from: TcpStream, mut to: TcpStream) {
        to.set_nodelay(true).unwrap();
        let serial = self.serial.fetch_add(1, Ordering::Relaxed);
        let mut chance = Chance(self.wire.seed.wrapping_add(serial));
        let mut chunk = vec![0; CHUNK_BYTES];
        while let Ok(got @ 1..) = from.read(&mut chunk) {
            let begun = Instant::now();
            let mut wait = self.wire.delay + self.wire.delay.mul_f64(chance.fraction());
            if self.wire.stall_every.is_some_and(|every| chance.next().is_multiple_of(every)) {
                wait += self.wire.stall;
            }
            if let Some(rate) = self.wire.rate {
                wait += Duration::from_secs_f64(got as f64 / rate as f64);
            }
            std::thread::sleep(wait.saturating_sub(begun.elapsed()));
            while self.cut[way as usize].load(Ordering::Relaxed) {
                if self.done.load(Ordering::Relaxed) {
                    return;
                }
                std::thread::sleep(LOOK);
            }
            let piece = self.piece(way, &mut chunk[..got]);
            if to.write_all(&piece).is_err() {
                break;
            }
        }
        // The end of one side is the other's.
        let _ = to.shutdown(Shutdown::Write);
    }

    /// What arrives of a piece.
    fn piece(&self, way: Way, piece: &mut [u8]) -> Vec<u8> {
        /// Beats of a pulse are smaller.
        const LARGE: usize = 500;
        let mut trick = self.trick.lock().unwrap();
        if way == Way::Back || piece.len() < LARGE {
            return piece.to_vec();
        }
        match trick.take() {
            None => piece.to_vec(),
            Some(Trick::Tamper) => {
                piece[LARGE / 2] ^= 0x10;
                piece.to_vec()
            }
            Some(Trick::Replay) => piece.repeat(2),
        }
    }
}

/// SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014).
struct Chance(u64);

impl Chance {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// From 0 to 1.
    fn fraction(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }
}
