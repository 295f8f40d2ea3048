//! `POST /v1/completions`: text or tokens in, their continuation out.

use std::sync::Arc;

use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::{IntoResponse, Response};
use pomona_text::Tokenizer;
use pomona_types::{Sampling, TokenId, TokenLogprobs};
use serde::Serialize;
use serde_json::value::RawValue;

use crate::choice::{Delta, TextRules};
use crate::error::ApiError;
use crate::fields::Fields;
use crate::gateway::{Model, Shared};
use crate::generation::{Counts, Event, Generation, Job};
use crate::list::List;
use crate::logprobs::{PromptLogprobs, TextLogprobs, prompt_logprobs};
use crate::messages::aside;
use crate::options::{Options, StreamOptions, alternatives};
use crate::server::Caller;
use crate::sse::{Chunks, Frames, MaybeWay, Stream};
use crate::wire::{Answer, Chunk, Ending, Head};

/// Output tokens when the request does not say (OpenAI API reference, "Create completion").
const MAX_TOKENS_DEFAULT: u32 = 16;
/// Most prompts of a request, before `limits.choices` is looked at.
const PROMPTS_MAX: usize = 4096;
/// Most tokens of one prompt, before the model's context is looked at.
const PROMPT_TOKENS_MAX: usize = 4 << 20;

/// OpenAI's and vLLM's fields of this endpoint that are not implemented, with the values that ask
/// for nothing.
const UNIMPLEMENTED: &[(&str, &[&str])] = &[
    ("response_format", &[r#"{"type":"text"}"#]),
    ("service_tier", &[r#""auto""#, r#""default""#]),
    ("store", &["false"]),
    ("suffix", &[r#""""#]),
];

/// A prompt as it came.
enum Prompt {
    Text(String),
    Tokens(Vec<TokenId>),
}

/// A request, checked.
struct TextRequest {
    model: Arc<Model>,
    /// As the client called it.
    name: String,
    prompts: Vec<Prompt>,
    options: Options,
    logprobs: Option<u32>,
    echo: bool,
    add_special: bool,
}

impl TextRequest {
    fn parse(shared: &Shared, text: &str) -> Result<TextRequest, ApiError> {
        let mut fields = Fields::body(text)?;
        let name = fields.string("model")?;
        let model = shared.model(name.as_deref())?;
        let limits = &shared.config.limits;
        let prompts = prompts(&mut fields)?;
        let options = Options::take(&mut fields, &model, limits)?;
        let logprobs = alternatives(&mut fields, "logprobs", limits.logprobs)?;
        let echo = fields.bool("echo")?.unwrap_or(false);
        let add_special = fields.bool("add_special_tokens")?.unwrap_or(true);
        if options.max_tokens == Some(0) && !echo {
            return Err(fields.wrong("max_tokens", "at least 1, unless 'echo' is true"));
        }
        if options.prompt_logprobs.is_some() && options.stream.is_some() {
            return Err(fields.wrong("prompt_logprobs", "absent when 'stream' is true"));
        }
        // Like OpenAI, but without candidates beyond those that are returned.
        if let Some(best_of) = fields.integer("best_of", 1..=i64::from(limits.choices))?
            && best_of != i64::from(options.n)
        {
            return Err(
                fields.wrong("best_of", "absent or equal to 'n': candidates are not ranked")
            );
        }
        fields.only_defaults(UNIMPLEMENTED)?;
        fields.finish()?;
        let choices = prompts.len() * options.n as usize;
        if choices > limits.choices as usize {
            let message = format!(
                "'prompt' with 'n' asks for {choices} choices, more than the {} that one request \
                 may have",
                limits.choices
            );
            return Err(ApiError::field("prompt", message));
        }
        let name = name.unwrap_or_else(|| model.name().to_owned());
        Ok(TextRequest { model, name, prompts, options, logprobs, echo, add_special })
    }
}

fn prompts(fields: &mut Fields<'_>) -> Result<Vec<Prompt>, ApiError> {
    const NAME: &str = "prompt";
    let must = format_args!(
        "a string, an array of token ids, or an array of at most {PROMPTS_MAX} strings or arrays \
         of token ids, and not empty"
    );
    let raw = fields.raw(NAME).ok_or_else(|| fields.wrong(NAME, must))?;
    let tokens = |text: &str| {
        let list = serde_json::from_str::<List<TokenId, PROMPT_TOKENS_MAX>>(text).ok();
        list.filter(|List(ids)| !ids.is_empty()).map(|List(ids)| Prompt::Tokens(ids))
    };
    let string = |text: &str| serde_json::from_str::<String>(text).ok().map(Prompt::Text);
    let one = |text: &str| if text.starts_with('"') { string(text) } else { tokens(text) };
    if let Some(prompt) = one(raw.get()) {
        return Ok(vec![prompt]);
    }
    let list = serde_json::from_str::<List<&RawValue, PROMPTS_MAX>>(raw.get()).ok();
    let all = list.and_then(|List(raws)| raws.iter().map(|raw| one(raw.get())).collect());
    all.filter(|all: &Vec<Prompt>| !all.is_empty()).ok_or_else(|| fields.wrong(NAME, must))
}

/// A prompt ready to run.
struct Ready {
    tokens: Arc<[TokenId]>,
    /// What `echo` shows.
    text: String,
}

/// Tokenises, and refuses what the vocabulary lacks.
async fn ready(
    model: &Arc<Model>,
    prompts: Vec<Prompt>,
    add_special: bool,
    echo: bool,
) -> Result<Vec<Ready>, ApiError> {
    let size = |prompt: &Prompt| match prompt {
        Prompt::Text(text) => text.len(),
        Prompt::Tokens(ids) => ids.len(),
    };
    let bytes = prompts.iter().map(size).sum();
    let tokenizer = model.served.tokenizer.clone();
    let vocab = model.served.replica.info().vocab_size;
    let work = move |prompt| match prompt {
        Prompt::Text(text) => {
            let tokens = tokenizer
                .encode(&text, add_special)
                .map_err(|error| ApiError::text("prompt", &error))?;
            if tokens.is_empty() {
                return Err(ApiError::field("prompt", "'prompt' must not be empty"));
            }
            Ok(Ready { tokens: tokens.into(), text })
        }
        Prompt::Tokens(ids) => {
            if let Some(id) = ids.iter().find(|id| **id >= vocab) {
                let message = format!("'prompt' holds the token {id}; ids are below {vocab}");
                return Err(ApiError::field("prompt", message));
            }
            let text = if echo { tokenizer.decode(&ids, true) } else { String::new() };
            Ok(Ready { tokens: ids.into(), text })
        }
    };
    aside(bytes, move || prompts.into_iter().map(work).collect()).await
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
    let request = TextRequest::parse(&shared, &body.text)?;
    drop(body);
    let TextRequest { model, name, prompts, options, logprobs, echo, add_special } = request;
    let prompts = ready(&model, prompts, add_special, echo).await?;
    let mute = options.max_tokens == Some(0);
    let mut limited = Vec::with_capacity(prompts.len());
    for prompt in &prompts {
        let most = options.output_limit(prompt.tokens.len(), Some(MAX_TOKENS_DEFAULT), &model)?;
        limited.push((prompt.tokens.clone(), most.max(1)));
    }
    let wanted = options.prompt_logprobs;
    let job = Job {
        tenant,
        prompts: limited,
        n: options.n,
        sampling: Sampling {
            logprobs,
            prompt_logprobs: if echo { wanted.max(logprobs) } else { wanted },
            ..options.sampling
        },
        priority: options.priority,
        rules: TextRules {
            stop: options.stop,
            include_stop: options.include_stop,
            skip_special: options.skip_special,
            mute,
        },
    };
    let n = options.n as usize;
    let mut columns = Columns::new(model.served.tokenizer.clone(), prompts, n);
    (columns.echo, columns.logprobs, columns.raw) = (echo, logprobs, wanted);
    let body = options.stream.map(|_| Stream::new(way));
    let generation = Generation::start(&shared, model, job, body.as_ref())?;
    let head = Head::new("cmpl", "text_completion", generation.number(), name);
    if let (Some(stream), Some(body)) = (options.stream, body) {
        let chunks = TextChunks { columns, stream };
        return Ok(body.respond(generation, chunks, &head, shared.config.keepalive));
    }
    collect(generation, head, columns).await
}

/// Makes text and columns of log-probabilities from events, with the prompt in front if wanted.
struct Columns {
    tokenizer: Arc<Tokenizer>,
    prompts: Vec<Ready>,
    n: usize,
    echo: bool,
    logprobs: Option<u32>,
    /// Alternatives in `prompt_logprobs`, if the request wants that field.
    raw: Option<u32>,
    /// By choice: whether the prompt has been shown.
    begun: Vec<bool>,
}

impl Columns {
    fn new(tokenizer: Arc<Tokenizer>, prompts: Vec<Ready>, n: usize) -> Columns {
        let begun = vec![false; prompts.len() * n];
        Columns { tokenizer, prompts, n, echo: false, logprobs: None, raw: None, begun }
    }

    /// The prompt's text and columns, when it is to be echoed and has not been.
    fn prompt(
        &mut self,
        index: usize,
        logprobs: &[Option<TokenLogprobs>],
    ) -> Option<(String, Option<TextLogprobs>)> {
        if !self.echo || std::mem::replace(&mut self.begun[index], true) {
            return None;
        }
        let prompt = &self.prompts[index / self.n];
        let columns = self.logprobs.map(|top| {
            let mut columns = TextLogprobs::default();
            let cut: Vec<_> =
                logprobs.iter().map(|lp| lp.as_ref().map(|lp| cut(lp, top))).collect();
            columns.prompt(&self.tokenizer, &prompt.tokens, &cut);
            columns
        });
        Some((prompt.text.clone(), columns))
    }

    /// The columns of a piece of the answer.
    fn answer(&self, index: usize, delta: &Delta) -> Option<TextLogprobs> {
        self.logprobs?;
        let prompt = &self.prompts[index / self.n].text;
        let shift = if self.echo { prompt.chars().count() } else { 0 };
        let mut columns = TextLogprobs::default();
        columns.extend(&self.tokenizer, &delta.scored, shift);
        Some(columns)
    }
}

/// The replica is asked once, for the larger of two numbers of alternatives.
fn cut(logprobs: &TokenLogprobs, top: u32) -> TokenLogprobs {
    let mut logprobs = logprobs.clone();
    logprobs.top.truncate(top as usize);
    logprobs
}

#[derive(Default, Serialize)]
struct TextChoice {
    index: usize,
    text: String,
    logprobs: Option<TextLogprobs>,
    #[serde(flatten)]
    ending: Ending,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_logprobs: Option<PromptLogprobs>,
}

#[derive(Serialize)]
struct NoExtra {}

async fn collect(
    mut generation: Generation,
    head: Head,
    mut columns: Columns,
) -> Result<Response, ApiError> {
    let choices = columns.prompts.len() * columns.n;
    let mut choices: Vec<TextChoice> =
        (0..choices).map(|index| TextChoice { index, ..TextChoice::default() }).collect();
    while let Some(event) = generation.next().await {
        let (index, delta) = match event? {
            Event::Prompt { index, logprobs } => {
                if let Some(top) = columns.raw {
                    let cut: Vec<_> =
                        logprobs.iter().map(|lp| lp.as_ref().map(|lp| cut(lp, top))).collect();
                    choices[index].prompt_logprobs =
                        Some(prompt_logprobs(&columns.tokenizer, &cut));
                }
                choices[index].show(columns.prompt(index, &logprobs));
                continue;
            }
            Event::Delta { index, delta } => (index, delta),
            Event::End { index, delta, end } => {
                choices[index].ending = end.into();
                (index, delta)
            }
        };
        let choice = &mut choices[index];
        choice.show(columns.prompt(index, &[]));
        choice.show(Some((delta.text.clone(), columns.answer(index, &delta))));
    }
    let usage = generation.counts().into();
    Ok(Json(Answer { head, choices, usage, extra: NoExtra {} }).into_response())
}

impl TextChoice {
    fn show(&mut self, piece: Option<(String, Option<TextLogprobs>)>) {
        let Some((text, columns)) = piece else { return };
        self.text.push_str(&text);
        match (&mut self.logprobs, columns) {
            (Some(all), Some(columns)) => all.append(columns),
            (all @ None, columns) => *all = columns,
            (Some(_), None) => {}
        }
    }
}

/// Writes chunks.
struct TextChunks {
    columns: Columns,
    stream: StreamOptions,
}

impl TextChunks {
    fn write(&self, choice: TextChoice, counts: Counts, out: &mut Frames) {
        let usage = self.stream.usage(counts);
        out.chunk(&Chunk { choices: &[choice], usage });
    }

    fn echo(
        &mut self,
        index: usize,
        list: &[Option<TokenLogprobs>],
        counts: Counts,
        out: &mut Frames,
    ) {
        if let Some((text, logprobs)) = self.columns.prompt(index, list) {
            let choice = TextChoice { index, text, logprobs, ..TextChoice::default() };
            self.write(choice, counts, out);
        }
    }
}

impl Chunks for TextChunks {
    fn event(&mut self, event: Event, counts: Counts, out: &mut Frames) {
        let (index, delta, ending) = match event {
            Event::Prompt { index, logprobs } => return self.echo(index, &logprobs, counts, out),
            Event::Delta { index, delta } => (index, delta, None),
            Event::End { index, delta, end } => (index, delta, Some(end)),
        };
        self.echo(index, &[], counts, out);
        if !delta.text.is_empty() || !delta.scored.is_empty() {
            let logprobs = self.columns.answer(index, &delta);
            let choice = TextChoice { index, text: delta.text, logprobs, ..TextChoice::default() };
            self.write(choice, counts, out);
        }
        if let Some(end) = ending {
            let choice = TextChoice { index, ending: end.into(), ..TextChoice::default() };
            self.write(choice, counts, out);
        }
    }

    fn finish(&mut self, counts: Counts, out: &mut Frames) {
        if self.stream.include_usage {
            let usage = Some(Some(counts.into()));
            out.chunk(&Chunk::<TextChoice> { choices: &[], usage });
        }
    }
}
