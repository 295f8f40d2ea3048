//! One tier: what the compiler makes of plain Rust.

use super::{Isa, Kernel, Portable};

pub(super) const TIERS: &[Isa] = &[Isa::Reference];

pub(super) fn detect() -> Isa {
    Isa::Reference
}

pub(super) fn run<K: Kernel>(_: Isa, kernel: K) {
    kernel.run(Portable);
}

/// Would send for the line at `at`.
#[inline(always)]
pub(crate) fn fetch(_: *const u8) {}

/// The same, into the second cache.
#[inline(always)]
pub(crate) fn fetch_second(_: *const u8) {}
