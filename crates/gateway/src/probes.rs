//! What watches the server from outside asks: `/health`, `/ready`, `/version`, `/metrics`. None of
//! them asks for a key, as with vLLM.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use serde_json::json;

use crate::error::ApiError;
use crate::gateway::{Phase, Shared};
use crate::metrics::{Scrape, expose};

/// The content type of Prometheus' text format.
const EXPOSITION_TYPE: HeaderValue =
    HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");

/// Whether the engine makes progress: fails when it is down, or when requests run and no step has
/// ended for `stall_after`.
pub(crate) async fn health(State(shared): State<Arc<Shared>>) -> Result<Response, ApiError> {
    let steps = check(&shared)?;
    Ok(Json(json!({ "status": "ok", "steps": steps })).into_response())
}

/// Whether new requests are welcome.
pub(crate) async fn ready(State(shared): State<Arc<Shared>>) -> Result<Response, ApiError> {
    if *shared.phase.borrow() != Phase::Open {
        return Err(ApiError::Unavailable("the server is shutting down".to_owned()));
    }
    check(&shared)?;
    Ok(Json(json!({ "status": "ready" })).into_response())
}

fn check(shared: &Shared) -> Result<u64, ApiError> {
    let mut steps = 0;
    for model in &shared.models {
        let load = model.served.replica.load();
        if let Some(reason) = load.down {
            let message = format!("the engine of '{}' is down: {reason}", model.name());
            return Err(ApiError::Unavailable(message));
        }
        let stalled_ms = load.stalled_for.0 / 1000;
        let work = load.running + load.waiting;
        if work > 0 && u128::from(stalled_ms) >= shared.config.stall_after.as_millis() {
            return Err(ApiError::Unavailable(format!(
                "the engine of '{}' hangs: {work} requests wait, and no step has ended for \
                 {stalled_ms} ms",
                model.name()
            )));
        }
        steps += load.steps;
    }
    Ok(steps)
}

/// Which Pomona this is.
pub(crate) async fn version() -> Response {
    Json(json!({ "version": env!("CARGO_PKG_VERSION") })).into_response()
}

/// Everything that is counted.
pub(crate) async fn metrics(State(shared): State<Arc<Shared>>) -> Response {
    let scrapes: Vec<Scrape<'_>> = shared
        .models
        .iter()
        .map(|model| Scrape {
            name: model.name(),
            load: model.served.replica.load(),
            experts: model.served.replica.experts(),
            metrics: &model.metrics,
        })
        .collect();
    ([(header::CONTENT_TYPE, EXPOSITION_TYPE)], expose(&scrapes, &shared.responses)).into_response()
}
