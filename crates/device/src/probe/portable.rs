//! Peak arithmetic in portable Rust: what the compiler makes of it.

use std::hint::black_box;

const STEPS: u64 = 2_000_000;

/// Reads all words.
pub(super) fn sum(words: &[u64]) -> u64 {
    super::lanes(words)
}

/// Runs multiply-adds; returns how many operations they were.
pub(super) fn f32_operations() -> u64 {
    let mut lanes = black_box([1.0f32; 64]);
    let (a, b) = black_box((1.000_001f32, 1e-7f32));
    for _ in 0..STEPS {
        for lane in &mut lanes {
            *lane = *lane * a + b;
        }
    }
    black_box(lanes);
    STEPS * 64 * 2
}

/// No instruction that Rust has a name for everywhere.
pub(super) fn bf16_operations() -> Option<u64> {
    None
}

/// As above.
pub(super) fn int8_operations() -> Option<u64> {
    None
}
