//! `GET /v1/models`: what is served.

use std::sync::Arc;

use axum::Json;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use axum::response::{IntoResponse, Response};
use serde::Serialize;

use crate::error::ApiError;
use crate::gateway::{Model, Shared};
use crate::server::Caller;

#[derive(Serialize)]
struct List<'a> {
    object: &'static str,
    data: Vec<Card<'a>>,
}

/// OpenAI's fields, and those of vLLM that mean something here.
#[derive(Serialize)]
struct Card<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    owned_by: &'static str,
    root: &'a str,
    parent: Option<()>,
    max_model_len: u32,
    /// Whether it has a chat template; without one it only continues texts.
    chat: bool,
}

fn card<'a>(shared: &Shared, model: &'a Model, name: &'a str) -> Card<'a> {
    let info = model.served.replica.info();
    Card {
        id: name,
        object: "model",
        created: shared.started,
        owned_by: "pomona",
        root: &info.model,
        parent: None,
        max_model_len: info.max_model_len,
        chat: model.served.template.is_some(),
    }
}

/// All models, each under all its names.
pub(crate) async fn list(State(shared): State<Arc<Shared>>, _: Caller) -> Response {
    let cards = shared.models.iter().flat_map(|model| {
        let names = model.served.names.iter();
        names.map(|name| card(&shared, model, name)).collect::<Vec<_>>()
    });
    Json(List { object: "list", data: cards.collect() }).into_response()
}

/// One model, by any of its names.
pub(crate) async fn retrieve(
    State(shared): State<Arc<Shared>>,
    _: Caller,
    name: Result<Path<String>, PathRejection>,
) -> Result<Response, ApiError> {
    let Path(name) = name.map_err(|error| ApiError::field("model", error.body_text()))?;
    let model = shared.model(Some(&name))?;
    Ok(Json(card(&shared, &model, &name)).into_response())
}
