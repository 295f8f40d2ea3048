//! Ranks that are processes of one machine: a parent and its children.
//!
//! The parent is rank 0 and the coordinator. A child's standard input is its control connection, a
//! socket of which the parent holds the other end: when a process ends, however it does, its end
//! closes. The shared memory of each epoch comes over it too. Each process has one thread that
//! watches the connections.

use std::io;
use std::os::fd::OwnedFd;
use std::process::Command;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use pomona_types::GroupError;

use super::GroupOptions;
use crate::link::Link;
use crate::link::shm::ShmLink;

mod child;
mod parent;
mod socket;

use self::child::ChildWatcher;
use self::parent::ParentWatcher;
use self::socket::{Bell, Socket};

/// What a group of local processes is made of.
#[derive(Clone, Debug)]
pub struct LocalOptions {
    /// Who takes part, and how long things may take.
    pub group: GroupOptions,
    /// Children beyond those that the ranks need.
    pub spares: usize,
    /// Bytes of each rank's arena.
    pub arena_bytes: usize,
}

/// The parent's place in a group of local processes: rank 0. Dropped, it ends the group, and
/// returns when all children have.
pub struct LocalGroup {
    place: Place,
}

/// A child's place in the group of its parent.
pub struct LocalMember {
    place: Place,
}

impl LocalGroup {
    /// Starts a process for each rank but 0, and for each spare. `command` says what to run on a
    /// seat, from 1 on; it has to call [`LocalMember::join`].
    pub fn spawn(
        options: &LocalOptions,
        mut command: impl FnMut(usize) -> Command,
    ) -> io::Result<LocalGroup> {
        let desk = Arc::new(Desk::new()?);
        let mut watcher = ParentWatcher::new(options, desk.clone());
        for seat in 1..options.group.ranks + options.spares {
            watcher.start(seat, command(seat))?;
        }
        let name = "fabric-parent".to_string();
        let thread = std::thread::Builder::new().name(name).spawn(move || watcher.run())?;
        Ok(LocalGroup { place: Place { desk, thread: Some(thread) } })
    }

    /// Leaves the present epoch, if there is one, and waits until the next has begun, in which
    /// those who were lost are no more. Fails when there will be none.
    pub fn next_epoch(&self) -> Result<Arc<dyn Link>, GroupError> {
        self.place.next_epoch()
    }
}

impl LocalMember {
    /// Takes the place that the parent has kept. `identity` has to be the same on all. To be
    /// called once, before anything else reads the standard input, which is empty afterwards.
    pub fn join(identity: &str) -> io::Result<LocalMember> {
        let control = Socket::take_stdin()?;
        let desk = Arc::new(Desk::new()?);
        let watcher = ChildWatcher::new(control, desk.clone(), identity);
        let name = "fabric-child".to_string();
        let thread = std::thread::Builder::new().name(name).spawn(move || watcher.run())?;
        Ok(LocalMember { place: Place { desk, thread: Some(thread) } })
    }

    /// As [`LocalGroup::next_epoch`].
    pub fn next_epoch(&self) -> Result<Arc<dyn Link>, GroupError> {
        self.place.next_epoch()
    }
}

/// A rank, and the thread that watches for it.
struct Place {
    desk: Arc<Desk>,
    thread: Option<JoinHandle<()>>,
}

impl Place {
    fn next_epoch(&self) -> Result<Arc<dyn Link>, GroupError> {
        let mut papers = self.desk.papers();
        papers.link = None;
        papers.returned = true;
        self.desk.bell.ring();
        loop {
            if let Some(why) = &papers.over {
                return Err(why.clone());
            }
            if let Some(link) = &papers.link {
                return Ok(link.clone());
            }
            papers = self.desk.changed.wait(papers).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.desk.papers().stop = true;
        self.desk.bell.ring();
        if let Some(thread) = self.thread.take() {
            // Whatever it panicked of has been printed.
            let _ = thread.join();
        }
    }
}

/// Where a rank and its watcher leave things for each other.
struct Desk {
    papers: Mutex<Papers>,
    changed: Condvar,
    bell: Bell,
}

#[derive(Default)]
struct Papers {
    /// From the watcher: the epoch that has begun.
    link: Option<Arc<ShmLink>>,
    /// From the watcher: there is no other.
    over: Option<GroupError>,
    /// From the rank: it is done with the epoch.
    returned: bool,
    /// From the rank: it leaves.
    stop: bool,
}

impl Desk {
    fn new() -> io::Result<Desk> {
        Ok(Desk { papers: Mutex::default(), changed: Condvar::new(), bell: Bell::new()? })
    }

    fn papers(&self) -> MutexGuard<'_, Papers> {
        self.papers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn begin(&self, link: Arc<ShmLink>) {
        self.papers().link = Some(link);
        self.changed.notify_all();
    }

    fn over(&self, why: GroupError) {
        self.papers().over.get_or_insert(why);
        self.changed.notify_all();
    }

    /// What the rank has left since the last time: whether it has returned, and whether it leaves.
    fn collect(&self) -> (bool, bool) {
        self.bell.silence();
        let mut papers = self.papers();
        (std::mem::take(&mut papers.returned), papers.stop)
    }
}

/// A frame, and the descriptor that came with it.
type Letter = (super::Frame, Option<OwnedFd>);
