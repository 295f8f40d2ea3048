//! A piece of a device's memory with an owner.

use std::any::Any;
use std::fmt;
use std::ptr::NonNull;
use std::sync::Arc;

use crate::Piece;

/// Which device a buffer belongs to. 0 is the host CPU.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct DeviceId(pub u32);

/// Shared ownership of device memory. Cloning shares it; the last clone frees it.
#[derive(Clone)]
pub struct Buffer {
    inner: Arc<Inner>,
}

struct Inner {
    device: DeviceId,
    base: NonNull<u8>,
    bytes: usize,
    writable: bool,
    // Keeps the memory alive: an allocation, a mapped file, a piece of an arena.
    _owner: Box<dyn Any + Send + Sync>,
}

// SAFETY: a Buffer is only an address and an owner that is itself Send + Sync; the bytes are
// reached by device implementations alone, which serialise access behind their own lock.
unsafe impl Send for Inner {}
// SAFETY: as above; no method of Inner reads or writes the bytes.
unsafe impl Sync for Inner {}

impl Buffer {
    /// Wraps memory. For device implementations.
    ///
    /// # Safety
    /// `base..base + bytes` must stay valid (as this device understands addresses) until `owner`
    /// is dropped, be writable, and be reached only through the device `device`,
    /// which must serialise conflicting accesses.
    pub unsafe fn from_raw(
        device: DeviceId,
        base: NonNull<u8>,
        bytes: usize,
        owner: Box<dyn Any + Send + Sync>,
    ) -> Buffer {
        Buffer { inner: Arc::new(Inner { device, base, bytes, writable: true, _owner: owner }) }
    }

    /// Wraps a mapped piece of a file, which can be read only.
    pub(crate) fn read_only(device: DeviceId, piece: Piece) -> Buffer {
        let (base, bytes) = (NonNull::from(piece.as_ref()).cast(), piece.as_ref().len());
        let owner = Box::new(piece);
        Buffer { inner: Arc::new(Inner { device, base, bytes, writable: false, _owner: owner }) }
    }

    /// Whether its bytes may be written.
    pub(crate) fn writable(&self) -> bool {
        self.inner.writable
    }

    /// The device that owns the memory.
    pub fn device(&self) -> DeviceId {
        self.inner.device
    }

    /// Its size.
    pub fn bytes(&self) -> usize {
        self.inner.bytes
    }

    /// The first byte, as the device addresses it. Dereferencing it is the device's business.
    pub fn base(&self) -> NonNull<u8> {
        self.inner.base
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buffer({:?}, {} bytes)", self.device(), self.bytes())
    }
}
