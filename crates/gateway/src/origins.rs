//! Which other sites' pages may call the API from a browser (Fetch standard, "CORS protocol").

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, Method, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use crate::access::REQUEST_ID;
use crate::gateway::Shared;

/// Lets pages of allowed origins in; for others nothing is added, and browsers refuse.
pub(crate) async fn allow(
    State(shared): State<Arc<Shared>>,
    request: Request,
    next: Next,
) -> Response {
    let Some(origin) = permitted(&shared.config.allowed_origins, request.headers()) else {
        return next.run(request).await;
    };
    let preflight = request.method() == Method::OPTIONS
        && request.headers().contains_key(header::ACCESS_CONTROL_REQUEST_METHOD);
    let mut response = if preflight {
        let headers = [
            (header::ACCESS_CONTROL_ALLOW_METHODS, HeaderValue::from_static("GET, POST")),
            // The openai package sends a dozen headers of its own; credentials are never cookies.
            (
                header::ACCESS_CONTROL_ALLOW_HEADERS,
                request
                    .headers()
                    .get(header::ACCESS_CONTROL_REQUEST_HEADERS)
                    .cloned()
                    .unwrap_or(HeaderValue::from_static("authorization, content-type")),
            ),
            (header::ACCESS_CONTROL_MAX_AGE, HeaderValue::from_static("600")),
        ];
        headers.into_response()
    } else {
        next.run(request).await
    };
    response.headers_mut().insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
    response.headers_mut().insert(header::ACCESS_CONTROL_EXPOSE_HEADERS, REQUEST_ID.into());
    response.headers_mut().append(header::VARY, HeaderValue::from_static("origin"));
    response
}

fn permitted(allowed: &[String], headers: &HeaderMap) -> Option<HeaderValue> {
    let origin = headers.get(header::ORIGIN)?;
    let known = allowed.iter().any(|known| known == "*" || known.as_bytes() == origin.as_bytes());
    known.then(|| origin.clone())
}
