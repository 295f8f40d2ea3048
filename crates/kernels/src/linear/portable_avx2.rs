//! In place of AVX2 where there is none: the reference.

use super::activations::Activations;
use super::panel::Panel;
use super::{Slab, reference};
use crate::Isa;

/// Computes a slab.
pub(super) fn run(slab: &Slab<'_>, activations: &Activations<'_>, panel: &mut Panel) {
    Isa::Reference.run(reference::Quantised { slab, activations, panel });
}
