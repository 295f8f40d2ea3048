//! Instruction-set tiers: found once, forced in tests.
//!
//! Most operations are one body that is compiled once per tier ([`Isa::run`]): plain Rust with
//! explicit fused multiply-adds and lane sums in a fixed order, or operations on sixteen lanes
//! ([`Tier`]) where compilers do not find the registers by themselves. So results are the same bits
//! on every tier.

use half::f16;

use crate::lanes::{LANES, LEAST_POWER, ONE, ROUND, larger, largest, sum, widen_half};

#[cfg(target_arch = "aarch64")]
#[path = "isa/arm.rs"]
mod tier;
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
#[path = "isa/portable.rs"]
mod tier;
#[cfg(target_arch = "x86_64")]
#[path = "isa/x86.rs"]
mod tier;

pub(crate) use tier::{fetch, fetch_second};

/// A tier of instructions. Each includes the ones before it of the same kind of machine.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Isa {
    /// Portable Rust; runs anywhere.
    Reference,
    /// AArch64, all of which has NEON.
    Neon,
    /// The same, with dot products of bytes (FEAT_DotProd).
    NeonDot,
    /// x86-64 with AVX2, FMA and F16C.
    Avx2,
    /// x86-64 with AVX-512 F, BW, DQ, VL, VBMI and VNNI.
    Avx512,
    /// The same, with tile registers for int8 and bf16 (AMX).
    Amx,
}

/// Sixteen lanes of f32 as a tier keeps them. A value of a tier is proof that the machine has it:
/// only this module makes one, where it has been looked for.
pub(crate) trait Tier: Copy {
    type F: Copy;
    /// Sixteen lanes of i32, or of four bytes each.
    type I: Copy;
    /// Vector registers, counted as sixteen lanes each.
    const REGISTERS: usize;
    fn splat(self, x: f32) -> Self::F;
    fn load(self, x: &[f32; LANES]) -> Self::F;
    fn store(self, x: Self::F, to: &mut [f32; LANES]);
    /// Widens half-precision numbers, given as bits.
    fn halves(self, x: &[u16; LANES]) -> Self::F;
    /// Widens the lower of two bfloat16 numbers.
    #[inline(always)]
    fn lower_bfloats(self, x: &[u32; LANES]) -> Self::F {
        self.load(&x.map(|bits| f32::from_bits(bits << 16)))
    }
    /// Widens the upper one.
    #[inline(always)]
    fn upper_bfloats(self, x: &[u32; LANES]) -> Self::F {
        self.load(&x.map(|bits| f32::from_bits(bits & 0xffff_0000)))
    }
    fn splat_integer(self, x: i32) -> Self::I;
    fn load_bytes(self, x: &[u8; 4 * LANES]) -> Self::I;
    /// To the nearest numbers, of two the even one.
    fn floats(self, x: Self::I) -> Self::F;
    fn add_integers(self, a: Self::I, b: Self::I) -> Self::I;
    fn times_256(self, x: Self::I) -> Self::I;
    /// Adds to each lane the products of its four unsigned bytes and its four signed ones.
    fn add_dots(self, sums: Self::I, unsigned: Self::I, signed: Self::I) -> Self::I;
    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a * b + c`, fused.
    fn mul_add(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// `b` where it is greater than `a`, `a` elsewhere: also where one of them is NaN.
    fn larger(self, a: Self::F, b: Self::F) -> Self::F;
    /// The largest lane, halves against each other as [`Tier::larger`] takes them.
    #[inline(always)]
    fn largest(self, x: Self::F) -> f32 {
        let mut lanes = [0.0; LANES];
        self.store(x, &mut lanes);
        largest(lanes)
    }
    /// Whether a lane is greater than 0.
    fn any_positive(self, x: Self::F) -> bool;
    /// `x` less the nearest whole number, of two the even one.
    #[inline(always)]
    fn past_nearest(self, x: Self::F) -> Self::F {
        let round = self.splat(ROUND);
        self.sub(x, self.sub(self.add(x, round), round))
    }
    /// `p` times 2 to that whole number, where `past` is what [`Tier::past_nearest`] gives for `x`;
    /// 0 where `x` is below [`LEAST_POWER`], NaN of NaN.
    fn times_power(self, p: Self::F, x: Self::F, past: Self::F) -> Self::F;

    /// The largest of numbers without their signs; NaN is larger than any other.
    #[inline(always)]
    fn largest_magnitude(self, x: &[[f32; LANES]]) -> f32 {
        // Without the sign, numbers are ordered as their bits are; NaN comes last.
        let bits = x.as_flattened().iter().map(|v| v.abs().to_bits());
        f32::from_bits(bits.fold(0, u32::max))
    }
    /// The lanes added up, halves onto each other.
    #[inline(always)]
    fn sum(self, x: Self::F) -> f32 {
        let mut lanes = [0.0; LANES];
        self.store(x, &mut lanes);
        sum(lanes)
    }
    /// Stores the lowest byte of each lane's bits.
    #[inline(always)]
    fn lowest_bytes(self, x: Self::F, to: &mut [u8; LANES]) {
        let mut lanes = [0.0; LANES];
        self.store(x, &mut lanes);
        for (to, x) in to.iter_mut().zip(lanes) {
            *to = x.to_bits() as u8;
        }
    }
    /// Stores the byte above it.
    #[inline(always)]
    fn second_bytes(self, x: Self::F, to: &mut [u8; LANES]) {
        let mut lanes = [0.0; LANES];
        self.store(x, &mut lanes);
        for (to, x) in to.iter_mut().zip(lanes) {
            *to = (x.to_bits() >> 8) as u8;
        }
    }
    /// The sum of bytes; with `signed` they have signs.
    #[inline(always)]
    fn sum_of_bytes(self, x: &[u8; LANES], signed: bool) -> i32 {
        let widen = |x: u8| if signed { i32::from(x as i8) } else { i32::from(x) };
        x.iter().map(|x| widen(*x)).sum()
    }
    /// Stores half-precision numbers, as bits: the nearest ones, of two the even one.
    #[inline(always)]
    fn store_halves(self, x: Self::F, to: &mut [u16; LANES]) {
        let mut lanes = [0.0; LANES];
        self.store(x, &mut lanes);
        for (to, x) in to.iter_mut().zip(lanes) {
            *to = f16::from_f32(x).to_bits();
        }
    }
    /// Widens bfloat16 numbers, given as bits.
    #[inline(always)]
    fn bfloats(self, x: &[u16; LANES]) -> Self::F {
        self.load(&x.map(|bits| f32::from_bits(u32::from(bits) << 16)))
    }
}

/// Lanes of plain Rust.
#[derive(Clone, Copy)]
pub(crate) struct Portable;

impl Tier for Portable {
    type F = [f32; LANES];
    type I = [i32; LANES];
    const REGISTERS: usize = 8;
    #[inline(always)]
    fn splat_integer(self, x: i32) -> Self::I {
        [x; LANES]
    }
    #[inline(always)]
    fn load_bytes(self, x: &[u8; 4 * LANES]) -> Self::I {
        std::array::from_fn(|i| i32::from_le_bytes(x.as_chunks().0[i]))
    }
    #[inline(always)]
    fn floats(self, x: Self::I) -> Self::F {
        x.map(|x| x as f32)
    }
    #[inline(always)]
    fn add_integers(self, a: Self::I, b: Self::I) -> Self::I {
        std::array::from_fn(|i| a[i].wrapping_add(b[i]))
    }
    #[inline(always)]
    fn times_256(self, x: Self::I) -> Self::I {
        x.map(|x| x << 8)
    }
    #[inline(always)]
    fn add_dots(self, sums: Self::I, unsigned: Self::I, signed: Self::I) -> Self::I {
        std::array::from_fn(|i| {
            let (u, s) = (unsigned[i].to_le_bytes(), signed[i].to_le_bytes());
            let products = u.iter().zip(s).map(|(u, s)| i32::from(*u) * i32::from(s as i8));
            sums[i].wrapping_add(products.sum())
        })
    }
    #[inline(always)]
    fn splat(self, x: f32) -> Self::F {
        [x; LANES]
    }
    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> Self::F {
        *x
    }
    #[inline(always)]
    fn store(self, x: Self::F, to: &mut [f32; LANES]) {
        *to = x;
    }
    #[inline(always)]
    fn halves(self, x: &[u16; LANES]) -> Self::F {
        x.map(widen_half)
    }
    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        std::array::from_fn(|i| a[i] * b[i])
    }
    #[inline(always)]
    fn mul_add(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        std::array::from_fn(|i| a[i].mul_add(b[i], c[i]))
    }
    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        std::array::from_fn(|i| a[i] + b[i])
    }
    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        std::array::from_fn(|i| a[i] - b[i])
    }
    #[inline(always)]
    fn larger(self, a: Self::F, b: Self::F) -> Self::F {
        std::array::from_fn(|i| larger(a[i], b[i]))
    }
    #[inline(always)]
    fn any_positive(self, x: Self::F) -> bool {
        x.iter().any(|x| *x > 0.0)
    }
    #[inline(always)]
    fn times_power(self, p: Self::F, x: Self::F, _past: Self::F) -> Self::F {
        std::array::from_fn(|i| {
            let nearest = (x[i] + ROUND).to_bits();
            let power = f32::from_bits((nearest << 23).wrapping_add(ONE));
            if x[i] < LEAST_POWER { 0.0 } else { p[i] * power }
        })
    }
}

/// A body to be compiled for each tier. `run` must be `#[inline(always)]`.
pub(crate) trait Kernel {
    fn run<T: Tier>(self, tier: T);
}

impl Isa {
    /// The best tier that this machine runs.
    pub fn detect() -> Isa {
        tier::detect()
    }

    /// All tiers that this machine runs, the reference first.
    pub fn available() -> Vec<Isa> {
        tier::TIERS.iter().copied().filter(|isa| *isa <= Isa::detect()).collect()
    }

    /// The best tier of this machine that is not above this one.
    pub(crate) fn within_machine(self) -> Isa {
        let most = self.min(Isa::detect());
        let tiers = tier::TIERS.iter().rev();
        tiers.copied().find(|isa| *isa <= most).unwrap_or(Isa::Reference)
    }

    /// A short name: `reference`, `neon`, `neon-dotprod`, `avx2`, `avx512`, `amx`.
    pub fn name(self) -> &'static str {
        match self {
            Isa::Reference => "reference",
            Isa::Neon => "neon",
            Isa::NeonDot => "neon-dotprod",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
            Isa::Amx => "amx",
        }
    }

    /// Runs a kernel compiled for this tier, or for the best one that the machine has.
    pub(crate) fn run<K: Kernel>(self, kernel: K) {
        tier::run(self.within_machine(), kernel);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tier_that_the_machine_lacks_becomes_one_that_it_has() {
        use Isa::{Amx, Avx2, Avx512, Neon, NeonDot, Reference};
        for isa in [Reference, Neon, NeonDot, Avx2, Avx512, Amx] {
            let found = isa.within_machine();
            assert!(Isa::available().contains(&found) && found <= isa, "{isa:?} is {found:?}");
            assert_eq!(found == isa, Isa::available().contains(&isa), "{isa:?} is {found:?}");
        }
        assert_eq!(Amx.within_machine(), Isa::detect());
    }
}
