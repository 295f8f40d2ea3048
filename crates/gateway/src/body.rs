//! Reading a request's body within limits: bytes, time, and all bodies together.

use std::sync::Arc;

use axum::body::Body;
use axum::http::{HeaderMap, header};
use http_body_util::{BodyExt, Limited};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::config::Limits;
use crate::error::ApiError;

/// The unit in which the bytes of all bodies are counted.
const GRAIN_BYTES: usize = 1024;
/// When to come back after the bodies of others were in the way.
const RETRY_AFTER_S: u32 = 1;

/// Bytes that bodies may hold at once.
#[derive(Clone)]
pub(crate) struct BodyBudget {
    grains: Arc<Semaphore>,
    limits: Limits,
}

/// A body as text. Its bytes count until it is dropped.
pub(crate) struct JsonBody {
    pub(crate) text: String,
    _permit: OwnedSemaphorePermit,
}

impl BodyBudget {
    /// Room for `limits.bodies_bytes`, and for at least one body of the full size.
    pub(crate) fn new(limits: &Limits) -> BodyBudget {
        let bytes = limits.bodies_bytes.max(limits.body_bytes);
        let grains = grains(bytes).min(Semaphore::MAX_PERMITS);
        BodyBudget { grains: Arc::new(Semaphore::new(grains)), limits: limits.clone() }
    }

    /// Reads a body that claims to be JSON.
    pub(crate) async fn read(&self, headers: &HeaderMap, body: Body) -> Result<JsonBody, ApiError> {
        if !is_json(headers) {
            return Err(ApiError::NotJson);
        }
        let limit = self.limits.body_bytes;
        let declared = headers
            .get(header::CONTENT_LENGTH)
            .and_then(|value| value.to_str().ok())
            .and_then(|value| value.parse::<usize>().ok());
        if declared.is_some_and(|bytes| bytes > limit) {
            return Err(ApiError::TooLarge { limit });
        }
        // A body of unknown length may become as long as the limit.
        let wanted = grains(declared.unwrap_or(limit)).min(u32::MAX as usize) as u32;
        let permit = self.grains.clone().try_acquire_many_owned(wanted).map_err(|_| {
            let message = "too many large requests are being read at once; retry shortly";
            ApiError::Overloaded { message: message.to_owned(), retry_after_s: RETRY_AFTER_S }
        })?;
        let read = Limited::new(body, limit).collect();
        let bytes = match tokio::time::timeout(self.limits.body_timeout, read).await {
            Err(_) => {
                return Err(ApiError::SlowBody { seconds: self.limits.body_timeout.as_secs() });
            }
            Ok(Err(error)) if error.is::<http_body_util::LengthLimitError>() => {
                return Err(ApiError::TooLarge { limit });
            }
            Ok(Err(error)) => {
                return Err(ApiError::body(format!("the body could not be read: {error}")));
            }
            Ok(Ok(collected)) => collected.to_bytes(),
        };
        let text = String::from_utf8(bytes.into()).map_err(|error| {
            let at = error.utf8_error().valid_up_to();
            ApiError::body(format!("the body is not valid UTF-8: byte {at} cannot stand there"))
        })?;
        Ok(JsonBody { text, _permit: permit })
    }
}

fn grains(bytes: usize) -> usize {
    bytes.div_ceil(GRAIN_BYTES).max(1)
}

/// Asking for the type keeps other sites' pages from posting here without a preflight (Fetch
/// standard, "CORS-safelisted request-header").
fn is_json(headers: &HeaderMap) -> bool {
    let Some(value) = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok())
    else {
        return false;
    };
    let essence = value.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    essence == "application/json"
        || (essence.starts_with("application/") && essence.ends_with("+json"))
}
