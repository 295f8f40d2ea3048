//! The worker pool: one pinned thread per core that the process may use, and a join that costs
//! about a microsecond while the workers spin.

use std::any::Any;
use std::cell::UnsafeCell;
use std::hint::spin_loop;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{JoinHandle, Thread, park, yield_now};

use crate::cores::{pin_to, usable_cores};

/// Rounds a worker spins for new work before it parks: some 100 us, longer than the gap between
/// two operations of a step, shorter than anyone minds.
const SPINS: u32 = 4_000;

type Work = dyn Fn(usize) + Sync;

/// Threads that run the parts of an operation. The caller is worker 0.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    handles: Vec<Thread>,
    /// One operation at a time.
    turn: Mutex<()>,
}

struct Shared {
    /// Counts operations; a change is the call to work.
    epoch: AtomicU32,
    /// Workers that have not finished the current operation.
    busy: AtomicU32,
    /// Written before `epoch` changes, read after: valid while `busy > 0`.
    work: UnsafeCell<Option<*const Work>>,
    parked: Vec<AtomicBool>,
    stop: AtomicBool,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    spins: u32,
}

// SAFETY: `work` is written by the caller only while no worker is busy, and read by workers only
// after they have seen the new epoch (release/acquire); the rest is atomic.
unsafe impl Sync for Shared {}
// SAFETY: the pointer in `work` is used only during the run() that set it, whatever the thread.
unsafe impl Send for Shared {}

impl Pool {
    /// A pool of `threads` workers, the calling thread included. Threads are pinned when there is
    /// a core for each.
    pub fn new(threads: usize) -> Pool {
        let threads = threads.max(1);
        let cores = usable_cores();
        let enough = threads <= cores.len();
        let shared = Arc::new(Shared {
            epoch: AtomicU32::new(0),
            busy: AtomicU32::new(0),
            work: UnsafeCell::new(None),
            parked: (1..threads).map(|_| AtomicBool::new(false)).collect(),
            stop: AtomicBool::new(false),
            panic: Mutex::new(None),
            // With more threads than cores, spinning takes the core from those who work.
            spins: if enough { SPINS } else { 0 },
        });
        let workers: Vec<JoinHandle<()>> = (1..threads)
            .map_while(|worker| {
                let shared = Arc::clone(&shared);
                let core = enough.then(|| cores[worker]);
                std::thread::Builder::new()
                    .name(format!("pomona-cpu-{worker}"))
                    .spawn(move || {
                        if let Some(core) = core {
                            pin_to(core);
                        }
                        shared.serve(worker);
                    })
                    .ok()
            })
            .collect();
        let handles = workers.iter().map(|w| w.thread().clone()).collect();
        Pool { shared, workers, handles, turn: Mutex::new(()) }
    }

    /// As many workers as there are cores to use.
    pub fn default_threads() -> usize {
        usable_cores().len().max(1)
    }

    /// Number of workers, the caller included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Runs `work(worker)` once for each worker and returns when all are done (a join). A panic
    /// in any of them is passed on after the others have finished. Not to be called from `work`.
    pub fn run(&self, work: &(dyn Fn(usize) + Sync)) {
        if self.workers.is_empty() {
            return work(0);
        }
        let turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let shared = &*self.shared;
        // SAFETY: only the lifetime is erased. Joining (below, on unwinding too) waits until no
        // worker uses it any more.
        let erased = unsafe { std::mem::transmute::<&(dyn Fn(usize) + Sync), *const Work>(work) };
        shared.busy.store(self.workers.len() as u32, Ordering::Relaxed);
        // SAFETY: no worker is busy, so none reads the cell.
        unsafe { *shared.work.get() = Some(erased) };
        shared.epoch.fetch_add(1, Ordering::SeqCst);
        for (parked, thread) in shared.parked.iter().zip(&self.handles) {
            if parked.load(Ordering::SeqCst) {
                thread.unpark();
            }
        }
        let own = catch_unwind(AssertUnwindSafe(|| work(0)));
        let mut rounds = 0u32;
        while shared.busy.load(Ordering::Acquire) > 0 {
            rounds += 1;
            if rounds > shared.spins { yield_now() } else { spin_loop() }
        }
        let theirs = shared.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        drop(turn);
        if let Some(panic) = own.err().or(theirs) {
            resume_unwind(panic);
        }
    }
}

impl Shared {
    fn serve(&self, worker: usize) {
        let mut seen = 0;
        loop {
            seen = self.next_epoch(worker, seen);
            if self.stop.load(Ordering::Relaxed) {
                return;
            }
            // SAFETY: the epoch changed, so run() has set the pointer and waits for us before it
            // returns; until then the closure is alive.
            let work = unsafe { &*(*self.work.get()).expect("set before the epoch changes") };
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| work(worker))) {
                *self.panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(panic);
            }
            self.busy.fetch_sub(1, Ordering::Release);
        }
    }

    /// Spins, then parks, until the epoch is not `seen` any more.
    fn next_epoch(&self, worker: usize, seen: u32) -> u32 {
        for _ in 0..self.spins {
            let now = self.epoch.load(Ordering::Acquire);
            if now != seen {
                return now;
            }
            spin_loop();
        }
        let parked = &self.parked[worker - 1];
        loop {
            // Announce, then look again: run() changes the epoch, then looks at the announcement.
            parked.store(true, Ordering::SeqCst);
            let now = self.epoch.load(Ordering::SeqCst);
            if now != seen {
                parked.store(false, Ordering::Relaxed);
                return now;
            }
            park();
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        self.shared.epoch.fetch_add(1, Ordering::SeqCst);
        for (worker, thread) in self.workers.drain(..).zip(&self.handles) {
            thread.unpark();
            // A worker catches its panics; there is nothing to learn from its result.
            let _ = worker.join();
        }
    }
}

/// Worker `worker`'s share of `0..count`: contiguous, a multiple of `grain` long but for the last.
pub fn split(count: usize, grain: usize, workers: usize, worker: usize) -> Range<usize> {
    let grains = count.div_ceil(grain);
    let start = grains * worker / workers * grain;
    let end = grains * (worker + 1) / workers * grain;
    start.min(count)..end.min(count)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use super::*;

    #[test]
    fn every_worker_runs_once_per_join() {
        for threads in [1, 2, 5] {
            let pool = Pool::new(threads);
            let counts: Vec<AtomicUsize> = (0..threads).map(|_| AtomicUsize::new(0)).collect();
            for _ in 0..1_000 {
                pool.run(&|worker| {
                    counts[worker].fetch_add(1, Ordering::Relaxed);
                });
            }
            assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1_000));
        }
    }

    #[test]
    fn a_panic_in_a_worker_reaches_the_caller_and_the_pool_goes_on() {
        let pool = Pool::new(3);
        for bad in 0..3 {
            let caught = catch_unwind(AssertUnwindSafe(|| {
                pool.run(&|worker| assert_ne!(worker, bad));
            }));
            assert!(caught.is_err());
        }
        pool.run(&|_| ());
    }

    #[test]
    fn parked_workers_wake_up() {
        let pool = Pool::new(2);
        let hits = AtomicUsize::new(0);
        for _ in 0..3 {
            while !pool.shared.parked[0].load(Ordering::SeqCst) {
                yield_now();
            }
            pool.run(&|_| {
                hits.fetch_add(1, Ordering::Relaxed);
            });
        }
        assert_eq!(hits.load(Ordering::Relaxed), 6);
    }

    #[test]
    fn split_covers_everything_once() {
        for (count, grain, workers) in [(100, 16, 3), (5, 16, 2), (0, 1, 4), (64, 1, 64)] {
            let mut next = 0;
            for worker in 0..workers {
                let range = split(count, grain, workers, worker);
                assert_eq!(range.start, next);
                next = range.end;
            }
            assert_eq!(next, count);
        }
    }
}
