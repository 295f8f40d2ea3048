//! Ranks of one machine: one piece of shared memory for an epoch, and futexes.
//!
//! It holds the abort word, a block for each rank (its doorbell, and the cause if it
//! is the one that ends the epoch), counters for each pair and direction, and an arena for each
//! rank. It has no name: whoever has its descriptor has it, and when the last process is gone so
//! is the memory. Ranks may be processes or threads. A new epoch is a new piece, so a rank that
//! wakes up late writes where nobody looks any more.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};
use std::{io, ptr, slice};

use memmap2::{MmapOptions, MmapRaw};
use pomona_types::GroupError;
use rustix::fs::{MemfdFlags, SealFlags};
use rustix::thread::futex;

use super::{COUNTERS, Link};
use crate::cause::{CAUSE_BYTES, decode, encode};

/// Looks before a wait sleeps when each rank has a core: about 100 us.
const SPINS: u32 = 2000;
/// The same when ranks share cores, where spinning delays who is waited for: about 2 us.
const SPINS_CROWDED: u32 = 40;
/// More ranks than one machine runs.
pub const RANKS_MAX: usize = 256;

const MAGIC: u64 = u64::from_le_bytes(*b"pomona\x00\x01");
const PAGE: usize = 4096;
const LINE: usize = 64;
/// Of the control page: the magic, then the sizes, then in a line of its own the abort word.
const ABORT_AT: usize = 2 * LINE;
/// A rank's block: a line for sleeping, then its cause with the length.
const BLOCK_BYTES: usize = 1024;
const CAUSE_AT: usize = LINE;
const PAIR_BYTES: usize = COUNTERS * size_of::<u32>();

const _: () = assert!(CAUSE_AT + 4 + CAUSE_BYTES <= BLOCK_BYTES);

/// What an epoch is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShmOptions {
    /// How many ranks.
    pub ranks: usize,
    /// Which life of the group.
    pub epoch: u32,
    /// Bytes of each arena. Only what is touched takes memory.
    pub arena_bytes: usize,
    /// Looks before a wait sleeps.
    pub spins: u32,
}

impl ShmOptions {
    /// With the spinning that suits so many ranks on the cores that this process may use.
    pub fn new(ranks: usize, arena_bytes: usize) -> ShmOptions {
        let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get());
        let spins = if ranks <= cores { SPINS } else { SPINS_CROWDED };
        ShmOptions { ranks, epoch: 0, arena_bytes, spins }
    }
}

/// The shared memory of one epoch, from which ranks take their links.
pub struct ShmEpoch {
    file: File,
    shared: Arc<Shared>,
}

impl ShmEpoch {
    /// New and empty shared memory.
    pub fn create(options: ShmOptions) -> io::Result<ShmEpoch> {
        let sizes = Sizes::new(options)?;
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = File::from(rustix::fs::memfd_create("pomona-fabric", flags)?);
        file.set_len(sizes.total as u64)?;
        // Sealed, so that no rank can take memory away from under the others.
        rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        let shared = Shared::map(&file, sizes)?;
        shared.set_options();
        Ok(ShmEpoch { file, shared: Arc::new(shared) })
    }

    /// The shared memory behind a descriptor that came from the process that created it.
    pub fn open(file: OwnedFd) -> io::Result<ShmEpoch> {
        let file = File::from(file);
        let length = file.metadata()?.len();
        let no_epoch = || io::Error::other("the descriptor is no epoch of this version of Pomona");
        let seals = rustix::fs::fcntl_get_seals(&file)?;
        if length < PAGE as u64 || !seals.contains(SealFlags::SHRINK) {
            return Err(no_epoch());
        }
        let control = MmapOptions::new().len(PAGE).map_raw(&file)?;
        let options = read_options(control.as_ptr()).ok_or_else(no_epoch)?;
        let sizes = Sizes::new(options)?;
        if sizes.total as u64 != length {
            return Err(no_epoch());
        }
        Ok(ShmEpoch { shared: Arc::new(Shared::map(&file, sizes)?), file })
    }

    /// How many ranks it has room for.
    pub fn ranks(&self) -> usize {
        self.shared.sizes.ranks
    }

    /// The ends of one rank. Each rank is to be taken once, by one process or thread.
    pub fn link(&self, rank: usize) -> Option<ShmLink> {
        (rank < self.ranks()).then(|| ShmLink {
            rank,
            shared: self.shared.clone(),
            start: Instant::now(),
            aborting: Mutex::new(()),
            cause: OnceLock::new(),
        })
    }

    /// The descriptor, to be given to the other ranks.
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Where things are.
#[derive(Clone, Copy)]
struct Sizes {
    ranks: usize,
    options: ShmOptions,
    counters_at: usize,
    arenas_at: usize,
    /// From one arena to the next: whole pages.
    arena_stride: usize,
    total: usize,
}

impl Sizes {
    fn new(options: ShmOptions) -> io::Result<Sizes> {
        let ranks = options.ranks;
        if ranks == 0 || ranks > RANKS_MAX || options.arena_bytes > isize::MAX as usize / 1024 {
            let why = format!("{ranks} ranks with arenas of {} bytes", options.arena_bytes);
            return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
        }
        let counters_at = PAGE + ranks * BLOCK_BYTES;
        let arenas_at = (counters_at + ranks * ranks * PAIR_BYTES).next_multiple_of(PAGE);
        let arena_stride = options.arena_bytes.next_multiple_of(PAGE);
        let total = arenas_at + ranks * arena_stride;
        Ok(Sizes { ranks, options, counters_at, arenas_at, arena_stride, total })
    }
}

/// The mapped memory.
struct Shared {
    sizes: Sizes,
    map: MmapRaw,
}

impl Shared {
    fn map(file: &File, sizes: Sizes) -> io::Result<Shared> {
        Ok(Shared { sizes, map: MmapOptions::new().len(sizes.total).map_raw(file)? })
    }

    fn word(&self, at: usize) -> &AtomicU32 {
        assert!(at.is_multiple_of(4) && at + 4 <= self.sizes.total);
        // SAFETY: in the mapping, which lives as long as self, and aligned, as just asserted; all
        // processes reach these words by atomic operations only.
        unsafe { AtomicU32::from_ptr(self.map.as_mut_ptr().add(at).cast()) }
    }

    fn long(&self, at: usize) -> &AtomicU64 {
        assert!(at.is_multiple_of(8) && at + 8 <= self.sizes.total);
        // SAFETY: as in `word`.
        unsafe { AtomicU64::from_ptr(self.map.as_mut_ptr().add(at).cast()) }
    }

    /// Zero, or one more than the rank whose cause it is.
    fn abort_word(&self) -> &AtomicU32 {
        self.word(ABORT_AT)
    }

    fn doorbell(&self, rank: usize) -> &AtomicU32 {
        self.word(PAGE + rank * BLOCK_BYTES)
    }

    fn sleepers(&self, rank: usize) -> &AtomicU32 {
        self.word(PAGE + rank * BLOCK_BYTES + 4)
    }

    fn counter(&self, to: usize, from: usize, counter: usize) -> &AtomicU32 {
        let ranks = self.sizes.ranks;
        assert!(to < ranks && from < ranks && counter < COUNTERS);
        self.word(self.sizes.counters_at + (to * ranks + from) * PAIR_BYTES + counter * 4)
    }

    /// Where `length` bytes at `at` begin. They are within the mapping, or it panics.
    fn bytes(&self, at: usize, length: usize) -> *mut u8 {
        assert!(at.checked_add(length).is_some_and(|end| end <= self.sizes.total));
        // SAFETY: within the mapping, as just asserted.
        unsafe { self.map.as_mut_ptr().add(at) }
    }

    /// Where bytes of a rank's arena are, if it has them.
    fn in_arena(&self, rank: usize, offset: usize, length: usize) -> Result<usize, GroupError> {
        let bytes = self.sizes.options.arena_bytes;
        let fits = offset.checked_add(length).is_some_and(|end| end <= bytes);
        if rank >= self.sizes.ranks || !fits {
            return Err(GroupError::Invalid(format!(
                "{length} bytes at {offset} of rank {rank}: there are {} arenas of {bytes} bytes",
                self.sizes.ranks
            )));
        }
        Ok(self.sizes.arenas_at + rank * self.sizes.arena_stride + offset)
    }

    fn wake(&self, rank: usize) {
        let doorbell = self.doorbell(rank);
        doorbell.fetch_add(1, Ordering::Release);
        // It fails for addresses that are not mapped only, and this one is.
        let _ = futex::wake(doorbell, futex::Flags::empty(), i32::MAX as u32);
    }

    fn set_options(&self) {
        let ShmOptions { ranks, epoch, arena_bytes, spins } = self.sizes.options;
        self.long(8).store(ranks as u64, Ordering::Relaxed);
        self.long(16).store(u64::from(epoch), Ordering::Relaxed);
        self.long(24).store(arena_bytes as u64, Ordering::Relaxed);
        self.long(32).store(u64::from(spins), Ordering::Relaxed);
        self.long(0).store(MAGIC, Ordering::Release);
    }
}

/// What the creator wrote to the control page, which is mapped at `page`.
fn read_options(page: *const u8) -> Option<ShmOptions> {
    // SAFETY: the caller mapped a page, and longs are aligned in it.
    let long = |index: usize| unsafe { page.cast::<u64>().add(index).read_volatile() };
    (long(0) == MAGIC).then_some(())?;
    Some(ShmOptions {
        ranks: usize::try_from(long(1)).ok()?,
        epoch: u32::try_from(long(2)).ok()?,
        arena_bytes: usize::try_from(long(3)).ok()?,
        spins: u32::try_from(long(4)).ok()?,
    })
}

/// One rank's ends in shared memory.
pub struct ShmLink {
    rank: usize,
    shared: Arc<Shared>,
    start: Instant,
    /// Held while this rank's cause is written.
    aborting: Mutex<()>,
    /// The cause, once it was read.
    cause: OnceLock<GroupError>,
}

impl ShmLink {
    /// Zero, or one more than the rank whose cause counts.
    fn abort_state(&self) -> u32 {
        self.shared.abort_word().load(Ordering::Acquire)
    }

    /// The cause that a rank has left in its block.
    fn cause_of(&self, rank: usize) -> GroupError {
        let at = PAGE + rank * BLOCK_BYTES + CAUSE_AT;
        let length = self.shared.word(at).load(Ordering::Relaxed) as usize;
        let length = length.min(CAUSE_BYTES);
        let bytes = self.shared.bytes(at + 4, length);
        // SAFETY: within the mapping; its rank writes it once, before the abort word that led here.
        let bytes = unsafe { slice::from_raw_parts(bytes, length) };
        decode(bytes).unwrap_or_else(|| {
            GroupError::Ended(format!("rank {rank} ended the epoch and left no readable cause"))
        })
    }
}

impl Link for ShmLink {
    fn rank(&self) -> usize {
        self.rank
    }

    fn ranks(&self) -> usize {
        self.shared.sizes.ranks
    }

    fn epoch(&self) -> u32 {
        self.shared.sizes.options.epoch
    }

    fn arena_bytes(&self) -> usize {
        self.shared.sizes.options.arena_bytes
    }

    fn put(
        &self,
        peer: usize,
        offset: usize,
        parts: &[&[u8]],
        counter: usize,
    ) -> Result<(), GroupError> {
        let shared = &*self.shared;
        let length = parts.iter().map(|part| part.len()).sum();
        let mut at = shared.in_arena(peer, offset, length)?;
        for part in parts {
            // SAFETY: `in_arena` has checked the range, `bytes` does again; a part is memory of
            // this process and never the arena's, which is handed out by pointer only. That nobody
            // reads the place now is what counters are for.
            unsafe {
                ptr::copy_nonoverlapping(part.as_ptr(), shared.bytes(at, part.len()), part.len());
            }
            at += part.len();
        }
        shared.counter(peer, self.rank, counter).fetch_add(1, Ordering::Release);
        // Between the count and the look at sleepers; `park` has its counterpart. One of the two
        // sees what the other did.
        fence(Ordering::SeqCst);
        if shared.sleepers(peer).load(Ordering::Relaxed) > 0 {
            shared.wake(peer);
        }
        Ok(())
    }

    fn count(&self, peer: usize, counter: usize) -> u32 {
        self.shared.counter(self.rank, peer, counter).load(Ordering::Acquire)
    }

    fn park(&self, peer: usize, counter: usize, seen: u32, at_most: Duration) {
        let doorbell = self.shared.doorbell(self.rank);
        let heard = doorbell.load(Ordering::Acquire);
        let sleepers = self.shared.sleepers(self.rank);
        sleepers.fetch_add(1, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        if self.count(peer, counter) == seen && self.abort_state() == 0 {
            let timeout = futex::Timespec {
                tv_sec: at_most.as_secs().min(i64::MAX as u64) as i64,
                tv_nsec: at_most.subsec_nanos().into(),
            };
            // Woken, late, interrupted or rung before: whoever waits looks again in any case.
            let _ = futex::wait(doorbell, futex::Flags::empty(), heard, Some(&timeout));
        }
        sleepers.fetch_sub(1, Ordering::Relaxed);
    }

    fn spins(&self) -> u32 {
        self.shared.sizes.options.spins
    }

    fn now(&self) -> Duration {
        self.start.elapsed()
    }

    fn arena(&self, rank: usize) -> Option<*mut u8> {
        let bytes = self.arena_bytes();
        let at = self.shared.in_arena(rank, 0, bytes).ok()?;
        Some(self.shared.bytes(at, bytes))
    }

    fn aborted(&self) -> Option<GroupError> {
        let rank = (self.abort_state() as usize).checked_sub(1)?;
        // A rank that is none can only come from a rank that has run wild.
        let rank = rank.min(self.ranks() - 1);
        Some(self.cause.get_or_init(|| self.cause_of(rank)).clone())
    }

    fn abort(&self, why: GroupError) {
        let _one_at_a_time = self.aborting.lock().unwrap_or_else(PoisonError::into_inner);
        if self.abort_state() != 0 {
            return;
        }
        // The cause first, so that it is whole when the word names it: a rank that dies between
        // the two has ended nothing.
        let bytes = encode(&why);
        let at = PAGE + self.rank * BLOCK_BYTES + CAUSE_AT;
        // SAFETY: `encode` keeps to `CAUSE_BYTES`, which fit in the block; nobody reads them
        // before the word below says so, and this rank sets it once.
        unsafe {
            let place = self.shared.bytes(at + 4, bytes.len());
            ptr::copy_nonoverlapping(bytes.as_ptr(), place, bytes.len());
        }
        self.shared.word(at).store(bytes.len() as u32, Ordering::Relaxed);
        let mine = self.rank as u32 + 1;
        let word = self.shared.abort_word();
        let _ = word.compare_exchange(0, mine, Ordering::AcqRel, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        for rank in 0..self.ranks() {
            self.shared.wake(rank);
        }
    }
}
