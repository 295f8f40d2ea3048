//! What a call is about: memory of a device, and the stream it is done on. Both are the backend's.

use std::ffi::{c_int, c_void};
use std::ops::Range;

/// Bytes on the communicator's device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceBytes {
    address: u64,
    bytes: usize,
}

impl DeviceBytes {
    /// Those from an address on.
    ///
    /// # Safety
    ///
    /// They are memory that the device may read and write, and nobody frees them, or uses them in
    /// a way that the order of work on the stream does not allow, until the work of the calls that
    /// they were given to is done, or the communicator was closed without an error.
    pub unsafe fn new(address: u64, bytes: usize) -> DeviceBytes {
        DeviceBytes { address, bytes }
    }

    /// Where they begin.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// How many they are.
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// Some of them.
    ///
    /// # Panics
    /// Where the range is not inside.
    pub fn part(&self, range: Range<usize>) -> DeviceBytes {
        assert!(range.start <= range.end && range.end <= self.bytes, "a part that is not inside");
        DeviceBytes { address: self.address + range.start as u64, bytes: range.len() }
    }
}

/// A stream: a `CUstream`.
#[derive(Clone, Copy, Debug)]
pub struct Stream(pub(super) *mut c_void);

// SAFETY: the driver's functions take streams from any thread.
unsafe impl Send for Stream {}

impl Stream {
    /// The one with this handle.
    ///
    /// # Safety
    ///
    /// It is a stream of the communicator's device, and outlives its use here.
    pub unsafe fn new(handle: *mut c_void) -> Stream {
        Stream(handle)
    }
}

/// A point in the work on a stream: a `CUevent`.
#[derive(Clone, Copy, Debug)]
pub struct Event(pub(super) *mut c_void);

// SAFETY: the driver's functions take events from any thread.
unsafe impl Send for Event {}

impl Event {
    /// The one with this handle.
    ///
    /// # Safety
    ///
    /// It is an event that was recorded, and outlives its use here.
    pub unsafe fn new(handle: *mut c_void) -> Event {
        Event(handle)
    }
}

/// What is waited for.
#[derive(Clone, Copy, Debug)]
pub enum Work {
    /// All that was given to a stream so far.
    Stream(Stream),
    /// What was given to its stream before an event.
    Event(Event),
}

/// The types of numbers that are added.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Number {
    /// 32 bits, with a sign.
    I32,
    /// IEEE 754, 16 bits.
    F16,
    /// The upper half of an `F32`.
    Bf16,
    /// IEEE 754, 32 bits.
    F32,
}

/// `ncclUint8`, which everything is that is not computed with.
pub(super) const BYTE: c_int = 1;

impl Number {
    /// Its `ncclDataType_t`.
    pub(super) fn code(self) -> c_int {
        match self {
            Number::I32 => 2,
            Number::F16 => 6,
            Number::F32 => 7,
            Number::Bf16 => 9,
        }
    }

    /// How many bytes one has.
    pub fn bytes(self) -> usize {
        match self {
            Number::F16 | Number::Bf16 => 2,
            Number::I32 | Number::F32 => 4,
        }
    }
}
