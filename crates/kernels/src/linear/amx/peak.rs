//! What tile registers can do at most: products of registers alone, in enough independent sums to
//! fill the pipeline.

use std::arch::asm;
use std::time::Instant;

use pomona_device::Pool;

use super::{Configured, Shapes, TILE, multiply};

/// Rounds of four instructions: some 10 ms.
const ROUNDS: u64 = 150_000;
/// Operations of an instruction: 16 tokens, 16 rows, 64 columns, a product and a sum each.
const OPERATIONS: u64 = 16 * 16 * 64 * 2;
/// Measurements; the best counts, since a limit is what is asked for.
const MEASUREMENTS: usize = 5;

/// 8-bit operations per second on the tile registers of a pool's cores together; `None` where
/// there are none.
pub fn int8_tile_ops(pool: &Pool) -> Option<f64> {
    if !super::detect() {
        return None;
    }
    let seconds = |_| {
        let begun = Instant::now();
        // SAFETY: just detected.
        pool.run(&|_| unsafe { products(ROUNDS) });
        begun.elapsed().as_secs_f64()
    };
    let best = (0..MEASUREMENTS).map(seconds).fold(f64::INFINITY, f64::min);
    Some((ROUNDS * 4 * OPERATIONS * pool.threads() as u64) as f64 / best)
}

/// Multiplies zeros, which registers hold once configured: it takes as long as anything else.
///
/// # Safety
/// The machine has tile registers, and the system lets us use them.
unsafe fn products(rounds: u64) {
    // SAFETY: by contract; registers are configured while `registers` lives.
    unsafe {
        let registers = Configured::new(&Shapes::new([(TILE, 64); 8]));
        for _ in 0..rounds {
            multiply!("tdpbusd", 0, 4, 6);
            multiply!("tdpbusd", 1, 4, 7);
            multiply!("tdpbusd", 2, 5, 6);
            multiply!("tdpbusd", 3, 5, 7);
        }
        drop(registers);
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn the_instructions_of_the_probe_are_tile_instructions() {
        super::super::emulator::install();
        // SAFETY: the emulator does what the machine lacks, and ends the test if it knows an
        // instruction no better.
        unsafe { products(3) };
        assert_eq!(int8_tile_ops(&Pool::new(1)).is_some(), super::super::detect());
    }
}
