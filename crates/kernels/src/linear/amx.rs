//! Products on tile registers (AMX): sixteen tokens and sixteen rows an instruction.
//!
//! The packed layout is what tile instructions take: a step of a block, four columns of sixteen
//! rows, is a row of their second operand, and so is a pair of bf16 columns. Integer products are
//! exact, and their sums are scaled as on every other tier: the same bits. bf16 products take bf16
//! activations, and add pairs in an order of their own: with them, all numbers of tokens go this
//! way, and results are those of this tier only.
//!
//! Instructions: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1 chapter 18
//! and volume 2. They are assembled here, since stable Rust has no names for them.

use std::arch::asm;
use std::arch::x86_64::*;
use std::ops::Range;
use std::sync::OnceLock;

use super::bfloats::Bfloats;
use super::packed::{self, BLOCK, GROUP, PAIRS_AT_ONCE};
use super::{Slab, TILE};
use crate::Format;

#[cfg(all(test, target_os = "linux"))]
pub(super) mod emulator;
pub(super) mod integers;
pub(crate) mod peak;
pub(crate) mod squares;

/// Whether the machine has tile registers for both types, and the system lets us use them. Asked
/// once: the permission holds for all threads of the process.
pub(crate) fn detect() -> bool {
    static FOUND: OnceLock<bool> = OnceLock::new();
    *FOUND.get_or_init(|| has_tiles() && permitted())
}

fn has_tiles() -> bool {
    const BF16: u32 = 1 << 22;
    const TILE: u32 = 1 << 24;
    const INT8: u32 = 1 << 25;
    const OSXSAVE: u32 = 1 << 27;
    /// State components 17 and 18: tile configuration and data.
    const STATE: u64 = 3 << 17;
    if __cpuid(0).eax < 7 || __cpuid(1).ecx & OSXSAVE == 0 {
        return false;
    }
    let (low, high): (u32, u32);
    // SAFETY: the system has enabled XGETBV, as OSXSAVE says.
    unsafe { asm!("xgetbv", in("ecx") 0, out("eax") low, out("edx") high, options(nomem)) };
    let state = u64::from(high) << 32 | u64::from(low);
    __cpuid_count(7, 0).edx & (BF16 | TILE | INT8) == BF16 | TILE | INT8 && state & STATE == STATE
}

#[cfg(target_os = "linux")]
fn permitted() -> bool {
    /// `arch_prctl` with ARCH_REQ_XCOMP_PERM (Linux 5.16).
    const REQUEST: i32 = 0x1023;
    const TILE_DATA: u64 = 18;
    // SAFETY: the call changes nothing but what this process may use.
    unsafe { libc::syscall(libc::SYS_arch_prctl, REQUEST, TILE_DATA) == 0 }
}

#[cfg(not(target_os = "linux"))]
fn permitted() -> bool {
    false
}

/// Shapes of the tile registers: what LDTILECFG reads.
#[repr(C, align(64))]
struct Shapes {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

impl Shapes {
    /// `(rows, bytes of a row)` of the eight registers.
    fn new(shapes: [(usize, usize); 8]) -> Shapes {
        let (mut row_bytes, mut rows) = ([0; 16], [0; 16]);
        for (i, (count, bytes)) in shapes.into_iter().enumerate() {
            (rows[i], row_bytes[i]) = (count as u8, bytes as u16);
        }
        Shapes { palette: 1, start_row: 0, reserved: [0; 14], row_bytes, rows }
    }
}

/// Tile registers in use; dropped, they are given back, so that the system need not save them.
struct Configured(());

impl Configured {
    /// # Safety
    /// The machine has tile registers, and the system lets us use them.
    unsafe fn new(shapes: &Shapes) -> Configured {
        // SAFETY: by contract; 64 bytes are read.
        unsafe {
            asm!("ldtilecfg [{}]", in(reg) shapes, options(nostack, readonly, preserves_flags));
        }
        Configured(())
    }
}

impl Drop for Configured {
    fn drop(&mut self) {
        // SAFETY: a value is proof that they are configured.
        unsafe { asm!("tilerelease", options(nostack, nomem, preserves_flags)) };
    }
}

/// `tmm$t = 0`
macro_rules! zero {
    ($t:literal) => {
        asm!(concat!("tilezero tmm", $t), options(nostack, nomem, preserves_flags))
    };
}

/// `tmm$t = rows at $at, $stride bytes apart`
macro_rules! load {
    ($t:literal, $at:expr, $stride:expr) => {
        asm!(concat!("tileloadd tmm", $t, ", [{} + {}*1]"), in(reg) $at, in(reg) $stride,
             options(nostack, readonly, preserves_flags))
    };
}

/// `rows at $at, $stride bytes apart = tmm$t`
macro_rules! store {
    ($t:literal, $at:expr, $stride:expr) => {
        asm!(concat!("tilestored [{} + {}*1], tmm", $t), in(reg) $at, in(reg) $stride,
             options(nostack, preserves_flags))
    };
}

/// `tmm$c += tmm$a * tmm$b` by instruction `$name`.
macro_rules! multiply {
    ($name:literal, $c:literal, $a:literal, $b:literal) => {
        asm!(
            concat!($name, " tmm", $c, ", tmm", $a, ", tmm", $b),
            options(nostack, nomem, preserves_flags)
        )
    };
}
use {load, multiply, store, zero};

/// Computes a slab of bf16 weights: two groups and up to two tiles of tokens at a time.
///
/// # Safety
/// The machine has tile registers, and the system lets us use them.
pub(super) unsafe fn bf16(slab: &Slab<'_>, x: Bfloats<'_>) {
    debug_assert_eq!(slab.format, Format::BF16);
    let (a, b, c) = ((x.width, 64), (TILE, 64), (x.width, 64));
    // SAFETY: by contract.
    let tiles = unsafe { Configured::new(&Shapes::new([c, c, c, c, a, a, b, b])) };
    let work = Dense { slab, x, blocks: slab.cols.div_ceil(BLOCK) };
    let tiles_of_tokens = slab.all_tokens.div_ceil(x.width);
    for group in slab.groups.clone().step_by(2) {
        for tile in (0..tiles_of_tokens).step_by(2) {
            // The last ones are taken twice where they are alone.
            let groups = [group, (group + 1).min(slab.groups.end - 1)];
            let tokens = [tile, (tile + 1).min(tiles_of_tokens - 1)];
            // SAFETY: registers are configured; groups and tiles are the slab's.
            unsafe { work.products(groups, tokens) };
        }
    }
    drop(tiles);
}

/// Products of bf16 weights.
struct Dense<'a> {
    slab: &'a Slab<'a>,
    x: Bfloats<'a>,
    blocks: usize,
}

impl Dense<'_> {
    /// # Safety
    /// Tile registers are configured, groups and tiles are in bounds.
    unsafe fn products(&self, groups: [usize; 2], tiles: [usize; 2]) {
        let Dense { slab, x, blocks } = self;
        let mut sums = [[[[0.0f32; GROUP]; TILE]; 2]; 2];
        let a_step = x.width * BLOCK;
        let b_step = PAIRS_AT_ONCE * packed::PAIR_BYTES;
        let a = tiles.map(|tile| x.values[tile * blocks * a_step..].as_ptr());
        let b = groups.map(|group| slab.group(group).as_ptr());
        // SAFETY: there are `blocks` blocks of each; what is stored has room for a register.
        unsafe {
            zero!(0);
            zero!(1);
            zero!(2);
            zero!(3);
            for block in 0..*blocks {
                load!(4, a[0].add(block * a_step), 64usize);
                load!(6, b[0].add(block * b_step), 64usize);
                multiply!("tdpbf16ps", 0, 4, 6);
                load!(7, b[1].add(block * b_step), 64usize);
                multiply!("tdpbf16ps", 1, 4, 7);
                load!(5, a[1].add(block * a_step), 64usize);
                multiply!("tdpbf16ps", 2, 5, 6);
                multiply!("tdpbf16ps", 3, 5, 7);
            }
            store!(0, sums[0][0].as_mut_ptr(), 64usize);
            store!(1, sums[0][1].as_mut_ptr(), 64usize);
            store!(2, sums[1][0].as_mut_ptr(), 64usize);
            store!(3, sums[1][1].as_mut_ptr(), 64usize);
        }
        let count = |pair: [usize; 2]| if pair[0] == pair[1] { 1 } else { 2 };
        for (sums, tile) in sums.iter().zip(tiles).take(count(tiles)) {
            let tokens: Range<usize> = tile * x.width..slab.all_tokens.min((tile + 1) * x.width);
            for (sums, group) in sums.iter().zip(groups).take(count(groups)) {
                for (token, sums) in tokens.clone().zip(sums) {
                    // SAFETY: the slab's own groups, and tokens within the output's.
                    unsafe { slab.sink.store(token, group, sums) };
                }
            }
        }
    }
}
