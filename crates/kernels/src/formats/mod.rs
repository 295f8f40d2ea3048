//! What the bytes of each weight format mean. The definitions of GGUF's are those of ggml's
//! `ggml-common.h` and `ggml-quants.c`; tests compare with the `gguf` Python package bit by bit.

mod groups;
mod k_quants;
mod legacy;

pub use groups::Int4Group;
pub(crate) use groups::ZERO_PARTS;
pub(crate) use k_quants::q4_k_scale_min;

use half::{bf16, f16};

use crate::Format;

/// Decodes one row: `out.len()` weights from `bytes`.
///
/// # Panics
/// When the lengths do not fit each other: callers size both from the same shape.
pub fn dequantize_row(format: Format, bytes: &[u8], out: &mut [f32]) {
    assert_eq!(format.row_bytes(out.len()), Some(bytes.len()), "{format:?}: row length");
    let blocks = bytes.chunks_exact(format.block_bytes());
    let outs = out.chunks_exact_mut(format.block_len());
    let each = |decode: fn(&[u8], &mut [f32])| blocks.zip(outs).for_each(|(b, o)| decode(b, o));
    match format {
        Format::F32 => {
            let words = bytes.as_chunks::<4>().0;
            out.iter_mut().zip(words).for_each(|(o, w)| *o = f32::from_le_bytes(*w));
        }
        Format::F16 => halves(bytes, out, |bits| f16::from_bits(bits).to_f32()),
        Format::BF16 => halves(bytes, out, |bits| bf16::from_bits(bits).to_f32()),
        Format::Q4_0 => each(legacy::q4_0),
        Format::Q4_1 => each(legacy::q4_1),
        Format::Q5_0 => each(legacy::q5_0),
        Format::Q5_1 => each(legacy::q5_1),
        Format::Q8_0 => each(legacy::q8_0),
        Format::Q4_K => each(k_quants::q4_k),
        Format::Q5_K => each(k_quants::q5_k),
        Format::Q6_K => each(k_quants::q6_k),
        Format::Int8G32 | Format::Int8G64 | Format::Int8G128 => each(groups::int8),
        Format::Int4G32 | Format::Int4G64 | Format::Int4G128 => each(groups::int4),
    }
}

fn halves(bytes: &[u8], out: &mut [f32], convert: fn(u16) -> f32) {
    let words = bytes.as_chunks::<2>().0;
    out.iter_mut().zip(words).for_each(|(o, w)| *o = convert(u16::from_le_bytes(*w)));
}

/// The half-precision number at a byte offset.
#[inline(always)]
pub(crate) fn half_at(bytes: &[u8], at: usize) -> f32 {
    f16::from_bits(u16::from_le_bytes([bytes[at], bytes[at + 1]])).to_f32()
}
