//! In place of tile registers where there are none: no dispatch comes here.

use pomona_device::Pool;

use super::Slab;

#[derive(Default)]
pub(crate) struct Tiles;

impl Tiles {
    pub(super) fn fill(&mut self, _: &Pool, _: &[f32], _: usize) {}
}

/// # Safety
/// Never called: no machine of this kind has the tier.
pub(super) unsafe fn bf16(_: &Slab<'_>, _: &Tiles) {
    unreachable!("the tier is of another kind of machine");
}

pub(crate) mod peak {
    use super::Pool;

    /// No machine of this kind has tile registers.
    pub fn int8_tile_ops(_: &Pool) -> Option<f64> {
        None
    }
}
