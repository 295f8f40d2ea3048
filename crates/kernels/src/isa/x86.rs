//! The tiers of x86-64.

use super::{Isa, Kernel};

pub(super) fn detect() -> Isa {
    let avx2 = is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c");
    let avx512 = is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512vbmi")
        && is_x86_feature_detected!("avx512vnni");
    match (avx2, avx512) {
        (true, true) => Isa::Avx512,
        (true, false) => Isa::Avx2,
        _ => Isa::Reference,
    }
}

pub(super) fn run<K: Kernel>(isa: Isa, kernel: K) {
    match isa {
        Isa::Reference => kernel.run(),
        // SAFETY: Isa::run clamps the tier to what detect() found.
        Isa::Avx2 => unsafe { avx2(kernel) },
        // SAFETY: as above.
        Isa::Avx512 => unsafe { avx512(kernel) },
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn avx2<K: Kernel>(kernel: K) {
    kernel.run();
}

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")]
fn avx512<K: Kernel>(kernel: K) {
    kernel.run();
}
