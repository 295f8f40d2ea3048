//! Messages between two members, in pieces, with credits.
//!
//! Each direction of a pair has four slots. A receiver that has used up two gives them back with
//! one notification, so a sender can be ahead, and no round trip is needed for each piece.

use std::sync::{Mutex, PoisonError};

use pomona_types::GroupError;

use super::call::{HEADER_BYTES, Header};
use super::lanes::{Lanes, MESSAGE_SLOTS};
use super::watch::Watch;

/// Slots that are given back together.
const CREDIT_SLOTS: u64 = MESSAGE_SLOTS as u64 / 2;

/// What went to and came from each other member so far, in pieces.
pub(super) struct Messages {
    sent: Vec<Mutex<u64>>,
    received: Vec<Mutex<u64>>,
}

impl Messages {
    pub fn new(members: usize) -> Messages {
        let none = || (0..members).map(|_| Mutex::new(0)).collect();
        Messages { sent: none(), received: none() }
    }

    /// Sends one piece of the call's message. Waits until the member has room for it.
    pub fn send_piece(
        &self,
        lanes: &Lanes,
        watch: &mut Watch<'_>,
        to: usize,
        whole: usize,
        piece: &[u8],
    ) -> Result<(), GroupError> {
        let mut sent = self.sent[to].lock().unwrap_or_else(PoisonError::into_inner);
        // The slot's last piece is one of those that were given back.
        let given_back = (*sent + 1).saturating_sub(MESSAGE_SLOTS as u64);
        if given_back > 0 {
            let credits = given_back.div_ceil(CREDIT_SLOTS);
            watch.wait(to, lanes.counters.credit(), credits as u32)?;
        }
        let header = Header { mark: watch.mark, piece: piece.len(), whole, waits_for: 0 };
        let (slot, _) = place(*sent);
        let at = lanes.message_slot(lanes.me, slot);
        let parts = [&header.encode()[..], piece];
        lanes.link.put(lanes.members[to], at, &parts, lanes.counters.message(slot))?;
        *sent += 1;
        Ok(())
    }

    /// Waits for the next piece of the call's message and hands it to `take`, with the length of
    /// the whole message.
    pub fn receive_piece<T>(
        &self,
        lanes: &Lanes,
        watch: &mut Watch<'_>,
        from: usize,
        take: impl FnOnce(usize, &[u8]) -> Result<T, GroupError>,
    ) -> Result<T, GroupError> {
        let mut received = self.received[from].lock().unwrap_or_else(PoisonError::into_inner);
        let (slot, filled) = place(*received);
        watch.wait(from, lanes.counters.message(slot), filled)?;
        let at = lanes.message_slot(from, slot);
        // SAFETY: the counter says that a message is there, and the sender writes to the slot
        // again only when it has the credit for it, which is given below.
        let header = unsafe { lanes.own(at, HEADER_BYTES) };
        let header = Header::decode(header.first_chunk().expect("a header's length"));
        if header.mark != watch.mark {
            return Err(watch.mismatch(from, header.mark));
        }
        let length = header.piece.min(lanes.message_payload);
        // SAFETY: as above.
        let piece = unsafe { lanes.own(at + HEADER_BYTES, length) };
        let taken = take(header.whole, piece)?;
        *received += 1;
        if received.is_multiple_of(CREDIT_SLOTS) {
            lanes.link.put(lanes.members[from], at, &[], lanes.counters.credit())?;
        }
        Ok(taken)
    }

    /// Waits for a piece that must be as long as `into`, and copies it there.
    pub fn receive_into(
        &self,
        lanes: &Lanes,
        watch: &mut Watch<'_>,
        from: usize,
        into: &mut [u8],
    ) -> Result<(), GroupError> {
        self.receive_piece(lanes, watch, from, |_, piece| {
            if piece.len() != into.len() {
                return Err(wrong_length(lanes.members[from], piece.len(), into.len()));
            }
            into.copy_from_slice(piece);
            Ok(())
        })
    }
}

/// In which slot a piece is, and how often that was filled when it is there.
fn place(piece: u64) -> (usize, u32) {
    let slots = MESSAGE_SLOTS as u64;
    ((piece % slots) as usize, (piece / slots + 1) as u32)
}

/// Marks agree, and lengths do not.
pub(super) fn wrong_length(rank: usize, got: usize, expected: usize) -> GroupError {
    GroupError::Ended(format!(
        "rank {rank} sent a piece of {got} bytes where {expected} belong: the versions differ"
    ))
}
