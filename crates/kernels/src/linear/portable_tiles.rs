//! In place of tile registers where there are none: no dispatch comes here.

use pomona_device::Pool;

use super::Slab;
use super::bfloats::Bfloats;

/// # Safety
/// Never called: no machine of this kind has the tier.
pub(super) unsafe fn bf16(_: &Slab<'_>, _: Bfloats<'_>) {
    unreachable!("the tier is of another kind of machine");
}

pub(crate) mod squares {
    pub(crate) const SQUARES: usize = 4;
    pub(crate) const DEPTH: usize = 64;

    #[derive(Clone, Copy)]
    pub(crate) struct Sums(pub(crate) [[[i32; 16]; 16]; SQUARES]);

    impl Sums {
        pub(crate) const NONE: Sums = Sums([[[0; 16]; 16]; SQUARES]);
    }

    /// Nobody has one.
    pub(crate) enum Squares {}

    impl Squares {
        /// # Safety
        /// Never called, as above.
        pub(crate) unsafe fn new() -> Squares {
            unreachable!("the tier is of another kind of machine");
        }

        /// # Safety
        /// Never called, as above.
        pub(crate) unsafe fn multiply<const SIGNED_ROWS: bool>(
            &self,
            _: (*const u8, usize),
            _: [*const u8; SQUARES],
            _: usize,
            _: &mut Sums,
        ) {
            match *self {}
        }
    }
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
