//! Files as memory.

use std::fs::{File, Metadata};
use std::io;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use memmap2::{Mmap, UncheckedAdvice};

use crate::ahead::ReadAhead;
use crate::{Bytes, SharedBytes};

/// Smaller files are there sooner than what would read them ahead has its memory.
const READ_AHEAD_LEAST: usize = 256 << 20;

/// What a file system says of a file without reading it. Whoever changes the file changes its
/// times; one that takes its place has another number.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FileIdentity {
    /// Its size.
    pub bytes: u64,
    /// Its inode.
    pub inode: u64,
    /// When its bytes changed, seconds and nanoseconds.
    pub modified: (i64, i64),
    /// When anything about it changed; cannot be set at will.
    pub changed: (i64, i64),
}

impl FileIdentity {
    pub(crate) fn of(file: &Metadata) -> FileIdentity {
        FileIdentity {
            bytes: file.len(),
            inode: file.ino(),
            modified: (file.mtime(), file.mtime_nsec()),
            changed: (file.ctime(), file.ctime_nsec()),
        }
    }
}

struct MappedFile {
    map: Mmap,
    path: PathBuf,
    /// From the first time that somebody wants bytes soon.
    ahead: OnceLock<Option<ReadAhead>>,
    identity: FileIdentity,
}

impl AsRef<[u8]> for MappedFile {
    fn as_ref(&self) -> &[u8] {
        &self.map
    }
}

impl Bytes for MappedFile {
    fn soon(&self, range: Range<usize>) {
        if range.is_empty() || range.end > self.map.len() || self.map.len() < READ_AHEAD_LEAST {
            return;
        }
        // Without it each page is read when it is touched.
        let begin = || ReadAhead::begin(&self.path, self.identity).ok();
        if let Some(ahead) = self.ahead.get_or_init(begin) {
            ahead.wait(range);
        }
    }

    fn read<'a>(&'a self, range: Range<usize>, room: &'a mut Vec<u8>) -> Option<&'a [u8]> {
        let mapped = self.map.get(range.clone())?;
        let ahead = self.ahead.get().and_then(Option::as_ref);
        ahead.and_then(|ahead| ahead.copy(range, room)).or(Some(mapped))
    }

    fn done_with(&self, range: Range<usize>) {
        if range.is_empty() || range.end > self.map.len() {
            return;
        }
        // SAFETY: pages of a read-only mapping of a file come back from the file when they are
        // touched again.
        let released = unsafe {
            self.map.unchecked_advise_range(UncheckedAdvice::DontNeed, range.start, range.len())
        };
        // A hint that was not taken costs memory, nothing else.
        let _ = released;
    }

    fn identity(&self) -> Option<FileIdentity> {
        Some(self.identity)
    }
}

/// Maps a file for reading. Pages come from the page cache when they are touched, and are shared
/// by all processes that map the file.
///
/// A file that another process truncates while it is mapped ends this process with SIGBUS: model
/// files are replaced by renaming, never rewritten in place.
///
/// # Errors
/// What the system says when the file cannot be opened or mapped.
pub fn map_file(path: &Path) -> io::Result<SharedBytes> {
    let file = File::open(path)?;
    let about = file.metadata()?;
    if about.len() == 0 {
        // An empty file cannot be mapped; its parser says what is wrong with it.
        return Ok(std::sync::Arc::new(Vec::new()));
    }
    // SAFETY: the mapping is private and read-only. That nobody truncates the file meanwhile is
    // the documented condition above; there is no way to enforce it.
    let map = unsafe { Mmap::map(&file)? };
    let (path, identity) = (path.to_owned(), FileIdentity::of(&about));
    Ok(std::sync::Arc::new(MappedFile { map, path, ahead: OnceLock::new(), identity }))
}
