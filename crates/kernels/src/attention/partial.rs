//! Softmax states of (row, head) pairs that have seen some of their past, and how they are joined.

use bytemuck::{cast_slice, cast_slice_mut};

use crate::isa::{Kernel, Tier};
use crate::lanes::{LANES, Line, exp2};

/// Online softmax of a set of pairs: what weights are relative to, sums, weighted values.
#[derive(Default)]
pub(super) struct Partial {
    /// In powers of two, as all scores here: near the largest score, and minus infinity before any.
    pub(super) base: Vec<[f32; LANES]>,
    pub(super) sum: Vec<[f32; LANES]>,
    /// `[pairs, head_dim]`, each pair's padded with zeros to whole vectors.
    pub(super) acc: Vec<Line>,
}

/// Vectors that a head's numbers take.
#[inline(always)]
pub(super) fn vectors(head_dim: usize) -> usize {
    head_dim.div_ceil(LANES)
}

/// Numbers of a record.
pub(super) fn record_len(head_dim: usize) -> usize {
    2 + head_dim
}

impl Partial {
    /// Forgets all, and makes room.
    #[inline(always)]
    pub(super) fn clear(&mut self, pairs: usize, head_dim: usize) {
        self.acc.clear();
        self.restart(pairs, head_dim);
    }

    /// The same but for weighted values: those of a pair without a base mean nothing.
    #[inline(always)]
    pub(super) fn restart(&mut self, pairs: usize, head_dim: usize) {
        self.base.clear();
        self.base.resize(vectors(pairs), [f32::NEG_INFINITY; LANES]);
        self.sum.clear();
        self.sum.resize(vectors(pairs), [0.0; LANES]);
        self.acc.resize(pairs * vectors(head_dim), Line::default());
    }

    /// A pair's weighted values.
    #[inline(always)]
    fn values(&self, pair: usize, head_dim: usize) -> &[f32] {
        &cast_slice(&self.acc[pair * vectors(head_dim)..])[..head_dim]
    }

    /// Appends a pair's record: its base, its sum, its weighted values.
    pub(super) fn write(&self, pair: usize, head_dim: usize, records: &mut Vec<f32>) {
        records.extend_from_slice(&[self.base.as_flattened()[pair], self.sum.as_flattened()[pair]]);
        records.extend_from_slice(self.values(pair, head_dim));
    }

    /// Becomes the pairs of these records.
    #[inline(always)]
    fn read(&mut self, records: &[f32], head_dim: usize) {
        self.clear(records.len() / record_len(head_dim), head_dim);
        let accs = self.acc.chunks_exact_mut(vectors(head_dim));
        let sums = self.base.as_flattened_mut().iter_mut().zip(self.sum.as_flattened_mut());
        for (record, ((base, sum), acc)) in
            records.chunks_exact(record_len(head_dim)).zip(sums.zip(accs))
        {
            (*base, *sum) = (record[0], record[1]);
            cast_slice_mut(acc)[..head_dim].copy_from_slice(&record[2..]);
        }
    }

    /// Takes in what has been seen after it.
    #[inline(always)]
    pub(super) fn merge<T: Tier>(&mut self, t: T, more: &Partial, head_dim: usize) {
        let width = vectors(head_dim);
        let accs = self.acc.chunks_mut(LANES * width).zip(more.acc.chunks(LANES * width));
        let states = self.base.iter_mut().zip(&mut self.sum).zip(more.base.iter().zip(&more.sum));
        for (((base, sum), (more_base, more_sum)), (accs, more_accs)) in states.zip(accs) {
            let (before, after) = (t.load(base), t.load(more_base));
            t.store(t.larger(before, after), base);
            let common = t.load(&base.map(finite_base));
            let (old, new) = (exp2(t, t.sub(before, common)), exp2(t, t.sub(after, common)));
            t.store(t.mul_add(t.load(sum), old, t.mul(t.load(more_sum), new)), sum);
            let mut factors = [[0.0; LANES]; 2];
            t.store(old, &mut factors[0]);
            t.store(new, &mut factors[1]);
            let accs = accs.chunks_exact_mut(width).zip(more_accs.chunks_exact(width));
            for (pair, (acc, more)) in accs.enumerate() {
                // Who has seen nothing of it stays as it is, to the sign of zeros: what its values
                // are there was left by somebody else, and may be anything.
                if more_sum[pair] == 0.0 {
                    continue;
                }
                let (old, new) = (t.splat(factors[0][pair]), t.splat(factors[1][pair]));
                for (acc, more) in acc.iter_mut().zip(more) {
                    t.store(
                        t.mul_add(t.load(&acc.0), old, t.mul(t.load(&more.0), new)),
                        &mut acc.0,
                    );
                }
            }
        }
    }

    /// Writes `[pairs, head_dim]`: weighted values by sums.
    #[inline(always)]
    pub(super) fn finish(&self, first: usize, head_dim: usize, out: &mut [f32]) {
        for (i, out) in out.chunks_exact_mut(head_dim).enumerate() {
            let inverse = 1.0 / self.sum.as_flattened()[first + i];
            for (out, acc) in out.iter_mut().zip(self.values(first + i, head_dim)) {
                *out = acc * inverse;
            }
        }
    }
}

/// What is subtracted from scores for a base: that of nothing cannot be.
#[inline(always)]
pub(super) fn finite_base(base: f32) -> f32 {
    if base == f32::NEG_INFINITY { 0.0 } else { base }
}

/// Merges a partial result into another.
pub(super) struct Merge<'a> {
    pub(super) total: &'a mut Partial,
    pub(super) part: &'a Partial,
    pub(super) head_dim: usize,
}

impl Kernel for Merge<'_> {
    #[inline(always)]
    fn run<T: Tier>(self, t: T) {
        self.total.merge(t, self.part, self.head_dim);
    }
}

/// Merges splits that came as records, `[pairs, 2 + head_dim]` each, in their order into a result:
/// `[pairs, head_dim]`.
pub(super) struct MergeRecords<'a> {
    pub(super) splits: &'a mut dyn Iterator<Item = &'a [f32]>,
    pub(super) head_dim: usize,
    pub(super) total: &'a mut Partial,
    pub(super) part: &'a mut Partial,
    pub(super) out: &'a mut [f32],
}

impl Kernel for MergeRecords<'_> {
    #[inline(always)]
    fn run<T: Tier>(self, t: T) {
        let MergeRecords { splits, head_dim, total, part, out } = self;
        total.clear(out.len() / head_dim, head_dim);
        for records in splits {
            part.read(records, head_dim);
            total.merge(t, part, head_dim);
        }
        total.finish(0, head_dim, out);
    }
}
