//! Files as memory.

use std::fs::File;
use std::io;
use std::path::Path;

use memmap2::Mmap;

use crate::SharedBytes;

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
    Ok(std::sync::Arc::new(map))
}
