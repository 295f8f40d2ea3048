//! Integer products of an unpacked panel on tile registers.

use std::arch::asm;

use super::{Configured, Shapes, TILE, load, multiply, store, zero};
use crate::linear::activations::Term;
use crate::linear::packed::{BLOCK, GROUP, STEPS};
use crate::linear::panel::{GROUPS, Panel};

/// Sums of integer products of a block: `256 * high + low` for each token and row. High ones stay
/// zero where activations have one term.
#[repr(C, align(64))]
pub(in crate::linear) struct TileSums {
    pub(in crate::linear) high: [[[i32; GROUP]; TILE]; GROUPS],
    pub(in crate::linear) low: [[[i32; GROUP]; TILE]; GROUPS],
}

impl TileSums {
    pub(in crate::linear) fn new() -> TileSums {
        let zero = [[[0; GROUP]; TILE]; GROUPS];
        TileSums { high: zero, low: zero }
    }
}

/// Tile registers set up for a panel and `width` tokens side by side.
pub(in crate::linear) struct TileProducts {
    parts: usize,
    _registers: Configured,
}

impl TileProducts {
    /// # Safety
    /// The machine has tile registers, and the system lets us use them.
    pub(in crate::linear) unsafe fn new(parts: usize, width: usize) -> TileProducts {
        let (a, b, c) = ((width, BLOCK / parts), (STEPS / parts, 64), (width, 64));
        // SAFETY: by contract.
        let registers = unsafe { Configured::new(&Shapes::new([c, c, c, a, a, b, b, b])) };
        TileProducts { parts, _registers: registers }
    }

    /// Multiplies part `part` of block `b`, for all groups of the panel and the tokens side by
    /// side whose block is at `terms`.
    ///
    /// # Safety
    /// As many tokens lie there as were told to [`TileProducts::new`]; the panel has the block.
    pub(in crate::linear) unsafe fn multiply(
        &self,
        panel: &Panel,
        (b, part): (usize, usize),
        (terms, two): (*const Term, bool),
        sums: &mut TileSums,
    ) {
        // SAFETY: by contract; what is stored has room for a register.
        unsafe {
            let first = terms.byte_add(part * BLOCK / self.parts);
            let step =
                |g: usize| panel.w.as_ptr().add(panel.steps(g, b) + part * STEPS / self.parts);
            let apart = if two { 2 } else { 1 } * size_of::<Term>();
            load!(5, step(0), 64usize);
            load!(6, step(1), 64usize);
            load!(7, step(2), 64usize);
            if two {
                load!(3, first, apart);
                // Activations are unsigned, weights are not.
                zero!(0);
                multiply!("tdpbusd", 0, 3, 5);
                zero!(1);
                multiply!("tdpbusd", 1, 3, 6);
                zero!(2);
                multiply!("tdpbusd", 2, 3, 7);
                store!(0, sums.high[0].as_mut_ptr(), 64usize);
                store!(1, sums.high[1].as_mut_ptr(), 64usize);
                store!(2, sums.high[2].as_mut_ptr(), 64usize);
            }
            load!(4, if two { first.add(1) } else { first }, apart);
            zero!(0);
            multiply!("tdpbusd", 0, 4, 5);
            zero!(1);
            multiply!("tdpbusd", 1, 4, 6);
            zero!(2);
            multiply!("tdpbusd", 2, 4, 7);
            store!(0, sums.low[0].as_mut_ptr(), 64usize);
            store!(1, sums.low[1].as_mut_ptr(), 64usize);
            store!(2, sums.low[2].as_mut_ptr(), 64usize);
        }
    }
}
