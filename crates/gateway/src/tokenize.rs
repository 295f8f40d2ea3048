//! `POST /tokenize` and `POST /detokenize`, in vLLM's shapes.

use std::sync::Arc;

use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::{IntoResponse, Response};
use pomona_types::TokenId;
use serde::Serialize;

use crate::error::ApiError;
use crate::fields::Fields;
use crate::gateway::Shared;
use crate::list::List;
use crate::messages::{Conversation, aside};
use crate::server::Caller;

/// Most tokens to turn into text at once.
const TOKENS_MAX: usize = 4 << 20;

#[derive(Serialize)]
struct Tokens {
    count: usize,
    max_model_len: u32,
    tokens: Vec<TokenId>,
    token_strs: Option<Vec<String>>,
}

/// Text or messages to tokens.
pub(crate) async fn tokenize(
    State(shared): State<Arc<Shared>>,
    _: Caller,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    let body = shared.bodies.read(&headers, body).await?;
    let mut fields = Fields::body(&body.text)?;
    let name = fields.string("model")?;
    let model = shared.model(name.as_deref())?;
    let text = fields.string("prompt")?;
    let strings = fields.bool("return_token_strs")?.unwrap_or(false);
    let tokens = if let Some(text) = text {
        let add_special = fields.bool("add_special_tokens")?.unwrap_or(true);
        fields.finish()?;
        let tokenizer = model.served.tokenizer.clone();
        aside(text.len(), move || {
            let tokens = tokenizer.encode(&text, add_special);
            tokens.map_err(|error| ApiError::text("prompt", &error))
        })
        .await?
    } else {
        let conversation = Conversation::take(&mut fields)?;
        fields.finish()?;
        conversation.tokens(&model).await?
    };
    let tokenizer = &model.served.tokenizer;
    let answer = Tokens {
        count: tokens.len(),
        max_model_len: model.served.replica.info().max_model_len,
        token_strs: strings.then(|| tokens.iter().map(|id| tokenizer.token_text(*id)).collect()),
        tokens,
    };
    Ok(Json(answer).into_response())
}

#[derive(Serialize)]
struct Text {
    prompt: String,
}

/// Tokens to text.
pub(crate) async fn detokenize(
    State(shared): State<Arc<Shared>>,
    _: Caller,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    let body = shared.bodies.read(&headers, body).await?;
    let mut fields = Fields::body(&body.text)?;
    let name = fields.string("model")?;
    let model = shared.model(name.as_deref())?;
    let vocab = model.served.replica.info().vocab_size;
    let must = format!("an array of at most {TOKENS_MAX} token ids below {vocab}");
    let list = fields.typed::<List<TokenId, TOKENS_MAX>>("tokens", &must)?;
    let known = list.filter(|List(ids)| ids.iter().all(|id| *id < vocab));
    let List(ids) = known.ok_or_else(|| fields.wrong("tokens", must))?;
    fields.finish()?;
    drop(body);
    let tokenizer = model.served.tokenizer.clone();
    let bytes = ids.len();
    let prompt = aside(bytes, move || Ok(tokenizer.decode(&ids, false))).await?;
    Ok(Json(Text { prompt }).into_response())
}
