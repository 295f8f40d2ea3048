//! Keys and values of a run, as panels take them: widened into memory before, or as they lie there.

use super::{BLOCK, RUN};
use crate::isa::{Tier, fetch_second};
use crate::lanes::LANES;

/// Bytes of a line of memory.
const A_LINE: usize = 64;

/// Where two runs lie: the one that is met, as it is stored, and the one after it, which is sent
/// for meanwhile.
#[derive(Clone, Copy)]
pub(super) struct Rows {
    /// First row of each block.
    pub(super) now: [usize; RUN],
    pub(super) soon: [usize; RUN],
}

/// Memory that is sent for while a block is read.
#[derive(Clone, Copy)]
pub(super) struct Soon(*const u8);

impl Soon {
    /// For blocks of rows of so many numbers.
    #[inline(always)]
    pub(super) fn of<N>(x: &[N], rows: Rows, row: usize) -> [Soon; RUN] {
        rows.soon.map(|at| Soon(x.as_ptr().wrapping_add(at * row).cast()))
    }

    /// Sends for what is there in the place of this byte of the block, if a line begins there.
    #[inline(always)]
    pub(super) fn send(self, byte: usize) {
        if byte.is_multiple_of(A_LINE) {
            fetch_second(self.0.wrapping_add(byte));
        }
    }
}

/// Keys and values of a run, sixteen numbers at a time.
pub(super) trait Run<T: Tier>: Copy {
    /// Those of `G` blocks from `block` on: their positions' `i`th numbers.
    fn keys<const G: usize>(self, t: T, i: usize, block: usize) -> [T::F; G];
    /// `G` vectors of a position's values, from vector `at` on.
    fn values<const G: usize>(self, t: T, position: usize, at: usize) -> [T::F; G];
}

/// A run that lies widened in memory.
#[derive(Clone, Copy)]
pub(super) struct Widened<'a> {
    /// `[head_dim, POSITIONS]`.
    pub(super) keys: &'a [[f32; LANES]],
    /// `[POSITIONS, head_dim]`, rows padded to `width` vectors.
    pub(super) values: &'a [[f32; LANES]],
    pub(super) width: usize,
}

impl<T: Tier> Run<T> for Widened<'_> {
    #[inline(always)]
    fn keys<const G: usize>(self, t: T, i: usize, block: usize) -> [T::F; G] {
        loaded(t, some(self.keys, i * RUN + block))
    }
    #[inline(always)]
    fn values<const G: usize>(self, t: T, position: usize, at: usize) -> [T::F; G] {
        loaded(t, some(self.values, position * self.width + at))
    }
}

#[inline(always)]
fn loaded<T: Tier, const G: usize>(t: T, vectors: &[[f32; LANES]; G]) -> [T::F; G] {
    let mut out = [t.splat(0.0); G];
    for g in 0..G {
        out[g] = t.load(&vectors[g]);
    }
    out
}

/// `G` vectors from number `at` on.
#[inline(always)]
fn some<N, const G: usize>(vectors: &[[N; LANES]], at: usize) -> &[[N; LANES]; G] {
    vectors[at..].first_chunk().expect("whole runs")
}

/// How a number is stored that needs no scale.
pub(super) trait Form: Copy {
    type Bits: Copy;
    fn widen<T: Tier>(t: T, x: &[Self::Bits; LANES]) -> T::F;
}

#[derive(Clone, Copy)]
pub(super) struct Half;
impl Form for Half {
    type Bits = u16;
    #[inline(always)]
    fn widen<T: Tier>(t: T, x: &[u16; LANES]) -> T::F {
        t.halves(x)
    }
}

#[derive(Clone, Copy)]
pub(super) struct Bfloat;
impl Form for Bfloat {
    type Bits = u16;
    #[inline(always)]
    fn widen<T: Tier>(t: T, x: &[u16; LANES]) -> T::F {
        t.bfloats(x)
    }
}

/// A run as it is stored. Heads are of whole vectors.
#[derive(Clone, Copy)]
pub(super) struct Plain<'a, F: Form> {
    /// `[head_dim]` of each block.
    keys: [&'a [[F::Bits; LANES]]; RUN],
    /// `[BLOCK, width]` of each block.
    values: [&'a [[F::Bits; LANES]]; RUN],
    /// Beside keys, and beside values.
    soon: [[Soon; RUN]; 2],
    width: usize,
}

impl<'a, F: Form> Plain<'a, F> {
    /// Bytes of a vector.
    const BYTES: usize = size_of::<[F::Bits; LANES]>();

    #[inline(always)]
    pub(super) fn of(
        (k, v): (&'a [F::Bits], &'a [F::Bits]),
        rows: Rows,
        head_dim: usize,
    ) -> Plain<'a, F> {
        let blocks = |x: &'a [F::Bits]| {
            rows.now.map(|row| x[row * head_dim..][..BLOCK * head_dim].as_chunks().0)
        };
        let soon = [k, v].map(|x| Soon::of(x, rows, head_dim));
        Plain { keys: blocks(k), values: blocks(v), soon, width: head_dim / LANES }
    }
}

impl<T: Tier, F: Form> Run<T> for Plain<'_, F> {
    #[inline(always)]
    fn keys<const G: usize>(self, t: T, i: usize, block: usize) -> [T::F; G] {
        let mut keys = [t.splat(0.0); G];
        for g in 0..G {
            self.soon[0][block + g].send(i * Self::BYTES);
            keys[g] = F::widen(t, &self.keys[block + g][i]);
        }
        keys
    }
    #[inline(always)]
    fn values<const G: usize>(self, t: T, position: usize, at: usize) -> [T::F; G] {
        let (block, row) = (position / BLOCK, position % BLOCK);
        let stored: &[_; G] = some(self.values[block], row * self.width + at);
        let mut values = [t.splat(0.0); G];
        for g in 0..G {
            self.soon[1][block].send((row * self.width + at + g) * Self::BYTES);
            values[g] = F::widen(t, &stored[g]);
        }
        values
    }
}
