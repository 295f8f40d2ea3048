//! A device for tests whose memory the host cannot touch: one arena without access rights, opened
//! only while a copy or an operation of the device runs. Code that reaches around its device dies
//! here by a fault. It takes the seat of a GPU in tests.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::host::{Closes, Pages, copy_in, copy_out};
use crate::{Access, Buffer, Device, DeviceError, DeviceId, HostMemory, View};

/// Buffers start at multiples of this.
const ALIGN: usize = 64;

/// An arena of fixed size. Buffers are never reused: it is for tests.
pub struct ArenaDevice {
    turn: Mutex<()>,
    arena: Arc<Pages>,
    used: AtomicUsize,
}

impl ArenaDevice {
    /// Reserves `bytes` of address space; memory is taken when touched.
    ///
    /// # Errors
    /// When the address space cannot be had.
    pub fn new(bytes: usize) -> Result<ArenaDevice, DeviceError> {
        let arena = Pages::map(bytes.max(ALIGN), libc::PROT_NONE)
            .ok_or(DeviceError::OutOfMemory { device: "arena".to_owned(), bytes })?;
        Ok(ArenaDevice { turn: Mutex::new(()), arena: Arc::new(arena), used: AtomicUsize::new(0) })
    }
}

fn protect(arena: &Pages, protection: i32) {
    // SAFETY: exactly the arena's own range; its rights are changed under the device's lock.
    let result = unsafe { libc::mprotect(arena.base.as_ptr().cast(), arena.bytes, protection) };
    assert_eq!(result, 0, "the arena's access rights cannot be changed");
}

struct Opened<'a>(&'a Pages);

impl Closes for Opened<'_> {}

impl Drop for Opened<'_> {
    fn drop(&mut self) {
        protect(self.0, libc::PROT_NONE);
    }
}

impl HostMemory for ArenaDevice {
    fn enter(&self) -> Access<'_> {
        let turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        protect(&self.arena, libc::PROT_READ | libc::PROT_WRITE);
        Access::new(self.id(), turn, Some(Box::new(Opened(&self.arena))))
    }
}

impl Device for ArenaDevice {
    fn id(&self) -> DeviceId {
        DeviceId(1_000)
    }

    fn name(&self) -> &str {
        "arena"
    }

    fn alloc(&self, bytes: usize) -> Result<Buffer, DeviceError> {
        let full = || DeviceError::OutOfMemory { device: self.name().to_owned(), bytes };
        let room = bytes.checked_next_multiple_of(ALIGN).ok_or_else(full)?;
        let start = self.used.fetch_add(room, Ordering::Relaxed);
        if start.checked_add(room).is_none_or(|end| end > self.arena.bytes) {
            return Err(full());
        }
        // SAFETY: start + bytes lies within the arena.
        let base = unsafe { self.arena.base.add(start) };
        let owner = Box::new(Arc::clone(&self.arena));
        // SAFETY: the range is handed out once and lives as long as the arena; it is reached
        // through Access only, which serialises.
        Ok(unsafe { Buffer::from_raw(self.id(), base, bytes, owner) })
    }

    fn upload(&self, source: &[u8], target: &View) -> Result<(), DeviceError> {
        copy_in(self, source, target)
    }

    fn download(&self, source: &View, target: &mut [u8]) -> Result<(), DeviceError> {
        copy_out(self, source, target)
    }
}
