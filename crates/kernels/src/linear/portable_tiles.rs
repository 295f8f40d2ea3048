//! In place of tile registers where there are none: no dispatch comes here.

use pomona_device::Pool;

use super::Slab;
use super::bfloats::Bfloats;

/// # Safety
/// Never called: no machine of this kind has the tier.
pub(super) unsafe fn bf16(_: &Slab<'_>, _: Bfloats<'_>) {
    unreachable!("the tier is of another kind of machine");
}

pub(crate) mod peak {
    use super::Pool;

    pub(crate) struct TilePeaks {
        pub(crate) int8: f64,
        pub(crate) bf16: f64,
    }

    /// No machine of this kind has tile registers.
    pub(crate) fn tile_peaks(_: &Pool) -> Option<TilePeaks> {
        None
    }
}
