//! Groups of rows unpacked: 8-bit integers and f32 scales, for as long as many tokens use them.

use super::jobs::SIDE;
use super::packed::{BLOCK, Block, GROUP, STEPS};
use crate::Format;

/// Groups of a panel: each activation that was fetched serves all of them.
pub(super) const GROUPS: usize = 3;

/// Four columns of sixteen rows.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Step(pub(super) [[i8; 4]; GROUP]);

/// Sixteen numbers, one for each row.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Row(pub(super) [f32; GROUP]);

/// Sixteen integers, one for each row.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Start(pub(super) [i32; GROUP]);

/// A worker's memory for the groups at hand.
#[derive(Default)]
pub(crate) struct Panel {
    pub(super) blocks: usize,
    /// Parts of a block with scales of their own.
    pub(super) parts: usize,
    /// `[blocks, groups, steps]`: also what tile instructions take, eight rows a block.
    pub(super) w: Vec<Step>,
    /// What sums of products with unsigned activations begin with, so that they end as if these had
    /// their signs, `[blocks, parts, groups]`; for whoever multiplies so.
    pub(super) start: Vec<Start>,
    /// `[blocks, parts, groups]`: `value = d * w + m`.
    pub(super) d: Vec<Row>,
    pub(super) m: Vec<Row>,
    /// What tokens have of the groups so far, for whoever takes some blocks at a time.
    #[cfg(target_arch = "x86_64")]
    pub(super) sums: Vec<[[Row; GROUPS]; SIDE]>,
    /// What AVX2 takes in place of steps.
    #[cfg(target_arch = "x86_64")]
    pub(super) words: super::avx2::Memory,
}

/// Parts of a block with scales of their own.
pub(super) fn parts(format: Format) -> usize {
    if format == Format::Q6_K { 2 } else { 1 }
}

impl Panel {
    /// Makes room for groups of `cols` columns.
    pub(super) fn size(&mut self, format: Format, cols: usize) {
        (self.blocks, self.parts) = (cols / BLOCK, parts(format));
        let blocks = GROUPS * self.blocks;
        self.w.resize(blocks * STEPS, Step([[0; 4]; GROUP]));
        self.start.resize(blocks * self.parts, Start([0; GROUP]));
        self.d.resize(blocks * self.parts, Row([0.0; GROUP]));
        self.m.resize(blocks * self.parts, Row([0.0; GROUP]));
    }

    /// Unpacks a group into place `place`: the definition of what other tiers do faster. They need
    /// `start` too.
    #[inline(always)]
    pub(super) fn unpack(&mut self, format: Format, place: usize, group: &[u8]) {
        for b in 0..self.blocks {
            let block = Block::of(format, group, self.blocks * BLOCK, b);
            let steps = self.steps(place, b);
            for (step, w) in self.w[steps..].iter_mut().zip(block.w) {
                *step = Step(w);
            }
            for part in 0..self.parts {
                let at = self.part(place, b, part);
                (self.d[at], self.m[at]) = (Row(block.d[part]), Row(block.m[part]));
            }
        }
    }

    /// Where the steps of a group's block begin.
    #[inline(always)]
    pub(super) fn steps(&self, place: usize, block: usize) -> usize {
        (block * GROUPS + place) * STEPS
    }

    /// Where the numbers of a part of a group's block are.
    #[inline(always)]
    pub(super) fn part(&self, place: usize, block: usize, part: usize) -> usize {
        (block * self.parts + part) * GROUPS + place
    }
}
