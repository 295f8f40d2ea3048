//! One data connection to one peer, both directions, in clear or sealed.
//!
//! Never blocks: what would is told to the caller, who does something else meanwhile.

use std::io;
use std::net::TcpStream;
use std::os::fd::{AsRawFd, RawFd};

use super::frame::{FrameError, Inbox, Parser};
use crate::link::socket::{receive, send, would_block};
use crate::secure::{Opener, RECORD_BYTES_MAX, RECORD_EXTRA_BYTES, RecordError, Sealer};

/// Bytes that are read beside what goes straight into the arena: small puts, and headers.
const SCRATCH_BYTES: usize = 8 << 10;
/// Ciphertext that is read at once.
const CIPHERTEXT_BYTES: usize = 4 * (RECORD_BYTES_MAX + RECORD_EXTRA_BYTES);
/// Where a record's content begins.
const CONTENT: usize = 4;

/// Why a connection is of no use any more.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Broken {
    #[error("the other side closed it")]
    Closed,
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("{0}")]
    Frame(#[from] FrameError),
    #[error("{0}")]
    Record(#[from] RecordError),
}

/// Whether a step got anything done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// Nothing to do for now.
    Idle,
    /// Some bytes.
    Bytes,
    /// Enough to complete a put, or all that was to be sent.
    Done,
}

/// The receiving side.
pub(crate) struct Incoming {
    fd: RawFd,
    parser: Parser,
    buffer: Box<[u8]>,
    sealed: Option<SealedIncoming>,
    closed: bool,
}

struct SealedIncoming {
    opener: Opener,
    /// Bytes in the buffer, an unfinished record at the most after each step.
    have: usize,
}

impl Incoming {
    pub(crate) fn new(stream: &TcpStream, parser: Parser, opener: Option<Opener>) -> Incoming {
        let bytes = if opener.is_some() { CIPHERTEXT_BYTES } else { SCRATCH_BYTES };
        Incoming {
            fd: stream.as_raw_fd(),
            parser,
            buffer: vec![0; bytes].into_boxed_slice(),
            sealed: opener.map(|opener| SealedIncoming { opener, have: 0 }),
            closed: false,
        }
    }

    /// Receives what is there, at most once through the buffer.
    pub(crate) fn step(&mut self, inbox: &Inbox<'_>) -> Result<Step, Broken> {
        if self.closed {
            return Ok(Step::Idle);
        }
        let result = match &mut self.sealed {
            None => step_clear(self.fd, &mut self.parser, &mut self.buffer, inbox),
            Some(sealed) => sealed.step(self.fd, &mut self.parser, &mut self.buffer, inbox),
        };
        self.closed = result.is_err();
        result
    }

    /// Whether anything more can come.
    pub(crate) fn is_closed(&self) -> bool {
        self.closed
    }
}

fn step_clear(
    fd: RawFd,
    parser: &mut Parser,
    scratch: &mut [u8],
    inbox: &Inbox<'_>,
) -> Result<Step, Broken> {
    let mut complete = false;
    loop {
        let (offset, left) = parser.wants().unwrap_or((0, 0));
        let target = (inbox.memory.at(offset, left), left);
        // SAFETY: `at` found the target inside of the arena, of which this part is the peer's
        // until the put is counted.
        let got = match unsafe { receive(fd, target, scratch) } {
            Ok(Some(got)) => got,
            Ok(None) => return Err(Broken::Closed),
            Err(error) if would_block(&error) => {
                return Ok(if complete { Step::Done } else { Step::Idle });
            }
            Err(error) => return Err(error.into()),
        };
        let placed = got.min(left);
        complete |= placed > 0 && parser.placed(placed, inbox);
        complete |= parser.feed(&scratch[..got - placed], inbox)?;
        // Less than asked for: that was all, and asking again would cost a call.
        if complete || got < left + scratch.len() {
            return Ok(if complete { Step::Done } else { Step::Bytes });
        }
    }
}

impl SealedIncoming {
    fn step(
        &mut self,
        fd: RawFd,
        parser: &mut Parser,
        buffer: &mut [u8],
        inbox: &Inbox<'_>,
    ) -> Result<Step, Broken> {
        let none = (std::ptr::null_mut(), 0);
        // SAFETY: no bytes go anywhere but into the buffer.
        match unsafe { receive(fd, none, &mut buffer[self.have..]) } {
            Ok(Some(got)) => self.have += got,
            Ok(None) => return Err(Broken::Closed),
            Err(error) if would_block(&error) => return Ok(Step::Idle),
            Err(error) => return Err(error.into()),
        }
        let (mut at, mut complete) = (0, false);
        while let Some(length) = Opener::length(&buffer[at..self.have])? {
            if self.have - at < length {
                break;
            }
            let content = self.opener.open(&mut buffer[at..at + length])?;
            complete |= parser.feed(content, inbox)?;
            at += length;
        }
        buffer.copy_within(at..self.have, 0);
        self.have -= at;
        Ok(if complete { Step::Done } else { Step::Bytes })
    }
}

/// The sending side.
pub(crate) struct Outgoing {
    fd: RawFd,
    sealed: Option<(Sealer, Box<[u8]>)>,
}

/// A message on its way: the header, and the parts behind it.
pub(crate) struct Message<'a> {
    pieces: &'a [&'a [u8]],
    /// All bytes.
    bytes: usize,
    /// Bytes that are sent, or sealed in the record on its way.
    taken: usize,
    /// What there is of that record, and how much of it was sent.
    record: (usize, usize),
}

impl<'a> Message<'a> {
    pub(crate) fn new(pieces: &'a [&'a [u8]]) -> Message<'a> {
        let bytes = pieces.iter().map(|piece| piece.len()).sum();
        Message { pieces, bytes, taken: 0, record: (0, 0) }
    }

    /// Copies the next bytes.
    fn take(&mut self, out: &mut [u8]) {
        let (mut skip, mut filled) = (self.taken, 0);
        for piece in self.pieces {
            let behind = piece.get(skip..).unwrap_or_default();
            skip = skip.saturating_sub(piece.len());
            let now = behind.len().min(out.len() - filled);
            out[filled..filled + now].copy_from_slice(&behind[..now]);
            filled += now;
        }
        self.taken += filled;
    }
}

impl Outgoing {
    pub(crate) fn new(stream: &TcpStream, sealer: Option<Sealer>) -> Outgoing {
        let record = || vec![0; RECORD_BYTES_MAX + RECORD_EXTRA_BYTES].into_boxed_slice();
        Outgoing { fd: stream.as_raw_fd(), sealed: sealer.map(|sealer| (sealer, record())) }
    }

    /// Sends what the socket takes now.
    pub(crate) fn step(&mut self, message: &mut Message<'_>) -> Result<Step, Broken> {
        let Some((sealer, record)) = &mut self.sealed else {
            let sent = accepted(send(self.fd, message.pieces, message.taken))?;
            message.taken += sent;
            let done = message.taken == message.bytes;
            return Ok(if done { Step::Done } else { some(sent) });
        };
        if message.record.0 == message.record.1 {
            let content = (message.bytes - message.taken).min(RECORD_BYTES_MAX);
            message.take(&mut record[CONTENT..CONTENT + content]);
            message.record = (content + RECORD_EXTRA_BYTES, 0);
            sealer.seal(&mut record[..message.record.0]);
        }
        let sent = accepted(send(self.fd, &[&record[..message.record.0]], message.record.1))?;
        message.record.1 += sent;
        let done = message.taken == message.bytes && message.record.0 == message.record.1;
        Ok(if done { Step::Done } else { some(sent) })
    }
}

fn some(bytes: usize) -> Step {
    if bytes > 0 { Step::Bytes } else { Step::Idle }
}

fn accepted(sent: io::Result<usize>) -> Result<usize, Broken> {
    match sent {
        Err(error) if would_block(&error) => Ok(0),
        other => Ok(other?),
    }
}
