//! A connection between two local processes that keeps frames apart and carries descriptors.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd};
use rustix::fs::Timespec;
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
};

use super::Letter;
use crate::group::{FRAME_BYTES_MAX, Frame};

/// One end.
pub(super) struct Socket(OwnedFd);

impl Socket {
    /// Both ends; the second is for another process.
    pub fn pair() -> io::Result<(Socket, OwnedFd)> {
        let kind = SocketType::SEQPACKET;
        let flags = SocketFlags::CLOEXEC;
        let (ours, theirs) = rustix::net::socketpair(AddressFamily::UNIX, kind, flags, None)?;
        Ok((Socket(ours), theirs))
    }

    /// The end that is the standard input, which is empty from now on.
    pub fn take_stdin() -> io::Result<Socket> {
        let stdin = io::stdin();
        let kind = rustix::net::sockopt::socket_type(&stdin);
        if kind != Ok(SocketType::SEQPACKET) {
            let why = "the standard input is no control connection: was this process started by \
                       a parent of the group?";
            return Err(io::Error::other(why));
        }
        let control = rustix::io::fcntl_dupfd_cloexec(&stdin, 3)?;
        rustix::stdio::dup2_stdin(File::open("/dev/null")?)?;
        Ok(Socket(control))
    }

    /// Sends a frame, with a descriptor if there is one. One for which there is no room is lost:
    /// who does not read is stopped, and will be found to be.
    pub fn send(&self, frame: &Frame, descriptor: Option<BorrowedFd<'_>>) {
        let bytes = frame.encode();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let descriptors = descriptor.map(|descriptor| [descriptor]);
        if let Some(descriptors) = &descriptors {
            control.push(SendAncillaryMessage::ScmRights(descriptors));
        }
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        // A connection that is gone is seen where it is read.
        let _ = rustix::net::sendmsg(&self.0, &[IoSlice::new(&bytes)], &mut control, flags);
    }

    /// The next frame; none if there is none yet. Fails when the connection is gone, or carries
    /// what is no frame.
    pub fn receive(&self, buffer: &mut Vec<u8>) -> io::Result<Option<Letter>> {
        buffer.resize(FRAME_BYTES_MAX, 0);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let parts = &mut [IoSliceMut::new(buffer)];
        let length = match rustix::net::recvmsg(&self.0, parts, &mut control, flags) {
            Ok(received) => received.bytes,
            Err(Errno::AGAIN | Errno::INTR) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let descriptor = control.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
            _ => None,
        });
        if length == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let frame = Frame::decode(&buffer[..length]);
        let frame = frame.ok_or_else(|| io::Error::other("what came is no frame"))?;
        Ok(Some((frame, descriptor)))
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// What a rank rings when it has left something for its watcher.
pub(super) struct Bell(OwnedFd);

impl Bell {
    pub fn new() -> io::Result<Bell> {
        Ok(Bell(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?))
    }

    pub fn ring(&self) {
        // It fails only when it has been rung more often than a long can count.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }

    pub fn silence(&self) {
        // It fails only when it was not rung.
        let _ = rustix::io::read(&self.0, &mut [0; 8]);
    }
}

/// Waits until the bell was rung, something has come on a socket, or the time is over.
pub(super) fn wait_for(bell: &Bell, sockets: impl Iterator<Item = impl AsFd>, at_most: Duration) {
    let sockets: Vec<_> = sockets.collect();
    let mut polled = vec![PollFd::new(&bell.0, PollFlags::IN)];
    polled.extend(sockets.iter().map(|socket| PollFd::new(socket, PollFlags::IN)));
    let timeout = Timespec { tv_sec: 0, tv_nsec: at_most.subsec_nanos().into() };
    // Interrupted or late: whoever waits looks at everything in any case.
    let _ = rustix::event::poll(&mut polled, Some(&timeout));
}
