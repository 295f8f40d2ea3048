//! Signs of life between machines, and the end of an epoch: a connection of its own to each peer.
//!
//! Beside the data, so that neither waits behind a large put. A thread sends a beat every
//! [`BEAT_MS`], looks for those of others, and reads what ended the epoch elsewhere. Owns the first
//! cause; a rank that has one tells it to all whom it can reach. Between machines nothing else
//! knows a peer: a connection that breaks means a process that ended; no beats mean a machine or a
//! wire that is gone, or a process that was stopped.

use std::fmt::Display;
use std::io;
use std::net::TcpStream;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use pomona_types::{GroupError, LostCause};

use super::mesh::Connection;
use super::socket::{Bell, Interest, poll, receive, send, would_block};
use crate::cause::{CAUSE_BYTES, decode, encode};
use crate::secure::{Opener, RECORD_EXTRA_BYTES, Sealer};

/// How often a rank shows that it lives.
pub const BEAT_MS: u32 = 50;
/// How long a rank may be silent by default: eight beats, so that a cut wire is reported within
/// 600 ms, and a busy machine is not taken for a dead one.
pub const SILENT_AFTER_MS: u32 = 400;
/// The same for one that was not heard yet in this epoch: it may still be connecting to others.
const FIRST_BEAT_AFTER: Duration = Duration::from_secs(5);
/// How long a broken data connection waits for its pulse, which knows more: whether the peer leaves
/// because of another rank's fault, or because its process ended and so both connections did.
const GRACE: Duration = Duration::from_millis(100);
/// And so many times the pulse listens meanwhile, however long that takes it on a busy machine: the
/// first may have begun before the connection broke.
const GRACE_LISTENS: u32 = 2;
/// How often it looks.
const GRACE_LOOK: Duration = Duration::from_millis(1);

/// A message is a byte that says what it is, and for an end its cause.
const MESSAGE_BYTES_MAX: usize = 1 + CAUSE_BYTES;
const BEAT: u8 = 0;
const END: u8 = 1;
const LEAVE: u8 = 2;

/// The end of an epoch, shared with whoever waits.
pub(crate) struct Over {
    flag: AtomicBool,
    why: Mutex<Option<GroupError>>,
    bell: Bell,
}

impl Over {
    fn new() -> io::Result<Over> {
        Ok(Over { flag: AtomicBool::new(false), why: Mutex::new(None), bell: Bell::new()? })
    }

    pub(crate) fn why(&self) -> Option<GroupError> {
        self.is_set().then(|| lock(&self.why).clone()).flatten()
    }

    fn is_set(&self) -> bool {
        self.flag.load(Ordering::Acquire)
    }

    /// Readable from the end on.
    pub(crate) fn interest(&self) -> Interest {
        Interest { fd: self.bell.as_raw_fd(), write: false }
    }

    /// True for the first cause.
    fn set(&self, why: &GroupError) -> bool {
        let mut first = lock(&self.why);
        if first.is_some() {
            return false;
        }
        *first = Some(why.clone());
        self.flag.store(true, Ordering::Release);
        self.bell.ring();
        true
    }
}

/// Where a peer's messages are written.
struct Writer {
    stream: TcpStream,
    /// In `auth` and `seal`.
    sealer: Option<Sealer>,
    /// A message was sent in part only: the peer has not read for many beats.
    stuck: bool,
}

impl Writer {
    fn tell(&mut self, kind: u8, cause: &[u8]) {
        if self.stuck {
            return;
        }
        let content = 1 + cause.len();
        let mut record = [0; MESSAGE_BYTES_MAX + RECORD_EXTRA_BYTES];
        record[4] = kind;
        record[5..4 + content].copy_from_slice(cause);
        let record = match &mut self.sealer {
            Some(sealer) => {
                let record = &mut record[..content + RECORD_EXTRA_BYTES];
                sealer.seal(record);
                record
            }
            None => {
                record[..4].copy_from_slice(&(content as u32).to_le_bytes());
                &mut record[..4 + content]
            }
        };
        // A connection that is broken is found by who reads from it.
        let sent = send(self.stream.as_raw_fd(), &[record], 0);
        self.stuck = sent.ok() != Some(record.len());
    }
}

/// A message of a peer.
enum Heard {
    Beat,
    End(GroupError),
    Leave,
}

/// Where they are read: the thread's alone.
struct Reader {
    peer: usize,
    stream: TcpStream,
    opener: Option<Opener>,
    buffer: Vec<u8>,
    have: usize,
    /// When something came last; none before the first beat.
    last: Option<Instant>,
    open: bool,
}

impl Reader {
    fn new(peer: usize, connection: &mut Connection, stream: TcpStream) -> Reader {
        let buffer = vec![0; 4 * (MESSAGE_BYTES_MAX + RECORD_EXTRA_BYTES)];
        let opener = connection.opener.take();
        Reader { peer, stream, opener, buffer, have: 0, last: None, open: true }
    }

    /// Hands what has come to `hear`. An error is the end of this connection.
    fn read(&mut self, mut hear: impl FnMut(Heard)) -> Result<(), String> {
        loop {
            let none = (std::ptr::null_mut(), 0);
            // SAFETY: no bytes go anywhere but into the buffer.
            match unsafe { receive(self.stream.as_raw_fd(), none, &mut self.buffer[self.have..]) } {
                Ok(Some(got)) => self.have += got,
                Ok(None) => return Err("the other side closed it".into()),
                Err(error) if would_block(&error) => return Ok(()),
                Err(error) => return Err(error.to_string()),
            }
            self.last = Some(Instant::now());
            let mut at = 0;
            while let Some(bytes) = self.message(at)? {
                hear(self.content(at, bytes)?);
                at += bytes;
            }
            self.buffer.copy_within(at..self.have, 0);
            self.have -= at;
        }
    }

    /// How long the message is that begins here, when all of it is there.
    fn message(&self, at: usize) -> Result<Option<usize>, String> {
        let begin = &self.buffer[at..self.have];
        let Some(bytes) = Opener::length(begin).map_err(|error| error.to_string())? else {
            return Ok(None);
        };
        if bytes > MESSAGE_BYTES_MAX + RECORD_EXTRA_BYTES {
            return Err(format!("a message of {bytes} bytes"));
        }
        let bytes = if self.opener.is_some() { bytes } else { bytes - (RECORD_EXTRA_BYTES - 4) };
        Ok((begin.len() >= bytes).then_some(bytes))
    }

    fn content(&mut self, at: usize, bytes: usize) -> Result<Heard, String> {
        let record = &mut self.buffer[at..at + bytes];
        let content = match &mut self.opener {
            Some(opener) => opener.open(record).map_err(|error| error.to_string())?,
            None => &record[4..],
        };
        match content.split_first() {
            Some((&BEAT, [])) => Some(Heard::Beat),
            Some((&LEAVE, [])) => Some(Heard::Leave),
            Some((&END, cause)) => decode(cause).map(Heard::End),
            _ => None,
        }
        .ok_or_else(|| "a message that no rank sends".to_owned())
    }
}

/// What the thread and the callers share.
struct Shared {
    rank: usize,
    epoch: u32,
    silent_after: Duration,
    /// By rank; none for the own.
    writers: Vec<Option<Mutex<Writer>>>,
    /// By rank: it said that it leaves, so its silence is no fault.
    left: Vec<AtomicBool>,
    over: Over,
    /// How many times the thread has read what all peers had sent.
    listens: AtomicU32,
    stop: Bell,
    stopped: AtomicBool,
}

impl Shared {
    fn tell_all(&self, kind: u8, cause: &[u8]) {
        for writer in self.writers.iter().flatten() {
            lock(writer).tell(kind, cause);
        }
    }

    fn end(&self, why: &GroupError) {
        if self.over.set(why) {
            self.tell_all(END, &encode(why));
        }
    }

    fn lost(&self, rank: usize, cause: LostCause) {
        self.end(&GroupError::PeerLost { rank, epoch: self.epoch, cause });
    }

    fn has_left(&self, peer: usize) -> bool {
        self.left[peer].load(Ordering::Acquire)
    }

    /// What the thread does until the epoch is dropped.
    fn run(&self, mut readers: Vec<Reader>) {
        let beat = Duration::from_millis(BEAT_MS.into());
        let begun = Instant::now();
        let (mut looked, mut next) = (begun, begun);
        while !self.stopped.load(Ordering::Acquire) {
            let now = Instant::now();
            if now >= next {
                self.tell_all(BEAT, &[]);
                next = now + beat;
            }
            let open = readers.iter().filter(|reader| reader.open);
            let fds = open.map(|reader| reader.stream.as_raw_fd()).chain([self.stop.as_raw_fd()]);
            poll(fds.map(|fd| Interest { fd, write: false }), next.saturating_duration_since(now));
            for reader in readers.iter_mut().filter(|reader| reader.open) {
                self.listen(reader);
            }
            self.listens.fetch_add(1, Ordering::Release);
            let slept = looked.elapsed();
            looked = Instant::now();
            if slept > 3 * beat {
                // It was this process that stood still: nothing is known of the others' silence.
                readers.iter_mut().for_each(|reader| {
                    reader.last = reader.last.map(|last| last + slept);
                });
                continue;
            }
            for reader in readers.iter().filter(|reader| reader.open) {
                self.check(reader, begun);
            }
        }
        if !self.over.is_set() {
            self.tell_all(LEAVE, &[]);
        }
    }

    fn listen(&self, reader: &mut Reader) {
        let peer = reader.peer;
        let result = reader.read(|heard| match heard {
            Heard::Beat => {}
            Heard::Leave => self.left[peer].store(true, Ordering::Release),
            Heard::End(why) => self.end(&why),
        });
        if let Err(why) = result {
            reader.open = false;
            if !self.has_left(peer) {
                self.lost(peer, LostCause::Disconnected(why));
            }
        }
    }

    fn check(&self, reader: &Reader, begun: Instant) {
        let (since, limit) = match reader.last {
            Some(last) => (last, self.silent_after),
            None => (begun, FIRST_BEAT_AFTER.max(self.silent_after)),
        };
        if since.elapsed() > limit && !self.has_left(reader.peer) {
            // The limit rather than the time: two ranks that notice at once say the same.
            self.lost(reader.peer, LostCause::Silent(limit.as_millis() as u32));
        }
    }
}

/// The pulses of one epoch. Dropping it is leaving.
pub(crate) struct Pulse {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Pulse {
    /// Takes a connection to each peer, by rank.
    pub(crate) fn start(
        rank: usize,
        epoch: u32,
        silent_after: Duration,
        connections: Vec<Option<Connection>>,
    ) -> io::Result<Pulse> {
        let left = connections.iter().map(|_| AtomicBool::new(false)).collect();
        let (mut readers, mut writers) = (Vec::new(), Vec::new());
        for (peer, connection) in connections.into_iter().enumerate() {
            let Some(mut connection) = connection else {
                writers.push(None);
                continue;
            };
            let stream = connection.stream.try_clone()?;
            readers.push(Reader::new(peer, &mut connection, stream));
            let Connection { stream, sealer, .. } = connection;
            writers.push(Some(Mutex::new(Writer { stream, sealer, stuck: false })));
        }
        let shared = Arc::new(Shared {
            rank,
            epoch,
            silent_after,
            writers,
            left,
            over: Over::new()?,
            listens: AtomicU32::new(0),
            stop: Bell::new()?,
            stopped: AtomicBool::new(false),
        });
        let runner = Arc::clone(&shared);
        let name = format!("pulse {rank}");
        let thread = std::thread::Builder::new().name(name).spawn(move || runner.run(readers))?;
        Ok(Pulse { shared, thread: Some(thread) })
    }

    pub(crate) fn rank(&self) -> usize {
        self.shared.rank
    }

    pub(crate) fn epoch(&self) -> u32 {
        self.shared.epoch
    }

    /// The end, when it has come.
    pub(crate) fn over(&self) -> &Over {
        &self.shared.over
    }

    /// Ends the epoch here and wherever somebody can be told.
    pub(crate) fn end(&self, why: &GroupError) {
        self.shared.end(why);
    }

    /// The data connection to a peer is broken; a peer that has left on purpose is no fault. Blocks
    /// until the pulse has told why, or has nothing to tell.
    pub(crate) fn broken(&self, peer: usize, why: &dyn Display) {
        let (begun, before) = (Instant::now(), self.listens());
        loop {
            // Before the look, which then sees what the last time has brought.
            let listened = self.listens().wrapping_sub(before) >= GRACE_LISTENS || self.is_deaf();
            let enough = listened && begun.elapsed() >= GRACE;
            if self.over().is_set() || self.shared.has_left(peer) {
                return;
            }
            if enough {
                break;
            }
            poll([self.over().interest()].into_iter(), GRACE_LOOK);
        }
        self.shared.lost(peer, LostCause::Disconnected(why.to_string()));
    }

    fn listens(&self) -> u32 {
        self.shared.listens.load(Ordering::Acquire)
    }

    /// Whether nobody listens any more.
    fn is_deaf(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Whether a peer has said that it leaves.
    pub(crate) fn has_left(&self, peer: usize) -> bool {
        self.shared.has_left(peer)
    }

    /// As if the process had ended: nobody hears what its thread makes of that.
    #[cfg(test)]
    pub(crate) fn cut(&self) {
        let held: Vec<_> = self.shared.writers.iter().flatten().map(lock).collect();
        for writer in &held {
            let _ = writer.stream.shutdown(std::net::Shutdown::Both);
        }
    }

    /// As if the machine had no time for this thread: it can send no beat, and so nothing else.
    #[cfg(test)]
    pub(crate) fn stall(&self, time: Duration) {
        let held: Vec<_> = self.shared.writers.iter().flatten().map(lock).collect();
        std::thread::sleep(time);
        drop(held);
    }

    /// The peer could not be understood: no grace, and no other cause.
    pub(crate) fn lost(&self, peer: usize, cause: LostCause) {
        self.shared.lost(peer, cause);
    }
}

impl Pulse {
    /// Tells the others that this rank leaves on purpose, unless the epoch is over anyway.
    pub(crate) fn leave(&mut self) {
        self.shared.stopped.store(true, Ordering::Release);
        self.shared.stop.ring();
        if let Some(thread) = self.thread.take() {
            // The thread does not panic, and there is nothing to do if it did.
            let _ = thread.join();
        }
    }
}

impl Drop for Pulse {
    fn drop(&mut self) {
        self.leave();
    }
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What is inside is whole at every point where its holder could panic.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
