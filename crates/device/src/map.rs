//! Files as memory.

use std::fs::{File, Metadata};
use std::io;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use memmap2::{Mmap, UncheckedAdvice};

use crate::{Bytes, SharedBytes};

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
    fn of(file: &Metadata) -> FileIdentity {
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
    identity: FileIdentity,
}

impl AsRef<[u8]> for MappedFile {
    fn as_ref(&self) -> &[u8] {
        &self.map
    }
}

impl Bytes for MappedFile {
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
    Ok(std::sync::Arc::new(MappedFile { map, identity: FileIdentity::of(&about) }))
}
