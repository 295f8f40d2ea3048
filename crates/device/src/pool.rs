//! The worker pool: one pinned thread per core that the process may use.

/// Threads that run the parts of an operation. The caller is worker 0.
pub struct Pool {
    threads: usize,
}

impl Pool {
    /// A pool of `threads` workers, the calling thread included.
    pub fn new(threads: usize) -> Pool {
        Pool { threads: threads.max(1) }
    }

    /// Number of workers, the caller included.
    pub fn threads(&self) -> usize {
        self.threads
    }

    /// Runs `work(worker)` once for each worker and returns when all are done (a join).
    pub fn run(&self, work: &(dyn Fn(usize) + Sync)) {
        (0..self.threads).for_each(work);
    }
}
