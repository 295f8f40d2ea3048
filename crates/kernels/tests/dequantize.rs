//! Every format's decoding against the `gguf` package's, bit by bit, on random blocks
//! (`tools/golden/gguf_blocks.py`). Random scales include infinities and NaNs; which NaN is not
//! compared.
#![allow(clippy::unwrap_used)]

use std::path::PathBuf;

use pomona_kernels::{Format, dequantize_row};

#[test]
fn decoding_equals_the_gguf_package_bit_by_bit() {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    for format in Format::ALL.into_iter().filter(|f| *f != Format::F32 && !f.is_grouped()) {
        let bytes = std::fs::read(folder.join(format!("{format:?}.bytes"))).unwrap();
        let expected = std::fs::read(folder.join(format!("{format:?}.f32"))).unwrap();
        let expected = expected.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b));
        let mut found = vec![0.0; expected.len()];
        dequantize_row(format, &bytes, &mut found);
        assert!(found.iter().any(|v| v.is_finite() && *v != 0.0));
        for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
            let same = found.to_bits() == expected.to_bits() || found.is_nan() && expected.is_nan();
            assert!(same, "{format:?} weight {i}: {found:e}, expected {expected:e}");
        }
    }
}

#[test]
fn f32_is_itself() {
    let mut out = [0.0; 2];
    let bytes = [1.5f32.to_le_bytes(), (-2.0f32).to_le_bytes()].concat();
    dequantize_row(Format::F32, &bytes, &mut out);
    assert_eq!(out, [1.5, -2.0]);
}
