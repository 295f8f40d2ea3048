//! F32, F16 and BF16 weights with f32 activations: each row is widened once and used for all
//! tokens.

use super::Slab;
use crate::Format;
use crate::formats::dequantize_row;
use crate::isa::Kernel;
use crate::lanes::{LANES, multiply_add, sum};

/// Independent sums per product, so that additions do not wait for each other.
const CHAINS: usize = 4;
/// Tokens that share a pass over a widened row.
const TOKENS: usize = 4;

pub(super) fn is_dense(format: Format) -> bool {
    matches!(format, Format::F32 | Format::F16 | Format::BF16)
}

/// A worker's rows.
pub(super) struct Dense<'a> {
    pub(super) slab: &'a Slab<'a>,
    pub(super) x: &'a [f32],
}

impl Kernel for Dense<'_> {
    #[inline(always)]
    fn run(self) {
        let slab = self.slab;
        let mut wide = vec![0.0f32; slab.cols];
        for row in slab.rows.clone() {
            let bytes = &slab.weight[row * slab.row_bytes..][..slab.row_bytes];
            widen(slab.format, bytes, &mut wide);
            let mut token = 0;
            while token < slab.tokens {
                let x = &self.x[token * slab.cols..];
                let count = if slab.tokens - token >= TOKENS {
                    store(slab, row, token, dot::<TOKENS>(&wide, x));
                    TOKENS
                } else {
                    store(slab, row, token, dot::<1>(&wide, x));
                    1
                };
                token += count;
            }
        }
    }
}

#[inline(always)]
fn widen(format: Format, bytes: &[u8], wide: &mut [f32]) {
    match format {
        Format::BF16 => {
            for (o, w) in wide.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *o = f32::from_bits(u32::from(u16::from_le_bytes(*w)) << 16);
            }
        }
        _ => dequantize_row(format, bytes, wide),
    }
}

#[inline(always)]
fn store<const T: usize>(slab: &Slab<'_>, row: usize, token: usize, values: [f32; T]) {
    for (t, value) in values.into_iter().enumerate() {
        // SAFETY: the slab's own rows, and tokens within the output's.
        unsafe { slab.sink.store(token + t, row, value) };
    }
}

/// Products of one row with `T` consecutive tokens; the same operations for every `T`.
#[inline(always)]
fn dot<const T: usize>(row: &[f32], x: &[f32]) -> [f32; T] {
    let cols = row.len();
    let mut lanes = [[[0.0f32; LANES]; CHAINS]; T];
    let (blocks, rest) = row.as_chunks::<{ LANES * CHAINS }>();
    for (b, block) in blocks.iter().enumerate() {
        for (t, lanes) in lanes.iter_mut().enumerate() {
            let x = &x[t * cols + b * LANES * CHAINS..][..LANES * CHAINS];
            let pieces = block.as_chunks::<LANES>().0.iter().zip(x.as_chunks::<LANES>().0);
            for (lanes, (w, x)) in lanes.iter_mut().zip(pieces) {
                multiply_add(lanes, w, x);
            }
        }
    }
    let done = cols - rest.len();
    let mut values = [0.0; T];
    for (t, (value, mut lanes)) in values.iter_mut().zip(lanes).enumerate() {
        for (i, w) in rest.iter().enumerate() {
            let lane = &mut lanes[i / LANES][i % LANES];
            *lane = w.mul_add(x[t * cols + done + i], *lane);
        }
        *value = (sum(lanes[0]) + sum(lanes[1])) + (sum(lanes[2]) + sum(lanes[3]));
    }
    values
}
