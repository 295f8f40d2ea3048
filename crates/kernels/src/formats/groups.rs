//! Groups of 32, 64 or 128 weights with one scale: what weights become while they are loaded.

use half::f16;

use super::half_at;
use crate::Format;

/// Zero points are stored in parts of this.
pub(crate) const ZERO_PARTS: f32 = 16.0;
/// Where the nibbles of a group begin.
const NIBBLES_AT: usize = 3;

/// `d: f16, signed bytes`; `d * q`.
pub(super) fn int8(group: &[u8], out: &mut [f32]) {
    let d = half_at(group, 0);
    for (q, o) in group[2..].iter().zip(out) {
        *o = d * f32::from(*q as i8);
    }
}

/// `d: f16, z: u8, nibbles`; `d * (q - z / 16)`. Each 16 bytes are 32 weights: the low nibbles the
/// first half of them.
pub(super) fn int4(group: &[u8], out: &mut [f32]) {
    let (d, z) = (half_at(group, 0), f32::from(group[2]) / ZERO_PARTS);
    for (qs, out) in group[NIBBLES_AT..].chunks_exact(16).zip(out.chunks_exact_mut(32)) {
        let (low, high) = out.split_at_mut(16);
        for (q, o) in qs.iter().zip(low) {
            *o = d * (f32::from(q & 15) - z);
        }
        for (q, o) in qs.iter().zip(high) {
            *o = d * (f32::from(q >> 4) - z);
        }
    }
}

/// A group of an `Int4` format that is being written, for whoever reads another file's groups.
pub struct Int4Group<'a>(&'a mut [u8]);

impl Int4Group<'_> {
    /// Group `index` of a row, which is zeroed.
    ///
    /// # Panics
    /// When the row has no such group, or `format` no zero points.
    pub fn of(format: Format, row: &mut [u8], index: usize) -> Int4Group<'_> {
        assert!(format.is_int4());
        let bytes = format.block_bytes();
        let group = &mut row[index * bytes..][..bytes];
        Int4Group(group)
    }

    /// Sets the scale, rounded to half precision, and the zero point, a whole number from 0 to 15.
    pub fn set_scale(&mut self, scale: f32, zero: u8) {
        self.set_scale_in_parts(f16::from_f32(scale), (zero & 15) * ZERO_PARTS as u8);
    }

    /// Sets the scale and the zero point in sixteenths.
    pub(crate) fn set_scale_in_parts(&mut self, scale: f16, zero: u8) {
        self.0[..2].copy_from_slice(&scale.to_le_bytes());
        self.0[2] = zero;
    }

    /// Sets weight `i` of the group, which is 0 still.
    pub fn set(&mut self, i: usize, q: u8) {
        let (run, i) = (i / 32, i % 32);
        self.0[NIBBLES_AT + run * 16 + i % 16] |= (q & 15) << (i / 16 * 4);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dequantize_row;

    #[test]
    fn what_was_set_is_what_is_read() {
        let mut row = vec![0; Format::Int4G64.row_bytes(128).unwrap()];
        for index in 0..2 {
            let mut group = Int4Group::of(Format::Int4G64, &mut row, index);
            group.set_scale(0.5, 3 + index as u8);
            (0..64).for_each(|i| group.set(i, (i % 16) as u8));
        }
        let mut out = [0.0; 128];
        dequantize_row(Format::Int4G64, &row, &mut out);
        for (i, value) in out.iter().enumerate() {
            assert_eq!(*value, 0.5 * ((i % 16) as f32 - 3.0 - (i / 64) as f32), "{i}");
        }
    }

    #[test]
    fn zero_points_may_be_fractions_and_bytes_have_a_sign() {
        let mut row = vec![0; Format::Int4G32.row_bytes(32).unwrap()];
        Int4Group::of(Format::Int4G32, &mut row, 0).set_scale_in_parts(f16::ONE, 24);
        let mut out = [0.0; 32];
        dequantize_row(Format::Int4G32, &row, &mut out);
        assert_eq!(out, [-1.5; 32]);
        let mut row = [0x80; 34];
        row[..2].copy_from_slice(&f16::from_f32(0.25).to_le_bytes());
        dequantize_row(Format::Int8G32, &row, &mut out);
        assert_eq!(out, [-32.0; 32]);
    }
}
