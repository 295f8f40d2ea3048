//! Collectives: what the ranks of a group do together, over any [`Link`].
//!
//! A [`World`] divides the ranks of a link into groups; each member of one gets a [`Comm`], which
//! has its own part of the arenas and its own counters. Sums are added in the order of ranks by
//! every algorithm, so the bits are the same whichever runs, and on every rank. Calls allocate
//! nothing but what a broadcast's message needs.

mod call;
mod exchange;
mod gather;
mod lanes;
mod messages;
mod plan;
mod reduce;
mod sum;
mod watch;

use std::sync::atomic::AtomicU32;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use pomona_types::{Collective, GroupError};

pub use self::plan::{GatherPlan, ReducePlan};
pub use self::reduce::Algorithm;

use self::call::{Calls, Mark, Operation};
use self::exchange::Rounds;
use self::lanes::{COUNTERS_EACH, Counters, Lanes};
use self::messages::{Messages, wrong_length};
use self::watch::Watch;
use crate::link::{COUNTERS, Link};

/// How long a wait within a call may take, if nothing else is said.
pub const CALL_LIMIT: Duration = Duration::from_secs(30);
/// The longest message that a broadcast takes.
pub const MESSAGE_BYTES_MAX: usize = 1 << 30;

/// A link whose arenas and counters are given to groups, one after the other. All ranks make the
/// same divisions in the same order.
pub struct World {
    link: Arc<dyn Link>,
    limit: Duration,
    bytes_given: usize,
    counters_given: usize,
}

impl World {
    /// Nothing is given yet.
    pub fn new(link: Arc<dyn Link>) -> World {
        World { link, limit: CALL_LIMIT, bytes_given: 0, counters_given: 0 }
    }

    /// How long a wait within a call may take before the rank that is waited for counts as lost.
    pub fn with_limit(mut self, limit: Duration) -> World {
        self.limit = limit;
        self
    }

    /// Divides ranks into groups of which no two share a rank. Each gets the same `bytes` of its
    /// members' arenas. Returns the group that this rank is a member of, if there is one.
    pub fn divide(
        &mut self,
        groups: &[&[usize]],
        bytes: usize,
    ) -> Result<Option<Comm>, GroupError> {
        let ranks = self.link.ranks();
        let mut member_of = vec![None; ranks];
        for (group, members) in groups.iter().enumerate() {
            for rank in members.iter().copied() {
                let place = member_of
                    .get_mut(rank)
                    .ok_or_else(|| invalid(format!("rank {rank} of a group: there are {ranks}")))?;
                if place.replace(group).is_some() {
                    let why = format!("rank {rank} stands in two groups of one division");
                    return Err(invalid(why));
                }
            }
        }
        let bytes = bytes.next_multiple_of(64);
        let left = self.link.arena_bytes() - self.bytes_given;
        let counters = COUNTERS - self.counters_given;
        let most = groups.iter().map(|members| members.len()).max().unwrap_or(0);
        let least = Lanes::bytes_min(most);
        if bytes < least || bytes > left || COUNTERS_EACH > counters {
            return Err(invalid(format!(
                "{bytes} bytes of the arenas for groups of up to {most} ranks: {least} are the \
                 least, {left} are left, and counters for {} divisions",
                counters / COUNTERS_EACH
            )));
        }
        let part = self.bytes_given..self.bytes_given + bytes;
        let counters = Counters::from(self.counters_given);
        self.bytes_given += bytes;
        self.counters_given += COUNTERS_EACH;
        let Some(group) = member_of[self.link.rank()] else { return Ok(None) };
        let lanes = Lanes::new(self.link.clone(), groups[group].to_vec(), part, counters);
        Ok(Some(Comm::new(lanes, self.limit)))
    }

    /// One group of all ranks.
    pub fn all(&mut self, bytes: usize) -> Result<Comm, GroupError> {
        let ranks: Vec<usize> = (0..self.link.ranks()).collect();
        Ok(self.divide(&[&ranks], bytes)?.expect("all ranks are members"))
    }

    /// The link.
    pub fn link(&self) -> &Arc<dyn Link> {
        &self.link
    }
}

/// A rank's place in one group of a [`World`]. Ranks in its methods are places in the list of
/// members; errors name ranks of the world.
pub struct Comm {
    lanes: Lanes,
    messages: Messages,
    limit: Duration,
    /// Sums are made by this one, whatever their size; all members have to have the same.
    forced: Option<Algorithm>,
    tellings: AtomicU32,
    turn: Mutex<Turn>,
}

/// What changes with every call that all ranks make.
#[derive(Default)]
struct Turn {
    calls: Calls,
    rounds: Rounds,
    /// Numbers of others on their way, for algorithms that pass them on.
    scratch: Vec<f32>,
}

impl Comm {
    fn new(lanes: Lanes, limit: Duration) -> Comm {
        let messages = Messages::new(lanes.count());
        let turn = Mutex::new(Turn::default());
        Comm { lanes, messages, limit, forced: None, tellings: AtomicU32::new(0), turn }
    }

    /// Makes sums by this algorithm instead of the one that suits their size. To be called on
    /// all members.
    pub fn force(&mut self, algorithm: Option<Algorithm>) {
        self.forced = algorithm;
    }

    /// The ranks of the members in the world.
    pub fn members(&self) -> &[usize] {
        &self.lanes.members
    }

    /// The own turn in what all ranks do, unless the epoch is over.
    fn turn(&self) -> Result<MutexGuard<'_, Turn>, GroupError> {
        let turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        match self.lanes.link.aborted() {
            Some(why) => Err(why),
            None => Ok(turn),
        }
    }

    fn watch(&self, mark: Mark) -> Watch<'_> {
        Watch::new(&self.lanes, mark, self.limit, &self.tellings)
    }

    /// Sends a message to one member in pieces.
    fn send_pieces(
        &self,
        watch: &mut Watch<'_>,
        to: usize,
        bytes: &[u8],
    ) -> Result<(), GroupError> {
        for range in pieces(bytes.len(), self.lanes.message_payload) {
            self.messages.send_piece(&self.lanes, watch, to, bytes.len(), &bytes[range])?;
        }
        Ok(())
    }

    /// Receives a message of a known length in pieces.
    fn receive_pieces(
        &self,
        watch: &mut Watch<'_>,
        from: usize,
        bytes: &mut [u8],
    ) -> Result<(), GroupError> {
        for range in pieces(bytes.len(), self.lanes.message_payload) {
            self.messages.receive_into(&self.lanes, watch, from, &mut bytes[range])?;
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

    fn receive_broadcast(
        &self,
        watch: &mut Watch<'_>,
        root: usize,
        message: &mut Vec<u8>,
    ) -> Result<(), GroupError> {
        message.clear();
        // The first piece is what may take as long as there is nothing to do.
        let limit = watch.limit.take();
        loop {
            let whole = self.messages.receive_piece(&self.lanes, watch, root, |whole, piece| {
                let fits = whole <= MESSAGE_BYTES_MAX
                    && message.len() + piece.len() <= whole
                    && (!piece.is_empty() || whole == 0);
                if !fits {
                    let rank = self.lanes.members[root];
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
}

impl Collective for Comm {
    fn rank(&self) -> usize {
        self.lanes.me
    }

    fn ranks(&self) -> usize {
        self.lanes.count()
    }

    fn all_gather(
        &self,
        rows: usize,
        widths: &[usize],
        own: &[u8],
        all: &mut [u8],
    ) -> Result<(), GroupError> {
        self.gather(rows, widths, own, all)
    }

    fn all_reduce(&self, values: &mut [f32]) -> Result<(), GroupError> {
        self.reduce(values)
    }

    fn reduce_scatter(
        &self,
        values: &[f32],
        counts: &[usize],
        own: &mut [f32],
    ) -> Result<(), GroupError> {
        self.reduce_parts(values, counts, own)
    }

    fn all_to_all(
        &self,
        sent: &[usize],
        out: &[u8],
        received: &[usize],
        into: &mut [u8],
    ) -> Result<(), GroupError> {
        self.exchange_parts(sent, out, received, into)
    }

    fn broadcast(&self, root: usize, message: &mut Vec<u8>) -> Result<(), GroupError> {
        let ranks = self.lanes.count();
        if root >= ranks || (root == self.lanes.me && message.len() > MESSAGE_BYTES_MAX) {
            return Err(invalid(format!(
                "a broadcast of {} bytes by rank {root}: there are {ranks} ranks, and messages \
                 have at most {MESSAGE_BYTES_MAX} bytes",
                message.len()
            )));
        }
        let mut turn = self.turn()?;
        let mut watch = self.watch(turn.calls.note(Operation::Broadcast, 0, [root]));
        if root != self.lanes.me {
            return self.receive_broadcast(&mut watch, root, message);
        }
        for range in pieces(message.len(), self.lanes.message_payload) {
            for member in self.lanes.others() {
                let piece = &message[range.clone()];
                self.messages.send_piece(&self.lanes, &mut watch, member, message.len(), piece)?;
            }
        }
        Ok(())
    }

    fn send(&self, to: usize, bytes: &[u8]) -> Result<(), GroupError> {
        self.check_peer(to)?;
        let mut watch = self.watch(Mark::message(bytes.len()));
        self.send_pieces(&mut watch, to, bytes)
    }

    fn receive(&self, from: usize, bytes: &mut [u8]) -> Result<(), GroupError> {
        self.check_peer(from)?;
        let mut watch = self.watch(Mark::message(bytes.len()));
        self.receive_pieces(&mut watch, from, bytes)
    }

    fn barrier(&self) -> Result<(), GroupError> {
        let turn = &mut *self.turn()?;
        let mut watch = self.watch(turn.calls.note(Operation::Barrier, 0, []));
        let round = turn.rounds.post_same(&self.lanes, watch.mark, &[])?;
        for member in self.lanes.others() {
            round.from(&mut watch, member, 0)?;
        }
        Ok(())
    }
}

fn invalid(why: String) -> GroupError {
    GroupError::Invalid(why)
}

/// The pieces of a message: at least one, so that it arrives even when it is empty.
fn pieces(bytes: usize, piece: usize) -> impl Iterator<Item = std::ops::Range<usize>> {
    let count = bytes.div_ceil(piece).max(1);
    (0..count).map(move |index| index * piece..bytes.min((index + 1) * piece))
}
