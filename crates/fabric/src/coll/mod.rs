//! Collectives: what the ranks of a group do together, over any [`Link`].
//!
//! A [`World`] divides the ranks of a link into groups; each member of one gets a [`Comm`], which
//! has its own part of the arenas and its own counters. Sums are added in the order of ranks by
//! every algorithm, so the bits are the same whichever runs, and on every rank. Calls allocate
//! nothing but what a broadcast's message needs.

mod call;
mod deliver;
mod exchange;
mod foreign;
mod gather;
mod lanes;
mod messages;
mod plan;
mod reduce;
mod sum;
mod watch;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use pomona_types::{Collective, GroupError};

pub use self::plan::{GatherPlan, ReducePlan};
pub use pomona_policy::cost::{Algorithm, Choices};

pub(crate) use self::call::{Mark, Operation};
pub(crate) use self::watch::Seen;

use self::call::Calls;
use self::exchange::Rounds;
use self::lanes::{COUNTERS_EACH, Counters, Lanes};
use self::messages::Messages;
use self::watch::{Ledger, Watch};
use crate::link::{COUNTERS, Link};
use crate::wait;
use crate::xfer::{self, Transfer};

/// How long a wait within a call may take, if nothing else is said.
pub const CALL_LIMIT: Duration = Duration::from_secs(30);
/// The longest message that a broadcast takes.
pub const MESSAGE_BYTES_MAX: usize = 1 << 30;

/// A link whose arenas and counters are given to groups, one after the other. All ranks make the
/// same divisions in the same order.
pub struct World {
    link: Arc<dyn Link>,
    limit: Duration,
    choices: Choices,
    bytes_given: usize,
    counters_given: usize,
}

impl World {
    /// Nothing is given yet.
    pub fn new(link: Arc<dyn Link>) -> World {
        let (limit, choices) = (CALL_LIMIT, Choices::default());
        World { link, limit, choices, bytes_given: 0, counters_given: 0 }
    }

    /// Makes sums by these algorithms where the list knows one: all ranks are to have the same.
    pub fn with_choices(mut self, choices: Choices) -> World {
        self.choices = choices;
        self
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
        Ok(Some(Comm::new(lanes, self.limit, self.choices.clone())))
    }

    /// Transfers among all ranks, with so many bytes of everyone's arena for regions and notices.
    /// All ranks make them in the same order as their divisions.
    pub fn transfer(&mut self, bytes: usize) -> Result<Transfer, GroupError> {
        let (start, first) = (self.bytes_given, self.counters_given);
        let bytes = bytes.next_multiple_of(64);
        let left = self.link.arena_bytes() - start;
        if bytes > left || first + xfer::COUNTERS_TAKEN > COUNTERS {
            return Err(invalid(format!("{bytes} bytes for transfers: {left} are left")));
        }
        let part = start..start + bytes;
        let transfer = Transfer::new(self.link.clone(), self.limit, part, first)?;
        self.bytes_given += bytes;
        self.counters_given += xfer::COUNTERS_TAKEN;
        Ok(transfer)
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
    /// Otherwise by the one that was measured to be the quickest, if it was.
    choices: Choices,
    ledger: Ledger,
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
    fn new(lanes: Lanes, limit: Duration, choices: Choices) -> Comm {
        let messages = Messages::new(lanes.count());
        let turn = Mutex::new(Turn::default());
        let (forced, ledger) = (None, Ledger::default());
        Comm { lanes, messages, limit, forced, choices, ledger, turn }
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

    /// What a call returns. A failure ends the epoch, and is then what all ranks have; mistakes
    /// of the caller, of which the others know nothing, do not.
    fn settle(&self, result: Result<(), GroupError>) -> Result<(), GroupError> {
        let why = match result {
            Err(GroupError::Invalid(_)) | Ok(()) => return result,
            Err(why) => why,
        };
        let link = &*self.lanes.link;
        let other = self.lanes.others().next().unwrap_or(self.lanes.me);
        Err(wait::end(link, self.lanes.members[other], why))
    }

    fn watch(&self, mark: Mark) -> Watch<'_> {
        Watch::new(&self.lanes, mark, self.limit, &self.ledger)
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
        self.settle(self.gather(rows, widths, own, all))
    }

    fn all_reduce(&self, values: &mut [f32]) -> Result<(), GroupError> {
        self.settle(self.reduce(values))
    }

    fn reduce_scatter(
        &self,
        values: &[f32],
        counts: &[usize],
        own: &mut [f32],
    ) -> Result<(), GroupError> {
        self.settle(self.reduce_parts(values, counts, own))
    }

    fn all_to_all(
        &self,
        sent: &[usize],
        out: &[u8],
        received: &[usize],
        into: &mut [u8],
    ) -> Result<(), GroupError> {
        self.settle(self.exchange_parts(sent, out, received, into))
    }

    fn broadcast(&self, root: usize, message: &mut Vec<u8>) -> Result<(), GroupError> {
        self.settle(self.spread(root, message))
    }

    fn send(&self, to: usize, bytes: &[u8]) -> Result<(), GroupError> {
        self.settle(self.send_to(to, bytes))
    }

    fn receive(&self, from: usize, bytes: &mut [u8]) -> Result<(), GroupError> {
        self.settle(self.receive_from(from, bytes))
    }

    fn barrier(&self) -> Result<(), GroupError> {
        self.settle(self.meet())
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
