//! A rank's arena where other ranks cannot reach it: ordinary memory that the transport writes.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ptr::NonNull;

/// Arenas begin on a page, as registered memory likes it.
const ALIGNMENT: usize = 4096;

/// Zeroed bytes that are read and written through pointers only, by several threads. Who may touch
/// which part when is the business of the counters of a link.
pub(crate) struct Memory {
    start: NonNull<u8>,
    layout: Layout,
}

// SAFETY: the memory is owned, and is only handed out as raw pointers and by copies.
unsafe impl Send for Memory {}
// SAFETY: as above; copies of the same bytes at the same time are excluded by the counters.
unsafe impl Sync for Memory {}

impl Memory {
    /// At least one byte; pages that nobody touches cost nothing.
    pub(crate) fn new(bytes: usize) -> Memory {
        let layout = Layout::from_size_align(bytes.max(1), ALIGNMENT)
            .expect("an arena is smaller than the address space");
        // SAFETY: the layout has at least one byte.
        let start = unsafe { alloc_zeroed(layout) };
        let Some(start) = NonNull::new(start) else { handle_alloc_error(layout) };
        Memory { start, layout }
    }

    pub(crate) fn len(&self) -> usize {
        self.layout.size()
    }

    pub(crate) fn start(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    /// Where `offset` is; `bytes` from there on are inside.
    pub(crate) fn at(&self, offset: usize, bytes: usize) -> *mut u8 {
        let end = offset.checked_add(bytes);
        assert!(end.is_some_and(|end| end <= self.len()), "{offset}+{bytes} is not in the arena");
        // SAFETY: the offset was just found to be inside of the allocation, or at its end.
        unsafe { self.start().add(offset) }
    }

    pub(crate) fn write(&self, offset: usize, bytes: &[u8]) {
        let to = self.at(offset, bytes.len());
        // SAFETY: `at` checked the target; the source is not in the arena, which nobody borrows.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout.
        unsafe { dealloc(self.start(), self.layout) }
    }
}
