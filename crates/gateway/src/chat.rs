//! `POST /v1/chat/completions`.

use std::sync::Arc;

use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::{IntoResponse, Response};
use pomona_text::Tokenizer;
use pomona_types::Sampling;
use serde::Serialize;

use crate::choice::{Delta, TextRules};
use crate::error::ApiError;
use crate::fields::Fields;
use crate::gateway::{Model, Shared};
use crate::generation::{Counts, Event, Generation, Job};
use crate::logprobs::{ChatLogprobs, PromptLogprobs, prompt_logprobs};
use crate::messages::Conversation;
use crate::options::{Options, StreamOptions, alternatives};
use crate::server::Caller;
use crate::sse::{Chunks, Frames, MaybeWay, Stream};
use crate::wire::{Answer, Chunk, Ending, Head};

/// OpenAI's and vLLM's fields of this endpoint that are not implemented, with the values that ask
/// for nothing.
const UNIMPLEMENTED: &[(&str, &[&str])] = &[
    ("audio", &[]),
    ("best_of", &["1"]),
    ("echo", &["false"]),
    ("function_call", &[r#""none""#, r#""auto""#]),
    ("functions", &["[]"]),
    ("include_reasoning", &["true"]),
    ("mm_processor_kwargs", &["{}"]),
    ("modalities", &[r#"["text"]"#]),
    ("moderation", &[]),
    ("parallel_tool_calls", &["true"]),
    ("prediction", &[]),
    ("prompt_cache_options", &[]),
    ("prompt_cache_retention", &[r#""in_memory""#]),
    ("reasoning_effort", &[]),
    ("response_format", &[r#"{"type":"text"}"#]),
    ("service_tier", &[r#""auto""#, r#""default""#]),
    ("store", &["false"]),
    ("tool_choice", &[r#""none""#, r#""auto""#]),
    ("verbosity", &[r#""medium""#]),
    ("web_search_options", &[]),
];

/// A request, checked.
struct ChatRequest {
    model: Arc<Model>,
    /// As the client called it.
    name: String,
    conversation: Conversation,
    options: Options,
    logprobs: Option<u32>,
}

impl ChatRequest {
    fn parse(shared: &Shared, text: &str) -> Result<ChatRequest, ApiError> {
        let mut fields = Fields::body(text)?;
        let name = fields.string("model")?;
        let model = shared.model(name.as_deref())?;
        let limits = &shared.config.limits;
        let conversation = Conversation::take(&mut fields)?;
        let options = Options::take(&mut fields, &model, limits)?;
        if options.max_tokens == Some(0) {
            return Err(fields.wrong("max_tokens", "at least 1"));
        }
        let wanted = fields.bool("logprobs")?.unwrap_or(false);
        let top = alternatives(&mut fields, "top_logprobs", limits.logprobs)?;
        if top.is_some_and(|top| top > 0) && !wanted {
            return Err(fields.wrong("top_logprobs", "absent unless 'logprobs' is true"));
        }
        if options.prompt_logprobs.is_some() && options.stream.is_some() {
            return Err(fields.wrong("prompt_logprobs", "absent when 'stream' is true"));
        }
        fields.only_defaults(UNIMPLEMENTED)?;
        // Labels for the operator's records, like `user`: none are kept.
        fields.string("safety_identifier")?;
        fields.string("prompt_cache_key")?;
        fields.raw("metadata");
        fields.finish()?;
        let name = name.unwrap_or_else(|| model.name().to_owned());
        let logprobs = wanted.then_some(top.unwrap_or(0));
        Ok(ChatRequest { model, name, conversation, options, logprobs })
    }
}

/// Answers, at once or piece by piece.
pub(crate) async fn create(
    State(shared): State<Arc<Shared>>,
    Caller(tenant): Caller,
    way: MaybeWay,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    let body = shared.bodies.read(&headers, body).await?;
    let request = ChatRequest::parse(&shared, &body.text)?;
    drop(body);
    let ChatRequest { model, name, conversation, options, logprobs } = request;
    let prompt = conversation.tokens(&model).await?;
    if prompt.is_empty() {
        return Err(ApiError::field("messages", "the chat template made no prompt of 'messages'"));
    }
    let max_tokens = options.output_limit(prompt.len(), None, &model)?;
    let job = Job {
        tenant,
        prompts: vec![(prompt.into(), max_tokens)],
        n: options.n,
        sampling: Sampling {
            logprobs,
            prompt_logprobs: options.prompt_logprobs,
            ..options.sampling
        },
        priority: options.priority,
        rules: TextRules {
            stop: options.stop,
            include_stop: options.include_stop,
            skip_special: options.skip_special,
            mute: false,
        },
    };
    let tokenizer = model.served.tokenizer.clone();
    let body = options.stream.map(|_| Stream::new(way));
    let generation = Generation::start(&shared, model, job, body.as_ref())?;
    let number = generation.number();
    if let (Some(stream), Some(body)) = (options.stream, body) {
        let head = Head::new("chatcmpl", "chat.completion.chunk", number, name);
        let begun = vec![false; options.n as usize];
        let chunks = ChatChunks { tokenizer, stream, logprobs: logprobs.is_some(), begun };
        return Ok(body.respond(generation, chunks, &head, shared.config.keepalive));
    }
    let head = Head::new("chatcmpl", "chat.completion", number, name);
    collect(generation, head, &tokenizer, logprobs.is_some(), options.n as usize).await
}

#[derive(Serialize)]
struct ChatChoice {
    index: usize,
    message: Message,
    logprobs: Option<ChatLogprobs>,
    #[serde(flatten)]
    ending: Ending,
}

#[derive(Serialize)]
struct Message {
    role: &'static str,
    content: String,
    refusal: Option<()>,
}

#[derive(Default, Serialize)]
struct ChatExtra {
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_logprobs: Option<PromptLogprobs>,
}

async fn collect(
    mut generation: Generation,
    head: Head,
    tokenizer: &Tokenizer,
    logprobs: bool,
    n: usize,
) -> Result<Response, ApiError> {
    let choice = |index| ChatChoice {
        index,
        message: Message { role: "assistant", content: String::new(), refusal: None },
        logprobs: logprobs.then(ChatLogprobs::empty),
        ending: Ending::default(),
    };
    let mut choices: Vec<ChatChoice> = (0..n).map(choice).collect();
    let mut extra = ChatExtra::default();
    while let Some(event) = generation.next().await {
        let (index, delta) = match event? {
            Event::Prompt { logprobs, .. } => {
                extra.prompt_logprobs = Some(prompt_logprobs(tokenizer, &logprobs));
                continue;
            }
            Event::Delta { index, delta } => (index, delta),
            Event::End { index, delta, end } => {
                choices[index].ending = end.into();
                (index, delta)
            }
        };
        let choice = &mut choices[index];
        choice.message.content.push_str(&delta.text);
        if let Some(list) = &mut choice.logprobs {
            list.content.extend(ChatLogprobs::new(tokenizer, &delta.scored).content);
        }
    }
    let usage = generation.counts().into();
    Ok(Json(Answer { head, choices, usage, extra }).into_response())
}

/// Writes chunks.
struct ChatChunks {
    tokenizer: Arc<Tokenizer>,
    stream: StreamOptions,
    logprobs: bool,
    /// By choice: whether its role has been told.
    begun: Vec<bool>,
}

#[derive(Serialize)]
struct ChunkChoice {
    index: usize,
    delta: MessageDelta,
    logprobs: Option<ChatLogprobs>,
    #[serde(flatten)]
    ending: Ending,
}

#[derive(Default, Serialize)]
struct MessageDelta {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<String>,
}

impl ChatChunks {
    fn write(&self, choice: ChunkChoice, counts: Counts, out: &mut Frames) {
        let usage = self.stream.usage(counts);
        out.chunk(&Chunk { choices: &[choice], usage });
    }

    fn delta(&mut self, index: usize, delta: Delta, counts: Counts, out: &mut Frames) {
        if !std::mem::replace(&mut self.begun[index], true) {
            let role = MessageDelta { role: Some("assistant"), content: Some(String::new()) };
            let ending = Ending::default();
            let choice = ChunkChoice { index, delta: role, logprobs: None, ending };
            self.write(choice, counts, out);
        }
        if delta.text.is_empty() && delta.scored.is_empty() {
            return;
        }
        let logprobs = self.logprobs.then(|| ChatLogprobs::new(&self.tokenizer, &delta.scored));
        let delta = MessageDelta { role: None, content: Some(delta.text) };
        let ending = Ending::default();
        self.write(ChunkChoice { index, delta, logprobs, ending }, counts, out);
    }
}

impl Chunks for ChatChunks {
    fn event(&mut self, event: Event, counts: Counts, out: &mut Frames) {
        match event {
            // Refused together with `stream`.
            Event::Prompt { .. } => {}
            Event::Delta { index, delta } => self.delta(index, delta, counts, out),
            Event::End { index, delta, end } => {
                self.delta(index, delta, counts, out);
                let (delta, ending) = (MessageDelta::default(), end.into());
                self.write(ChunkChoice { index, delta, logprobs: None, ending }, counts, out);
            }
        }
    }

    fn finish(&mut self, counts: Counts, out: &mut Frames) {
        if self.stream.include_usage {
            let usage = Some(Some(counts.into()));
            out.chunk(&Chunk::<ChunkChoice> { choices: &[], usage });
        }
    }
}
