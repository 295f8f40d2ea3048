//! Sums over ranks: which algorithm, and the algorithms. All add in the order of ranks.

use std::ops::Range;

use pomona_policy::cost::Algorithm;
use pomona_types::GroupError;

use super::call::{Calls, Mark, Operation};
use super::messages::wrong_length;
use super::sum::{add, sum_in_order};
use super::watch::Watch;
use super::{Comm, Turn, invalid, pieces};

/// The algorithm for so many bytes, if nothing was measured.
fn suits(ranks: usize, bytes: usize, in_place: bool) -> Algorithm {
    match (ranks, bytes, in_place) {
        (..=2, ..) | (_, ..=ONE_SHOT_BYTES, true) => Algorithm::OneShot,
        (_, ..=DOUBLING_BYTES, false) => Algorithm::Doubling,
        _ => Algorithm::TwoShot,
    }
}

/// Up to here, fewer steps are worth reading more bytes of shared memory.
const ONE_SHOT_BYTES: usize = 32 << 10;
/// Up to here, fewer messages are worth more bytes on a wire.
const DOUBLING_BYTES: usize = 4 << 10;
/// Pieces of a ring: small enough that all ranks have work soon.
const RING_PIECE_BYTES: usize = 64 << 10;
/// Parts of a sum begin at multiples of so many numbers: a cache line.
const PART_NUMBERS: usize = 16;

impl Comm {
    /// The algorithm for sums of so many numbers.
    pub(super) fn algorithm(&self, count: usize) -> Algorithm {
        let (ranks, bytes) = (self.lanes.count(), count * 4);
        let chosen = self.forced.or_else(|| self.choices.algorithm(ranks, bytes));
        chosen.unwrap_or_else(|| suits(ranks, bytes, self.lanes.in_place))
    }

    /// Takes note of a sum of so many numbers.
    pub(super) fn reduce_mark(
        &self,
        calls: &mut Calls,
        count: usize,
        algorithm: Algorithm,
    ) -> Mark {
        let shape = [algorithm as usize, usize::from(self.lanes.in_place)];
        calls.note(Operation::AllReduce, count * 4, shape)
    }

    pub(super) fn reduce(&self, values: &mut [f32]) -> Result<(), GroupError> {
        let algorithm = self.algorithm(values.len());
        let turn = &mut *self.turn()?;
        let mark = self.reduce_mark(&mut turn.calls, values.len(), algorithm);
        let watch = &mut self.watch(mark);
        if self.lanes.count() == 1 {
            return Ok(());
        }
        match algorithm {
            Algorithm::OneShot => self.one_shot(turn, watch, values),
            Algorithm::TwoShot => self.two_shot(turn, watch, values),
            Algorithm::Doubling => self.doubling(turn, watch, values),
            Algorithm::Ring => self.ring(watch, values),
        }
    }

    fn one_shot(
        &self,
        turn: &mut Turn,
        watch: &mut Watch<'_>,
        values: &mut [f32],
    ) -> Result<(), GroupError> {
        let lanes = &self.lanes;
        for range in pieces(values.len(), lanes.exchange_payload / 4) {
            let values = &mut values[range];
            let round = turn.rounds.post_same(lanes, watch.mark, bytemuck::cast_slice(values))?;
            round.sum(watch, values)?;
        }
        Ok(())
    }

    fn two_shot(
        &self,
        turn: &mut Turn,
        watch: &mut Watch<'_>,
        values: &mut [f32],
    ) -> Result<(), GroupError> {
        let lanes = &self.lanes;
        let (me, ranks, total) = (lanes.me, lanes.count(), values.len());
        let part = total.div_ceil(ranks).next_multiple_of(PART_NUMBERS);
        for range in pieces(part, lanes.exchange_payload / 4) {
            // A rank's share of this piece: parts at the end may be short, or empty.
            let of = |rank: usize| -> Range<usize> {
                let end = total.min((rank + 1) * part);
                end.min(rank * part + range.start)..end.min(rank * part + range.end)
            };
            let mine = of(me);
            let (before, rest) = values.split_at_mut(mine.start);
            let (own, after) = rest.split_at_mut(mine.len());
            let theirs = |rank: usize| {
                let share = of(rank);
                let numbers = match rank < me {
                    true => &before[share],
                    false => &after[share.start - mine.end..share.end - mine.end],
                };
                bytemuck::cast_slice(numbers)
            };
            let round = turn.rounds.post_each(lanes, watch.mark, theirs)?;
            round.sum(watch, own)?;
            let round = turn.rounds.post_same(lanes, watch.mark, bytemuck::cast_slice(own))?;
            for member in lanes.others() {
                let share = of(member);
                let sums = round.from(watch, member, share.len() * 4)?;
                values[share].copy_from_slice(bytemuck::cast_slice(sums));
            }
        }
        Ok(())
    }

    fn doubling(
        &self,
        turn: &mut Turn,
        watch: &mut Watch<'_>,
        values: &mut [f32],
    ) -> Result<(), GroupError> {
        let (me, ranks, count) = (self.lanes.me, self.lanes.count(), values.len());
        // Block `b` is that of the `b`-th rank from the own one on.
        let blocks = &mut turn.scratch;
        blocks.resize(ranks * count, 0.0);
        blocks[..count].copy_from_slice(values);
        let mut known = 1;
        while known < ranks {
            let step = known.min(ranks - known);
            let (to, from) = ((me + ranks - known) % ranks, (me + known) % ranks);
            let (old, new) = blocks.split_at_mut(known * count);
            let (send, receive) = (&old[..step * count], &mut new[..step * count]);
            for range in pieces(step * count, self.lanes.message_payload / 4) {
                let piece = bytemuck::cast_slice(&send[range.clone()]);
                self.messages.send_piece(&self.lanes, watch, to, send.len() * 4, piece)?;
                let place = bytemuck::cast_slice_mut(&mut receive[range]);
                self.messages.receive_into(&self.lanes, watch, from, place)?;
            }
            known += step;
        }
        sum_in_order(values, me, ranks, &mut |rank| {
            Ok(&blocks[(rank + ranks - me) % ranks * count..][..count])
        })
    }

    /// Rank 0 begins each piece, the last rank has its sum and passes it to rank 0, which hands it
    /// on. Results follow sums at a distance, so that no rank waits for one that has to go around.
    fn ring(&self, watch: &mut Watch<'_>, values: &mut [f32]) -> Result<(), GroupError> {
        let (lanes, messages) = (&self.lanes, &self.messages);
        let (me, ranks) = (lanes.me, lanes.count());
        let (next, before, last) = ((me + 1) % ranks, (me + ranks - 1) % ranks, ranks - 1);
        let piece = lanes.message_payload.min(RING_PIECE_BYTES) / 4;
        let whole = values.len() * 4;
        let count = pieces(values.len(), piece).count();
        let total = values.len();
        let of = |index: usize| index * piece..total.min((index + 1) * piece);
        for step in 0..count + last {
            if step < count {
                let values = &mut values[of(step)];
                if me > 0 {
                    messages.receive_piece(lanes, watch, before, |_, sums| {
                        let (got, expected) = (sums.len(), values.len() * 4);
                        if got != expected {
                            return Err(wrong_length(lanes.members[before], got, expected));
                        }
                        add(values, bytemuck::cast_slice(sums));
                        Ok(())
                    })?;
                }
                messages.send_piece(lanes, watch, next, whole, bytemuck::cast_slice(values))?;
            }
            if step >= last && me < last {
                let place = bytemuck::cast_slice_mut(&mut values[of(step - last)]);
                messages.receive_into(lanes, watch, before, place)?;
                if next < last {
                    messages.send_piece(lanes, watch, next, whole, place)?;
                }
            }
        }
        Ok(())
    }

    pub(super) fn reduce_parts(
        &self,
        values: &[f32],
        counts: &[usize],
        own: &mut [f32],
    ) -> Result<(), GroupError> {
        let (lanes, me, ranks) = (&self.lanes, self.lanes.me, self.lanes.count());
        let sum = counts.iter().try_fold(0usize, |sum, count| sum.checked_add(*count));
        if counts.len() != ranks || sum != Some(values.len()) || counts[me] != own.len() {
            return Err(invalid(format!(
                "a sum of {} numbers in parts of {counts:?}, {} of them for rank {me} of {ranks}: \
                 the lengths do not fit",
                values.len(),
                own.len()
            )));
        }
        let turn = &mut *self.turn()?;
        let shape = counts.iter().copied();
        let mark = turn.calls.note(Operation::ReduceScatter, values.len() * 4, shape);
        let watch = &mut self.watch(mark);
        let widest = counts.iter().copied().max().unwrap_or(0);
        for range in pieces(widest, lanes.exchange_payload / 4) {
            let of = |rank: usize| range.start.min(counts[rank])..range.end.min(counts[rank]);
            let share = |rank: usize| {
                let start: usize = counts[..rank].iter().sum();
                &values[start..][..counts[rank]][of(rank)]
            };
            let round = turn
                .rounds
                .post_each(lanes, watch.mark, |rank| bytemuck::cast_slice(share(rank)))?;
            let own = &mut own[of(me)];
            own.copy_from_slice(share(me));
            round.sum(watch, own)?;
        }
        Ok(())
    }
}
