//! Memory and workers of a machine: devices, buffers, typed views, the pinned CPU pool.
//!
//! Owns where bytes live and who may touch them. A [`View`] carries its device; whoever holds one
//! cannot reach the bytes except by an explicit copy through its device or an operation of it (the
//! `kernels` crate). Does not know operations or models.

mod ahead;
mod arena;
mod buffer;
mod cgroup;
mod cores;
mod error;
mod host;
mod map;
mod memory;
mod pieces;
mod pool;
mod probe;
mod view;

use std::ops::Range;
use std::sync::Arc;

pub use arena::ArenaDevice;
pub use buffer::{Buffer, DeviceId};
pub use cores::{ask_for_short_turns, cpu_quota, restrict_to, second_cache_bytes, usable_cores};
pub use error::DeviceError;
pub use host::{Access, HostDevice, HostMemory};
pub use map::{FileIdentity, map_file};
pub use memory::{available_memory, resident_memory};
pub use pieces::{Piece, Pieces, PiecesKey, PiecesWriter};
pub use pool::{Pool, split};
pub use probe::{Probe, probe};
pub use view::{DType, View};

/// Bytes that live elsewhere: a mapped file, a vector.
pub trait Bytes: AsRef<[u8]> + Send + Sync {
    /// A hint that a range will be read next, and then what lies behind it. May wait until the
    /// range is in memory.
    fn soon(&self, _range: Range<usize>) {}

    /// The bytes of a range, `None` beyond the end: as they lie, or copied to `room`.
    fn read<'a>(&'a self, range: Range<usize>, _room: &'a mut Vec<u8>) -> Option<&'a [u8]> {
        self.as_ref().get(range)
    }

    /// A hint that a range will hardly be read again: its pages need not stay in memory.
    fn done_with(&self, _range: Range<usize>) {}

    /// Numbers that change when the bytes do, cheap to have: what the system knows of the file.
    /// `None` where there is nothing of the kind.
    fn identity(&self) -> Option<FileIdentity> {
        None
    }
}

impl Bytes for Vec<u8> {}

/// Bytes with several owners.
pub type SharedBytes = Arc<dyn Bytes>;

/// A place with memory. Copies are synchronous and ordered with the device's operations.
pub trait Device: Send + Sync {
    /// Which one; views of another device are refused by its operations.
    fn id(&self) -> DeviceId;

    /// A short name for logs: `cpu`, `arena`, `cuda:0`.
    fn name(&self) -> &str;

    /// Memory of `bytes`, zeroed, aligned to 64 bytes.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`] when there is not that much.
    fn alloc(&self, bytes: usize) -> Result<Buffer, DeviceError>;

    /// Copies host bytes into a view of this device; the lengths must match.
    fn upload(&self, source: &[u8], target: &View) -> Result<(), DeviceError>;

    /// Copies a view of this device to host bytes; the lengths must match.
    fn download(&self, source: &View, target: &mut [u8]) -> Result<(), DeviceError>;

    /// Allocates a view of its own.
    fn alloc_view(&self, dtype: DType, shape: &[usize]) -> Result<View, DeviceError> {
        let elements = shape.iter().try_fold(1usize, |a, b| a.checked_mul(*b));
        let bytes = elements.and_then(|n| n.checked_mul(dtype.bytes())).ok_or(
            DeviceError::OutOfMemory { device: self.name().to_owned(), bytes: usize::MAX },
        )?;
        View::new(self.alloc(bytes)?, 0, dtype, shape)
    }
}
