//! What one rank sends: to one other, or to all. And the barrier, which sends nothing.

use pomona_types::GroupError;

use super::call::{Mark, Operation};
use super::messages::wrong_length;
use super::watch::Watch;
use super::{Comm, MESSAGE_BYTES_MAX, Turn, invalid, pieces};

impl Comm {
    pub(super) fn send_to(&self, to: usize, bytes: &[u8]) -> Result<(), GroupError> {
        self.check_peer(to)?;
        let mut watch = self.watch(Mark::message(bytes.len()));
        for range in pieces(bytes.len(), self.lanes.message_payload) {
            let (lanes, whole) = (&self.lanes, bytes.len());
            self.messages.send_piece(lanes, &mut watch, to, whole, &bytes[range])?;
        }
        Ok(())
    }

    pub(super) fn receive_from(&self, from: usize, bytes: &mut [u8]) -> Result<(), GroupError> {
        self.check_peer(from)?;
        let mut watch = self.watch(Mark::message(bytes.len()));
        for range in pieces(bytes.len(), self.lanes.message_payload) {
            self.messages.receive_into(&self.lanes, &mut watch, from, &mut bytes[range])?;
        }
        Ok(())
    }

    /// A peer is another member, and the epoch is not over.
    fn check_peer(&self, peer: usize) -> Result<(), GroupError> {
        let (me, ranks) = (self.lanes.me, self.lanes.count());
        if peer == me || peer >= ranks {
            return Err(invalid(format!("rank {peer} as the peer of rank {me} of {ranks}")));
        }
        self.lanes.link.aborted().map_or(Ok(()), Err)
    }

    pub(super) fn spread(&self, root: usize, message: &mut Vec<u8>) -> Result<(), GroupError> {
        let (lanes, ranks) = (&self.lanes, self.lanes.count());
        if root >= ranks || (root == lanes.me && message.len() > MESSAGE_BYTES_MAX) {
            return Err(invalid(format!(
                "a broadcast of {} bytes by rank {root}: there are {ranks} ranks, and messages \
                 have at most {MESSAGE_BYTES_MAX} bytes",
                message.len()
            )));
        }
        let mut turn = self.turn()?;
        let mut watch = self.watch(turn.calls.note(Operation::Broadcast, 0, [root]));
        if root != lanes.me {
            return self.receive_whole(&mut watch, root, message);
        }
        for range in pieces(message.len(), lanes.message_payload) {
            for member in lanes.others() {
                let (whole, piece) = (message.len(), &message[range.clone()]);
                self.messages.send_piece(lanes, &mut watch, member, whole, piece)?;
            }
        }
        Ok(())
    }

    /// Receives a message whose length comes with it.
    fn receive_whole(
        &self,
        watch: &mut Watch<'_>,
        from: usize,
        message: &mut Vec<u8>,
    ) -> Result<(), GroupError> {
        message.clear();
        // The first piece is what may take as long as there is nothing to do.
        let limit = watch.limit.take();
        loop {
            let whole = self.messages.receive_piece(&self.lanes, watch, from, |whole, piece| {
                let fits = whole <= MESSAGE_BYTES_MAX
                    && message.len() + piece.len() <= whole
                    && (!piece.is_empty() || whole == 0);
                if !fits {
                    let rank = self.lanes.members[from];
                    return Err(wrong_length(rank, piece.len(), whole));
                }
                message.reserve_exact(whole - message.len());
                message.extend_from_slice(piece);
                Ok(whole)
            })?;
            watch.limit = limit;
            if message.len() == whole {
                return Ok(());
            }
        }
    }

    pub(super) fn meet(&self) -> Result<(), GroupError> {
        let Turn { calls, rounds, .. } = &mut *self.turn()?;
        let mut watch = self.watch(calls.note(Operation::Barrier, 0, []));
        let round = rounds.post_same(&self.lanes, watch.mark, &[])?;
        for member in self.lanes.others() {
            round.from(&mut watch, member, 0)?;
        }
        Ok(())
    }
}
