//! The few system calls that a link makes itself: polling, gathering writes that never raise a
//! signal, scattering reads into raw memory, and a bell that wakes a poll.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::time::Duration;

/// Most bytes of one system call that sends: what is copied into the kernel by one is still in the
/// cache when it leaves.
const CALL_BYTES: usize = 64 << 10;
/// Pieces of one system call.
const PIECES: usize = 16;

/// Descriptors of one poll: all peers, and what wakes a sleeper. On the stack, for a wait allocates
/// nothing.
const DESCRIPTORS_MAX: usize = super::mesh::RANKS_MAX + 2;

/// What to poll a descriptor for.
#[derive(Clone, Copy)]
pub(crate) struct Interest {
    pub(crate) fd: RawFd,
    pub(crate) write: bool,
}

/// Sleeps until one of the descriptors is ready or has failed, at most so long. A signal ends it.
pub(crate) fn poll(interests: impl Iterator<Item = Interest>, at_most: Duration) {
    let mut list = [libc::pollfd { fd: -1, events: 0, revents: 0 }; DESCRIPTORS_MAX];
    let mut count = 0;
    for (entry, Interest { fd, write }) in list.iter_mut().zip(interests) {
        entry.fd = fd;
        entry.events = libc::POLLIN | if write { libc::POLLOUT } else { 0 };
        count += 1;
    }
    let limit = libc::timespec {
        tv_sec: at_most.as_secs().min(3600) as libc::time_t,
        tv_nsec: at_most.subsec_nanos().into(),
    };
    // SAFETY: the list and the limit live through the call; no signal mask is given.
    unsafe {
        libc::ppoll(list.as_mut_ptr(), count, &limit, std::ptr::null());
    }
}

/// Sends what is left of `parts` behind the first `skip` bytes, as much as the socket takes now.
pub(crate) fn send(fd: RawFd, parts: &[&[u8]], mut skip: usize) -> io::Result<usize> {
    let mut pieces = [libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }; PIECES];
    let (mut count, mut room) = (0, CALL_BYTES);
    for part in parts {
        let behind = part.get(skip..).unwrap_or_default();
        skip = skip.saturating_sub(part.len());
        let now = behind.len().min(room);
        if now > 0 && count < PIECES {
            pieces[count].iov_base = behind.as_ptr().cast_mut().cast();
            pieces[count].iov_len = now;
            room -= now;
            count += 1;
        }
    }
    // SAFETY: all zeros is a message header without name and control data.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = pieces.as_mut_ptr();
    message.msg_iovlen = count as _;
    // SAFETY: the pieces point into slices that live through the call, which only reads them.
    let sent = unsafe { libc::sendmsg(fd, &message, libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT) };
    outcome(sent)
}

/// Receives into `first`, and what is more into `rest`. None: the other side has closed.
///
/// # Safety
/// `first` is memory of its length that may be written, and nobody else writes it meanwhile.
pub(crate) unsafe fn receive(
    fd: RawFd,
    first: (*mut u8, usize),
    rest: &mut [u8],
) -> io::Result<Option<usize>> {
    let mut pieces = [
        libc::iovec { iov_base: first.0.cast(), iov_len: first.1 },
        libc::iovec { iov_base: rest.as_mut_ptr().cast(), iov_len: rest.len() },
    ];
    let pieces = if first.1 == 0 { &mut pieces[1..] } else { &mut pieces[..] };
    // SAFETY: all zeros is a message header without name and control data.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = pieces.as_mut_ptr();
    message.msg_iovlen = pieces.len() as _;
    // SAFETY: the caller vouches for `first`; `rest` is borrowed by this function.
    let got = outcome(unsafe { libc::recvmsg(fd, &mut message, libc::MSG_DONTWAIT) })?;
    Ok((got > 0).then_some(got))
}

fn outcome(result: isize) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// Whether a call only has to be made again later.
pub(crate) fn would_block(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

/// A descriptor that is ready from its first ring on, for ever: what announces the end.
pub(crate) struct Bell(OwnedFd);

impl Bell {
    pub(crate) fn new() -> io::Result<Bell> {
        // SAFETY: no memory is handed over.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new and nobody else's.
        Ok(Bell(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    pub(crate) fn ring(&self) {
        let one = 1u64.to_ne_bytes();
        // SAFETY: eight bytes are read. It fails when the number is at its end, and then it rings.
        unsafe { libc::write(self.0.as_raw_fd(), one.as_ptr().cast(), one.len()) };
    }
}

impl AsRawFd for Bell {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
