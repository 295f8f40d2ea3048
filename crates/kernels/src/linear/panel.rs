//! Groups of rows unpacked: 8-bit integers and f32 scales, for as long as many tokens use them.

use super::packed::{BLOCK, Block, GROUP, STEPS};
use crate::Format;

/// Groups of a panel: each activation that was fetched serves all of them.
pub(super) const GROUPS: usize = 2;

/// Four columns of sixteen rows.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Step(pub(super) [[u8; 4]; GROUP]);

/// Sixteen numbers, one for each row.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Row(pub(super) [f32; GROUP]);

/// A worker's memory for the groups at hand.
#[derive(Default)]
pub(crate) struct Panel {
    pub(super) blocks: usize,
    /// Parts of a block with scales of their own.
    pub(super) parts: usize,
    /// `[groups, blocks, steps]`: also what tile instructions take, eight rows a block.
    pub(super) w: Vec<Step>,
    /// `[groups, blocks, parts]`: `value = d * w + m`.
    pub(super) d: Vec<Row>,
    pub(super) m: Vec<Row>,
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
        self.d.resize(blocks * self.parts, Row([0.0; GROUP]));
        self.m.resize(blocks * self.parts, Row([0.0; GROUP]));
    }

    /// Unpacks a group into place `place`: the definition of what other tiers do faster.
    #[inline(always)]
    pub(super) fn unpack(&mut self, format: Format, place: usize, group: &[u8]) {
        for b in 0..self.blocks {
            let (block, at) = (Block::of(format, group, self.blocks * BLOCK, b), self.at(place, b));
            for (step, w) in self.w[at * STEPS..].iter_mut().zip(block.w) {
                *step = Step(w);
            }
            for part in 0..self.parts {
                self.d[at * self.parts + part] = Row(block.d[part]);
                self.m[at * self.parts + part] = Row(block.m[part]);
            }
        }
    }

    /// Index of a group's block.
    #[inline(always)]
    pub(super) fn at(&self, place: usize, block: usize) -> usize {
        place * self.blocks + block
    }
}
