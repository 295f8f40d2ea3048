//! A file's bytes, read ahead of those who take them in order: the disk works while they compute.
//! Bytes come past the system's cache, which would keep a second copy of what is read once; what
//! the cache has already is left to the mapping to show.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use memmap2::{Mmap, MmapMut};

use crate::FileIdentity;

/// Bytes that are read at once, from multiples of themselves: enough to keep a disk busy.
const CHUNK: usize = 4 << 20;
/// The smallest page there is.
const PAGE: usize = 4096;
/// Most chunks that are read beyond those that were asked for. Two for each time that the file was
/// read on, so that who jumps about does not have read what nobody wants.
const AHEAD: usize = 6;
/// How long a thread waits for more to do before it ends.
const PATIENCE: Duration = Duration::from_secs(10);

/// Who reads a file ahead. Gone with it is the thread that does.
pub(crate) struct ReadAhead(Arc<Shared>);

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

/// A chunk that was read; none if it was in the system's cache.
type Chunk = Option<Arc<MmapMut>>;

#[derive(Default)]
struct State {
    /// The chunks that were asked for last.
    wanted: Range<usize>,
    /// How many times in a row these were the same, or those behind them.
    streak: usize,
    /// Number of the first chunk that is there, and those from it on.
    first: usize,
    there: VecDeque<Chunk>,
    /// Room for more: memory that was used already costs nothing to have.
    spare: Vec<MmapMut>,
    /// Nothing more will be read.
    over: bool,
}

impl State {
    fn end(&self) -> usize {
        self.first + self.there.len()
    }

    fn has(&self, chunks: &Range<usize>) -> bool {
        self.first <= chunks.start && chunks.end <= self.end()
    }

    /// Takes note of chunks that somebody wants.
    fn want(&mut self, chunks: Range<usize>) {
        let goes_on = (self.wanted.start..=self.wanted.end).contains(&chunks.start);
        self.streak = if goes_on { self.streak + 1 } else { 0 };
        self.wanted = chunks;
    }

    /// The chunk to read next, of a file of so many, once there is room for it. Those before the
    /// wanted ones make room.
    fn next(&mut self, chunks: usize) -> Option<usize> {
        if self.streak == 0 {
            return None;
        }
        let goes_on = (self.first..=self.end()).contains(&self.wanted.start);
        let done = if goes_on { self.wanted.start - self.first } else { self.there.len() };
        // Whoever still copies from one keeps it.
        let room = self.there.drain(..done).flatten().filter_map(Arc::into_inner);
        self.spare.extend(room);
        self.first = self.wanted.start;
        let next = self.end();
        let ahead = (2 * self.streak).min(AHEAD);
        (next < chunks && next < self.wanted.end + ahead).then_some(next)
    }
}

/// Where a thread reads from.
struct Source {
    /// Past the system's cache.
    direct: File,
    /// Through it, to see what it has.
    map: Mmap,
    /// The system's, as `mincore` counts them.
    page: usize,
}

impl Source {
    fn bytes_of(&self, chunk: usize) -> Range<usize> {
        let start = chunk * CHUNK;
        start..self.map.len().min(start + CHUNK)
    }

    fn read(&self, chunk: usize, room: Option<MmapMut>) -> io::Result<Chunk> {
        let Range { start, end } = self.bytes_of(chunk);
        let mut room = room.map_or_else(|| MmapMut::map_anon(CHUNK), Ok)?;
        let mut at = 0;
        while start + at < end {
            match self.direct.read_at(&mut room[at..], (start + at) as u64) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => at += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(Some(Arc::new(room)))
    }

    /// Whether the system's cache has all of these bytes, which begin on a page. It may also say so
    /// of a file that belongs to somebody else.
    fn is_cached(&self, bytes: Range<usize>) -> bool {
        let Some(bytes) = self.map.get(bytes) else { return false };
        let mut pages = [0u8; CHUNK / PAGE];
        // SAFETY: the bytes are mapped, and there is room for a byte for each of their pages.
        let seen = unsafe {
            libc::mincore(bytes.as_ptr().cast_mut().cast(), bytes.len(), pages.as_mut_ptr())
        };
        seen == 0 && pages[..bytes.len().div_ceil(self.page)].iter().all(|page| page & 1 != 0)
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a change; false if there was none for so long.
    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> (MutexGuard<'a, State>, bool) {
        let waited = self.changed.wait_timeout(state, PATIENCE);
        let (state, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
        (state, !timeout.timed_out())
    }

    /// Reads what is wanted until there is nothing more to do.
    fn run(&self, source: &Source) {
        let mut state = self.state();
        while !state.over {
            let Some(next) = state.next(source.map.len().div_ceil(CHUNK)) else {
                let changed;
                (state, changed) = self.wait(state);
                state.over |= !changed;
                continue;
            };
            let room = state.spare.pop();
            drop(state);
            let (read, room) = match source.is_cached(source.bytes_of(next)) {
                true => (Ok(None), room),
                false => (source.read(next, room), None),
            };
            state = self.state();
            state.spare.extend(room);
            match read {
                Ok(chunk) if state.end() == next => state.there.push_back(chunk),
                Ok(_) => {}
                // A file system that cannot, or a disk that fails, which the mapping will show.
                Err(_) => state.over = true,
            }
            self.changed.notify_all();
        }
        state.there.clear();
        state.spare.clear();
        self.changed.notify_all();
    }
}

impl ReadAhead {
    /// Begins a thread that reads the file at `path`, if it is the one that was mapped.
    pub(crate) fn begin(path: &Path, mapped: FileIdentity) -> io::Result<ReadAhead> {
        let cached = File::open(path)?;
        let direct = File::options().read(true).custom_flags(libc::O_DIRECT).open(path)?;
        for file in [&cached, &direct] {
            if FileIdentity::of(&file.metadata()?) != mapped {
                return Err(io::ErrorKind::NotFound.into());
            }
        }
        // SAFETY: read-only, and only looked at from outside.
        let map = unsafe { Mmap::map(&cached)? };
        // SAFETY: asks for a number.
        let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
        let page = usize::try_from(page).unwrap_or(PAGE).max(PAGE);
        let source = Source { direct, map, page };
        let shared = Arc::new(Shared { state: Mutex::default(), changed: Condvar::new() });
        let own = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name("pomona-ahead".into());
        thread.spawn(move || own.run(&source))?;
        Ok(ReadAhead(shared))
    }

    /// Waits until a range is there that begins where the one before lay, or right behind it; what
    /// follows comes next. Others are left to the mapping. Returns where nothing is read ahead any
    /// more, or not for long. One caller at a time: the next one's range takes the place.
    pub(crate) fn wait(&self, range: Range<usize>) {
        let wanted = chunks_of(&range);
        let (mut state, mut changed) = (self.0.state(), true);
        state.want(wanted.clone());
        self.0.changed.notify_all();
        while changed && state.streak > 0 && !state.over && !state.has(&wanted) {
            (state, changed) = self.0.wait(state);
        }
    }

    /// Copies a range to `room`, if all of it was read and is still there.
    pub(crate) fn copy<'a>(&self, range: Range<usize>, room: &'a mut Vec<u8>) -> Option<&'a [u8]> {
        let wanted = chunks_of(&range);
        let state = self.0.state();
        if !state.has(&wanted) {
            return None;
        }
        let there = state.there.range(wanted.start - state.first..wanted.end - state.first);
        let chunks: Vec<_> = there.cloned().collect::<Option<_>>()?;
        drop(state);
        room.clear();
        for (chunk, number) in chunks.iter().zip(wanted) {
            let start = number * CHUNK;
            let part = range.start.max(start) - start..range.end.min(start + CHUNK) - start;
            room.extend_from_slice(&chunk[part]);
        }
        Some(room)
    }
}

impl Drop for ReadAhead {
    fn drop(&mut self) {
        self.0.state().over = true;
        self.0.changed.notify_all();
    }
}

/// The chunks that have bytes of a range.
fn chunks_of(range: &Range<usize>) -> Range<usize> {
    range.start / CHUNK..range.end.div_ceil(CHUNK)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// On the disk that the tests were built on: a temporary folder may be in memory.
    fn folder() -> tempfile::TempDir {
        let here = std::env::current_exe().unwrap();
        tempfile::tempdir_in(here.parent().unwrap()).unwrap()
    }

    fn content(bytes: usize) -> Vec<u8> {
        (0..bytes).map(|i| (i / 7 + i / CHUNK) as u8).collect()
    }

    /// A file on a disk, its content no longer in memory where that can be had.
    fn file(folder: &Path, bytes: usize) -> (std::path::PathBuf, FileIdentity) {
        let path = folder.join("file");
        std::fs::write(&path, content(bytes)).unwrap();
        let file = File::open(&path).unwrap();
        file.sync_all().unwrap();
        // SAFETY: the file is open.
        unsafe {
            libc::posix_fadvise(
                std::os::fd::AsRawFd::as_raw_fd(&file),
                0,
                0,
                libc::POSIX_FADV_DONTNEED,
            )
        };
        (path, FileIdentity::of(&file.metadata().unwrap()))
    }

    #[test]
    fn what_is_asked_for_is_there_then_and_more_comes_next() {
        let folder = folder();
        let bytes = 9 * CHUNK + 5;
        let (path, identity) = file(folder.path(), bytes);
        let (ahead, content) = (ReadAhead::begin(&path, identity).unwrap(), content(bytes));
        let mut room = Vec::new();
        for (range, jumps) in [
            (0..10, false),
            (CHUNK - 1..CHUNK + 1, false),
            (8 * CHUNK..bytes, true),
            (5..3 * CHUNK, true),
            (2..bytes, false),
        ] {
            ahead.wait(range.clone());
            assert!(!jumps || ahead.copy(range.clone(), &mut room).is_none(), "{range:?}");
            ahead.wait(range.clone());
            let copied = ahead.copy(range.clone(), &mut room);
            assert!(copied == Some(&content[range.clone()]), "{range:?}");
        }
        (0..3).for_each(|_| ahead.wait(0..1));
        let mut state = ahead.0.state();
        while state.end() < 1 + AHEAD {
            let changed;
            (state, changed) = ahead.0.wait(state);
            assert!(changed, "{}", state.end());
        }
        drop(state);
        // What lies before it gives way.
        (0..2).for_each(|_| ahead.wait(8 * CHUNK..bytes));
        while ahead.copy(0..1, &mut room).is_some() {
            std::thread::yield_now();
        }
    }

    #[test]
    fn another_file_of_that_name_is_not_read() {
        let folder = folder();
        let (path, identity) = file(folder.path(), 10);
        std::fs::remove_file(&path).unwrap();
        assert!(ReadAhead::begin(&path, identity).is_err());
        file(folder.path(), 11);
        assert!(ReadAhead::begin(&path, identity).is_err());
    }

    #[test]
    fn chunks_make_room_for_those_behind_them() {
        let chunk = || Some(Arc::new(MmapMut::map_anon(CHUNK).unwrap()));
        let mut state = State { wanted: 2..4, streak: 3, ..State::default() };
        for number in 2..4 + AHEAD {
            assert_eq!(state.next(100), Some(number));
            state.there.push_back(chunk());
        }
        assert_eq!(state.next(100), None);
        // Room of what is done with is used again, unless somebody still copies from it.
        let copied = state.there[0].clone();
        state.wanted = 4..5;
        assert_eq!((state.next(100), state.spare.len()), (Some(4 + AHEAD), 1));
        drop(copied);
        // Elsewhere, nothing of what is there serves; the file's end is the end.
        state.wanted = 98..100;
        assert_eq!((state.next(100), state.spare.len()), (Some(98), 1 + AHEAD));
        state.there.extend([chunk(), None]);
        assert_eq!(state.next(100), None);
        assert!(state.has(&(99..100)) && !state.has(&(97..99)));
        state.wanted = 0..1;
        assert_eq!(state.next(100), Some(0));
    }

    #[test]
    fn who_jumps_about_has_little_read() {
        let mut state = State::default();
        let read = |state: &mut State, wanted| {
            state.want(wanted);
            let mut count = 0;
            while state.next(1000).is_some() {
                state.there.push_back(None);
                count += 1;
            }
            count
        };
        // The chunks themselves and two more, then two more each time.
        let reads = [0..2, 2..4, 4..6, 6..8].map(|wanted| read(&mut state, wanted));
        assert_eq!(reads, [4, 4, 4, 2]);
        // As experts of three stacked tensors are taken in turns.
        for expert in 0..50 {
            for tensor in [100, 300, 500] {
                assert_eq!(read(&mut state, tensor + expert..tensor + expert + 1), 0);
            }
        }
        assert_eq!(read(&mut state, 549..551), 4);
    }

    #[test]
    fn who_waits_goes_on_when_it_is_over() {
        let folder = folder();
        let (path, identity) = file(folder.path(), 10);
        let ahead = ReadAhead::begin(&path, identity).unwrap();
        // Beyond the file's end: nothing ever comes.
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| ahead.wait(0..2 * CHUNK));
            while ahead.0.state().wanted.is_empty() {
                std::thread::yield_now();
            }
            ahead.0.state().over = true;
            ahead.0.changed.notify_all();
            waiting.join().unwrap();
        });
    }
}
