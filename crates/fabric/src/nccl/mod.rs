//! NCCL: collectives among GPUs, on the streams of CUDA, with this crate's deadlines and causes.
//!
//! NCCL is opened at run time and moves the bytes. What it does not do is done here, over the
//! group's own link, which carries no bytes of a model: every wait has a deadline and sees the
//! abort, a rank that dies, stands still or calls something else is named on all, and what hangs
//! is aborted. An [`NcclComm`] lives as long as an epoch; the next one has another.
//!
//! What is left to a backend for CUDA:
//!
//! - The context of its device is current on the thread that makes the communicator; each rank has
//!   a device of its own. Memory and streams are the backend's.
//! - It does not wait for a stream by the driver's functions, which know neither deadline nor
//!   abort, but by [`NcclComm::wait`], at the same places on all ranks.
//! - NCCL adds in an order of its own. Where bits must not depend on the number of ranks, sums are
//!   of numbers that are zero on all ranks but one, or the numbers are gathered and added by the
//!   backend.
//! - Calls that are captured in a graph get their marks once, when they are captured: after each
//!   launch of such a graph, ranks compare nothing but that they wait.

mod calls;
mod comm;
mod ending;
mod ffi;
mod library;
mod memory;
mod survey;

pub use self::calls::Columns;
pub use self::comm::NcclComm;
pub use self::library::{Nccl, Paths};
pub use self::memory::{DeviceBytes, Event, Number, Stream, Work};
pub use self::survey::{Devices, Survey, survey};

/// What can go wrong without any other rank.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NcclError {
    /// A library is not there, or lacks something.
    #[error("{library} cannot be used: {why}")]
    Absent {
        /// The file that was asked for.
        library: String,
        /// Why, and what to do.
        why: String,
    },
    /// A call failed.
    #[error("{0}")]
    Call(String),
    /// A communicator does not let go of its device.
    #[error("{0}")]
    Left(String),
}
