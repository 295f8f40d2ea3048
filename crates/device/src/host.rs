//! The host's memory as a device, and how operations that run on the host reach memory.

use std::ptr::NonNull;
use std::slice;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::{Buffer, DType, Device, DeviceError, DeviceId, Piece, View};

/// A device whose memory the host's instructions can reach, while it is entered.
pub trait HostMemory: Device {
    /// Waits for the device and opens its memory for one operation.
    fn enter(&self) -> Access<'_>;

    /// Memory with a piece's bytes, to be read only: the piece itself where the device can use it
    /// where it lies, else a copy.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`] when there is no room for a copy.
    fn adopt(&self, piece: Piece) -> Result<Buffer, DeviceError> {
        let bytes = piece.as_ref();
        let view = self.alloc_view(DType::U8, &[bytes.len()])?;
        self.upload(bytes, &view)?;
        Ok(view.buffer().clone())
    }
}

/// The right to touch a device's memory, held by one operation at a time.
pub struct Access<'a> {
    device: DeviceId,
    // Fields drop in order: memory closes before the next operation may enter.
    _closing: Option<Closing<'a>>,
    _turn: MutexGuard<'a, ()>,
}

type Closing<'a> = Box<dyn Closes + 'a>;

/// Something that closes a device's memory when it is dropped.
pub(crate) trait Closes {}

/// A type that a view's elements can be read as: any bits are a value.
pub trait Element: Copy + private::Sealed {
    /// The view's element type.
    fn fits(dtype: DType) -> bool;
}

mod private {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for u32 {}
    impl Sealed for u16 {}
    impl Sealed for u8 {}
}

impl Element for f32 {
    fn fits(dtype: DType) -> bool {
        dtype == DType::F32
    }
}
impl Element for u32 {
    fn fits(dtype: DType) -> bool {
        dtype == DType::U32
    }
}
impl Element for u16 {
    fn fits(dtype: DType) -> bool {
        matches!(dtype, DType::F16 | DType::BF16)
    }
}
impl Element for u8 {
    fn fits(_: DType) -> bool {
        true
    }
}

impl<'a> Access<'a> {
    pub(crate) fn new(
        device: DeviceId,
        turn: MutexGuard<'a, ()>,
        closing: Option<Closing<'a>>,
    ) -> Access<'a> {
        Access { device, _closing: closing, _turn: turn }
    }

    fn check<T: Element>(&self, view: &View) -> Result<(*mut u8, usize), DeviceError> {
        if view.device() != self.device {
            let (expected, found) = (self.device, view.device());
            return Err(DeviceError::WrongDevice { operation: "access", expected, found });
        }
        if !T::fits(view.dtype()) {
            let (dtype, shape) = (view.dtype(), view.shape());
            return Err(DeviceError::Mismatch(format!(
                "a view of {dtype:?} {shape:?} was accessed as another type"
            )));
        }
        let at = view.buffer().base().as_ptr().wrapping_add(view.offset());
        Ok((at, view.bytes() / size_of::<T>()))
    }

    /// A view's elements.
    ///
    /// # Errors
    /// When the view is another device's or of another type.
    ///
    /// # Safety
    /// No slice from [`Access::write`] on this access that overlaps `view` is alive.
    pub unsafe fn read<T: Element>(&self, view: &View) -> Result<&[T], DeviceError> {
        let (at, len) = self.check::<T>(view)?;
        // SAFETY: the view lies within a live buffer of this device, which is open while self
        // lives; View::new checked bounds and alignment; all bits are a T; no one else is in, and
        // the caller has no overlapping mutable slice.
        Ok(unsafe { slice::from_raw_parts(at.cast(), len) })
    }

    /// A view's elements, to be written.
    ///
    /// # Errors
    /// When the view is another device's, of another type, or can be read only.
    ///
    /// # Safety
    /// No other slice of this access that overlaps `view` is alive.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn write<T: Element>(&self, view: &View) -> Result<&mut [T], DeviceError> {
        let (at, len) = self.check::<T>(view)?;
        if !view.buffer().writable() {
            return Err(DeviceError::Mismatch("a mapped file was to be written".to_owned()));
        }
        // SAFETY: as in read(); the caller has no overlapping slice.
        Ok(unsafe { slice::from_raw_parts_mut(at.cast(), len) })
    }
}

/// The host's own memory.
#[derive(Default)]
pub struct HostDevice {
    turn: Mutex<()>,
}

impl HostDevice {
    /// The host. Buffers of all instances have device 0 in common, so there should be one.
    pub fn new() -> HostDevice {
        HostDevice::default()
    }
}

impl HostMemory for HostDevice {
    fn enter(&self) -> Access<'_> {
        let turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        Access::new(self.id(), turn, None)
    }

    fn adopt(&self, piece: Piece) -> Result<Buffer, DeviceError> {
        Ok(Buffer::read_only(self.id(), piece))
    }
}

impl Device for HostDevice {
    fn id(&self) -> DeviceId {
        DeviceId(0)
    }

    fn name(&self) -> &str {
        "cpu"
    }

    fn alloc(&self, bytes: usize) -> Result<Buffer, DeviceError> {
        let pages = Pages::map(bytes.max(1), libc::PROT_READ | libc::PROT_WRITE)
            .ok_or(DeviceError::OutOfMemory { device: self.name().to_owned(), bytes })?;
        let base = pages.base;
        // SAFETY: the pages live as long as their owner, are writable, and are handed out here
        // only; Access serialises all use.
        Ok(unsafe { Buffer::from_raw(self.id(), base, bytes, Box::new(pages)) })
    }

    fn upload(&self, source: &[u8], target: &View) -> Result<(), DeviceError> {
        copy_in(self, source, target)
    }

    fn download(&self, source: &View, target: &mut [u8]) -> Result<(), DeviceError> {
        copy_out(self, source, target)
    }
}

pub(crate) fn copy_in(
    device: &dyn HostMemory,
    source: &[u8],
    target: &View,
) -> Result<(), DeviceError> {
    same_len(source.len(), target.bytes())?;
    let access = device.enter();
    // SAFETY: the only slice of this access.
    unsafe { access.write::<u8>(target)? }.copy_from_slice(source);
    Ok(())
}

pub(crate) fn copy_out(
    device: &dyn HostMemory,
    source: &View,
    target: &mut [u8],
) -> Result<(), DeviceError> {
    same_len(target.len(), source.bytes())?;
    let access = device.enter();
    // SAFETY: the only slice of this access.
    target.copy_from_slice(unsafe { access.read::<u8>(source)? });
    Ok(())
}

fn same_len(host: usize, view: usize) -> Result<(), DeviceError> {
    if host == view {
        return Ok(());
    }
    Err(DeviceError::Mismatch(format!("{host} host bytes were copied to or from {view}")))
}

/// Anonymous pages: zeroed, and resident only once touched.
pub(crate) struct Pages {
    pub(crate) base: NonNull<u8>,
    pub(crate) bytes: usize,
}

// SAFETY: Pages is an address range that it owns; it has no thread affinity.
unsafe impl Send for Pages {}
// SAFETY: no method touches the bytes.
unsafe impl Sync for Pages {}

impl Pages {
    pub(crate) fn map(bytes: usize, protection: i32) -> Option<Pages> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a fresh anonymous mapping; no existing memory is affected.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), bytes, protection, flags, -1, 0) };
        if at == libc::MAP_FAILED {
            return None;
        }
        NonNull::new(at.cast()).map(|base| Pages { base, bytes })
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: exactly the range that map() made; whoever drops the owner has no use of it.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.bytes) };
    }
}
