//! The seam between a model that is split over ranks and whatever carries bytes between them.

/// What the ranks of a group do together. Every rank of the group makes the same calls in the same
/// order; a call returns when its own part is done, and fails on every rank that is alive when one
/// is not. Results are the same bits on all ranks, whatever algorithm ran. After a failure the
/// group is of no use any more: every further call fails with the same cause.
pub trait Collective: Send + Sync {
    /// This process's or thread's place in the group.
    fn rank(&self) -> usize;

    /// How many take part.
    fn ranks(&self) -> usize;

    /// Joins columns: every rank has `rows` rows of `widths[rank]` bytes in `own`, and gets rows of
    /// `widths.sum()` bytes, those of rank 0 first. One row is the plain gather.
    fn all_gather(
        &self,
        rows: usize,
        widths: &[usize],
        own: &[u8],
        all: &mut [u8],
    ) -> Result<(), GroupError>;

    /// Sums of all ranks' numbers, added in order of ranks, from rank 0 on.
    fn all_reduce(&self, values: &mut [f32]) -> Result<(), GroupError>;

    /// The same, of which rank `r` keeps the part that begins behind `counts[..r].sum()` numbers.
    fn reduce_scatter(
        &self,
        values: &[f32],
        counts: &[usize],
        own: &mut [f32],
    ) -> Result<(), GroupError>;

    /// Rank `r` is sent `sent[r]` bytes of `out`, which has them in order of ranks, and as many
    /// bytes come from it to `into` as it sends: `received[r]`, known to both.
    fn all_to_all(
        &self,
        sent: &[usize],
        out: &[u8],
        received: &[usize],
        into: &mut [u8],
    ) -> Result<(), GroupError>;

    /// Every rank gets the message of `root`, of any length. The one call in which ranks may wait
    /// without end, for as long as the root is alive: it is how they are told what to do next.
    fn broadcast(&self, root: usize, message: &mut Vec<u8>) -> Result<(), GroupError>;

    /// Sends to one rank, which calls [`receive`](Collective::receive) with the same length.
    fn send(&self, to: usize, bytes: &[u8]) -> Result<(), GroupError>;

    /// The other side of [`send`](Collective::send).
    fn receive(&self, from: usize, bytes: &mut [u8]) -> Result<(), GroupError>;

    /// Returns when all ranks have called it.
    fn barrier(&self) -> Result<(), GroupError>;
}

/// Why a group cannot go on. The same rank and cause on all who are left.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GroupError {
    /// A rank is gone or does not answer.
    #[error("rank {rank} was lost in epoch {epoch}: {cause}")]
    PeerLost {
        /// Which.
        rank: usize,
        /// The life of the group that ended with it.
        epoch: u32,
        /// What was seen.
        cause: LostCause,
    },
    /// A rank made another call than the rest: a bug, or another version.
    #[error("rank {rank} called {theirs} where others called {ours}")]
    Mismatch {
        /// Which.
        rank: usize,
        /// Its call.
        theirs: String,
        /// Ours.
        ours: String,
    },
    /// The group was told to end.
    #[error("the group has ended: {0}")]
    Ended(String),
    /// Lengths that do not fit each other, or a rank that is none: the caller's mistake.
    #[error("{0}")]
    Invalid(String),
}

/// What was seen of a rank that was lost.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LostCause {
    /// Its process ended.
    #[error("its process ended")]
    Exited,
    /// It gave no sign of life for so many milliseconds.
    #[error("no sign of life for {0} ms")]
    Silent(u32),
    /// Its connection broke.
    #[error("its connection broke: {0}")]
    Disconnected(String),
    /// It took longer in a call than allowed, and is alive.
    #[error("alive, but it did not come to {call} within {after_ms} ms")]
    Late {
        /// The call that was waited in.
        call: String,
        /// How long.
        after_ms: u32,
    },
    /// It said itself that it cannot go on.
    #[error("it failed: {0}")]
    Failed(String),
}
