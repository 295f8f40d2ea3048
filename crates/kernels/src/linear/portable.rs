//! In place of the vectors of another kind of machine, AVX-512 or NEON: the reference.

use super::activations::Activations;
use super::panel::Panel;
use super::{Slab, reference};
use crate::Isa;

/// Computes a slab.
pub(super) fn run(slab: &Slab<'_>, activations: &Activations<'_>, panel: &mut Panel, _: bool) {
    Isa::Reference.run(reference::Quantised { slab, activations, panel });
}
