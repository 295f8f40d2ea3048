//! 64 weights of any quantised format in one form: `value = d * w + m`, with `w` an unsigned byte
//! and `d`, `m` given for each lane of 4 weights.

use super::CHUNK;
use crate::Format;
use crate::formats::{half_at, q4_k_scales};
use crate::lanes::LANES;

/// Decoded integers and lane factors.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Chunk {
    pub(super) w: [u8; CHUNK],
    pub(super) d: [f32; LANES],
    pub(super) m: [f32; LANES],
}

impl Chunk {
    pub(super) const ZERO: Chunk = Chunk { w: [0; CHUNK], d: [0.0; LANES], m: [0.0; LANES] };

    fn set_block(&mut self, half: usize, d: f32, m: f32) {
        self.d[half * 8..][..8].fill(d);
        self.m[half * 8..][..8].fill(m);
    }
}

/// Decodes chunk `index` of a row.
pub(super) fn decode(format: Format, row: &[u8], index: usize) -> Chunk {
    let mut chunk = Chunk::ZERO;
    match format {
        Format::Q4_K | Format::Q5_K => {
            let block = &row[index / 4 * format.block_bytes()..][..format.block_bytes()];
            q4_k(format, block, index % 4, &mut chunk);
        }
        Format::Q6_K => q6_k(&row[index / 4 * 210..][..210], index % 4, &mut chunk),
        _ => {
            let bytes = format.block_bytes();
            let blocks = row[index * 2 * bytes..].chunks_exact(bytes).take(2);
            for (half, block) in blocks.enumerate() {
                block_of_32(format, block, half, &mut chunk);
            }
        }
    }
    chunk
}

fn block_of_32(format: Format, block: &[u8], half: usize, chunk: &mut Chunk) {
    let w = &mut chunk.w[half * 32..][..32];
    let d = half_at(block, 0);
    let nibbles = |qs: &[u8], w: &mut [u8]| {
        for i in 0..16 {
            w[i] = qs[i] & 15;
            w[i + 16] = qs[i] >> 4;
        }
    };
    let fifth = |qh: &[u8], w: &mut [u8]| {
        for (i, w) in w.iter_mut().enumerate() {
            *w |= (qh[i / 8] >> (i % 8) & 1) << 4;
        }
    };
    let m = match format {
        Format::Q4_0 => {
            nibbles(&block[2..], w);
            -8.0 * d
        }
        Format::Q4_1 => {
            nibbles(&block[4..], w);
            half_at(block, 2)
        }
        Format::Q5_0 => {
            nibbles(&block[6..], w);
            fifth(&block[2..6], w);
            -16.0 * d
        }
        Format::Q5_1 => {
            nibbles(&block[8..], w);
            fifth(&block[4..8], w);
            half_at(block, 2)
        }
        Format::Q8_0 => {
            for (w, q) in w.iter_mut().zip(&block[2..34]) {
                *w = q ^ 0x80;
            }
            -128.0 * d
        }
        _ => unreachable!("{format:?} has no blocks of 32 integers"),
    };
    chunk.set_block(half, d, m);
}

/// Sub-blocks `2 * part` and `2 * part + 1`.
fn q4_k(format: Format, block: &[u8], part: usize, chunk: &mut Chunk) {
    let nibbles = if format == Format::Q4_K { &block[16..] } else { &block[48..] };
    for half in 0..2 {
        let sub = 2 * part + half;
        for i in 0..32 {
            let mut w = nibbles[part * 32 + i] >> (half * 4) & 15;
            if format == Format::Q5_K {
                w |= (block[16 + i] >> sub & 1) << 4;
            }
            chunk.w[half * 32 + i] = w;
        }
        let (d, m) = q4_k_scales(block, sub);
        chunk.set_block(half, d, -m);
    }
}

/// Runs `2 * (part % 2)` and the next of half `part / 2`.
fn q6_k(block: &[u8], part: usize, chunk: &mut Chunk) {
    let (low, high) = (&block[part / 2 * 64..], &block[128 + part / 2 * 32..]);
    let d = half_at(block, 208);
    for (i, w) in chunk.w.iter_mut().enumerate() {
        let nibble = low[i] >> (part % 2 * 4) & 15;
        let shift = part % 2 * 4 + i / 32 * 2;
        *w = nibble | (high[i % 32] >> shift & 3) << 4;
    }
    for lane in 0..LANES {
        let scale = d * f32::from(block[192 + part * 4 + lane / 4] as i8);
        chunk.d[lane] = scale;
        chunk.m[lane] = -32.0 * scale;
    }
}
