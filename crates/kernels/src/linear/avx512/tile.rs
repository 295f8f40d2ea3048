//! Products of eight tokens and three groups of rows: 24 sums of integers in as many registers.
//!
//! Written in assembly, since this is the loop that reading prompts takes its time in, and
//! compilers will not have it: they take operands from memory again for each product, and spill
//! sums. Here, each is loaded once for all products it has a part in. Of the turns of the two ports
//! that multiply, products are 8 of 11 with one term (12 where blocks have minima), 16 of 20 (21)
//! with two; where others convert, as on Zen 4, 8 of 10 (11) with one.

use std::arch::asm;

use super::super::activations::{Scaled, Term};
use super::super::jobs::SIDE;
use super::super::packed::STEPS;
use super::super::panel::{GROUPS, Row, Start, Step};
use super::formats::Scales;

/// Tokens that meet a panel at once.
pub(super) const TOKENS: usize = SIDE;

/// Sums of a tile. They lie in memory: registers are for those of integers.
pub(super) type Sums = [[Row; GROUPS]; TOKENS];

/// Where a part of a block lies, and what its products are added to.
pub(super) struct Block {
    /// Of the first group; the others' follow, whole blocks each.
    pub(super) w: *const Step,
    /// Of all groups: what sums of integers begin with, and the weights' numbers.
    pub(super) start: *const Start,
    pub(super) d: *const Row,
    pub(super) m: *const Row,
    /// Of the first token; the others' follow.
    pub(super) terms: *const Term,
    pub(super) scaled: *const Scaled,
}

/// `$m!` for each token and its three sums.
macro_rules! tokens {
    ($m:ident $($argument:tt)*) => {
        concat!(
            $m!("0", "zmm0", "zmm1", "zmm2" $($argument)*),
            $m!("1", "zmm3", "zmm4", "zmm5" $($argument)*),
            $m!("2", "zmm6", "zmm7", "zmm8" $($argument)*),
            $m!("3", "zmm9", "zmm10", "zmm11" $($argument)*),
            $m!("4", "zmm12", "zmm13", "zmm14" $($argument)*),
            $m!("5", "zmm15", "zmm16", "zmm17" $($argument)*),
            $m!("6", "zmm18", "zmm19", "zmm20" $($argument)*),
            $m!("7", "zmm21", "zmm22", "zmm23" $($argument)*),
        )
    };
}

/// `$last!` for each token, and `$end!` for each two tokens later.
macro_rules! staggered {
    ($last:ident, $end:ident $($argument:tt)*) => {
        concat!(
            $last!("0", "zmm0", "zmm1", "zmm2" $($argument)*),
            $last!("1", "zmm3", "zmm4", "zmm5" $($argument)*),
            $last!("2", "zmm6", "zmm7", "zmm8" $($argument)*),
            $end!("0", "zmm0", "zmm1", "zmm2"),
            $last!("3", "zmm9", "zmm10", "zmm11" $($argument)*),
            $end!("1", "zmm3", "zmm4", "zmm5"),
            $last!("4", "zmm12", "zmm13", "zmm14" $($argument)*),
            $end!("2", "zmm6", "zmm7", "zmm8"),
            $last!("5", "zmm15", "zmm16", "zmm17" $($argument)*),
            $end!("3", "zmm9", "zmm10", "zmm11"),
            $last!("6", "zmm18", "zmm19", "zmm20" $($argument)*),
            $end!("4", "zmm12", "zmm13", "zmm14"),
            $last!("7", "zmm21", "zmm22", "zmm23" $($argument)*),
            $end!("5", "zmm15", "zmm16", "zmm17"),
            $end!("6", "zmm18", "zmm19", "zmm20"),
            $end!("7", "zmm21", "zmm22", "zmm23"),
        )
    };
}

/// Three registers of the groups' numbers, `$apart` bytes apart.
macro_rules! load {
    ($a:literal, $b:literal, $c:literal, $at:literal, $apart:literal) => {
        concat!(
            "vmovups ", $a, ", [", $at, "]\n", "vmovups ", $b, ", [", $at, " + ", $apart, "]\n",
            "vmovups ", $c, ", [", $at, " + 2*", $apart, "]\n",
        )
    };
}

/// Products of a token and a step.
macro_rules! product {
    ($t:literal, $a:literal, $b:literal, $c:literal, $term:literal, $step:literal) => {
        concat!(
            "vpbroadcastd zmm31, [{terms} + ",
            $t,
            "*{item} + 32*",
            $term,
            " + 4*",
            $step,
            "]\n",
            "vpdpbusd ",
            $a,
            ", zmm31, zmm24\n",
            "vpdpbusd ",
            $b,
            ", zmm31, zmm25\n",
            "vpdpbusd ",
            $c,
            ", zmm31, zmm26\n",
        )
    };
}

/// The same for the first step of all.
macro_rules! first {
    ($t:literal, $a:literal, $b:literal, $c:literal, $($of:literal),*) => {
        concat!(load!($a, $b, $c, "{start}", "64"), product!($t, $a, $b, $c, $($of),*))
    };
}

/// The same for the first step of the low term: sums of the high one count 256 times.
macro_rules! lower {
    ($t:literal, $a:literal, $b:literal, $c:literal, $($of:literal),*) => {
        concat!(
            "vpslld ", $a, ", ", $a, ", 8\n", "vpslld ", $b, ", ", $b, ", 8\n", "vpslld ", $c,
            ", ", $c, ", 8\n",
            product!($t, $a, $b, $c, $($of),*)
        )
    };
}

/// The groups' weights of a step.
macro_rules! weights {
    ($step:literal) => {
        concat!(
            "vmovups zmm24, [{w} + 64*",
            $step,
            "]\n",
            "vmovups zmm25, [{w} + 512 + 64*",
            $step,
            "]\n",
            "vmovups zmm26, [{w} + 1024 + 64*",
            $step,
            "]\n",
        )
    };
}

/// Products of a term and some steps: `$begin!` for those of the first.
macro_rules! steps {
    ($begin:ident $term:literal: $first:literal $($step:literal)*) => {
        concat!(
            weights!($first), tokens!($begin, $term, $first),
            $(weights!($step), tokens!(product, $term, $step)),*
        )
    };
}

/// Products of the last step. Where those of a token end, it is scaled and stored while others are
/// multiplied.
macro_rules! last {
    ($term:literal: $step:literal) => {
        concat!(
            load!("zmm27", "zmm28", "zmm29", "{d}", "64"),
            weights!($step),
            staggered!(product, end, $term, $step)
        )
    };
}

/// Scales integers, adds them to the sums, and stores these.
macro_rules! end {
    ($t:literal, $a:literal, $b:literal, $c:literal) => {
        concat!(scale!($t, $a, $b, $c, "zmm27", "zmm28", "zmm29"), store!($t, $a, $b, $c))
    };
}

/// The same with minima, for which there are registers when all products have ended.
macro_rules! minima {
    () => {
        concat!(
            load!("zmm24", "zmm25", "zmm26", "{d}", "64"),
            load!("zmm27", "zmm28", "zmm29", "{m}", "64"),
            tokens!(end_with_minima)
        )
    };
}

/// Minima count as often as the sum of the token's numbers.
macro_rules! end_with_minima {
    ($t:literal, $a:literal, $b:literal, $c:literal) => {
        concat!(
            scale!($t, $a, $b, $c, "zmm24", "zmm25", "zmm26"),
            "vbroadcastss zmm31, [{scaled} + 16*",
            $t,
            " + 4]\n",
            "vfmadd231ps ",
            $a,
            ", zmm27, zmm31\n",
            "vfmadd231ps ",
            $b,
            ", zmm28, zmm31\n",
            "vfmadd231ps ",
            $c,
            ", zmm29, zmm31\n",
            store!($t, $a, $b, $c)
        )
    };
}

macro_rules! scale {
    ($t:literal, $a:literal, $b:literal, $c:literal, $d:literal, $e:literal, $f:literal) => {
        concat!(
            "vbroadcastss zmm30, [{scaled} + 16*",
            $t,
            "]\n",
            add!($a, $d, $t, "0"),
            add!($b, $e, $t, "64"),
            add!($c, $f, $t, "128"),
        )
    };
}

macro_rules! add {
    ($a:literal, $d:literal, $t:literal, $at:literal) => {
        concat!(
            "vcvtdq2ps ",
            $a,
            ", ",
            $a,
            "\n",
            "vmulps ",
            $a,
            ", ",
            $a,
            ", zmm30\n",
            "vfmadd213ps ",
            $a,
            ", ",
            $d,
            ", [{before} + 192*",
            $t,
            " + ",
            $at,
            "]\n",
        )
    };
}

macro_rules! store {
    ($t:literal, $a:literal, $b:literal, $c:literal) => {
        concat!(
            "vmovups [{sums} + 192*",
            $t,
            "], ",
            $a,
            "\n",
            "vmovups [{sums} + 192*",
            $t,
            " + 64], ",
            $b,
            "\n",
            "vmovups [{sums} + 192*",
            $t,
            " + 128], ",
            $c,
            "\n",
        )
    };
}

/// A function that adds the products of a part of a block, with terms and steps that it is made of.
macro_rules! kernel {
    ($name:ident, $item:literal, $($products:expr),*) => {
        /// # Safety
        /// The machine has AVX-512 and VNNI; three groups and eight tokens lie where `block`
        /// says, and as many sums `before`.
        #[inline]
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
        unsafe fn $name(block: &Block, before: *const Sums, sums: *mut Sums) {
            // SAFETY: by contract. `m` is read where there are minima.
            unsafe {
                asm!(
                    $($products,)*
                    "/* {m} */",
                    item = const $item * size_of::<Term>(),
                    w = in(reg) block.w,
                    start = in(reg) block.start,
                    d = in(reg) block.d,
                    m = in(reg) block.m,
                    terms = in(reg) block.terms,
                    scaled = in(reg) block.scaled,
                    before = in(reg) before,
                    sums = in(reg) sums,
                    out("zmm0") _, out("zmm1") _, out("zmm2") _, out("zmm3") _,
                    out("zmm4") _, out("zmm5") _, out("zmm6") _, out("zmm7") _,
                    out("zmm8") _, out("zmm9") _, out("zmm10") _, out("zmm11") _,
                    out("zmm12") _, out("zmm13") _, out("zmm14") _, out("zmm15") _,
                    out("zmm16") _, out("zmm17") _, out("zmm18") _, out("zmm19") _,
                    out("zmm20") _, out("zmm21") _, out("zmm22") _, out("zmm23") _,
                    out("zmm24") _, out("zmm25") _, out("zmm26") _, out("zmm27") _,
                    out("zmm28") _, out("zmm29") _, out("zmm30") _, out("zmm31") _,
                    options(nostack, preserves_flags)
                );
            }
        }
    };
}

kernel!(one, 1, steps!(first "0": "0" "1" "2" "3" "4" "5" "6"), last!("0": "7"));
kernel!(one_with_minima, 1, steps!(first "0": "0" "1" "2" "3" "4" "5" "6" "7"), minima!());
kernel!(one_half, 1, steps!(first "0": "0" "1" "2"), last!("0": "3"));
kernel!(
    two,
    2,
    steps!(first "0": "0" "1" "2" "3" "4" "5" "6" "7"),
    steps!(lower "1": "0" "1" "2" "3" "4" "5" "6"),
    last!("1": "7")
);
kernel!(
    two_with_minima,
    2,
    steps!(first "0": "0" "1" "2" "3" "4" "5" "6" "7"),
    steps!(lower "1": "0" "1" "2" "3" "4" "5" "6" "7"),
    minima!()
);
kernel!(
    two_half,
    2,
    steps!(first "0": "0" "1" "2" "3"),
    steps!(lower "1": "0" "1" "2"),
    last!("1": "3")
);

const _: () = assert!(STEPS * size_of::<Step>() == 512 && GROUPS * size_of::<Row>() == 192);
const _: () = assert!(TOKENS == 8 && size_of::<Term>() == 32 && size_of::<Scaled>() == 16);

/// Adds the products of a part of a block to the sums `before`, which may be `sums` themselves.
/// `TWO` terms, or one.
///
/// # Safety
/// The machine has AVX-512 and VNNI; three groups and eight tokens lie where `block` says, and
/// as many sums `before`; there is room for them in `sums`.
#[inline(always)]
pub(super) unsafe fn add<S: Scales, const TWO: bool>(
    block: &Block,
    before: *const Sums,
    sums: *mut Sums,
) {
    // SAFETY: by contract.
    unsafe {
        match (S::PARTS, S::MINIMA, TWO) {
            (1, false, false) => one(block, before, sums),
            (1, true, false) => one_with_minima(block, before, sums),
            (2, false, false) => one_half(block, before, sums),
            (1, false, true) => two(block, before, sums),
            (1, true, true) => two_with_minima(block, before, sums),
            (2, false, true) => two_half(block, before, sums),
            _ => unreachable!("no format has minima of half blocks"),
        }
    }
}
