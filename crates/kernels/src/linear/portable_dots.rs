//! In place of products of bf16 where there are none: no dispatch comes here.

use super::Slab;
use super::bfloats::Bfloats;

/// Whether the machine has the instruction.
pub(super) fn detect() -> bool {
    false
}

/// # Safety
/// Never called: no machine of this kind has the instruction.
pub(super) unsafe fn run(_: &Slab<'_>, _: Bfloats<'_>) {
    unreachable!("the instruction is of another kind of machine");
}
