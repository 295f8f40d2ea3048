//! Peak arithmetic of x86-64: enough independent accumulators to fill the pipelines.

use std::arch::x86_64::*;
use std::hint::black_box;

use super::lanes;

const STEPS: u64 = 1_000_000;
const CHAINS: usize = 12;

/// Reads all words with the widest loads there are: narrow ones ask for too few lines at a time,
/// and see two thirds of what memory gives.
pub(super) fn sum(words: &[u64]) -> u64 {
    if is_x86_feature_detected!("avx512f") {
        // SAFETY: detected.
        unsafe { sum_avx512(words) }
    } else if is_x86_feature_detected!("avx2") {
        // SAFETY: detected.
        unsafe { sum_avx2(words) }
    } else {
        lanes(words)
    }
}

#[target_feature(enable = "avx512f")]
fn sum_avx512(words: &[u64]) -> u64 {
    lanes(words)
}

#[target_feature(enable = "avx2")]
fn sum_avx2(words: &[u64]) -> u64 {
    lanes(words)
}

/// Runs multiply-adds; returns how many operations they were.
pub(super) fn f32_operations() -> u64 {
    if is_x86_feature_detected!("avx512f") {
        // SAFETY: detected.
        unsafe { f32_avx512() }
    } else if is_x86_feature_detected!("fma") {
        // SAFETY: detected; FMA implies AVX.
        unsafe { f32_fma() }
    } else {
        portable()
    }
}

/// The same of pairs of bf16.
pub(super) fn bf16_operations() -> Option<u64> {
    // SAFETY: detected.
    is_x86_feature_detected!("avx512bf16").then(|| unsafe { bf16_avx512() })
}

/// The same of 8-bit integers.
pub(super) fn int8_operations() -> Option<u64> {
    // SAFETY: detected.
    is_x86_feature_detected!("avx512vnni").then(|| unsafe { int8_vnni() })
}

#[target_feature(enable = "avx512f")]
fn f32_avx512() -> u64 {
    let (a, b) = (_mm512_set1_ps(black_box(1.000_001)), _mm512_set1_ps(black_box(1e-7)));
    let mut lanes = [_mm512_set1_ps(1.0); CHAINS];
    for _ in 0..STEPS {
        for lane in &mut lanes {
            *lane = _mm512_fmadd_ps(*lane, a, b);
        }
    }
    black_box(lanes);
    STEPS * CHAINS as u64 * 16 * 2
}

#[target_feature(enable = "avx,fma")]
fn f32_fma() -> u64 {
    let (a, b) = (_mm256_set1_ps(black_box(1.000_001)), _mm256_set1_ps(black_box(1e-7)));
    let mut lanes = [_mm256_set1_ps(1.0); CHAINS];
    for _ in 0..STEPS {
        for lane in &mut lanes {
            *lane = _mm256_fmadd_ps(*lane, a, b);
        }
    }
    black_box(lanes);
    STEPS * CHAINS as u64 * 8 * 2
}

#[target_feature(enable = "avx512f,avx512bf16")]
fn bf16_avx512() -> u64 {
    let one = _mm512_cvtne2ps_pbh(_mm512_set1_ps(black_box(1.0)), _mm512_set1_ps(1.0));
    let mut lanes = [_mm512_set1_ps(1.0); CHAINS];
    for _ in 0..STEPS {
        for lane in &mut lanes {
            *lane = _mm512_dpbf16_ps(*lane, one, one);
        }
    }
    black_box(lanes);
    STEPS * CHAINS as u64 * 32 * 2
}

#[target_feature(enable = "avx512f,avx512vnni")]
fn int8_vnni() -> u64 {
    let (a, b) = (_mm512_set1_epi8(black_box(3)), _mm512_set1_epi8(black_box(5)));
    let mut lanes = [_mm512_setzero_si512(); CHAINS];
    for _ in 0..STEPS {
        for lane in &mut lanes {
            *lane = _mm512_dpbusd_epi32(*lane, a, b);
        }
    }
    black_box(lanes);
    STEPS * CHAINS as u64 * 64 * 2
}

fn portable() -> u64 {
    let mut lanes = black_box([1.0f32; 64]);
    let (a, b) = black_box((1.000_001f32, 1e-7f32));
    for _ in 0..STEPS {
        for lane in &mut lanes {
            *lane = *lane * a + b;
        }
    }
    black_box(lanes);
    STEPS * 64 * 2
}
