//! A connection's socket with two users. The connection's task owns it by HTTP's rules, through
//! hyper; between two of the task's flushes, while an answer's body has nothing more to give, a
//! [`writer`](crate::writers) may put whole chunks on it without waking the task.
//!
//! The door is shut when hyper is given something, the answer's head or a piece of its body, and
//! open once hyper has written all that it was given. What the socket does not take of a chunk at
//! once waits here; the door is shut until the task has written it, ahead of hyper's next bytes.

use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll, ready};
use std::{io, slice};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};

/// The way past hyper.
pub(crate) struct Door {
    way: Mutex<Way>,
}

struct Way {
    socket: OwnedWriteHalf,
    open: bool,
    /// The rest of a chunk, written up to here.
    rest: Vec<u8>,
    written: usize,
}

impl Door {
    fn way(&self) -> MutexGuard<'_, Way> {
        // What is behind it stays whole, whoever panicked.
        self.way.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hyper is given something to write.
    pub(crate) fn shut(&self) {
        self.way().open = false;
    }

    /// Whether hyper has written all that it was given.
    pub(crate) fn is_open(&self) -> bool {
        self.way().open
    }

    /// Writes what the socket takes at once and keeps the rest for the connection's task, which has
    /// to be woken then: false. For an open door only.
    pub(crate) fn write(&self, chunk: &[u8]) -> bool {
        let mut way = self.way();
        debug_assert!(way.open && way.rest.is_empty());
        // An error comes again when the task writes the rest, and ends the connection there.
        let taken = way.socket.try_write(chunk).unwrap_or(0);
        way.open = taken == chunk.len();
        way.rest.extend_from_slice(&chunk[taken..]);
        way.open
    }
}

impl Way {
    /// Writes the rest of a chunk.
    fn poll_rest(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.written < self.rest.len() {
            let rest = &self.rest[self.written..];
            match ready!(Pin::new(&mut self.socket).poll_write(context, rest))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                taken => self.written += taken,
            }
        }
        (self.rest, self.written) = (Vec::new(), 0);
        Poll::Ready(Ok(()))
    }
}

/// The socket as hyper has it.
pub(crate) struct Guarded {
    socket: OwnedReadHalf,
    door: Arc<Door>,
}

impl Guarded {
    /// Takes a socket.
    pub(crate) fn new(socket: TcpStream) -> Guarded {
        let (read, socket) = socket.into_split();
        let way = Way { socket, open: false, rest: Vec::new(), written: 0 };
        Guarded { socket: read, door: Arc::new(Door { way: Mutex::new(way) }) }
    }

    /// Its door, which does not keep the socket open.
    pub(crate) fn door(&self) -> Weak<Door> {
        Arc::downgrade(&self.door)
    }
}

impl AsyncRead for Guarded {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().socket).poll_read(context, buffer)
    }
}

impl AsyncWrite for Guarded {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(context, slice::from_ref(&io::IoSlice::new(bytes)))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let mut way = self.door.way();
        ready!(way.poll_rest(context))?;
        Pin::new(&mut way.socket).poll_write_vectored(context, pieces)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    /// Hyper comes here with nothing left to write.
    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut way = self.door.way();
        ready!(way.poll_rest(context))?;
        way.open = true;
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut way = self.door.way();
        ready!(way.poll_rest(context))?;
        way.open = false;
        Pin::new(&mut way.socket).poll_shutdown(context)
    }
}
