//! Attention over a cache whose splits lie on several ranks.
//!
//! A rank computes the partial sums of the splits that it has, for the query heads of all ranks;
//! then each gets those of its own heads from everyone, and merges them in the order of splits.
//! That is what one rank does with all of them, so the bits are the same. Rows go in rounds, so
//! that partial sums take bounded memory however long the past is.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use bytemuck::{cast_slice, cast_slice_mut};
use pomona_device::Pool;
use pomona_types::{Collective, GroupError};

use super::partial::{MergeRecords, record_len};
use super::tile::Tile;
use super::{Item, Out, Problem, SPLIT, Workspace, compute};
use crate::Isa;

/// Most numbers of a round's partial sums, those of all ranks together: 16 MiB. One row and its
/// splits go at a time where they are more.
const ROUND_NUMBERS: usize = 4 << 20;
/// Rows of a piece times heads of a group: threads share a round by pieces, so there must be many.
const PIECE_PAIRS: usize = 192;

/// Who has which splits, and who gets which heads.
#[derive(Clone, Copy)]
pub(crate) struct Shares<'a> {
    /// This rank.
    pub(crate) rank: usize,
    /// Query heads whose results each rank gets.
    pub(crate) heads: &'a [Range<usize>],
    /// For each span, the rank that has its first split; the next has the next one, and so on.
    pub(crate) origins: &'a [u32],
}

impl Shares<'_> {
    /// Who has a split of a span.
    fn owner(&self, span: usize, split: usize) -> usize {
        (self.origins[span] as usize + split) % self.heads.len()
    }

    /// Whether this rank has a block of a span.
    pub(crate) fn has(&self, span: usize, block: usize) -> bool {
        self.owner(span, block * super::BLOCK / SPLIT) == self.rank
    }
}

/// Some rows of a span, and the splits that they see.
#[derive(Clone, Debug)]
struct Piece {
    span: usize,
    row: usize,
    rows: usize,
    splits: Range<usize>,
}

/// Computes `out: [tokens, own heads, head_dim]`. Bounds of spans and tables, as far as splits are
/// this rank's, are the caller's responsibility. Every rank of the group has to call it.
pub(crate) fn shared_attention(
    (pool, isa, group): (&Pool, Isa, &dyn Collective),
    problem: &Problem<'_>,
    shares: &Shares<'_>,
    (work, [sent, came]): (&mut Workspace, &mut [Vec<f32>; 2]),
    out: &mut [f32],
) -> Result<(), GroupError> {
    let pieces = pieces(problem);
    let mut rest = pieces.as_slice();
    while !rest.is_empty() {
        let round;
        (round, rest) = rest.split_at(round_len(problem, rest));
        let round = Round { problem, shares, pieces: round };
        round.compute(pool, isa, work);
        round.pack(work, sent);
        let counts = round.counts();
        came.clear();
        came.resize(counts[1].iter().sum(), 0.0);
        let bytes = counts.each_ref().map(|counts| -> Vec<usize> {
            counts.iter().map(|count| count * size_of::<f32>()).collect()
        });
        group.all_to_all(&bytes[0], cast_slice(sent), &bytes[1], cast_slice_mut(came))?;
        round.merge((pool, isa), (came, &counts[1]), work, out);
    }
    Ok(())
}

/// All rows, in pieces that are no larger than a round where it can be.
fn pieces(problem: &Problem<'_>) -> Vec<Piece> {
    let mut pieces = Vec::new();
    for (span, s) in problem.spans.iter().enumerate() {
        let (mut row, end) = (0, s.rows as usize);
        while row < end {
            let position = s.start as usize + row;
            let first = problem.first_seen(position) / SPLIT;
            let splits = |rows: usize| first..(position + rows - 1) / SPLIT + 1;
            let rows = (PIECE_PAIRS / problem.groups.size).clamp(1, end - row);
            let most = ROUND_NUMBERS / (splits(rows).len() * row_numbers(problem));
            let rows = rows.min(most.max(1));
            pieces.push(Piece { span, row, rows, splits: splits(rows) });
            row += rows;
        }
    }
    pieces
}

/// Numbers of the partial sums of one row over one split.
fn row_numbers(problem: &Problem<'_>) -> usize {
    problem.heads * record_len(problem.head_dim)
}

/// How many of the pieces go into the next round: at least one.
fn round_len(problem: &Problem<'_>, pieces: &[Piece]) -> usize {
    let mut numbers = 0;
    let fits = |piece: &&Piece| {
        numbers += piece.rows * piece.splits.len() * row_numbers(problem);
        numbers <= ROUND_NUMBERS
    };
    pieces.iter().take_while(fits).count().max(1)
}

/// What is exchanged at a time. From a rank to another go records, by piece, split, row and head.
struct Round<'a> {
    problem: &'a Problem<'a>,
    shares: &'a Shares<'a>,
    pieces: &'a [Piece],
}

impl Round<'_> {
    /// Pieces with the splits of them that a rank has.
    fn splits_of(&self, rank: usize) -> impl Iterator<Item = (&Piece, usize)> {
        let splits = self.pieces.iter().flat_map(|p| p.splits.clone().map(move |s| (p, s)));
        splits.filter(move |(piece, split)| self.shares.owner(piece.span, *split) == rank)
    }

    /// Numbers that go from this rank to each, and come from each.
    fn counts(&self) -> [Vec<usize>; 2] {
        let heads = self.shares.heads;
        let rows = |rank| self.splits_of(rank).map(|(piece, _)| piece.rows).sum::<usize>();
        let own = heads[self.shares.rank].len();
        let (record, own_rows) = (record_len(self.problem.head_dim), rows(self.shares.rank));
        [
            heads.iter().map(|heads| own_rows * heads.len() * record).collect(),
            (0..heads.len()).map(|rank| rows(rank) * own * record).collect(),
        ]
    }

    /// Computes partial sums of this rank's splits: those of piece, split and KV head in order.
    fn compute(&self, pool: &Pool, isa: Isa, work: &mut Workspace) {
        work.items.clear();
        for (piece, split) in self.splits_of(self.shares.rank) {
            let &Piece { span, row, rows, .. } = piece;
            for kv_head in 0..self.problem.kv_heads {
                let (splits, partial) = (split..split + 1, Some(work.items.len()));
                let kv_heads = kv_head..kv_head + 1;
                work.items.push(Item { span, row, rows, kv_heads, splits, partial });
            }
        }
        let partials = work.items.len();
        compute(pool, isa, self.problem, (work, partials), &|_, _| {
            unreachable!("every item has one split")
        });
    }

    /// Brings together what each rank gets.
    fn pack(&self, work: &mut Workspace, records: &mut Vec<f32>) {
        let Problem { kv_heads, head_dim, groups, heads: all, .. } = *self.problem;
        records.clear();
        for heads in self.shares.heads {
            for (at, (piece, _)) in self.splits_of(self.shares.rank).enumerate() {
                for row in 0..piece.rows {
                    for head in heads.clone() {
                        let kv_head = (head + groups.skipped) / groups.size;
                        let group = groups.of(kv_head, all);
                        let partial = &mut work.partials[at * kv_heads + kv_head];
                        let partial = partial.get_mut().unwrap_or_else(PoisonError::into_inner);
                        partial.write(row * group.len() + head - group.start, head_dim, records);
                    }
                }
            }
        }
    }

    /// Merges what came, from rank 0 first, into this rank's heads of the pieces' rows.
    fn merge(
        &self,
        (pool, isa): (&Pool, Isa),
        (came, counts): (&[f32], &[usize]),
        work: &mut Workspace,
        out: &mut [f32],
    ) {
        let (own, d) = (self.shares.heads[self.shares.rank].len(), self.problem.head_dim);
        let (starts, firsts) = self.places(counts);
        work.tiles.resize_with(pool.threads(), Mutex::default);
        let (next, sink, all) = (AtomicUsize::new(0), Out(out.as_mut_ptr()), out.len());
        let run = |worker: usize| {
            let sink = &sink;
            let mut tile = work.tiles[worker].lock().unwrap_or_else(PoisonError::into_inner);
            loop {
                let at = next.fetch_add(1, Ordering::Relaxed);
                let Some(piece) = self.pieces.get(at) else { return };
                let len = piece.rows * own * record_len(d);
                let starts = &starts[firsts[at]..][..piece.splits.len()];
                let mut splits = starts.iter().map(|start| &came[*start..][..len]);
                let row = self.problem.spans[piece.span].first_row as usize + piece.row;
                let (start, len) = (row * own * d, piece.rows * own * d);
                assert!(start + len <= all, "spans are within the batch");
                // SAFETY: within `out` by the assertion; pieces have rows of their own.
                let out = unsafe { std::slice::from_raw_parts_mut(sink.0.add(start), len) };
                let splits = &mut splits;
                let Tile { total, part, .. } = &mut *tile;
                isa.run(MergeRecords { splits, head_dim: d, total, part, out });
            }
        };
        if self.pieces.len() == 1 { run(0) } else { pool.run(&run) }
    }

    /// Where the records of each split of each piece start in what came, and where each piece's
    /// splits start among those.
    fn places(&self, counts: &[usize]) -> (Vec<usize>, Vec<usize>) {
        let mut total = 0;
        let next = counts.iter().map(|count| {
            total += count;
            total - count
        });
        let mut next: Vec<usize> = next.collect();
        let own = self.shares.heads[self.shares.rank].len();
        let record = record_len(self.problem.head_dim);
        let (mut starts, mut firsts) = (Vec::new(), Vec::new());
        for piece in self.pieces {
            firsts.push(starts.len());
            for split in piece.splits.clone() {
                let next = &mut next[self.shares.owner(piece.span, split)];
                starts.push(*next);
                *next += piece.rows * own * record;
            }
        }
        (starts, firsts)
    }
}
