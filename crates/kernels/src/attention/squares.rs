//! A run of integers on tile registers: sixteen pairs at a time.

use super::integers::{BYTES, Integers, QUAD, Quads, Weights};
use super::panel::{Panel, Scores};
use super::{BLOCK, POSITIONS, RUN};
use crate::isa::Tier;
use crate::lanes::LANES;
use crate::linear::amx::squares::{DEPTH, SQUARES, Squares, Sums};

/// Pairs of a panel.
pub(super) const PAIRS: usize = 16;
/// Fours of positions in a run.
const FOURS: usize = POSITIONS / QUAD;

/// A run's values as tile registers take them, and these.
#[derive(Clone, Copy)]
pub(super) struct Gathered<'a> {
    squares: &'a Squares,
    /// Of each vector of numbers those of all positions.
    values: &'a [[[u8; BYTES]; FOURS]],
}

/// Whether heads are of whole tiles.
pub(super) fn fit(head_dim: usize) -> bool {
    head_dim.is_multiple_of(DEPTH)
}

/// Bytes that values of a run take.
pub(super) fn gathered_bytes(head_dim: usize) -> usize {
    head_dim * DEPTH
}

impl<'a> Integers<'a> {
    /// The same for tile registers, whose memory is `to`.
    #[inline(always)]
    pub(super) fn gather(mut self, squares: &'a Squares, to: &'a mut [u8]) -> Integers<'a> {
        let to: &mut [[[u8; BYTES]; FOURS]] = to.as_chunks_mut().0.as_chunks_mut().0;
        for (block, (keys, values)) in self.keys.iter().zip(&self.values).enumerate() {
            for (four, row) in values.vectors.chunks_exact(self.width).enumerate() {
                for (at, vector) in row.iter().enumerate() {
                    keys.soon.send((four * self.width + at) * BYTES);
                    values.soon.send((four * self.width + at) * BYTES);
                    to[at][block * BLOCK / QUAD + four] = *vector;
                }
            }
        }
        self.gathered = Some(Gathered { squares, values: to });
        self
    }
}

impl<const P: usize> Panel<'_, P, Quads<'_, P>, Integers<'_>> {
    /// Scores of sixteen pairs, whose queries lie by rows.
    #[inline(always)]
    pub(super) fn square_dots<T: Tier, const TERMS: usize>(
        &self,
        t: T,
        gathered: Gathered<'_>,
        scores: &mut [Scores; P],
    ) {
        assert!(P == PAIRS && RUN == SQUARES, "whole tiles");
        let Quads { quads, scales, starts } = self.queries;
        let n = quads.len() / TERMS;
        let mut sums = [Sums::NONE; TERMS];
        let keys = self.run.keys.each_ref().map(|block| {
            assert_eq!(block.vectors.len(), n, "keys and queries are of one size");
            block.vectors.as_ptr().cast()
        });
        for (quads, sums) in quads.chunks_exact(n).zip(&mut sums) {
            let rows = (quads.as_ptr().cast(), n * QUAD);
            // SAFETY: there are sixteen rows of `n` fours, whole tiles of them, and such keys.
            unsafe { gathered.squares.multiply::<true>(rows, keys, n * QUAD / DEPTH, sums) };
        }
        for g in 0..RUN {
            let keys = self.run.keys[g].scales(t);
            for p in 0..P {
                let mut sum = t.splat_integer(0);
                for term in 0..TERMS {
                    let dots = t.load_bytes(bytemuck::cast_ref(&sums[term].0[g][p]));
                    let dots = t.add_integers(dots, t.splat_integer(starts[p][term]));
                    sum = t.add_integers(t.times_256(sum), dots);
                }
                let score = t.mul(t.mul(t.floats(sum), keys), t.splat(scales[p]));
                t.store(score, &mut scores[p][g]);
            }
        }
    }

    /// Adds the weighted values.
    #[inline(always)]
    pub(super) fn square_columns<T: Tier, const TERMS: usize>(
        self,
        t: T,
        gathered: Gathered<'_>,
        (weights, scales): (&[Weights<TERMS>; P], &[f32; P]),
    ) {
        assert!(P == PAIRS && RUN * LANES == DEPTH, "whole tiles");
        let width = self.run.width;
        let bytes: *const u8 = weights.as_ptr().cast();
        let mut sums = [Sums::NONE; TERMS];
        for (four, values) in gathered.values[..width].as_chunks::<SQUARES>().0.iter().enumerate() {
            let columns = values.each_ref().map(|values| values.as_ptr().cast());
            for (term, sums) in sums.iter_mut().enumerate() {
                // SAFETY: there are sixteen pairs' weights of a run, and such columns of values.
                unsafe {
                    let rows = (bytes.add(term * DEPTH), size_of::<Weights<TERMS>>());
                    gathered.squares.multiply::<false>(rows, columns, 1, sums);
                }
            }
            for p in 0..P {
                let acc = &mut self.acc[p * width + four * SQUARES..][..SQUARES];
                for g in 0..SQUARES {
                    let mut sum = t.splat_integer(0);
                    for term in 0..TERMS {
                        let dots = t.load_bytes(bytemuck::cast_ref(&sums[term].0[g][p]));
                        sum = t.add_integers(t.times_256(sum), dots);
                    }
                    let sum = t.mul_add(t.floats(sum), t.splat(scales[p]), t.load(&acc[g]));
                    t.store(sum, &mut acc[g]);
                }
            }
        }
    }
}
