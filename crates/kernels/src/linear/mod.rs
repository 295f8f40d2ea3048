//! Products of weights and activations: `out[token][row] = weight[row] · x[token] (+ bias)`.
//!
//! Quantised weights meet quantised activations: 64 weights at a time, integer products in 16
//! lanes of 4, then one multiply-add per lane into f32. Every (row, token) is computed by the same
//! sequence of operations whatever the number of tokens, rows or threads; the tiers agree bit for
//! bit, since they agree on lanes and order. Dense weights meet f32 activations in 64 lanes.
//!
//! Cost: bytes of the weights at few tokens (read once), 2 operations per weight and token at many.

mod activations;
#[cfg_attr(not(target_arch = "x86_64"), path = "portable.rs")]
mod avx512;
mod chunk;
mod dense;
mod reference;
#[cfg(test)]
pub(crate) mod tests;

use std::ops::Range;

pub(crate) use activations::Activations;
use pomona_device::{Pool, split};

use crate::{Format, Isa, Write};

/// Weights in a chunk, the unit of quantised work.
pub(crate) const CHUNK: usize = 64;
/// Rows of a worker's share: a cache line of outputs.
const ROW_GRAIN: usize = 16;

/// One product of a join.
pub(crate) struct Part<'a> {
    pub(crate) format: Format,
    /// `rows * format.row_bytes(cols)` bytes.
    pub(crate) weight: &'a [u8],
    pub(crate) rows: usize,
    pub(crate) bias: Option<&'a [f32]>,
    /// `[tokens, rows]`.
    pub(crate) out: &'a mut [f32],
}

/// A worker's view of a part: its rows, and where results go.
pub(crate) struct Slab<'a> {
    format: Format,
    weight: &'a [u8],
    rows: Range<usize>,
    row_bytes: usize,
    tokens: usize,
    cols: usize,
    sink: Sink<'a>,
}

/// Writes results of one part from several workers, each its own rows.
#[derive(Clone, Copy)]
struct Sink<'a> {
    out: *mut f32,
    rows: usize,
    bias: Option<&'a [f32]>,
    write: Write,
}

// SAFETY: workers write disjoint rows of `out`, which outlives the join.
unsafe impl Sync for Sink<'_> {}
// SAFETY: as above.
unsafe impl Send for Sink<'_> {}

impl Sink<'_> {
    /// Stores the product of `row` and `token`.
    ///
    /// # Safety
    /// `token` and `row` are in bounds, and no other worker stores this row.
    #[inline(always)]
    unsafe fn store(&self, token: usize, row: usize, value: f32) {
        let value = self.bias.map_or(value, |bias| value + bias[row]);
        // SAFETY: in bounds by contract.
        let out = unsafe { &mut *self.out.add(token * self.rows + row) };
        *out = match self.write {
            Write::Set => value,
            Write::Add => *out + value,
        };
    }
}

/// Computes all parts in one join. `x: [tokens, cols]`; shapes are the caller's responsibility.
pub(crate) fn linear(
    pool: &Pool,
    isa: Isa,
    x: &[f32],
    cols: usize,
    parts: &mut [Part<'_>],
    how: (Write, &mut Activations),
) {
    let (write, activations) = how;
    let tokens = x.len() / cols;
    if tokens == 0 {
        return;
    }
    if parts.iter().any(|p| !dense::is_dense(p.format)) {
        activations.quantise(pool, isa, x, cols);
    }
    let activations = &*activations;
    let slabs: Vec<Slab<'_>> = parts
        .iter_mut()
        .map(|part| {
            let row_bytes = part.format.row_bytes(cols).expect("checked when the matrix was made");
            assert_eq!(part.weight.len(), part.rows * row_bytes, "a matrix has all its bytes");
            assert_eq!(part.out.len(), tokens * part.rows, "an output has room for all tokens");
            let (out, rows) = (part.out.as_mut_ptr(), part.rows);
            Slab {
                format: part.format,
                weight: part.weight,
                rows: 0..rows,
                row_bytes,
                tokens,
                cols,
                sink: Sink { out, rows, bias: part.bias, write },
            }
        })
        .collect();
    let total: usize = slabs.iter().map(|s| s.rows.end).sum();
    pool.run(&|worker| {
        let mine = split(total, ROW_GRAIN, pool.threads(), worker);
        let mut first = 0;
        for slab in &slabs {
            let start = mine.start.clamp(first, first + slab.rows.end) - first;
            let end = mine.end.clamp(first, first + slab.rows.end) - first;
            first += slab.rows.end;
            if start < end {
                run_slab(isa, &Slab { rows: start..end, ..*slab }, x, activations);
            }
        }
    });
}

fn run_slab(isa: Isa, slab: &Slab<'_>, x: &[f32], activations: &Activations) {
    if dense::is_dense(slab.format) {
        isa.run(dense::Dense { slab, x });
    } else if isa == Isa::Avx512 {
        avx512::run(slab, activations);
    } else {
        isa.run(reference::Quantised { slab, activations });
    }
}

/// A pointer that workers of one join share; each touches its own elements.
#[derive(Clone, Copy)]
struct Shared<T>(*mut T);

// SAFETY: whoever uses `at` promises disjointness there.
unsafe impl<T> Sync for Shared<T> {}
// SAFETY: as above.
unsafe impl<T> Send for Shared<T> {}

impl<T> Shared<T> {
    /// # Safety
    /// `index` is within the allocation, and no one else uses the elements from there on that the
    /// caller touches.
    unsafe fn at(&self, index: usize) -> *mut T {
        // SAFETY: within the allocation by contract.
        unsafe { self.0.add(index) }
    }
}
