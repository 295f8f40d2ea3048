//! The name of each request, which its answer carries as `x-request-id`, and the line that the log
//! gets when it is over. A line has method, path, status and time; never a query, a header but the
//! name, or a text.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method};
use axum::middleware::Next;
use axum::response::Response;
use bytes::Bytes;
use hyper::body::{Body as HttpBody, Frame, SizeHint};

use crate::gateway::Shared;

/// The header that carries a request's name, in both directions.
pub(crate) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Longest name that is taken over from a client.
const REQUEST_ID_BYTES_MAX: usize = 128;

/// Names the answer and, if the configuration wants it, writes the request's line.
pub(crate) async fn record(
    State(shared): State<Arc<Shared>>,
    request: Request,
    next: Next,
) -> Response {
    let id = request_id(&shared, request.headers());
    let line = shared.config.access_log.then(|| Line::begin(&request, id.clone()));
    let mut response = next.run(request).await;
    response.headers_mut().insert(REQUEST_ID, id);
    let Some(mut line) = line else { return response };
    line.status = Some(response.status().as_u16());
    response.map(|body| Body::new(Logged::new(body, line)))
}

/// The client's name for its request if it is short and printable, else one of ours.
fn request_id(shared: &Shared, headers: &HeaderMap) -> HeaderValue {
    let sane = |value: &&HeaderValue| {
        let bytes = value.as_bytes();
        (1..=REQUEST_ID_BYTES_MAX).contains(&bytes.len()) && bytes.iter().all(u8::is_ascii_graphic)
    };
    headers.get(REQUEST_ID).filter(sane).cloned().unwrap_or_else(|| {
        let name = format!("req-{:016x}", shared.request_id().0);
        HeaderValue::try_from(name).expect("letters and digits make a header")
    })
}

/// A line of the log, written when it is dropped: at the end of the answer, however it ends.
struct Line {
    method: Method,
    path: String,
    id: HeaderValue,
    begun: Instant,
    /// `None` until there is an answer.
    status: Option<u16>,
    /// Whether the answer was handed over to its end.
    complete: bool,
}

impl Line {
    fn begin(request: &Request, id: HeaderValue) -> Line {
        Line {
            method: request.method().clone(),
            path: crate::fields::shortened(request.uri().path()),
            id,
            begun: Instant::now(),
            status: None,
            complete: false,
        }
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        let Line { method, path, begun, .. } = self;
        let ms = begun.elapsed().as_millis();
        let status = self.status.map_or("-".to_owned(), |status| status.to_string());
        let left = if self.complete { "" } else { ", the client left" };
        let id = self.id.to_str().unwrap_or_default();
        tracing::info!(id, "{method} {path} {status} {ms} ms{left}");
    }
}

/// An answer's body with the line that is due when it ends.
struct Logged {
    body: Body,
    line: Line,
}

impl Logged {
    fn new(body: Body, mut line: Line) -> Logged {
        // The body of an answer to HEAD is never asked for.
        line.complete = body.is_end_stream() || line.method == Method::HEAD;
        Logged { body, line }
    }
}

impl HttpBody for Logged {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let polled = Pin::new(&mut self.body).poll_frame(context);
        self.line.complete |= matches!(polled, Poll::Ready(None)) || self.body.is_end_stream();
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
