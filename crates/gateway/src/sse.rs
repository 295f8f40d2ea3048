//! Server-sent events (WHATWG HTML, section 9.2): a generation as a response body. There is no task
//! behind it: a connection that goes away drops the body, and with it the generation.
//!
//! Two can take events off a generation. The connection's task does by polling the body, for the
//! first piece and the last, while the client is slow, and wherever there is no way past hyper.
//! Otherwise a [writer](crate::writers) puts events on the socket by itself, as chunks of HTTP/1.1
//! (RFC 9112, section 7.1), through the connection's [door](crate::door). Both hold the stream's
//! lock while they do, so events keep their order.

use std::convert::Infallible;
use std::future::Future;
use std::io::Write;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::body::Body;
use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use axum::http::{HeaderValue, Version, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures::task::AtomicWaker;
use hyper::body::{Body as HttpBody, Frame};
use serde::Serialize;
use tokio::time::{Instant, Sleep, sleep};

use crate::door::Door;
use crate::error::ApiError;
use crate::generation::{Counts, Event, Generation};
use crate::wire::{Chunk, Head};
use crate::writers::Queue;

/// Bytes after which a piece of the body goes out even if more events are ready.
const PIECE_BYTES: usize = 16 << 10;
/// Room for the events that a piece usually has.
const PIECE_ROOM_BYTES: usize = 512;
/// Room before a piece for its length in HTTP: hexadecimal digits and a line end.
const LENGTH_BYTES: usize = 2 * size_of::<usize>() + 2;

/// Turns events into chunks of one API.
pub(crate) trait Chunks: Send + 'static {
    /// Writes what the client shall see of an event.
    fn event(&mut self, event: Event, counts: Counts, out: &mut Frames);
    /// Writes what follows the last event.
    fn finish(&mut self, counts: Counts, out: &mut Frames);
}

/// Events under construction.
pub(crate) struct Frames {
    /// What every chunk begins with, up to and without the end of its object.
    head: Vec<u8>,
    /// Events after [`LENGTH_BYTES`] of room.
    bytes: Vec<u8>,
}

impl Frames {
    fn new(head: &Head) -> Frames {
        let mut begin = b"data: ".to_vec();
        write_json(&mut begin, head);
        begin.pop();
        Frames { head: begin, bytes: Frames::room() }
    }

    fn room() -> Vec<u8> {
        let mut bytes = Vec::with_capacity(PIECE_ROOM_BYTES);
        bytes.resize(LENGTH_BYTES, 0);
        bytes
    }

    fn len(&self) -> usize {
        self.bytes.len() - LENGTH_BYTES
    }

    /// Adds one event: the head's fields, then the chunk's.
    pub(crate) fn chunk(&mut self, chunk: &Chunk<'_, impl Serialize>) {
        self.bytes.extend_from_slice(&self.head);
        let at = self.bytes.len();
        write_json(&mut self.bytes, chunk);
        // Both are objects with fields: the second one goes on where the first one has not ended.
        self.bytes[at] = b',';
        self.bytes.extend_from_slice(b"\n\n");
    }

    fn text(&mut self, line: &str) {
        self.bytes.extend_from_slice(line.as_bytes());
        self.bytes.extend_from_slice(b"\n\n");
    }

    /// The events as a piece of a body.
    fn take(&mut self) -> Bytes {
        Bytes::from(std::mem::replace(&mut self.bytes, Frames::room())).slice(LENGTH_BYTES..)
    }

    /// The events as a chunk of HTTP, as hyper would write it.
    fn framed(&mut self) -> &[u8] {
        let mut length = [0; LENGTH_BYTES];
        let mut unused = &mut length[..];
        write!(unused, "{:X}\r\n", self.len()).expect("there is room for every length");
        let used = LENGTH_BYTES - unused.len();
        let begin = LENGTH_BYTES - used;
        self.bytes[begin..LENGTH_BYTES].copy_from_slice(&length[..used]);
        self.bytes.extend_from_slice(b"\r\n");
        &self.bytes[begin..]
    }

    fn clear(&mut self) {
        self.bytes.truncate(LENGTH_BYTES);
    }
}

fn write_json(out: &mut Vec<u8>, value: &impl Serialize) {
    serde_json::to_writer(out, value).expect("chunks have string keys only");
}

/// How writers reach the client of a request.
#[derive(Clone)]
pub(crate) struct Way {
    /// Of the connection; none once it is gone.
    pub(crate) door: Weak<Door>,
    pub(crate) queue: Arc<Queue>,
}

/// A request's [`Way`], if it has one: HTTP/1.0 knows no chunks.
pub(crate) struct MaybeWay(Option<Way>);

impl<S: Sync> FromRequestParts<S> for MaybeWay {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<MaybeWay, Infallible> {
        let way = parts.extensions.remove::<Way>();
        Ok(MaybeWay(way.filter(|_| parts.version == Version::HTTP_11)))
    }
}

/// A streamed answer, as those know it who have something for it.
pub(crate) struct Stream {
    /// From [`Stream::respond`] until the body is gone.
    state: Mutex<Option<State>>,
    way: Option<Way>,
    /// Whether it stands in the writers' queue, or may not yet: the first piece is the task's.
    queued: AtomicBool,
    /// The connection's.
    task: AtomicWaker,
}

struct State {
    /// `None` after its end.
    generation: Option<Generation>,
    chunks: Box<dyn Chunks>,
    frames: Frames,
    /// When something was said.
    last: Instant,
}

impl Stream {
    /// An answer to a request that came this way.
    pub(crate) fn new(MaybeWay(way): MaybeWay) -> Arc<Stream> {
        let (state, queued) = (Mutex::new(None), AtomicBool::new(true));
        Arc::new(Stream { state, way, queued, task: AtomicWaker::new() })
    }

    /// The response that streams a generation, which tells this stream of its tokens.
    pub(crate) fn respond(
        self: Arc<Self>,
        generation: Generation,
        chunks: impl Chunks,
        head: &Head,
        keepalive: Duration,
    ) -> Response {
        let closing = Box::pin(generation.closing());
        let state = State {
            generation: Some(generation),
            chunks: Box::new(chunks),
            frames: Frames::new(head),
            last: Instant::now(),
        };
        *self.state.lock().unwrap_or_else(PoisonError::into_inner) = Some(state);
        let silence = Box::pin(sleep(keepalive));
        let headers = [
            (header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8")),
            (header::CACHE_CONTROL, HeaderValue::from_static("no-cache")),
            // Asks reverse proxies (nginx) not to collect the stream.
            (header::HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no")),
        ];
        let body = Body::new(Pieces { stream: self, begun: false, closing, keepalive, silence });
        (headers, body).into_response()
    }

    /// Something was told to its generation.
    pub(crate) fn told(self: &Arc<Self>) {
        match &self.way {
            Some(way) if !self.queued.swap(true, Ordering::AcqRel) => way.queue.push(self.clone()),
            Some(_) => {}
            None => self.task.wake(),
        }
    }

    /// Writes what was told; for writers. What only the connection's task can do is left to it.
    pub(crate) fn write_out(&self) {
        // Before anything is taken: what comes from now on is queued again.
        self.queued.swap(false, Ordering::AcqRel);
        let Some(door) = self.door() else { return };
        // Poisoned: a writer woke the task already.
        let Ok(mut state) = self.state.lock() else { return };
        let Some(state) = state.as_mut() else { return };
        if !door.is_open() || !state.write(&door) {
            self.task.wake();
        }
    }

    fn door(&self) -> Option<Arc<Door>> {
        self.way.as_ref()?.door.upgrade()
    }

    /// Hyper is given something to write.
    fn shut(&self) {
        if let Some(door) = self.door() {
            door.shut();
        }
    }

    /// Lets the connection's task see to it.
    pub(crate) fn wake(&self) {
        self.task.wake();
    }
}

impl State {
    /// Takes what was told, up to about a piece.
    fn take(&mut self) {
        while self.frames.len() < PIECE_BYTES
            && let Some(generation) = &mut self.generation
        {
            if generation.is_over() {
                self.chunks.finish(generation.counts(), &mut self.frames);
                self.end();
                return;
            }
            match generation.ready() {
                Some(Ok(event)) => {
                    self.chunks.event(event, generation.counts(), &mut self.frames);
                }
                Some(Err(error)) => self.fail(&error),
                None => return,
            }
        }
    }

    fn fail(&mut self, error: &ApiError) {
        tracing::warn!(%error, "a stream failed");
        self.frames.text(&format!("data: {}", error.json()));
        self.end();
    }

    fn end(&mut self) {
        self.frames.text("data: [DONE]");
        // Cancels what still runs, and makes room for the next request.
        self.generation = None;
    }

    /// Takes what was told and writes it; false if the connection's task has to go on, as it has at
    /// the end. The door is open, and stays so: it is shut under the stream's lock.
    fn write(&mut self, door: &Door) -> bool {
        loop {
            self.take();
            if self.generation.is_none() {
                return false;
            }
            if self.frames.len() == 0 {
                return true;
            }
            self.last = Instant::now();
            let whole = door.write(self.frames.framed());
            self.frames.clear();
            if !whole {
                return false;
            }
        }
    }
}

/// A streamed answer as the connection's task has it.
struct Pieces {
    stream: Arc<Stream>,
    /// Whether the first piece was asked for.
    begun: bool,
    /// Ready when the server cancels what runs.
    closing: Pin<Box<dyn Future<Output = ()> + Send>>,
    keepalive: Duration,
    /// Runs out when nothing has been said for as long, or earlier: it is put off when it does,
    /// and not with each event.
    silence: Pin<Box<Sleep>>,
}

impl HttpBody for Pieces {
    type Data = Bytes;
    type Error = ApiError;

    /// The next piece: everything that is ready, at least one event.
    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, ApiError>>> {
        let this = self.get_mut();
        this.stream.task.register(context.waker());
        let Ok(mut state) = this.stream.state.lock() else {
            let message = "an event could not be written: a bug was caught (see the log)";
            return Poll::Ready(Some(Err(ApiError::Internal(message.to_owned()))));
        };
        let Some(state) = state.as_mut() else { return Poll::Ready(None) };
        if !std::mem::replace(&mut this.begun, true) {
            // Hyper has the answer's head, and this takes what has been told so far.
            this.stream.shut();
            this.stream.queued.swap(false, Ordering::AcqRel);
        }
        loop {
            state.take();
            if state.frames.len() > 0 {
                this.stream.shut();
                state.last = Instant::now();
                return Poll::Ready(Some(Ok(Frame::data(state.frames.take()))));
            }
            if state.generation.is_none() {
                this.stream.shut();
                return Poll::Ready(None);
            }
            if this.closing.as_mut().poll(context).is_ready() {
                state.fail(&Generation::cancelled());
                continue;
            }
            ready!(this.silence.as_mut().poll(context));
            let now = Instant::now();
            if now >= state.last + this.keepalive {
                state.frames.text(": still at work");
                state.last = now;
            }
            this.silence.as_mut().reset(state.last + this.keepalive);
        }
    }
}

impl Drop for Pieces {
    /// The client has all of it, or has gone.
    fn drop(&mut self) {
        let state = self.stream.state.lock().unwrap_or_else(PoisonError::into_inner).take();
        // Cancels what still runs; without the lock, which a writer may wait for.
        drop(state);
    }
}
