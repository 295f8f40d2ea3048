//! What can go wrong with memory.

/// An error of a device or a view.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// Outside failure: no memory.
    #[error("{device} has no {bytes} bytes free")]
    OutOfMemory {
        /// The device's name.
        device: String,
        /// Bytes asked for.
        bytes: usize,
    },
    /// A caller's mistake: shape, dtype, bounds.
    #[error("{0}")]
    Mismatch(String),
    /// A caller's mistake: the view belongs to another device.
    #[error("{operation}: a view of device {found:?} was given to device {expected:?}")]
    WrongDevice {
        /// What was attempted.
        operation: &'static str,
        /// The device that was asked.
        expected: crate::DeviceId,
        /// The view's device.
        found: crate::DeviceId,
    },
    /// Outside failure: the system refused.
    #[error("{attempted}")]
    System {
        /// What was attempted.
        attempted: String,
        /// The system's answer.
        source: std::io::Error,
    },
}
