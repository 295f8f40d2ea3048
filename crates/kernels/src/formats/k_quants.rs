//! Super-blocks of 256 weights with scales of scales.

use super::half_at;

/// Scale and minimum, 6 bits each, of sub-block `i` of 8 (Q4_K and Q5_K pack them in 12 bytes).
#[inline(always)]
pub(crate) fn q4_k_scale_min(scales: &[u8], i: usize) -> (u8, u8) {
    if i < 4 {
        (scales[i] & 63, scales[i + 4] & 63)
    } else {
        let low = scales[i + 4];
        ((low & 15) | (scales[i - 4] >> 6) << 4, (low >> 4) | (scales[i] >> 6) << 4)
    }
}

/// `d * scale` and `dmin * minimum` of sub-block `i`.
#[inline(always)]
fn q4_k_scales(block: &[u8], i: usize) -> (f32, f32) {
    let (scale, minimum) = q4_k_scale_min(&block[4..16], i);
    (half_at(block, 0) * f32::from(scale), half_at(block, 2) * f32::from(minimum))
}

/// `d, dmin: f16, 12 bytes of scales, 128 bytes of nibbles`; 8 sub-blocks of 32: `d * s * q -
/// dmin * m`. Sub-blocks 2j and 2j + 1 are the low and high nibbles of the same 32 bytes.
pub(super) fn q4_k(block: &[u8], out: &mut [f32]) {
    for (i, out) in out.chunks_exact_mut(32).enumerate() {
        let (d, m) = q4_k_scales(block, i);
        let qs = &block[16 + i / 2 * 32..][..32];
        for (q, o) in qs.iter().zip(out) {
            *o = d * f32::from(q >> (i % 2 * 4) & 15) - m;
        }
    }
}

/// As Q4_K with 32 bytes of fifth bits before the nibbles: bit `i` belongs to sub-block `i`.
pub(super) fn q5_k(block: &[u8], out: &mut [f32]) {
    for (i, out) in out.chunks_exact_mut(32).enumerate() {
        let (d, m) = q4_k_scales(block, i);
        let qs = &block[48 + i / 2 * 32..][..32];
        for ((q, h), o) in qs.iter().zip(&block[16..48]).zip(out) {
            *o = d * f32::from((q >> (i % 2 * 4) & 15) | (h >> i & 1) << 4) - m;
        }
    }
}

/// `128 bytes of nibbles, 64 of upper bit pairs, 16 signed scales, d: f16`; 16 sub-blocks of 16:
/// `d * s * (q - 32)`. Each half of 128 weights is four runs of 32.
pub(super) fn q6_k(block: &[u8], out: &mut [f32]) {
    let d = half_at(block, 208);
    for (half, out) in out.chunks_exact_mut(128).enumerate() {
        let (low, high) = (&block[half * 64..], &block[128 + half * 32..]);
        for (i, o) in out.iter_mut().enumerate() {
            let (run, l) = (i / 32, i % 32);
            let nibble = low[l + run % 2 * 32] >> (run / 2 * 4) & 15;
            let q = nibble | (high[l] >> (run * 2) & 3) << 4;
            let scale = block[192 + half * 8 + i / 16] as i8;
            *o = (d * f32::from(scale)) * (f32::from(q) - 32.0);
        }
    }
}
