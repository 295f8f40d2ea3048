//! The one layout of weights in memory, for few tokens and for many.
//!
//! Sixteen rows form a group, and a vector register has a lane for each: one instruction serves
//! sixteen rows, and no sum ever crosses lanes. Formats of integers lie in blocks of 32 columns:
//! first the integers of all blocks of the group, then their scales. Four columns of a row fill a
//! lane, so that a block is eight steps of 64 integers:
//!
//! | bits | bytes of a block |
//! | --- | --- |
//! | 4 | four vectors: the low nibbles are step `j`, the high ones step `j + 2` of the same half |
//! | 5 | as 4 bits, then eight 64-bit masks with the fifth bits of each step |
//! | 6 | as 4 bits, then one vector for each half with the upper two bits of its four steps |
//! | 8 | eight vectors |
//!
//! Dense formats lie column by column: sixteen numbers each, as stored in the file. Two columns of
//! BF16 lie together, a lane's numbers side by side, and columns of zeros fill the last block.
//!
//! Group formats have their scales once for each group of 32, 64 or 128 columns, which is one, two
//! or four blocks.
//!
//! Every integer format reads `value = d * w + m`, with `d` and `m` given per row for a block or
//! (Q6_K) for half of one. Integers are stored without a sign; in formats without minima, `m`, a
//! centre is taken from them as they are read.

use half::f16;

use crate::Format;
use crate::formats::{ZERO_PARTS, half_at, q4_k_scale_min};
use crate::lanes::LANES;

/// Number of this layout: to be raised with every change of a packed matrix's bytes, so that files
/// of packed matrices that earlier versions wrote are not taken for this one's.
pub const LAYOUT: u32 = 2;
/// Rows of a group.
pub(crate) const GROUP: usize = LANES;
/// Columns of a block.
pub(crate) const BLOCK: usize = 32;
/// Steps of a block: four columns each.
pub(crate) const STEPS: usize = BLOCK / 4;
/// Pairs of BF16 columns that fill a tile register, and the bytes of one.
pub(super) const PAIRS_AT_ONCE: usize = BLOCK / 2;
pub(super) const PAIR_BYTES: usize = 4 * GROUP;
/// Bytes that a group is rounded up to: a cache line.
const ALIGN: usize = 64;
/// Blocks that share the 16-bit scales of a K format.
pub(super) const SUPER: usize = 8;

/// Bits of an integer.
pub(super) fn bits(format: Format) -> usize {
    match format {
        Format::Q4_0 | Format::Q4_1 | Format::Q4_K => 4,
        Format::Q5_0 | Format::Q5_1 | Format::Q5_K => 5,
        Format::Q6_K => 6,
        Format::Q8_0 => 8,
        Format::Int8G32 | Format::Int8G64 | Format::Int8G128 => 8,
        Format::Int4G32 | Format::Int4G64 | Format::Int4G128 => 4,
        Format::F32 | Format::F16 | Format::BF16 => unreachable!("dense formats have no integers"),
    }
}

/// Bytes of the integers of a group's block.
pub(super) fn integer_bytes(format: Format) -> usize {
    bits(format) * GROUP * BLOCK / 8
}

/// Bytes of the scales of block `block` and all before it.
#[inline(always)]
pub(super) fn factors_at(format: Format, block: usize) -> usize {
    if format.is_grouped() {
        // A 16-bit scale, then for 4 bits a byte.
        let each = if format.is_int4() { 48 } else { 32 };
        return block / (format.block_len() / BLOCK) * each;
    }
    let (head, each) = match format {
        Format::Q4_1 | Format::Q5_1 => (0, 64),
        // 16-bit scale and minimum, then a byte each for every block.
        Format::Q4_K | Format::Q5_K => (64, 32),
        // A 16-bit scale, then a byte for each half block.
        Format::Q6_K => (32, 32),
        _ => (0, 32),
    };
    block.div_ceil(SUPER) * head + block * each
}

/// Bytes of a group of `cols` columns.
pub(crate) fn group_bytes(format: Format, cols: usize) -> usize {
    let bytes = if format == Format::BF16 {
        cols.div_ceil(BLOCK) * PAIRS_AT_ONCE * PAIR_BYTES
    } else if format.is_dense() {
        cols * GROUP * format.block_bytes()
    } else {
        let blocks = cols / BLOCK;
        blocks * integer_bytes(format) + factors_at(format, blocks)
    };
    bytes.next_multiple_of(ALIGN)
}

/// Bytes of a packed matrix, `None` when the shape is impossible or too large.
pub(crate) fn matrix_bytes(format: Format, rows: usize, cols: usize) -> Option<usize> {
    // A row in the file is at least as large as its share of a group but for scales of scales.
    format.row_bytes(cols)?.checked_mul(2)?.checked_mul(rows.checked_next_multiple_of(GROUP)?)?;
    Some(rows.div_ceil(GROUP) * group_bytes(format, cols)).filter(|bytes| *bytes > 0)
}

/// Packs up to sixteen rows, each as stored in the file, into a zeroed group.
pub(crate) fn pack(format: Format, rows: &[u8], cols: usize, group: &mut [u8]) {
    let row_bytes = format.row_bytes(cols).expect("checked when the matrix was made");
    if format.is_dense() {
        return match format {
            Format::F32 => pack_dense::<4, 1>(rows, cols, group),
            Format::BF16 => pack_dense::<2, 2>(rows, cols, group),
            _ => pack_dense::<2, 1>(rows, cols, group),
        };
    }
    let blocks = cols / BLOCK;
    let (integers, factors) = group.split_at_mut(blocks * integer_bytes(format));
    for (lane, row) in rows.chunks_exact(row_bytes).enumerate() {
        for (b, place) in integers.chunks_exact_mut(integer_bytes(format)).enumerate() {
            put_integers(bits(format), lane, &integers_of(format, row, b), place);
            put_factors(format, lane, row, b, factors);
        }
    }
}

/// Rows of numbers of `N` bytes, `C` columns together, a tile of columns after the other: what a
/// tile is written to stays in the first level of the cache until all rows have been there.
fn pack_dense<const N: usize, const C: usize>(rows: &[u8], cols: usize, group: &mut [u8]) {
    const TILE: usize = 128;
    let group = group.as_chunks_mut::<N>().0;
    for start in (0..cols).step_by(TILE) {
        let columns = start..cols.min(start + TILE);
        for (lane, row) in rows.chunks_exact(cols * N).enumerate() {
            let places = group[columns.start * GROUP + lane * C..].chunks_mut(GROUP * C);
            let values = row.as_chunks::<N>().0[columns.clone()].chunks(C);
            for (place, values) in places.zip(values) {
                place[..values.len()].copy_from_slice(values);
            }
        }
    }
}

/// The 32 unsigned integers of a row's block.
#[inline(always)]
fn integers_of(format: Format, row: &[u8], b: usize) -> [u8; BLOCK] {
    let mut w = [0; BLOCK];
    let bytes = format.block_bytes();
    let nibbles = |qs: &[u8], w: &mut [u8; BLOCK]| {
        for (i, q) in qs[..16].iter().enumerate() {
            w[i] = q & 15;
            w[i + 16] = q >> 4;
        }
    };
    let fifth = |qh: &[u8], w: &mut [u8; BLOCK]| {
        for (i, w) in w.iter_mut().enumerate() {
            *w |= (qh[i / 8] >> (i % 8) & 1) << 4;
        }
    };
    match format {
        Format::Q4_K | Format::Q5_K => {
            let block = &row[b / SUPER * bytes..][..bytes];
            let (sub, qs) = (b % SUPER, &block[bytes - 128..]);
            for (i, w) in w.iter_mut().enumerate() {
                *w = qs[sub / 2 * 32 + i] >> (sub % 2 * 4) & 15;
                if format == Format::Q5_K {
                    *w |= (block[16 + i] >> sub & 1) << 4;
                }
            }
        }
        Format::Q6_K => {
            let block = &row[b / SUPER * bytes..][..bytes];
            let (half, run) = (b % SUPER / 4, b % 4);
            let (low, high) = (&block[half * 64 + run % 2 * 32..], &block[128 + half * 32..]);
            for (i, w) in w.iter_mut().enumerate() {
                *w = low[i] >> (run / 2 * 4) & 15 | (high[i] >> (run * 2) & 3) << 4;
            }
        }
        _ if format.is_grouped() => {
            let (group, own) = group_of(format, row, b);
            match format.is_int4() {
                true => nibbles(&group[3 + own * 16..], &mut w),
                false => {
                    let qs = &group[2 + own * BLOCK..];
                    w.iter_mut().zip(qs).for_each(|(w, q)| *w = q ^ 0x80);
                }
            }
        }
        _ => {
            let block = &row[b * bytes..][..bytes];
            match format {
                Format::Q8_0 => w.iter_mut().zip(&block[2..]).for_each(|(w, q)| *w = q ^ 0x80),
                _ => nibbles(&block[bytes - 16..], &mut w),
            }
            if bits(format) == 5 {
                fifth(&block[bytes - 20..], &mut w);
            }
        }
    }
    w
}

/// The group that has block `b`, and which of its blocks that is.
#[inline(always)]
fn group_of(format: Format, row: &[u8], b: usize) -> (&[u8], usize) {
    let (blocks, bytes) = (format.block_len() / BLOCK, format.block_bytes());
    (&row[b / blocks * bytes..][..bytes], b % blocks)
}

#[inline(always)]
fn put_integers(bits: usize, lane: usize, w: &[u8; BLOCK], place: &mut [u8]) {
    let steps = w.as_chunks::<4>().0;
    if bits == 8 {
        for (s, four) in steps.iter().enumerate() {
            place[s * 64 + lane * 4..][..4].copy_from_slice(four);
        }
        return;
    }
    for j in 0..4 {
        let (low, high) = (&steps[nibble_step(j)], &steps[nibble_step(j) + 2]);
        for i in 0..4 {
            place[j * 64 + lane * 4 + i] = low[i] & 15 | high[i] << 4;
        }
    }
    for (s, four) in steps.iter().enumerate() {
        for (i, w) in four.iter().enumerate() {
            let at = lane * 4 + i;
            match bits {
                5 => place[256 + s * 8 + at / 8] |= (w >> 4) << (at % 8),
                6 => place[256 + s / 4 * 64 + at] |= (w >> 4) << (s % 4 * 2),
                _ => {}
            }
        }
    }
}

/// The step in the low nibbles of vector `j`.
#[inline(always)]
pub(super) const fn nibble_step(j: usize) -> usize {
    j / 2 * 4 + j % 2
}

#[inline(always)]
fn put_factors(format: Format, lane: usize, row: &[u8], b: usize, factors: &mut [u8]) {
    let bytes = format.block_bytes();
    match format {
        Format::Q4_K | Format::Q5_K => {
            let block = &row[b / SUPER * bytes..][..bytes];
            let at = factors_at(format, b / SUPER * SUPER);
            factors[at + lane * 2..][..2].copy_from_slice(&block[..2]);
            factors[at + 32 + lane * 2..][..2].copy_from_slice(&block[2..4]);
            let (scale, minimum) = q4_k_scale_min(&block[4..16], b % SUPER);
            let at = at + 64 + b % SUPER * 32;
            (factors[at + lane], factors[at + 16 + lane]) = (scale, minimum);
        }
        Format::Q6_K => {
            let block = &row[b / SUPER * bytes..][..bytes];
            let at = factors_at(format, b / SUPER * SUPER);
            factors[at + lane * 2..][..2].copy_from_slice(&block[208..210]);
            let (at, scales) = (at + 32 + b % SUPER * 32, &block[192 + b % SUPER * 2..]);
            (factors[at + lane], factors[at + 16 + lane]) = (scales[0], scales[1]);
        }
        _ if format.is_grouped() => {
            let ((group, _), at) = (group_of(format, row, b), factors_at(format, b));
            factors[at + lane * 2..][..2].copy_from_slice(&group[..2]);
            if format.is_int4() {
                factors[at + 32 + lane] = group[2];
            }
        }
        _ => {
            let (block, at) = (&row[b * bytes..][..bytes], factors_at(format, b));
            factors[at + lane * 2..][..2].copy_from_slice(&block[..2]);
            if matches!(format, Format::Q4_1 | Format::Q5_1) {
                factors[at + 32 + lane * 2..][..2].copy_from_slice(&block[2..4]);
            }
        }
    }
}

/// What is taken from integers as they are stored; zero where there are minima.
pub(super) const fn centre(format: Format) -> i8 {
    match format {
        Format::Q4_0 => 8,
        Format::Q5_0 => 16,
        Format::Q6_K => 32,
        Format::Q8_0 | Format::Int8G32 | Format::Int8G64 | Format::Int8G128 => -128,
        _ => 0,
    }
}

/// Whether values have a part, `m`, that does not depend on the integer.
pub(super) const fn has_minima(format: Format) -> bool {
    centre(format) == 0
}

/// A block of a group, unpacked: the definition of the layout.
#[derive(Default)]
pub(super) struct Block {
    /// `[step][lane][column of the step]`.
    pub(super) w: [[[i8; 4]; GROUP]; STEPS],
    /// For each half of the block.
    pub(super) d: [[f32; GROUP]; 2],
    pub(super) m: [[f32; GROUP]; 2],
}

impl Block {
    /// Unpacks block `b` of a group of `cols` columns.
    #[inline(always)]
    pub(super) fn of(format: Format, group: &[u8], cols: usize, b: usize) -> Block {
        let size = integer_bytes(format);
        let stored = stored(bits(format), &group[b * size..][..size]);
        let mut block = Block::default();
        block.take_factors(format, &group[cols / BLOCK * size..], b);
        block.w = stored
            .map(|step| step.map(|four| four.map(|w| (w as i8).wrapping_sub(centre(format)))));
        block
    }

    #[inline(always)]
    fn take_factors(&mut self, format: Format, factors: &[u8], b: usize) {
        let start = factors_at(format, b / SUPER * SUPER);
        let own = match format {
            Format::Q4_K | Format::Q5_K => start + 64 + b % SUPER * 32,
            Format::Q6_K => start + 32 + b % SUPER * 32,
            _ => factors_at(format, b),
        };
        for lane in 0..GROUP {
            let bytes = [factors[own + lane], factors[own + 16 + lane]];
            let zero = || f32::from(factors[own + 32 + lane]) / -ZERO_PARTS;
            let half = |at: usize| half_at(factors, at + lane * 2);
            let (d, m) = match format {
                Format::Q4_K | Format::Q5_K => {
                    let [scale, minimum] = bytes.map(f32::from);
                    ([half(start) * scale; 2], [-(half(start + 32) * minimum); 2])
                }
                Format::Q6_K => (bytes.map(|s| half(start) * f32::from(s as i8)), [0.0; 2]),
                Format::Q4_1 | Format::Q5_1 => ([half(own); 2], [half(own + 32); 2]),
                _ if format.is_int4() => ([half(own); 2], [half(own) * zero(); 2]),
                _ => ([half(own); 2], [0.0; 2]),
            };
            for h in 0..2 {
                (self.d[h][lane], self.m[h][lane]) = (d[h], m[h]);
            }
        }
    }
}

/// A block's integers as they are stored.
#[inline(always)]
fn stored(bits: usize, place: &[u8]) -> [[[u8; 4]; GROUP]; STEPS] {
    let vectors = place.as_chunks::<4>().0.as_chunks::<GROUP>().0;
    let mut w = [[[0; 4]; GROUP]; STEPS];
    if bits == 8 {
        w.copy_from_slice(vectors);
        return w;
    }
    for (j, vector) in vectors[..4].iter().enumerate() {
        let step = nibble_step(j);
        for lane in 0..GROUP {
            for i in 0..4 {
                w[step][lane][i] = vector[lane][i] & 15;
                w[step + 2][lane][i] = vector[lane][i] >> 4;
            }
        }
    }
    for s in 0..STEPS {
        for lane in 0..GROUP {
            for i in 0..4 {
                let at = lane * 4 + i;
                w[s][lane][i] |= match bits {
                    5 => (place[256 + s * 8 + at / 8] >> (at % 8) & 1) << 4,
                    6 => (vectors[4 + s / 4][lane][i] >> (s % 4 * 2) & 3) << 4,
                    _ => 0,
                };
            }
        }
    }
    w
}

/// Reads row `lane` of a group, the same numbers as [`crate::dequantize_row`] gives.
pub(crate) fn row(format: Format, group: &[u8], lane: usize, out: &mut [f32]) {
    let cols = out.len();
    if format.is_dense() {
        let size = format.block_bytes();
        let together = if format == Format::BF16 { 2 } else { 1 };
        let columns = group.chunks(GROUP * together * size);
        let values = columns.flat_map(|column| {
            column[lane * together * size..][..together * size].chunks_exact(size)
        });
        for (value, out) in values.zip(out) {
            *out = match format {
                Format::F32 => f32::from_le_bytes([value[0], value[1], value[2], value[3]]),
                Format::F16 => f16::from_le_bytes([value[0], value[1]]).to_f32(),
                _ => f32::from_bits(u32::from(u16::from_le_bytes([value[0], value[1]])) << 16),
            };
        }
        return;
    }
    for (b, out) in out.chunks_exact_mut(BLOCK).enumerate() {
        let block = Block::of(format, group, cols, b);
        for (i, out) in out.iter_mut().enumerate() {
            let w = f32::from(block.w[i / 4][lane][i % 4]);
            *out = w.mul_add(block.d[i / 16][lane], block.m[i / 16][lane]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{Dice, random_weights};
    use super::*;
    use crate::dequantize_row;

    #[test]
    fn what_was_packed_reads_as_what_was_stored() {
        let mut dice = Dice(9);
        for format in Format::ALL {
            let cols = if format.block_len() == 1 { 37 } else { 768 };
            let stored = random_weights(format, 11, cols, &mut dice);
            let mut group = vec![0; group_bytes(format, cols)];
            pack(format, &stored, cols, &mut group);
            let row_bytes = format.row_bytes(cols).unwrap();
            for (lane, bytes) in stored.chunks_exact(row_bytes).enumerate() {
                let (mut expected, mut found) = (vec![0.0; cols], vec![0.0; cols]);
                dequantize_row(format, bytes, &mut expected);
                row(format, &group, lane, &mut found);
                assert_eq!(found, expected, "{format:?} row {lane}");
            }
            let mut empty = vec![1.0; cols];
            row(format, &group, GROUP - 1, &mut empty);
            assert!(empty.iter().all(|v| *v == 0.0), "rows beyond the last are zero");
        }
    }

    #[test]
    fn packing_costs_at_most_a_few_per_cent() {
        for format in Format::ALL {
            let stored = format.row_bytes(2048).unwrap() * 512;
            let packed = matrix_bytes(format, 512, 2048).unwrap();
            assert!(packed >= stored && packed * 100 <= stored * 103, "{format:?}: {packed}");
        }
        assert_eq!(matrix_bytes(Format::Q4_0, 1, 33), None);
        assert_eq!(matrix_bytes(Format::F32, usize::MAX, 2), None);
        assert_eq!(matrix_bytes(Format::F32, 0, 2), None);
    }

    #[test]
    fn a_changed_layout_has_another_number() {
        let mut dice = Dice(5);
        let mut sums = [0xcbf2_9ce4_8422_2325u64; 2];
        for format in Format::ALL {
            let stored = random_weights(format, 11, 512, &mut dice);
            let mut group = vec![0; group_bytes(format, 512)];
            pack(format, &stored, 512, &mut group);
            let sum = &mut sums[usize::from(format.is_grouped())];
            for byte in group {
                *sum = (*sum ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
            }
        }
        // Those of files, and those of our own.
        let [files, groups] = sums;
        // With other bytes than this version has, LAYOUT is to be raised, and then both stand here.
        assert_eq!(
            (LAYOUT, files, groups),
            (2, 325_842_209_404_709_594, 2_245_939_620_202_140_286)
        );
    }
}
