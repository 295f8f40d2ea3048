//! Files as memory.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::Path;

use memmap2::{Mmap, UncheckedAdvice};

use crate::{Bytes, SharedBytes};

struct MappedFile(Mmap);

impl AsRef<[u8]> for MappedFile {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl Bytes for MappedFile {
    fn done_with(&self, range: Range<usize>) {
        if range.is_empty() || range.end > self.0.len() {
            return;
        }
        // SAFETY: pages of a read-only mapping of a file come back from the file when they are
        // touched again.
        let released = unsafe {
            self.0.unchecked_advise_range(UncheckedAdvice::DontNeed, range.start, range.len())
        };
        // A hint that was not taken costs memory, nothing else.
        let _ = released;
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
    if file.metadata()?.len() == 0 {
        // An empty file cannot be mapped; its parser says what is wrong with it.
        return Ok(std::sync::Arc::new(Vec::new()));
    }
    // SAFETY: the mapping is private and read-only. That nobody truncates the file meanwhile is
    // the documented condition above; there is no way to enforce it.
    let map = unsafe { Mmap::map(&file)? };
    Ok(std::sync::Arc::new(MappedFile(map)))
}
