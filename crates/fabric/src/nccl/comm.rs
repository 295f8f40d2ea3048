//! A communicator: how it begins, how its work is waited for, and how it ends.

use std::ptr::null_mut;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pomona_types::{Collective, GroupError};

use super::ending::Ending;
use super::ffi::{Code, Config, Handle, REMOTE_ERROR, SYSTEM_ERROR, UNIQUE_ID_BYTES, UniqueId};
use super::library::{Failure, Nccl};
use super::{NcclError, Work};
use crate::coll::{Comm, Mark, Operation, Seen};
use crate::link::Link;

/// When NCCL misses a peer, the group will soon know why: it has so long to say so, before this
/// rank is the one that failed.
const GRACE: Duration = Duration::from_secs(1);
/// How often it is asked meanwhile.
const GRACE_LOOK: Duration = Duration::from_millis(1);
/// So much longer than a call an ending may take, which waits for others with that limit.
const ENDING_EXTRA: Duration = Duration::from_millis(500);

/// A rank's place in a group of GPUs, for one epoch.
///
/// Calls give work to a stream and return; [`wait`](NcclComm::wait) is for it to be done. Every
/// rank makes the same calls in the same order, waits included, but for messages between two and
/// waits with nothing but such messages before them. The first failure is that of all further
/// calls, on all ranks.
pub struct NcclComm {
    pub(super) nccl: Nccl,
    pub(super) control: Comm,
    /// None when it has failed.
    handle: Option<Handle>,
    ending: Option<Ending>,
    /// What was called since the last wait.
    pub(super) called: Called,
}

/// Calls that nobody has waited for.
#[derive(Clone, Copy)]
pub(super) enum Called {
    Nothing,
    /// Of all ranks; the last.
    Together(Mark),
    /// Messages only; the first, and the peer of it.
    Message(Mark, usize),
}

// SAFETY: NCCL's communicators may be used from any thread, one at a time, which `&mut` sees to.
unsafe impl Send for NcclComm {}

impl NcclComm {
    /// Joins the members of `control`, which is this communicator's alone from now on. The device
    /// is the one whose context is current on this thread. All members call it, and it returns
    /// when all have.
    pub fn begin(nccl: &Nccl, control: Comm) -> Result<NcclComm, GroupError> {
        let (handle, ending, called) = (None, None, Called::Nothing);
        let mut comm = NcclComm { nccl: *nccl, control, handle, ending, called };
        let result = comm.start();
        comm.settle(result).map(|()| comm)
    }

    /// The own place.
    pub fn rank(&self) -> usize {
        self.control.rank()
    }

    /// How many take part.
    pub fn ranks(&self) -> usize {
        self.control.ranks()
    }

    /// The link that carries what the group knows of its ranks.
    pub fn link(&self) -> &Arc<dyn Link> {
        self.control.link()
    }

    fn start(&mut self) -> Result<(), GroupError> {
        let (rank, ranks) = (self.rank(), self.ranks());
        // NCCL waits for those whom it has given an id, so there is none before all are here.
        self.control.barrier()?;
        let mut id = UniqueId { internal: [0; UNIQUE_ID_BYTES] };
        if rank == 0 {
            let made = self.nccl.library.unique_id();
            id = made.map_err(|error| self.control.failed(error.to_string()))?;
        }
        // A gather, because unlike a broadcast it has a deadline.
        let mut widths = vec![0; ranks];
        widths[0] = UNIQUE_ID_BYTES;
        let own = id.internal;
        self.control.all_gather(1, &widths, &own[..widths[rank]], &mut id.internal)?;
        let mark = self.control.note(Operation::Start, 0, [ranks])?;
        let mut handle = null_mut();
        // SAFETY: the result is written before the function returns, the configuration is read
        // before; rank and ranks fit each other.
        let code = unsafe {
            let config = &mut Config::new();
            (self.nccl.library.init_rank)(&mut handle, ranks as i32, id, rank as i32, config)
        };
        self.handle = Handle::new(handle);
        self.check("ncclCommInitRankConfig", code)?;
        let NcclComm { control, nccl, handle, .. } = self;
        let handle = handle.ok_or_else(|| control.failed("NCCL made no communicator".into()))?;
        control.meet_when(mark, || ready(nccl, control, handle))
    }

    /// Waits until work is done, and all ranks have come here after the same calls. Where messages
    /// are all that was called since the last wait, it is this rank's alone.
    pub fn wait(&mut self, work: Work) -> Result<(), GroupError> {
        let handle = self.handle()?;
        let called = std::mem::replace(&mut self.called, Called::Nothing);
        let NcclComm { control, nccl, .. } = self;
        let done = || {
            let called = ready(nccl, control, handle)?;
            let done = nccl.driver.query(work);
            Ok(called && done.map_err(|error| control.failed(error.to_string()))?)
        };
        let result = match called {
            Called::Together(last) => control.meet_when(last, done),
            Called::Message(first, peer) => control.until(first, Seen::Missing(peer), done),
            Called::Nothing => control.until(Mark::work(), Seen::Working, done),
        };
        self.settle(result)
    }

    /// Waits until work is done, and all ranks have called this.
    pub fn barrier(&mut self, work: Work) -> Result<(), GroupError> {
        self.handle()?;
        match self.control.note(Operation::Barrier, 0, []) {
            Ok(mark) => self.called = Called::Together(mark),
            Err(why) => return self.settle(Err(why)),
        }
        self.wait(work)
    }

    /// Ends it when all ranks do, or aborts what is not done by then. An error says that NCCL does
    /// not come back from that: the device is then of no use to this process any more, and memory
    /// that was given to calls must not be freed.
    pub fn close(mut self) -> Result<(), NcclError> {
        self.end()
    }

    /// Lets `call` give work to a stream, and waits until it has, which may need other ranks the
    /// first time. What it says went wrong is this rank's failure.
    pub(super) fn launch(
        &mut self,
        call: Mark,
        peer: Option<usize>,
        what: &str,
        give: impl FnOnce(Handle) -> Code,
    ) -> Result<(), GroupError> {
        let handle = self.handle()?;
        let code = give(handle);
        let result = self.check(what, code).and_then(|()| {
            let NcclComm { control, nccl, .. } = &*self;
            // Work that comes behind it must not overtake it.
            let missing = peer.map_or(Seen::Unknown, Seen::Missing);
            control.until(call, missing, || ready(nccl, control, handle))
        });
        self.settle(result)
    }

    /// The communicator, unless it has failed.
    pub(super) fn handle(&mut self) -> Result<Handle, GroupError> {
        if let Some(why) = self.control.link().aborted() {
            return self.settle(Err(why));
        }
        self.handle.ok_or_else(|| GroupError::Ended("the communicator was not begun".into()))
    }

    fn check(&self, what: &str, code: Code) -> Result<(), GroupError> {
        let judged = self.nccl.library.judge(what, code, self.handle);
        judged.map(drop).map_err(|failure| blame(&self.control, failure))
    }

    /// What a call returns. A failure ends the epoch, and what runs on the device; mistakes of the
    /// caller, of which the others know nothing, do not.
    pub(super) fn settle<T>(&mut self, result: Result<T, GroupError>) -> Result<T, GroupError> {
        let why = match result {
            Ok(_) | Err(GroupError::Invalid(_)) => return result,
            Err(why) => why,
        };
        // All ranks first, for NCCL's own end may wait for theirs.
        let why = self.control.end(why);
        if let Some(handle) = self.handle.take() {
            self.ending = Ending::abort(self.nccl.library, handle);
        }
        Err(why)
    }

    fn end(&mut self) -> Result<(), NcclError> {
        let limit = self.control.limit();
        if let Some(handle) = self.handle.take() {
            let (library, link) = (self.nccl.library, self.control.link().clone());
            self.ending = match link.aborted() {
                None => Ending::finish(library, handle, link, limit),
                Some(_) => Ending::abort(library, handle),
            };
            if self.ending.is_none() {
                return Err(NcclError::Left("no thread to end a communicator".into()));
            }
        }
        self.ending.take().map_or(Ok(()), |ending| ending.wait(limit + ENDING_EXTRA))
    }
}

impl Drop for NcclComm {
    fn drop(&mut self) {
        // Who wants to know closes it.
        let _ = self.end();
    }
}

/// Whether NCCL is done with the last call.
fn ready(nccl: &Nccl, control: &Comm, handle: Handle) -> Result<bool, GroupError> {
    nccl.library.state(handle).map_err(|failure| blame(control, failure))
}

/// Whose failure it is. A peer that NCCL misses is often lost, which the group finds out by itself.
fn blame(control: &Comm, failure: Failure) -> GroupError {
    let start = Instant::now();
    let peers = matches!(failure.code, REMOTE_ERROR | SYSTEM_ERROR);
    while peers && start.elapsed() < GRACE {
        if let Some(why) = control.link().aborted() {
            return why;
        }
        std::thread::sleep(GRACE_LOOK);
    }
    control.failed(failure.text)
}
