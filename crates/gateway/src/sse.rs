//! Server-sent events (WHATWG HTML, section 9.2): a generation as a response body that is pulled
//! by the connection. There is no task behind it: a connection that goes away drops the body, and
//! with it the generation.

use std::convert::Infallible;
use std::time::Duration;

use axum::body::Body;
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use serde::Serialize;

use crate::error::ApiError;
use crate::generation::{Counts, Event, Generation};

/// Bytes after which a piece of the body goes out even if more events are ready.
const PIECE_BYTES: usize = 16 << 10;

/// Turns events into chunks of one API.
pub(crate) trait Chunks: Send + 'static {
    /// Writes what the client shall see of an event.
    fn event(&mut self, event: Event, counts: Counts, out: &mut Frames);
    /// Writes what follows the last event.
    fn finish(&mut self, counts: Counts, out: &mut Frames);
}

/// Events under construction.
#[derive(Default)]
pub(crate) struct Frames {
    bytes: Vec<u8>,
}

impl Frames {
    /// Adds one event with a JSON value.
    pub(crate) fn json(&mut self, value: &impl Serialize) {
        self.bytes.extend_from_slice(b"data: ");
        serde_json::to_writer(&mut self.bytes, value).expect("chunks have string keys only");
        self.bytes.extend_from_slice(b"\n\n");
    }

    fn text(&mut self, line: &str) {
        self.bytes.extend_from_slice(line.as_bytes());
        self.bytes.extend_from_slice(b"\n\n");
    }
}

struct State<C> {
    generation: Option<Generation>,
    chunks: C,
    keepalive: Duration,
}

/// The response that streams a generation.
pub(crate) fn respond<C: Chunks>(
    generation: Generation,
    chunks: C,
    keepalive: Duration,
) -> Response {
    let state = State { generation: Some(generation), chunks, keepalive };
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
        let mut frames = Frames::default();
        while frames.bytes.is_empty() {
            let generation = self.generation.as_mut()?;
            match tokio::time::timeout(self.keepalive, generation.next()).await {
                Err(_) => frames.text(": still at work"),
                Ok(event) => self.take(event, &mut frames),
            }
            while frames.bytes.len() < PIECE_BYTES
                && let Some(event) = self.generation.as_mut().and_then(Generation::ready)
            {
                self.take(Some(event), &mut frames);
            }
        }
        Some(Bytes::from(frames.bytes))
    }

    fn take(&mut self, event: Option<Result<Event, ApiError>>, frames: &mut Frames) {
        let Some(generation) = &self.generation else { return };
        let counts = generation.counts();
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
