//! Keys and values of 8 bits, with a scale for each position, and the inner loops over them.
//!
//! Queries become integers too, of as many bits as activations have, with a scale for each pair.
//! So do the weights of a run's positions, once the scales of values are in them, with a scale for
//! each pair and run. Sums of products are exact; what is rounded depends on a pair and on what it
//! sees of a run alone, and so is the same however work is cut.

use std::ops::Range;

use super::panel::{Panel, Scores, hide, soften};
use super::partial::vectors;
use super::squares::{self, Gathered};
use super::stored::{Rows, Soon};
use super::{BLOCK, POSITIONS, RUN};
use crate::isa::Tier;
use crate::lanes::{Aligned, LANES, Line, ROUND};
use crate::linear::{ActivationBits, scale_of};

/// Bytes of a position's scale.
pub(super) const SCALE_BYTES: usize = size_of::<f32>();
/// Bytes of a lane.
pub(super) const QUAD: usize = 4;
/// Bytes of a vector.
pub(super) const BYTES: usize = QUAD * LANES;
/// What is added to the integers of keys, which instructions take without a sign.
pub(super) const MIDDLE: u8 = 0x80;

/// Longest heads: sums of two terms fit 32 bits.
pub(crate) const HEAD_DIM_MAX: usize = 512;

/// Bytes that a key or a value of `head_dim` numbers takes, with its scale. Integers are padded to
/// whole vectors.
pub(crate) fn quantised_bytes(head_dim: usize) -> usize {
    head_dim.next_multiple_of(LANES) + SCALE_BYTES
}

/// Where number `i` of a position's key is in its block: four numbers side by side, then positions.
#[inline(always)]
pub(super) fn key_at(position: usize, i: usize) -> usize {
    i / QUAD * BYTES + position * QUAD + i % QUAD
}

/// Where number `i` of its value is: four positions side by side, then numbers.
#[inline(always)]
pub(super) fn value_at(position: usize, i: usize, head_dim: usize) -> usize {
    let row = head_dim.next_multiple_of(LANES);
    (position / QUAD * row + i) * QUAD + position % QUAD
}

/// A tile's queries as integers.
#[derive(Default)]
pub(super) struct Queries {
    /// `[terms, head_dim / 4, pairs]` of one panel after the other, four signed bytes each; of a
    /// panel on tile registers `[terms, pairs, head_dim / 4]`.
    quads: Vec<i32>,
    /// Of each pair.
    scales: Vec<f32>,
    /// What the sums of each term begin with, as keys are greater than they should be.
    starts: Vec<[i32; 2]>,
    row: Vec<Line>,
}

impl Queries {
    /// Makes room.
    #[inline(always)]
    pub(super) fn restart(&mut self, pairs: usize, head_dim: usize, bits: ActivationBits) {
        self.quads.resize(pairs * bits.terms() * quads(head_dim), 0);
        self.scales.resize(pairs, 0.0);
        self.starts.resize(pairs, [0; 2]);
        self.row.clear();
        self.row.resize(vectors(head_dim), Line::default());
    }

    /// Sets the `p`th query of the panel of `len` pairs that begins with pair `first`.
    #[inline(always)]
    pub(super) fn set<T: Tier>(
        &mut self,
        t: T,
        (first, len, p): (usize, usize, usize),
        (query, factor, bits): (&[f32], f32, ActivationBits),
    ) {
        let row: &mut [[f32; LANES]] = bytemuck::cast_slice_mut(&mut self.row);
        let numbers = row.as_flattened_mut().iter_mut();
        numbers.zip(query).for_each(|(to, q)| *to = q * factor);
        let (scale, inverse) = scale_of(t.largest_magnitude(row), bits.largest());
        let (terms, quads) = (bits.terms(), quads(query.len()));
        let panel = &mut self.quads[first * terms * quads..][..len * terms * quads];
        let mut starts = [0; 2];
        for (at, numbers) in row.iter().enumerate() {
            let rounded = t.mul_add(t.load(numbers), t.splat(inverse), t.splat(ROUND));
            let mut bytes = [[0; LANES]; 2];
            if terms == 1 {
                t.lowest_bytes(rounded, &mut bytes[0]);
            } else {
                // The low term's sign takes from the high one.
                t.second_bytes(t.add(rounded, t.splat(128.0)), &mut bytes[0]);
                t.lowest_bytes(rounded, &mut bytes[1]);
            }
            for (term, bytes) in bytes[..terms].iter().enumerate() {
                starts[term] -= i32::from(MIDDLE) * t.sum_of_bytes(bytes, true);
                let (first, at) = (term * quads * len, at * LANES / QUAD);
                let (first, step) = match len {
                    squares::PAIRS => (first + p * quads + at, 1),
                    _ => (first + at * len + p, len),
                };
                let places = panel[first..].iter_mut().step_by(step);
                let quads = bytes.as_chunks().0.iter().map(|quad| i32::from_le_bytes(*quad));
                places.zip(quads).for_each(|(to, quad)| *to = quad);
            }
        }
        (self.scales[first + p], self.starts[first + p]) = (scale, starts);
    }

    /// Those of `P` pairs from `first` on, which are a panel.
    #[inline(always)]
    pub(super) fn panel<const P: usize>(&self, first: usize) -> Quads<'_, P> {
        let each = self.quads.len() / self.scales.len();
        Quads {
            quads: self.quads[first * each..][..P * each].as_chunks().0,
            scales: self.scales[first..].first_chunk().expect("all pairs"),
            starts: self.starts[first..].first_chunk().expect("all pairs"),
        }
    }
}

/// Fours of a head's numbers.
#[inline(always)]
fn quads(head_dim: usize) -> usize {
    vectors(head_dim) * LANES / QUAD
}

/// A panel's queries.
#[derive(Clone, Copy)]
pub(super) struct Quads<'a, const P: usize> {
    /// `[terms, head_dim / 4]`, those of the pairs side by side, or one pair's after the other's.
    pub(super) quads: &'a [[i32; P]],
    pub(super) scales: &'a [f32; P],
    pub(super) starts: &'a [[i32; 2]; P],
}

/// A run as it is stored.
#[derive(Clone, Copy)]
pub(super) struct Integers<'a> {
    pub(super) keys: [Block<'a>; RUN],
    pub(super) values: [Block<'a>; RUN],
    /// Vectors of a head's numbers.
    pub(super) width: usize,
    /// For tile registers, if there are any.
    pub(super) gathered: Option<Gathered<'a>>,
}

#[derive(Clone, Copy)]
pub(super) struct Block<'a> {
    /// Of keys `[head_dim / 4]`, of values `[4, width]`.
    pub(super) vectors: &'a [[u8; BYTES]],
    scales: &'a [[u8; SCALE_BYTES]; BLOCK],
    pub(super) soon: Soon,
}

impl Block<'_> {
    #[inline(always)]
    pub(super) fn scales<T: Tier>(&self, t: T) -> T::F {
        t.load(&self.scales.map(f32::from_le_bytes))
    }
}

impl<'a> Integers<'a> {
    #[inline(always)]
    pub(super) fn of(layer: [&'a [u8]; 2], rows: Rows, head_dim: usize) -> Integers<'a> {
        let row = quantised_bytes(head_dim);
        let integers = BLOCK * (row - SCALE_BYTES);
        let [keys, values] = layer.map(|x| {
            let soon = Soon::of(x, rows, row);
            std::array::from_fn(|block| {
                // The scales, behind the integers.
                soon[block].send(integers);
                let (bytes, scales) = x[rows.now[block] * row..][..BLOCK * row].split_at(integers);
                let scales = scales.as_chunks().0.first_chunk().expect("a block's");
                Block { vectors: bytes.as_chunks().0, scales, soon: soon[block] }
            })
        });
        Integers { keys, values, width: vectors(head_dim), gathered: None }
    }
}

/// The bytes of a pair's weights, by terms.
pub(super) type Weights<const TERMS: usize> = [[[u8; LANES]; RUN]; TERMS];

impl<const P: usize> Panel<'_, P, Quads<'_, P>, Integers<'_>> {
    /// Adds the run to the states.
    #[inline(always)]
    pub(super) fn add_integers<T: Tier, const TERMS: usize>(self, t: T) {
        let mut scores = Aligned([[[0.0; LANES]; RUN]; P]);
        let on_tiles = self.run.gathered.filter(|_| P == squares::PAIRS);
        if let Some(gathered) = on_tiles {
            self.square_dots::<T, TERMS>(t, gathered, &mut scores.0);
        } else if T::REGISTERS >= 32 {
            self.integer_dots::<T, TERMS, RUN>(t, 0, &mut scores.0);
        } else {
            for block in 0..RUN {
                self.integer_dots::<T, TERMS, 1>(t, block, &mut scores.0);
            }
        }
        if let Some(seen) = &self.seen {
            hide(seen, &mut scores.0, f32::NEG_INFINITY);
        }
        soften(t, &mut scores.0, self.base, self.sums, self.acc);
        for scores in &mut scores.0 {
            for (block, weights) in scores.iter_mut().enumerate() {
                t.store(t.mul(t.load(weights), self.run.values[block].scales(t)), weights);
            }
        }
        let mut seen = 0..POSITIONS;
        if let Some(each) = &self.seen {
            // A scale that nobody sees may be anything.
            hide(each, &mut scores.0, 0.0);
            let ends = |of: fn(&Range<usize>) -> usize| each.iter().map(of);
            seen = ends(|seen| seen.start).fold(POSITIONS, usize::min)
                ..ends(|seen| seen.end).fold(0, usize::max);
        }
        let mut weights = Aligned([[[[0; LANES]; RUN]; TERMS]; P]);
        let mut scales = [0.0; P];
        for p in 0..P {
            scales[p] = narrow(t, &scores.0[p], &mut weights.0[p]);
        }
        if let Some(gathered) = on_tiles {
            return self.square_columns::<T, TERMS>(t, gathered, (&weights.0, &scales));
        }
        let (width, mut at) = (self.run.width, 0);
        let blocks = seen.start / BLOCK..seen.end.div_ceil(BLOCK);
        while at < width {
            let (place, weights) = ((at, blocks.clone()), (&weights.0, &scales));
            at += match width - at {
                4.. if T::REGISTERS >= 32 => {
                    integer_columns::<T, P, TERMS, 4>(t, &self.run, place, weights, self.acc)
                }
                2.. if T::REGISTERS >= 32 => {
                    integer_columns::<T, P, TERMS, 2>(t, &self.run, place, weights, self.acc)
                }
                _ => integer_columns::<T, P, TERMS, 1>(t, &self.run, place, weights, self.acc),
            };
        }
    }

    /// Scores of all pairs and `G` blocks.
    #[inline(always)]
    fn integer_dots<T: Tier, const TERMS: usize, const G: usize>(
        &self,
        t: T,
        block: usize,
        scores: &mut [Scores; P],
    ) {
        let Quads { quads, scales, starts } = self.queries;
        let n = quads.len() / TERMS;
        let blocks: &[Block<'_>; G] = self.run.keys[block..].first_chunk().expect("of a run");
        let (vectors, soon) = (blocks.map(|block| &block.vectors[..n]), blocks.map(|b| b.soon));
        let mut sums = [[t.splat_integer(0); G]; P];
        for term in 0..TERMS {
            let quads = &quads[term * n..][..n];
            for p in 0..P {
                let start = t.splat_integer(starts[p][term]);
                for g in 0..G {
                    sums[p][g] = t.add_integers(t.times_256(sums[p][g]), start);
                }
            }
            for (i, quads) in quads.iter().enumerate() {
                let mut keys = [t.splat_integer(0); G];
                for g in 0..G {
                    soon[g].send(i * BYTES);
                    keys[g] = t.load_bytes(&vectors[g][i]);
                }
                for p in 0..P {
                    let query = t.splat_integer(quads[p]);
                    for g in 0..G {
                        sums[p][g] = t.add_dots(sums[p][g], keys[g], query);
                    }
                }
            }
        }
        for g in 0..G {
            let keys = blocks[g].scales(t);
            for p in 0..P {
                let score = t.mul(t.mul(t.floats(sums[p][g]), keys), t.splat(scales[p]));
                t.store(score, &mut scores[p][block + g]);
            }
        }
    }
}

/// Rounds a pair's weights of a run to integers without a sign, and returns their scale.
#[inline(always)]
fn narrow<T: Tier, const TERMS: usize>(t: T, weights: &Scores, bytes: &mut Weights<TERMS>) -> f32 {
    let largest = if TERMS == 1 { 255.0 } else { 65535.0 };
    let (scale, inverse) = scale_of(t.largest_magnitude(weights), largest);
    for (block, weights) in weights.iter().enumerate() {
        let rounded = t.mul_add(t.load(weights), t.splat(inverse), t.splat(ROUND));
        if TERMS == 1 {
            t.lowest_bytes(rounded, &mut bytes[0][block]);
        } else {
            t.second_bytes(rounded, &mut bytes[0][block]);
            t.lowest_bytes(rounded, &mut bytes[1][block]);
        }
    }
    scale
}

/// Adds `G` vectors of columns of the weighted values of some blocks; returns `G`.
#[inline(always)]
fn integer_columns<T: Tier, const P: usize, const TERMS: usize, const G: usize>(
    t: T,
    run: &Integers<'_>,
    (at, blocks): (usize, Range<usize>),
    (weights, scales): (&[Weights<TERMS>; P], &[f32; P]),
    acc: &mut [[f32; LANES]],
) -> usize {
    let mut sums = [[t.splat_integer(0); G]; P];
    for term in 0..TERMS {
        for p in 0..P {
            for g in 0..G {
                sums[p][g] = t.times_256(sums[p][g]);
            }
        }
        for block in blocks.clone() {
            // The remainder changes nothing; it spares checks.
            let block = block % RUN;
            let Block { vectors, soon, .. } = run.values[block];
            for (four, row) in vectors.chunks_exact(run.width).enumerate() {
                let vectors: &[_; G] = row[at..].first_chunk().expect("whole blocks");
                let mut values = [t.splat_integer(0); G];
                for g in 0..G {
                    soon.send((four * run.width + at + g) * BYTES);
                    values[g] = t.load_bytes(&vectors[g]);
                }
                for p in 0..P {
                    let bytes = weights[p][term][block].as_chunks().0[four % (BLOCK / QUAD)];
                    let weight = t.splat_integer(i32::from_le_bytes(bytes));
                    for g in 0..G {
                        sums[p][g] = t.add_dots(sums[p][g], weight, values[g]);
                    }
                }
            }
        }
    }
    for p in 0..P {
        for g in 0..G {
            let acc = &mut acc[p * run.width + at + g];
            t.store(t.mul_add(t.floats(sums[p][g]), t.splat(scales[p]), t.load(acc)), acc);
        }
    }
    G
}
