//! Prepared calls: sizes are checked once, and what goes out is made where it goes out from. Which
//! calls, and why no others: docs/decisions/2026-11-22-plans-only-where-bytes-are-made-in-place.md.

use std::sync::MutexGuard;

use pomona_policy::cost::Algorithm;
use pomona_types::GroupError;

use super::call::{Mark, Operation};
use super::gather::Columns;
use super::{Comm, Turn, invalid};

/// An [`all_gather`](pomona_types::Collective::all_gather) of the same sizes, again and again.
pub struct GatherPlan<'a> {
    comm: &'a Comm,
    rows: usize,
    widths: Vec<usize>,
    /// The own bytes, where they cannot be made in the arena.
    own: Vec<u8>,
    in_place: bool,
}

/// An [`all_reduce`](pomona_types::Collective::all_reduce) of the same size, again and again.
pub struct ReducePlan<'a> {
    comm: &'a Comm,
    count: usize,
    /// The own numbers, where they cannot be made in the arena.
    own: Vec<f32>,
    in_place: bool,
}

impl Comm {
    /// Prepares a gather of `rows` rows, to which rank `r` adds `widths[r]` bytes each.
    pub fn plan_gather(&self, rows: usize, widths: &[usize]) -> Result<GatherPlan<'_>, GroupError> {
        let too_many = || invalid(format!("a gather of {rows} rows with widths {widths:?}"));
        let width = widths.get(self.lanes.me).ok_or_else(too_many)?;
        let own = rows.checked_mul(*width).ok_or_else(too_many)?;
        let all = widths.iter().try_fold(0usize, |sum, width| sum.checked_add(*width));
        let all = all.and_then(|all| all.checked_mul(rows)).ok_or_else(too_many)?;
        let widest = self.check_gather(rows, widths, own, all)?;
        let in_place = self.lanes.in_place && widest <= self.lanes.exchange_payload;
        let own = vec![0; if in_place { 0 } else { own }];
        Ok(GatherPlan { comm: self, rows, widths: widths.to_vec(), own, in_place })
    }

    /// Prepares a sum of `count` numbers.
    pub fn plan_reduce(&self, count: usize) -> ReducePlan<'_> {
        let fits = count <= self.lanes.exchange_payload / 4;
        let in_place = self.lanes.in_place && fits && self.algorithm(count) == Algorithm::OneShot;
        let own = vec![0.0; if in_place { 0 } else { count }];
        ReducePlan { comm: self, count, own, in_place }
    }
}

impl GatherPlan<'_> {
    /// Lets `make` write the own bytes, and joins them with those of the others in `all`.
    pub fn run(&mut self, make: impl FnOnce(&mut [u8]), all: &mut [u8]) -> Result<(), GroupError> {
        let comm = self.comm;
        comm.settle(self.gather(make, all))
    }

    fn gather(&mut self, make: impl FnOnce(&mut [u8]), all: &mut [u8]) -> Result<(), GroupError> {
        let (lanes, widths) = (&self.comm.lanes, &self.widths);
        let bytes = |rank: usize| self.rows * widths[rank];
        if !self.in_place {
            make(&mut self.own);
            return self.comm.gather(self.rows, widths, &self.own, all);
        }
        self.comm.check_gather(self.rows, widths, bytes(lanes.me), all.len())?;
        let Turn { calls, rounds, .. } = &mut *self.comm.turn()?;
        let own = rounds.stage(lanes, bytes(lanes.me)).expect("checked when it was prepared");
        make(own);
        Columns::of(widths, lanes.me).place(0, own, all);
        let shape = std::iter::once(self.rows).chain(widths.iter().copied());
        let mut watch = self.comm.watch(calls.note(Operation::AllGather, all.len(), shape));
        let round = rounds.post_staged(lanes, watch.mark, bytes(lanes.me))?;
        for member in lanes.others() {
            let piece = round.from(&mut watch, member, bytes(member))?;
            Columns::of(widths, member).place(0, piece, all);
        }
        Ok(())
    }
}

impl ReducePlan<'_> {
    /// Lets `make` write the own numbers, and puts the sums into `sums`.
    pub fn run(
        &mut self,
        make: impl FnOnce(&mut [f32]),
        sums: &mut [f32],
    ) -> Result<(), GroupError> {
        let comm = self.comm;
        comm.settle(self.reduce(make, sums))
    }

    fn reduce(
        &mut self,
        make: impl FnOnce(&mut [f32]),
        sums: &mut [f32],
    ) -> Result<(), GroupError> {
        if sums.len() != self.count {
            return Err(invalid(format!("sums of {} numbers for {}", self.count, sums.len())));
        }
        let lanes = &self.comm.lanes;
        if !self.in_place {
            make(&mut self.own);
            sums.copy_from_slice(&self.own);
            return self.comm.reduce(sums);
        }
        let mut turn: MutexGuard<'_, Turn> = self.comm.turn()?;
        let Turn { calls, rounds, .. } = &mut *turn;
        let bytes = self.count * 4;
        let own = rounds.stage(lanes, bytes).expect("checked when it was prepared");
        make(bytemuck::cast_slice_mut(own));
        let mark: Mark = self.comm.reduce_mark(calls, self.count, Algorithm::OneShot);
        let mut watch = self.comm.watch(mark);
        let round = rounds.post_staged(lanes, mark, bytes)?;
        sums.copy_from_slice(bytemuck::cast_slice(round.own(bytes)));
        round.sum(&mut watch, sums)
    }
}
