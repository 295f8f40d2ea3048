//! In place of AVX-512 where there is none: the reference.

use super::panel::Panel;
use super::{Activations, Slab, reference};
use crate::Isa;

/// Computes a slab.
pub(super) fn run(slab: &Slab<'_>, activations: &Activations, panel: &mut Panel, _: bool) {
    Isa::Reference.run(reference::Quantised { slab, activations, panel });
}
