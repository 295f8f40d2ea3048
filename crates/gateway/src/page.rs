//! The chat page, built into the binary. It loads nothing from elsewhere, and its policy forbids
//! that anything else does.

use axum::http::{HeaderName, HeaderValue, header};
use axum::response::{IntoResponse, Response};

/// Only our own files run and load; images may be inline (the icon).
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; \
    connect-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; \
    frame-ancestors 'none'";

fn file(kind: &'static str, text: &'static str) -> Response {
    let headers: [(HeaderName, HeaderValue); 5] = [
        (header::CONTENT_TYPE, HeaderValue::from_static(kind)),
        (header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(POLICY)),
        (header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
        (header::REFERRER_POLICY, HeaderValue::from_static("no-referrer")),
        (header::CACHE_CONTROL, HeaderValue::from_static("no-cache")),
    ];
    (headers, text).into_response()
}

/// `/`
pub(crate) async fn index() -> Response {
    file("text/html; charset=utf-8", include_str!("../../../web/index.html"))
}

/// `/page.css`
pub(crate) async fn style() -> Response {
    file("text/css; charset=utf-8", include_str!("../../../web/page.css"))
}

/// `/page.js`
pub(crate) async fn script() -> Response {
    file("text/javascript; charset=utf-8", include_str!("../../../web/page.js"))
}

/// `/markdown.js`
pub(crate) async fn markdown() -> Response {
    file("text/javascript; charset=utf-8", include_str!("../../../web/markdown.js"))
}

/// `/favicon.ico`, for browsers that ask although the page names its icon.
pub(crate) async fn icon() -> Response {
    file("image/svg+xml", include_str!("../../../web/icon.svg"))
}
