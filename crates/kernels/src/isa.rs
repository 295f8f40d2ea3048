//! Instruction-set tiers: found once, forced in tests.
//!
//! Most operations are one body of plain Rust that is compiled once per tier ([`Isa::run`]), with
//! explicit fused multiply-adds and lane sums in a fixed order. So their results are the same bits
//! on every tier.

#[cfg(not(target_arch = "x86_64"))]
#[path = "isa/portable.rs"]
mod tier;
#[cfg(target_arch = "x86_64")]
#[path = "isa/x86.rs"]
mod tier;

/// A tier of instructions. Each includes the ones before it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Isa {
    /// Portable Rust; runs anywhere.
    Reference,
    /// x86-64 with AVX2, FMA and F16C.
    Avx2,
    /// x86-64 with AVX-512 F, BW, DQ, VL, VBMI and VNNI.
    Avx512,
}

/// A body to be compiled for each tier. `run` must be `#[inline(always)]`.
pub(crate) trait Kernel {
    fn run(self);
}

impl Isa {
    /// The best tier that this machine runs.
    pub fn detect() -> Isa {
        tier::detect()
    }

    /// All tiers that this machine runs, the reference first.
    pub fn available() -> Vec<Isa> {
        let all = [Isa::Reference, Isa::Avx2, Isa::Avx512];
        all.into_iter().filter(|isa| *isa <= Isa::detect()).collect()
    }

    /// A short name: `reference`, `avx2`, `avx512`.
    pub fn name(self) -> &'static str {
        match self {
            Isa::Reference => "reference",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
        }
    }

    /// Runs a kernel compiled for this tier, or for the best one that the machine has.
    pub(crate) fn run<K: Kernel>(self, kernel: K) {
        tier::run(self.min(Isa::detect()), kernel);
    }
}
