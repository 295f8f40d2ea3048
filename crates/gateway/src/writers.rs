//! Threads that write tokens to sockets, so that neither the replica's thread nor a task for each
//! connection has to. Streams that were told something stand in one queue, each once; whoever is
//! free takes the next. Sockets do not block, so a slow client holds nobody up.
//!
//! The threads sleep most of the time and work for microseconds, beside threads that compute on all
//! cores: whoever serves may have them ask for turns that come sooner (`Config::writer_begins`).

use std::collections::VecDeque;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use crate::sse::Stream;

/// A step's tokens for 256 streams take one thread 2 ms, most of it in the system.
const THREADS: usize = 2;

/// The threads. Dropping them ends them.
pub(crate) struct Writers {
    queue: Arc<Queue>,
    threads: Vec<JoinHandle<()>>,
}

/// Streams that have something to write. Bounded by the streams that there are.
#[derive(Default)]
pub(crate) struct Queue {
    waiting: Mutex<Waiting>,
    came: Condvar,
}

#[derive(Default)]
struct Waiting {
    streams: VecDeque<Arc<Stream>>,
    /// Threads that sleep and have not been woken.
    idle: usize,
    closed: bool,
}

impl Writers {
    /// Starts the threads, each of which calls `begins` first.
    ///
    /// # Errors
    /// When the system has no thread left.
    pub(crate) fn start(begins: fn()) -> io::Result<Writers> {
        let mut writers = Writers { queue: Arc::default(), threads: Vec::new() };
        for _ in 0..THREADS {
            let queue = writers.queue.clone();
            let builder = std::thread::Builder::new().name("pomona-writer".to_owned());
            writers.threads.push(builder.spawn(move || {
                begins();
                queue.work();
            })?);
        }
        Ok(writers)
    }

    /// What they take their work from.
    pub(crate) fn queue(&self) -> Arc<Queue> {
        self.queue.clone()
    }
}

impl Drop for Writers {
    fn drop(&mut self) {
        self.queue.waiting().closed = true;
        self.queue.came.notify_all();
        for thread in self.threads.drain(..) {
            // Panics are caught in it.
            let _ = thread.join();
        }
    }
}

impl Queue {
    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        // What is behind it stays whole, whoever panicked.
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a stream that is not in it.
    pub(crate) fn push(&self, stream: Arc<Stream>) {
        let mut waiting = self.waiting();
        waiting.streams.push_back(stream);
        let wake = waiting.idle > 0;
        waiting.idle -= usize::from(wake);
        drop(waiting);
        if wake {
            self.came.notify_one();
        }
    }

    /// A thread's life.
    fn work(&self) {
        while let Some(stream) = self.next() {
            // A panic leaves the stream's lock poisoned, by which its connection sees it and ends.
            if catch_unwind(AssertUnwindSafe(|| stream.write_out())).is_err() {
                stream.wake();
            }
        }
    }

    /// Waits for a stream; `None` at the end.
    fn next(&self) -> Option<Arc<Stream>> {
        let mut waiting = self.waiting();
        loop {
            if waiting.closed {
                return None;
            }
            if let Some(stream) = waiting.streams.pop_front() {
                return Some(stream);
            }
            waiting.idle += 1;
            waiting = self.came.wait(waiting).unwrap_or_else(PoisonError::into_inner);
        }
    }
}
