//! In place of tile registers where there are none: no dispatch comes here.

use pomona_device::Pool;

use super::{Inputs, Slab};

#[derive(Default)]
pub(crate) struct Memory;

#[derive(Clone, Copy)]
pub(super) struct Tiles<'a>(std::marker::PhantomData<&'a ()>);

impl Memory {
    pub(super) fn fill(&mut self, _: &Pool, _: &Inputs<'_>) -> Vec<Tiles<'_>> {
        Vec::new()
    }
}

/// # Safety
/// Never called: no machine of this kind has the tier.
pub(super) unsafe fn bf16(_: &Slab<'_>, _: Tiles<'_>) {
    unreachable!("the tier is of another kind of machine");
}

pub(crate) mod peak {
    use super::Pool;

    /// No machine of this kind has tile registers.
    pub fn int8_tile_ops(_: &Pool) -> Option<f64> {
        None
    }
}
