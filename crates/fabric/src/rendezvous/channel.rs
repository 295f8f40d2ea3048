//! A control connection: messages in order, in clear or over TLS 1.3.
//!
//! May be used by several threads, and polled: nothing here blocks without a deadline. A message is
//! its length in four bytes and its bytes. The length comes big end first: what a session of TLS
//! begins with is then far too long, and found out at once.

use std::io::{self, Read, Write};
use std::net::{IpAddr, TcpStream};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use rustls::Connection;

use super::tls;
use crate::link::pulse::lock;
use crate::link::socket::{Interest, poll, would_block};

/// Most bytes of a message.
pub const MESSAGE_BYTES_MAX: usize = 256 << 10;
/// How long a peer may take to make room for a message.
const SEND_TIMEOUT: Duration = Duration::from_secs(5);
/// How often a wait without a deadline looks by itself.
const LOOK: Duration = Duration::from_secs(1);
/// Read at once.
const CHUNK_BYTES: usize = 16 << 10;

/// Why a control connection is of no use any more.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// By a process that ended, or on purpose.
    #[error("the other side closed the connection")]
    Closed,
    /// Nothing came, or nothing was taken.
    #[error("the other side did not answer in time")]
    TimedOut,
    /// The system's reason.
    #[error("the connection failed: {0}")]
    Io(#[from] io::Error),
    /// Not TLS 1.3 as we speak it, or changed on the way.
    #[error("no TLS session of Pomona's (is the policy the same on both sides?): {0}")]
    Tls(String),
    /// More than a message may have.
    #[error(
        "a message of {0} bytes, {MESSAGE_BYTES_MAX} are allowed (is the policy the same on both \
         sides?)"
    )]
    TooLong(usize),
}

impl From<rustls::Error> for ChannelError {
    fn from(error: rustls::Error) -> ChannelError {
        ChannelError::Tls(error.to_string())
    }
}

/// One end.
pub struct Channel {
    stream: TcpStream,
    state: Mutex<State>,
}

struct State {
    session: Option<Connection>,
    /// What was received and not yet taken.
    received: Vec<u8>,
}

impl Channel {
    /// Without protection.
    pub(crate) fn clear(stream: TcpStream) -> Result<Channel, ChannelError> {
        stream.set_nonblocking(true)?;
        stream.set_nodelay(true)?;
        let state = State { session: None, received: Vec::new() };
        Ok(Channel { stream, state: Mutex::new(state) })
    }

    /// Over TLS, as the leader or as a node; the handshake is done within the deadline.
    pub(crate) fn protected(
        stream: TcpStream,
        session: Connection,
        deadline: Instant,
    ) -> Result<Channel, ChannelError> {
        let channel = Channel::clear(stream)?;
        let mut state = lock(&channel.state);
        state.session = Some(session);
        state.write(&channel.stream, deadline)?;
        while state.is_handshaking() {
            if !state.read(&channel.stream)? {
                channel.sleep(deadline)?;
            }
            state.write(&channel.stream, deadline)?;
        }
        drop(state);
        Ok(channel)
    }

    /// What the two ends of a TLS session share; empty in clear.
    pub(crate) fn exporter(&self) -> Result<Vec<u8>, ChannelError> {
        let state = lock(&self.state);
        let Some(session) = &state.session else { return Ok(Vec::new()) };
        let stranger = || ChannelError::Tls("another application's protocol".to_owned());
        tls::exporter(session).map(|bytes| bytes.to_vec()).ok_or_else(stranger)
    }

    /// Sends a message. Blocks for some seconds at most.
    pub fn send(&self, message: &[u8]) -> Result<(), ChannelError> {
        if message.len() > MESSAGE_BYTES_MAX {
            return Err(ChannelError::TooLong(message.len()));
        }
        let bytes = [&(message.len() as u32).to_be_bytes(), message].concat();
        let deadline = Instant::now() + SEND_TIMEOUT;
        let mut state = lock(&self.state);
        let mut rest = bytes.as_slice();
        while !rest.is_empty() {
            let taken = match &mut state.session {
                // It keeps a bounded number of bytes, which are then written.
                Some(session) => session.writer().write(rest)?,
                None => send_clear(&self.stream, rest, deadline)?,
            };
            rest = &rest[taken..];
            state.write(&self.stream, deadline)?;
        }
        Ok(())
    }

    /// The next message, if it is there.
    pub fn try_receive(&self) -> Result<Option<Vec<u8>>, ChannelError> {
        let mut state = lock(&self.state);
        loop {
            if let Some(message) = split_message(&mut state.received)? {
                return Ok(Some(message));
            }
            if !state.read(&self.stream)? {
                return Ok(None);
            }
        }
    }

    /// The next message; waits until the deadline, without one for as long as the connection lives.
    pub fn receive(&self, deadline: Option<Instant>) -> Result<Vec<u8>, ChannelError> {
        loop {
            if let Some(message) = self.try_receive()? {
                return Ok(message);
            }
            self.sleep(deadline.unwrap_or_else(|| Instant::now() + LOOK))?;
        }
    }

    /// Sleeps until something may be there to read.
    fn sleep(&self, deadline: Instant) -> Result<(), ChannelError> {
        sleep_until(Interest { fd: self.stream.as_raw_fd(), write: false }, deadline)
    }

    /// The machine at the other end, and this one as the other sees it.
    pub(crate) fn machines(&self) -> Result<(IpAddr, IpAddr), ChannelError> {
        Ok((self.stream.peer_addr()?.ip(), self.stream.local_addr()?.ip()))
    }
}

/// To be polled: readable when [`try_receive`](Channel::try_receive) may have something.
impl AsRawFd for Channel {
    fn as_raw_fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }
}

impl State {
    fn is_handshaking(&self) -> bool {
        self.session.as_ref().is_some_and(|session| session.is_handshaking())
    }

    /// Receives what is there. False if nothing is.
    fn read(&mut self, mut stream: &TcpStream) -> Result<bool, ChannelError> {
        let mut chunk = [0; CHUNK_BYTES];
        let read = match &mut self.session {
            Some(session) => session.read_tls(&mut stream),
            None => stream.read(&mut chunk),
        };
        let got = match read {
            Ok(0) => return Err(ChannelError::Closed),
            Ok(got) => got,
            Err(error) if would_block(&error) => return Ok(false),
            Err(error) => return Err(error.into()),
        };
        let Some(session) = &mut self.session else {
            self.received.extend_from_slice(&chunk[..got]);
            return Ok(true);
        };
        if let Err(error) = session.process_new_packets() {
            // The alert that tells the other side why, if there is room for it.
            let _ = session.write_tls(&mut stream);
            return Err(error.into());
        }
        loop {
            match session.reader().read(&mut chunk) {
                // An orderly end; the next read finds the connection closed.
                Ok(0) => return Ok(true),
                Ok(got) => self.received.extend_from_slice(&chunk[..got]),
                Err(error) if would_block(&error) => return Ok(true),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Sends what the session has to send.
    fn write(&mut self, mut stream: &TcpStream, deadline: Instant) -> Result<(), ChannelError> {
        let Some(session) = &mut self.session else { return Ok(()) };
        while session.wants_write() {
            match session.write_tls(&mut stream) {
                Ok(_) => {}
                Err(error) if would_block(&error) => sleep_until(room(stream), deadline)?,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

fn send_clear(
    mut stream: &TcpStream,
    bytes: &[u8],
    deadline: Instant,
) -> Result<usize, ChannelError> {
    match stream.write(bytes) {
        Err(error) if would_block(&error) => sleep_until(room(stream), deadline).map(|()| 0),
        sent => Ok(sent?),
    }
}

fn room(stream: &TcpStream) -> Interest {
    Interest { fd: stream.as_raw_fd(), write: true }
}

fn sleep_until(interest: Interest, deadline: Instant) -> Result<(), ChannelError> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(ChannelError::TimedOut);
    }
    poll([interest].into_iter(), left);
    Ok(())
}

/// Takes the first message out of what was received, if it is whole.
pub(crate) fn split_message(received: &mut Vec<u8>) -> Result<Option<Vec<u8>>, ChannelError> {
    let Some(length) = received.first_chunk::<4>() else { return Ok(None) };
    let length = u32::from_be_bytes(*length) as usize;
    if length > MESSAGE_BYTES_MAX {
        return Err(ChannelError::TooLong(length));
    }
    if received.len() < 4 + length {
        return Ok(None);
    }
    let rest = received.split_off(4 + length);
    let mut message = std::mem::replace(received, rest);
    message.drain(..4);
    Ok(Some(message))
}
