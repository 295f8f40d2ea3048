//! What this machine can do at most: measured, in the run that uses the number.

use std::hint::black_box;
use std::sync::Mutex;
use std::time::Instant;

use crate::Pool;

/// Bytes read per worker and round, at least: larger than any cache share it could sit in for long.
const READ_BYTES: usize = 256 << 20;
/// The same of all workers: last caches of servers have some hundred megabytes.
const ALL_BYTES: usize = 1 << 30;
/// Rounds; the best counts, since a limit is what is asked for.
const ROUNDS: usize = 5;

/// Measured limits of a pool's cores together.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Probe {
    /// Sequential reading from memory, bytes per second.
    pub read_bytes_per_s: f64,
    /// Multiply-adds of f32 in registers, operations (2 per multiply-add) per second.
    pub f32_ops_per_s: f64,
    /// Multiply-adds of bf16 into f32 in registers, likewise; 0 where there is no instruction.
    pub bf16_ops_per_s: f64,
    /// Multiply-adds of int8 into int32 in registers, likewise; 0 where there is no instruction.
    pub int8_ops_per_s: f64,
}

/// Measures. Takes about a second, and 256 MiB a worker, 1 GiB at least.
pub fn probe(pool: &Pool) -> Probe {
    let each = READ_BYTES.max(ALL_BYTES / pool.threads());
    let buffers: Vec<Mutex<Vec<u64>>> =
        (0..pool.threads()).map(|i| Mutex::new(vec![i as u64 + 1; each / 8])).collect();
    let read = best(|| {
        pool.run(&|worker| {
            let buffer = buffers[worker].lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            black_box(arithmetic::sum(&buffer));
        });
    });
    drop(buffers);
    let threads = pool.threads() as f64;
    let rate = |operations: fn() -> Option<u64>| {
        let Some(count) = operations() else { return 0.0 };
        let seconds = best(|| pool.run(&|_| _ = black_box(operations())));
        count as f64 * threads / seconds
    };
    Probe {
        read_bytes_per_s: each as f64 * threads / read,
        f32_ops_per_s: rate(|| Some(arithmetic::f32_operations())),
        bf16_ops_per_s: rate(arithmetic::bf16_operations),
        int8_ops_per_s: rate(arithmetic::int8_operations),
    }
}

/// Seconds of the fastest of several runs.
fn best(mut run: impl FnMut()) -> f64 {
    let time = |_| {
        let start = Instant::now();
        run();
        start.elapsed().as_secs_f64()
    };
    (0..ROUNDS).map(time).fold(f64::INFINITY, f64::min)
}

/// Sums with enough independent lanes that memory, not addition, is the limit.
#[inline(always)]
fn lanes(words: &[u64]) -> u64 {
    let mut lanes = [0u64; 64];
    for chunk in words.as_chunks::<64>().0 {
        for (lane, word) in lanes.iter_mut().zip(chunk) {
            *lane = lane.wrapping_add(*word);
        }
    }
    lanes.iter().fold(0, |a, b| a.wrapping_add(*b))
}

#[cfg(target_arch = "x86_64")]
#[path = "probe/x86.rs"]
mod arithmetic;

#[cfg(not(target_arch = "x86_64"))]
#[path = "probe/portable.rs"]
mod arithmetic;
