//! Every way in which the gateway says no, and the only place where HTTP codes are chosen. The
//! body is OpenAI's: `{"error": {"message", "type", "param", "code"}}`.

use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use pomona_text::TextError;
use pomona_types::Refusal;
use serde::Serialize;

/// Why a request is refused or has failed.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub(crate) enum ApiError {
    /// The caller's mistake in a field (or in the body as a whole, without `param`).
    #[error("{message}")]
    Invalid { param: Option<String>, code: Option<&'static str>, message: String },
    /// No key, or a wrong one.
    #[error(
        "this server wants an API key: send the header 'Authorization: Bearer KEY' with one of \
         the keys that the server was started with"
    )]
    Unauthorized,
    /// A model that is not here.
    #[error("the model '{name}' does not exist here; this server serves {served}")]
    UnknownModel { name: String, served: String },
    /// A path that is not here.
    #[error("there is nothing at {path}; the API lives under /v1, see /v1/models")]
    UnknownPath { path: String },
    /// A known path, another method.
    #[error("{path} does not take {method}; see the Allow header")]
    Method { path: String, method: String },
    /// The body is longer than the limit.
    #[error("the body is longer than {limit} bytes, the most this server reads; send less")]
    TooLarge { limit: usize },
    /// The body is not declared as JSON.
    #[error("the body must be JSON: send the header 'Content-Type: application/json'")]
    NotJson,
    /// The body took too long to arrive.
    #[error("the body did not arrive within {seconds} s; send it again")]
    SlowBody { seconds: u64 },
    /// Too much to do.
    #[error("{message}")]
    Overloaded { message: String, retry_after_s: u32 },
    /// Draining, or the replica is down.
    #[error("{0}")]
    Unavailable(String),
    /// Our fault.
    #[error("{0}")]
    Internal(String),
}

#[derive(Serialize)]
struct Body<'a> {
    error: Detail<'a>,
}

#[derive(Serialize)]
struct Detail<'a> {
    message: String,
    r#type: &'static str,
    param: Option<&'a str>,
    code: Option<&'static str>,
}

impl ApiError {
    /// A mistake in the field `param`; the message is a sentence that names it.
    pub(crate) fn field(param: &str, message: impl Into<String>) -> ApiError {
        ApiError::Invalid { param: Some(param.to_owned()), code: None, message: message.into() }
    }

    /// A mistake in the body that no field is to blame for.
    pub(crate) fn body(message: impl Into<String>) -> ApiError {
        ApiError::Invalid { param: None, code: None, message: message.into() }
    }

    /// What a text could not be tokenised or rendered for.
    pub(crate) fn text(param: &str, error: &TextError) -> ApiError {
        match error {
            TextError::Tokenizer(_) => ApiError::Internal(error.to_string()),
            _ => ApiError::field(param, error.to_string()),
        }
    }

    fn parts(&self) -> (StatusCode, &'static str, Option<&'static str>) {
        const REQUEST: &str = "invalid_request_error";
        match self {
            ApiError::Invalid { code, .. } => (StatusCode::BAD_REQUEST, REQUEST, *code),
            ApiError::Unauthorized => (StatusCode::UNAUTHORIZED, REQUEST, Some("invalid_api_key")),
            ApiError::UnknownModel { .. } => {
                (StatusCode::NOT_FOUND, REQUEST, Some("model_not_found"))
            }
            ApiError::UnknownPath { .. } => (StatusCode::NOT_FOUND, REQUEST, Some("unknown_url")),
            ApiError::Method { .. } => {
                (StatusCode::METHOD_NOT_ALLOWED, REQUEST, Some("method_not_supported"))
            }
            ApiError::TooLarge { .. } => {
                (StatusCode::PAYLOAD_TOO_LARGE, REQUEST, Some("request_too_large"))
            }
            ApiError::NotJson => {
                (StatusCode::UNSUPPORTED_MEDIA_TYPE, REQUEST, Some("unsupported_media_type"))
            }
            ApiError::SlowBody { .. } => {
                (StatusCode::REQUEST_TIMEOUT, REQUEST, Some("request_timeout"))
            }
            ApiError::Overloaded { .. } => {
                (StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", Some("rate_limit_exceeded"))
            }
            ApiError::Unavailable(_) => {
                (StatusCode::SERVICE_UNAVAILABLE, "service_unavailable_error", Some("unavailable"))
            }
            ApiError::Internal(_) => {
                (StatusCode::INTERNAL_SERVER_ERROR, "server_error", Some("internal_error"))
            }
        }
    }

    /// The body, as it also stands in an event stream.
    pub(crate) fn json(&self) -> String {
        let (_, kind, code) = self.parts();
        let param = match self {
            ApiError::Invalid { param, .. } => param.as_deref(),
            ApiError::UnknownModel { .. } => Some("model"),
            _ => None,
        };
        let body = Body { error: Detail { message: self.to_string(), r#type: kind, param, code } };
        serde_json::to_string(&body).expect("strings always serialise")
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let (status, ..) = self.parts();
        if matches!(self, ApiError::Internal(_) | ApiError::Unavailable(_)) {
            tracing::warn!(error = %self, "a request failed");
        }
        let mut headers = HeaderMap::new();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        match &self {
            ApiError::Overloaded { retry_after_s, .. } => {
                headers.insert(header::RETRY_AFTER, HeaderValue::from(*retry_after_s));
            }
            ApiError::Unauthorized => {
                headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            }
            // What was not read cannot be skipped: the connection ends here.
            ApiError::TooLarge { .. } | ApiError::SlowBody { .. } => {
                headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
            }
            _ => {}
        }
        (status, headers, self.json()).into_response()
    }
}

impl From<Refusal> for ApiError {
    fn from(refusal: Refusal) -> ApiError {
        let message = refusal.to_string();
        match refusal {
            Refusal::Invalid(_) => ApiError::body(message),
            Refusal::Overloaded { retry_after_s, .. } => {
                ApiError::Overloaded { message, retry_after_s }
            }
            Refusal::Unavailable(_) => ApiError::Unavailable(message),
        }
    }
}
