//! Bytes that are not computed with: the gather of columns, and the exchange of parts.

use pomona_types::GroupError;

use super::call::Operation;
use super::{Comm, Turn, invalid, pieces};

/// Columns of one rank in the rows of all: where its bytes, one row after the other, belong.
#[derive(Clone, Copy)]
pub(super) struct Columns {
    /// Where its first row begins.
    pub start: usize,
    /// Its bytes in each row.
    pub width: usize,
    /// From one row to the next.
    pub stride: usize,
}

impl Columns {
    /// Those of `rank`.
    pub fn of(widths: &[usize], rank: usize) -> Columns {
        let start = widths[..rank].iter().sum();
        Columns { start, width: widths[rank], stride: widths.iter().sum() }
    }

    /// Copies a piece of the rank's bytes, which begins at `at`, to where it belongs.
    pub fn place(self, mut at: usize, mut piece: &[u8], all: &mut [u8]) {
        if self.width == self.stride {
            return all[at..at + piece.len()].copy_from_slice(piece);
        }
        while !piece.is_empty() {
            let (row, column) = (at / self.width, at % self.width);
            let (part, rest) = piece.split_at(piece.len().min(self.width - column));
            let place = self.start + row * self.stride + column;
            all[place..place + part.len()].copy_from_slice(part);
            at += part.len();
            piece = rest;
        }
    }
}

/// The part of `bytes` that a piece which begins at `at` has.
fn piece_of(bytes: usize, at: usize, piece: usize) -> std::ops::Range<usize> {
    bytes.min(at)..bytes.min(at + piece)
}

impl Comm {
    /// Checks the lengths of a gather. Returns the bytes that the widest rank has.
    pub(super) fn check_gather(
        &self,
        rows: usize,
        widths: &[usize],
        own: usize,
        all: usize,
    ) -> Result<usize, GroupError> {
        let lengths = || {
            let total = widths.iter().try_fold(0usize, |sum, width| sum.checked_add(*width))?;
            Some((rows.checked_mul(*widths.get(self.lanes.me)?)?, rows.checked_mul(total)?))
        };
        if widths.len() != self.lanes.count() || lengths() != Some((own, all)) {
            return Err(invalid(format!(
                "a gather of {rows} rows with widths {widths:?} by {} ranks, from {own} bytes \
                 to {all}: the lengths do not fit",
                self.lanes.count()
            )));
        }
        Ok(rows * widths.iter().max().expect("a width for each rank"))
    }

    pub(super) fn gather(
        &self,
        rows: usize,
        widths: &[usize],
        own: &[u8],
        all: &mut [u8],
    ) -> Result<(), GroupError> {
        let widest = self.check_gather(rows, widths, own.len(), all.len())?;
        let Turn { calls, rounds, .. } = &mut *self.turn()?;
        let lanes = &self.lanes;
        let shape = std::iter::once(rows).chain(widths.iter().copied());
        let mut watch = self.watch(calls.note(Operation::AllGather, all.len(), shape));
        for range in pieces(widest, lanes.exchange_payload) {
            let (at, length) = (range.start, lanes.exchange_payload);
            let mine = piece_of(own.len(), at, length);
            let round = rounds.post_same(lanes, watch.mark, &own[mine.clone()])?;
            // While the others' bytes are on their way.
            Columns::of(widths, lanes.me).place(at, &own[mine], all);
            for member in lanes.others() {
                let theirs = piece_of(rows * widths[member], at, length);
                let piece = round.from(&mut watch, member, theirs.len())?;
                Columns::of(widths, member).place(at, piece, all);
            }
        }
        Ok(())
    }

    pub(super) fn exchange_parts(
        &self,
        sent: &[usize],
        out: &[u8],
        received: &[usize],
        into: &mut [u8],
    ) -> Result<(), GroupError> {
        let (ranks, me) = (self.lanes.count(), self.lanes.me);
        let sums = [sent, received]
            .map(|list| list.iter().try_fold(0usize, |sum, bytes| sum.checked_add(*bytes)));
        let fits = sums == [Some(out.len()), Some(into.len())];
        if !fits || sent.len() != ranks || received.len() != ranks || sent[me] != received[me] {
            return Err(invalid(format!(
                "an exchange of {sent:?} bytes, {} in all, for {received:?}, {} in all, by {ranks} \
                 ranks: the lengths do not fit",
                out.len(),
                into.len()
            )));
        }
        let turn = &mut *self.turn()?;
        let mut watch = self.watch(turn.calls.note(Operation::AllToAll, 0, []));
        let start_of = |list: &[usize], rank: usize| list[..rank].iter().sum::<usize>();
        let own = start_of(sent, me)..start_of(sent, me) + sent[me];
        into[start_of(received, me)..][..received[me]].copy_from_slice(&out[own]);
        let payload = self.lanes.message_payload;
        let count = |bytes: usize| bytes.div_ceil(payload).max(1);
        let most = sent.iter().chain(received).map(|bytes| count(*bytes)).max().unwrap_or(0);
        for index in 0..most {
            // Piece by piece to and from everyone, so that nobody waits for room in a circle.
            for to in self.lanes.others().filter(|to| index < count(sent[*to])) {
                let part = &out[start_of(sent, to)..][..sent[to]];
                let piece = &part[piece_of(part.len(), index * payload, payload)];
                self.messages.send_piece(&self.lanes, &mut watch, to, part.len(), piece)?;
            }
            for from in self.lanes.others().filter(|from| index < count(received[*from])) {
                let part = &mut into[start_of(received, from)..][..received[from]];
                let range = piece_of(part.len(), index * payload, payload);
                let place = &mut part[range];
                self.messages.receive_into(&self.lanes, &mut watch, from, place)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_of_columns_come_to_their_places() {
        let widths = [2, 0, 3];
        // Rows of rank 0 are "ab", "cd", of rank 2 "123", "456".
        for piece in 1..8 {
            let mut all = [b'.'; 10];
            for (rank, own) in [(0, &b"abcd"[..]), (1, b""), (2, b"123456")] {
                for range in pieces(own.len(), piece) {
                    Columns::of(&widths, rank).place(range.start, &own[range], &mut all);
                }
            }
            assert_eq!(&all, b"ab123cd456");
        }
    }
}
