//! Blocks of 32 weights: `d * q (+ m)`. The first 16 weights are the low nibbles, the last 16 the
//! high ones.

use super::half_at;

/// The 4-bit part of weight `i`.
#[inline(always)]
fn nibble(qs: &[u8], i: usize) -> u8 {
    if i < 16 { qs[i] & 15 } else { qs[i - 16] >> 4 }
}

/// Weight `i` with its fifth bit from `qh`.
#[inline(always)]
fn five_bits(qh: &[u8], qs: &[u8], i: usize) -> u8 {
    nibble(qs, i) | (qh[i / 8] >> (i % 8) & 1) << 4
}

/// `d: f16, 16 bytes`; `d * (q - 8)`.
pub(super) fn q4_0(block: &[u8], out: &mut [f32]) {
    let d = half_at(block, 0);
    for (i, o) in out.iter_mut().enumerate() {
        *o = (f32::from(nibble(&block[2..], i)) - 8.0) * d;
    }
}

/// `d: f16, m: f16, 16 bytes`; `d * q + m`.
pub(super) fn q4_1(block: &[u8], out: &mut [f32]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    for (i, o) in out.iter_mut().enumerate() {
        *o = f32::from(nibble(&block[4..], i)) * d + m;
    }
}

/// `d: f16, fifth bits: u32, 16 bytes`; `d * (q - 16)`.
pub(super) fn q5_0(block: &[u8], out: &mut [f32]) {
    let d = half_at(block, 0);
    for (i, o) in out.iter_mut().enumerate() {
        *o = (f32::from(five_bits(&block[2..], &block[6..], i)) - 16.0) * d;
    }
}

/// `d: f16, m: f16, fifth bits: u32, 16 bytes`; `d * q + m`.
pub(super) fn q5_1(block: &[u8], out: &mut [f32]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    for (i, o) in out.iter_mut().enumerate() {
        *o = f32::from(five_bits(&block[4..], &block[8..], i)) * d + m;
    }
}

/// `d: f16, 32 signed bytes`; `d * q`.
pub(super) fn q8_0(block: &[u8], out: &mut [f32]) {
    let d = half_at(block, 0);
    for (q, o) in block[2..].iter().zip(out) {
        *o = f32::from(*q as i8) * d;
    }
}
