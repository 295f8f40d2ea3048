//! One tier: what the compiler makes of plain Rust.

use super::{Isa, Kernel, Portable};

pub(super) const TIERS: &[Isa] = &[Isa::Reference];

pub(super) fn detect() -> Isa {
    Isa::Reference
}

pub(super) fn run<K: Kernel>(_: Isa, kernel: K) {
    kernel.run(Portable);
}
