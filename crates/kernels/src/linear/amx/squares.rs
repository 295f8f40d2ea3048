//! Products of bytes for whoever brings both sides: sixteen rows meet four times sixteen columns.

use std::arch::asm;

use super::{Configured, Shapes, TILE, load, multiply, store, zero};

/// Squares that are computed at once.
pub(crate) const SQUARES: usize = 4;
/// Numbers of a row or a column that an instruction takes.
pub(crate) const DEPTH: usize = 64;
/// Bytes of so many numbers of sixteen columns: four numbers side by side, then columns.
const COLUMNS: usize = TILE * DEPTH;

/// Sums, of each square `[rows, columns]`.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Sums(pub(crate) [[[i32; TILE]; TILE]; SQUARES]);

impl Sums {
    pub(crate) const NONE: Sums = Sums([[[0; TILE]; TILE]; SQUARES]);
}

/// Tile registers set up for this.
pub(crate) struct Squares {
    _registers: Configured,
}

impl Squares {
    /// # Safety
    /// The machine has tile registers, and the system lets us use them.
    pub(crate) unsafe fn new() -> Squares {
        // SAFETY: by contract.
        Squares { _registers: unsafe { Configured::new(&Shapes::new([(TILE, DEPTH); 8])) } }
    }

    /// Products of `deep` times [`DEPTH`] numbers. Rows lie `apart` bytes apart. They have signs
    /// and columns do not, or the other way round.
    ///
    /// # Safety
    /// Sixteen rows and columns of so many numbers lie there.
    pub(crate) unsafe fn multiply<const SIGNED_ROWS: bool>(
        &self,
        (rows, apart): (*const u8, usize),
        columns: [*const u8; SQUARES],
        deep: usize,
        sums: &mut Sums,
    ) {
        macro_rules! product {
            ($sums:literal, $columns:literal) => {
                if SIGNED_ROWS {
                    multiply!("tdpbsud", $sums, 4, $columns);
                } else {
                    multiply!("tdpbusd", $sums, 4, $columns);
                }
            };
        }
        let sums = sums.0.each_mut().map(|square| square.as_mut_ptr());
        // SAFETY: by contract; what is stored has room for a register.
        unsafe {
            zero!(0);
            zero!(1);
            zero!(2);
            zero!(3);
            for at in 0..deep {
                load!(4, rows.add(at * DEPTH), apart);
                load!(5, columns[0].add(at * COLUMNS), 64usize);
                product!(0, 5);
                load!(6, columns[1].add(at * COLUMNS), 64usize);
                product!(1, 6);
                load!(7, columns[2].add(at * COLUMNS), 64usize);
                product!(2, 7);
                load!(5, columns[3].add(at * COLUMNS), 64usize);
                product!(3, 5);
            }
            store!(0, sums[0], 64usize);
            store!(1, sums[1], 64usize);
            store!(2, sums[2], 64usize);
            store!(3, sums[3], 64usize);
        }
    }
}
