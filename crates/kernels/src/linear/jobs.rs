//! What a join of products consists of: jobs, each some tokens that meet some matrices. A dense
//! layer is one job; a layer of experts is one for each expert that a token chose.

use std::marker::PhantomData;
use std::ops::Range;

use pomona_device::{Pool, split};

use super::activations::Form;
use crate::Format;

/// Most tokens that lie side by side: as many as a tile register has rows.
pub(super) const TILE: usize = 16;
/// Up to so many tokens have a loop for just their number.
pub(super) const COUNTED: usize = 4;
/// Groups of rows that one or two tokens meet at once, as long as there are so many. Memory answers
/// several streams faster than one: what goes ahead of each stops at the end of a page.
pub(super) const ABREAST: usize = 4;
/// Most tokens that meet weights as they come from memory; on arm64, those that have such loops.
pub(super) const FEW: usize = if cfg!(target_arch = "aarch64") { COUNTED } else { 8 };
/// More than counted ones are taken so many at a time; what lies beyond the last one is not looked
/// at.
pub(super) const SIDE: usize = 8;

/// Tokens that meet the same matrices.
pub(crate) struct Job<'a> {
    /// How many.
    pub(crate) tokens: usize,
    /// Where they are in the input.
    pub(crate) inputs: Rows<'a>,
    /// Where their results go in each output, each row once.
    pub(crate) outputs: Rows<'a>,
    pub(crate) parts: Vec<Part<'a>>,
}

/// One product of a job.
pub(crate) struct Part<'a> {
    pub(crate) format: Format,
    /// Packed: `packed::matrix_bytes(format, rows, cols)` bytes.
    pub(crate) weight: &'a [u8],
    pub(crate) rows: usize,
    pub(crate) bias: Option<&'a [f32]>,
    /// `[any, rows]`.
    pub(crate) out: Out<'a>,
}

/// Rows of a matrix.
#[derive(Clone, Copy)]
pub(crate) enum Rows<'a> {
    /// One after the other.
    From(usize),
    /// These.
    Listed(&'a [u32]),
}

impl Rows<'_> {
    #[inline(always)]
    pub(super) fn at(self, token: usize) -> usize {
        match self {
            Rows::From(first) => first + token,
            Rows::Listed(rows) => rows[token] as usize,
        }
    }

    /// Whether the first `count` of them are among so many rows.
    pub(super) fn are_within(self, count: usize, rows: usize) -> bool {
        match self {
            Rows::From(first) => first + count <= rows,
            Rows::Listed(listed) => listed[..count].iter().all(|row| (*row as usize) < rows),
        }
    }
}

/// A matrix that results are written to.
pub(crate) struct Out<'a> {
    pub(super) at: *mut f32,
    pub(super) len: usize,
    of: PhantomData<&'a mut [f32]>,
}

impl<'a> Out<'a> {
    pub(crate) fn new(out: &'a mut [f32]) -> Out<'a> {
        Out { at: out.as_mut_ptr(), len: out.len(), of: PhantomData }
    }

    /// The same matrix for another job.
    ///
    /// # Safety
    /// Jobs of one join that share it write different rows.
    pub(crate) unsafe fn share(&self) -> Out<'a> {
        Out { at: self.at, len: self.len, of: PhantomData }
    }
}

/// A job's tokens, as those who prepare activations see them.
pub(super) struct Input<'a> {
    pub(super) tokens: usize,
    rows: Rows<'a>,
    /// Where its tiles begin, counted in tokens.
    pub(super) first_lane: usize,
}

impl Input<'_> {
    /// Tokens side by side.
    pub(super) fn width(&self) -> usize {
        match self.tokens {
            ..=COUNTED => self.tokens,
            _ => self.tokens.next_multiple_of(SIDE).min(TILE),
        }
    }

    pub(super) fn form(&self) -> Form {
        if self.tokens <= FEW { Form::Signed } else { Form::Unsigned }
    }

    /// Tiles of so many tokens; the last may have fewer.
    pub(super) fn tiles(&self) -> usize {
        self.tokens.div_ceil(self.width())
    }
}

/// The activations of all jobs: `x: [any, cols]`, and which of its rows each job takes.
pub(super) struct Inputs<'a> {
    x: &'a [f32],
    pub(super) cols: usize,
    pub(super) jobs: Vec<Input<'a>>,
    /// Tokens of all tiles, were they all full.
    pub(super) lanes: usize,
}

impl<'a> Inputs<'a> {
    /// Jobs have a token at least, and rows that are there.
    pub(super) fn new((x, cols): (&'a [f32], usize), jobs: &[&Job<'a>]) -> Inputs<'a> {
        let mut lanes = 0;
        let place = |job: &&Job<'a>| {
            assert!(job.inputs.are_within(job.tokens, x.len() / cols), "inputs are there");
            let input = Input { tokens: job.tokens, rows: job.inputs, first_lane: lanes };
            lanes += input.tiles() * input.width();
            input
        };
        let jobs = jobs.iter().map(place).collect();
        Inputs { x, cols, jobs, lanes }
    }

    #[inline(always)]
    pub(super) fn row(&self, job: usize, token: usize) -> &[f32] {
        &self.x[self.jobs[job].rows.at(token) * self.cols..][..self.cols]
    }
}

/// Runs `each(job, range)` over all items of all jobs: by all workers, or by the caller alone where
/// they are fewer than `least`.
pub(super) fn spread(
    pool: &Pool,
    least: usize,
    counts: impl Iterator<Item = usize>,
    each: &(dyn Fn(usize, Range<usize>) + Sync),
) {
    let counts: Vec<usize> = counts.collect();
    let total = counts.iter().sum();
    let share = |range: Range<usize>| {
        let mut before = 0;
        for (job, count) in counts.iter().enumerate() {
            let own = |at: usize| at.saturating_sub(before).min(*count);
            let own = own(range.start)..own(range.end);
            before += count;
            if !own.is_empty() {
                each(job, own);
            }
        }
    };
    if total < least {
        share(0..total);
    } else {
        pool.run(&|worker| share(split(total, 1, pool.threads(), worker)));
    }
}
