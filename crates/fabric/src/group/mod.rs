//! Which processes are the ranks: joining, epochs, and the loss of members.
//!
//! What is decided is decided by two values without clock or connection, [`Coordinator`] and
//! [`Member`]; [`local`] runs them for processes of one machine.

pub mod local;

mod frame;
mod member;
mod protocol;

pub use self::frame::{FRAME_BYTES_MAX, Frame};
pub use self::member::{Member, MemberAction, MemberEvent};
pub use self::protocol::{
    ALIVE_EVERY, Action, Coordinator, Event, GroupOptions, PAUSE, SILENT_AFTER,
};

/// How often whoever runs the protocol lets it look at the clock.
pub const TICK: std::time::Duration = std::time::Duration::from_millis(25);
