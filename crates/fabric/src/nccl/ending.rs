//! The end of a communicator. NCCL's own functions for it may wait for other ranks, and have hung
//! (NVIDIA/nccl issues 549, 863 and 1013 tell of it), so a thread does them that can be left to
//! itself.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::thread::{JoinHandle, sleep};
use std::time::{Duration, Instant};

use super::NcclError;
use super::ffi::Handle;
use super::library::Library;
use crate::link::Link;

/// How often it looks whether other ranks are done too.
const LOOK_EVERY: Duration = Duration::from_micros(200);

/// A communicator on its way out.
pub(super) struct Ending {
    thread: JoinHandle<()>,
    done: Receiver<()>,
}

/// A communicator that nobody else has.
struct Last {
    library: Library,
    handle: Handle,
}

// SAFETY: NCCL's communicators may be used from any thread, one at a time, and this is the last.
unsafe impl Send for Last {}

impl Last {
    fn abort(self) {
        // SAFETY: it is open, and not used afterwards.
        unsafe { (self.library.abort)(self.handle.as_ptr()) };
    }

    /// Lets all ranks come to an end with what they do, for as long as that may take; then, or
    /// when something is wrong, it is an abort.
    fn finish(self, link: &dyn Link, limit: Duration) {
        let start = Instant::now();
        // SAFETY: it is open, and used by nobody else.
        let code = unsafe { (self.library.finalize)(self.handle.as_ptr()) };
        let mut done = self.library.judge("ncclCommFinalize", code, Some(self.handle));
        while matches!(done, Ok(false)) && start.elapsed() < limit && link.aborted().is_none() {
            sleep(LOOK_EVERY);
            done = self.library.state(self.handle);
        }
        match done {
            // SAFETY: as above, and not used afterwards.
            Ok(true) => drop(unsafe { (self.library.destroy)(self.handle.as_ptr()) }),
            _ => self.abort(),
        }
    }
}

impl Ending {
    /// What runs on the device is aborted.
    pub fn abort(library: Library, handle: Handle) -> Option<Ending> {
        let last = Last { library, handle };
        Ending::run(move || last.abort())
    }

    /// What runs on the devices comes to its end on all ranks, within the limit.
    pub fn finish(
        library: Library,
        handle: Handle,
        link: Arc<dyn Link>,
        limit: Duration,
    ) -> Option<Ending> {
        let last = Last { library, handle };
        Ending::run(move || last.finish(&*link, limit))
    }

    /// None where there can be no more threads; the communicator is left then.
    fn run(work: impl FnOnce() + Send + 'static) -> Option<Ending> {
        let (tell, done) = channel();
        let thread = std::thread::Builder::new().name("fabric-nccl".into()).spawn(move || {
            work();
            // Whoever would hear it may have gone.
            let _ = tell.send(());
        });
        thread.ok().map(|thread| Ending { thread, done })
    }

    /// Returns when it is over, or after a while all the same.
    pub fn wait(self, limit: Duration) -> Result<(), NcclError> {
        if self.done.recv_timeout(limit).is_err() {
            let why = format!("NCCL did not end a communicator within {} ms", limit.as_millis());
            return Err(NcclError::Left(why));
        }
        // It has told that it is done; whatever it panicked of has been printed.
        let _ = self.thread.join();
        Ok(())
    }
}
