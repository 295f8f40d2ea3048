//! What tile registers can do at most: products of registers alone, in enough independent sums to
//! fill the pipeline.

use std::arch::asm;
use std::time::Instant;

use pomona_device::Pool;

use super::{Configured, Shapes, TILE, multiply};

/// Rounds of four instructions: some 10 ms.
const ROUNDS: u64 = 150_000;
/// Operations of an instruction: 16 tokens, 16 rows, as many columns as 64 bytes have, a product
/// and a sum each.
const INT8_OPERATIONS: u64 = 16 * 16 * 64 * 2;
const BF16_OPERATIONS: u64 = 16 * 16 * 32 * 2;
/// Measurements; the best counts, since a limit is what is asked for.
const MEASUREMENTS: usize = 5;

/// What tile registers of a pool's cores do together, operations per second.
pub(crate) struct TilePeaks {
    pub(crate) int8: f64,
    pub(crate) bf16: f64,
}

/// Measures; `None` where there are no tile registers.
pub(crate) fn tile_peaks(pool: &Pool) -> Option<TilePeaks> {
    let rate = |products: unsafe fn(u64), operations: u64| {
        let seconds = |_| {
            let begun = Instant::now();
            // SAFETY: detected below, before the first call.
            pool.run(&|_| unsafe { products(ROUNDS) });
            begun.elapsed().as_secs_f64()
        };
        let best = (0..MEASUREMENTS).map(seconds).fold(f64::INFINITY, f64::min);
        (ROUNDS * 4 * operations * pool.threads() as u64) as f64 / best
    };
    super::detect().then(|| TilePeaks {
        int8: rate(int8_products, INT8_OPERATIONS),
        bf16: rate(bf16_products, BF16_OPERATIONS),
    })
}

/// Multiplies zeros, which registers hold once configured: it takes as long as anything else.
macro_rules! products {
    ($name:ident, $instruction:literal) => {
        /// # Safety
        /// The machine has tile registers, and the system lets us use them.
        unsafe fn $name(rounds: u64) {
            // SAFETY: by contract; registers are configured while `registers` lives.
            unsafe {
                let registers = Configured::new(&Shapes::new([(TILE, 64); 8]));
                for _ in 0..rounds {
                    multiply!($instruction, 0, 4, 6);
                    multiply!($instruction, 1, 4, 7);
                    multiply!($instruction, 2, 5, 6);
                    multiply!($instruction, 3, 5, 7);
                }
                drop(registers);
            }
        }
    };
}

products!(int8_products, "tdpbusd");
products!(bf16_products, "tdpbf16ps");

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn the_instructions_of_the_probe_are_tile_instructions() {
        super::super::emulator::install();
        // SAFETY: the emulator does what the machine lacks, and ends the test if it knows an
        // instruction no better.
        unsafe {
            int8_products(3);
            bf16_products(3);
        }
        assert_eq!(tile_peaks(&Pool::new(1)).is_some(), super::super::detect());
    }
}
