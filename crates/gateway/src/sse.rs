//! Server-sent events (WHATWG HTML, section 9.2): a generation as a response body that is pulled
//! by the connection. There is no task behind it: a connection that goes away drops the body, and
//! with it the generation.

use std::convert::Infallible;
use std::pin::Pin;
use std::time::Duration;

use axum::body::Body;
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use serde::Serialize;
use tokio::time::{Instant, Sleep, sleep};

use crate::error::ApiError;
use crate::generation::{Counts, Event, Generation};
use crate::wire::{Chunk, Head};

/// Bytes after which a piece of the body goes out even if more events are ready.
const PIECE_BYTES: usize = 16 << 10;
/// Room for the events that a piece usually has.
const PIECE_ROOM_BYTES: usize = 512;

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
    bytes: Vec<u8>,
}

impl Frames {
    fn new(head: &Head) -> Frames {
        let mut begin = b"data: ".to_vec();
        write_json(&mut begin, head);
        begin.pop();
        Frames { head: begin, bytes: Vec::new() }
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
}

fn write_json(out: &mut Vec<u8>, value: &impl Serialize) {
    serde_json::to_writer(out, value).expect("chunks have string keys only");
}

struct State<C> {
    generation: Option<Generation>,
    chunks: C,
    frames: Frames,
    keepalive: Duration,
    /// Runs out when nothing has been said for as long, or earlier: it is put off when it does,
    /// and not with each event.
    silence: Pin<Box<Sleep>>,
    last: Instant,
}

/// The response that streams a generation.
pub(crate) fn respond<C: Chunks>(
    generation: Generation,
    chunks: C,
    head: &Head,
    keepalive: Duration,
) -> Response {
    let state = State {
        generation: Some(generation),
        chunks,
        frames: Frames::new(head),
        keepalive,
        silence: Box::pin(sleep(keepalive)),
        last: Instant::now(),
    };
    let stream = futures::stream::unfold(state, |mut state| async {
        let piece = state.piece().await?;
        Some((Ok::<Bytes, Infallible>(piece), state))
    });
    let headers = [
        (header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8")),
        (header::CACHE_CONTROL, HeaderValue::from_static("no-cache")),
        // Asks reverse proxies (nginx) not to collect the stream.
        (header::HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no")),
    ];
    (headers, Body::from_stream(stream)).into_response()
}

impl<C: Chunks> State<C> {
    /// The next piece of the body: everything that is ready, at least one event.
    async fn piece(&mut self) -> Option<Bytes> {
        self.frames.bytes = Vec::with_capacity(PIECE_ROOM_BYTES);
        while self.frames.bytes.is_empty() {
            let generation = self.generation.as_mut()?;
            tokio::select! {
                biased;
                event = generation.next() => self.take(event),
                () = self.silence.as_mut() => {
                    let now = Instant::now();
                    if now >= self.last + self.keepalive {
                        self.frames.text(": still at work");
                        self.last = now;
                    }
                    self.silence.as_mut().reset(self.last + self.keepalive);
                }
            }
            while self.frames.bytes.len() < PIECE_BYTES
                && let Some(event) = self.generation.as_mut().and_then(Generation::ready)
            {
                self.take(Some(event));
            }
        }
        self.last = Instant::now();
        Some(Bytes::from(std::mem::take(&mut self.frames.bytes)))
    }

    fn take(&mut self, event: Option<Result<Event, ApiError>>) {
        let Some(generation) = &self.generation else { return };
        let counts = generation.counts();
        let frames = &mut self.frames;
        match event {
            Some(Ok(event)) => {
                self.chunks.event(event, counts, frames);
                return;
            }
            Some(Err(error)) => {
                tracing::warn!(%error, "a stream failed");
                frames.text(&format!("data: {}", error.json()));
            }
            None => self.chunks.finish(counts, frames),
        }
        frames.text("data: [DONE]");
        // Cancels what still runs, and makes room for the next request.
        self.generation = None;
    }
}
