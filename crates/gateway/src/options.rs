//! What chat and completions have in common: how to sample, when to stop, how to answer. Names and
//! meanings are OpenAI's, and vLLM's for what OpenAI does not have.

use std::collections::BTreeMap;

use pomona_types::{Sampling, TokenId};
use serde_json::Number;

use crate::config::Limits;
use crate::error::ApiError;
use crate::fields::Fields;
use crate::gateway::Model;
use crate::list::{List, Strings};

/// Most stop strings of a request.
const STOP_STRINGS_MAX: usize = 32;
/// Longest stop string.
const STOP_BYTES_MAX: usize = 1024;
/// Most stop token ids of a request.
const STOP_TOKENS_MAX: usize = 256;
/// Most biased tokens of a request.
const LOGIT_BIAS_MAX: usize = 1024;
/// Largest penalty on repetition; beyond it logits are noise.
const REPETITION_MAX: f32 = 100.0;

/// Fields of OpenAI and vLLM that both endpoints know and that are not implemented, with the
/// values that ask for nothing.
const UNIMPLEMENTED: &[(&str, &[&str])] = &[
    ("allowed_token_ids", &["[]"]),
    ("bad_words", &["[]"]),
    ("cache_salt", &[]),
    ("early_stopping", &["false"]),
    ("guided_choice", &[]),
    ("guided_decoding_backend", &[]),
    ("guided_grammar", &[]),
    ("guided_json", &[]),
    ("guided_regex", &[]),
    ("kv_transfer_params", &[]),
    ("length_penalty", &["1", "1.0"]),
    ("logits_processors", &["[]"]),
    ("lora_request", &[]),
    ("prompt_embeds", &[]),
    ("return_token_ids", &["false"]),
    ("return_tokens_as_token_ids", &["false"]),
    ("spaces_between_special_tokens", &["true"]),
    ("structured_outputs", &[]),
    ("truncate_prompt_tokens", &[]),
    ("use_beam_search", &["false"]),
    ("vllm_xargs", &["{}"]),
];

/// A request's options, checked.
#[derive(Debug)]
pub(crate) struct Options {
    /// Everything but `max_tokens`, `logprobs` and `prompt_logprobs`, which depend on the endpoint.
    pub(crate) sampling: Sampling,
    pub(crate) max_tokens: Option<u32>,
    pub(crate) prompt_logprobs: Option<u32>,
    pub(crate) n: u32,
    pub(crate) stop: Vec<String>,
    pub(crate) include_stop: bool,
    pub(crate) skip_special: bool,
    pub(crate) priority: i32,
    pub(crate) stream: Option<StreamOptions>,
}

/// How to stream.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct StreamOptions {
    /// A last chunk tells the usage.
    pub(crate) include_usage: bool,
    /// Each chunk tells the usage so far.
    pub(crate) continuous_usage: bool,
}

impl Options {
    /// Takes the common fields.
    pub(crate) fn take(
        fields: &mut Fields<'_>,
        model: &Model,
        limits: &Limits,
    ) -> Result<Options, ApiError> {
        fields.only_defaults(UNIMPLEMENTED)?;
        // A label for the operator's records. None are kept, so it changes nothing.
        fields.string("user")?;
        let sampling = sampling(fields, model)?;
        let max_tokens = max_tokens(fields)?;
        if let Some(max) = max_tokens
            && sampling.min_tokens > max
        {
            let must = format!("at most max_tokens ({max}), but is {}", sampling.min_tokens);
            return Err(fields.wrong("min_tokens", must));
        }
        Ok(Options {
            sampling,
            max_tokens,
            prompt_logprobs: alternatives(fields, "prompt_logprobs", limits.logprobs)?,
            n: fields.integer("n", 1..=i64::from(limits.choices))?.map_or(1, |n| n as u32),
            stop: stop(fields)?,
            include_stop: fields.bool("include_stop_str_in_output")?.unwrap_or(false),
            skip_special: fields.bool("skip_special_tokens")?.unwrap_or(true),
            priority: fields
                .integer("priority", i64::from(i32::MIN)..=i64::from(i32::MAX))?
                .map_or(0, |priority| priority as i32),
            stream: stream(fields)?,
        })
    }

    /// The limit on output tokens for a prompt of this many, or why they do not fit. Without a
    /// limit of the request's own it is `default`, or what is left of the context.
    pub(crate) fn output_limit(
        &self,
        prompt: usize,
        default: Option<u32>,
        model: &Model,
    ) -> Result<u32, ApiError> {
        let context = model.served.replica.info().max_model_len as usize;
        let room = context.saturating_sub(prompt);
        let wanted = self.max_tokens.map_or(1, |max| max as usize);
        if wanted > room || room == 0 {
            let message = format!(
                "this model's context is {context} tokens, but the request needs {} ({prompt} in \
                 the prompt, {wanted} for the answer); shorten the prompt or lower max_tokens",
                prompt + wanted,
            );
            let code = Some("context_length_exceeded");
            return Err(ApiError::Invalid { param: Some("max_tokens".into()), code, message });
        }
        let room = u32::try_from(room).unwrap_or(u32::MAX);
        Ok(self.max_tokens.or(default).unwrap_or(room).min(room))
    }
}

fn sampling(fields: &mut Fields<'_>, model: &Model) -> Result<Sampling, ApiError> {
    let defaults = &model.served.defaults;
    let vocab = model.served.replica.info().vocab_size;
    let plain = Sampling::default();
    let temperature = fields.number("temperature", 0.0..=2.0)?.or(defaults.temperature);
    let top_p = fields.number("top_p", 0.0..=1.0)?;
    if top_p == Some(0.0) {
        return Err(fields.wrong("top_p", "above 0; send temperature 0 for the likeliest token"));
    }
    // vLLM also writes -1 for "all".
    let top_k = fields.integer("top_k", -1..=i64::from(i32::MAX))?.map(|k| k.max(0) as u32);
    let repetition = fields.number("repetition_penalty", 0.0..=REPETITION_MAX)?;
    if repetition == Some(0.0) {
        return Err(fields.wrong("repetition_penalty", "above 0; 1 changes nothing"));
    }
    Ok(Sampling {
        temperature: temperature.unwrap_or(plain.temperature),
        top_k: top_k.or(defaults.top_k).unwrap_or(plain.top_k),
        top_p: top_p.or(defaults.top_p).unwrap_or(plain.top_p),
        min_p: fields.number("min_p", 0.0..=1.0)?.or(defaults.min_p).unwrap_or(plain.min_p),
        repetition_penalty: repetition
            .or(defaults.repetition_penalty)
            .unwrap_or(plain.repetition_penalty),
        frequency_penalty: fields.number("frequency_penalty", -2.0..=2.0)?.unwrap_or(0.0),
        presence_penalty: fields.number("presence_penalty", -2.0..=2.0)?.unwrap_or(0.0),
        logit_bias: logit_bias(fields, vocab)?,
        seed: seed(fields)?,
        min_tokens: fields.count("min_tokens", 0)?.unwrap_or(0),
        ignore_eos: fields.bool("ignore_eos")?.unwrap_or(false),
        stop_token_ids: stop_token_ids(fields, vocab)?,
        ..plain
    })
}

fn logit_bias(fields: &mut Fields<'_>, vocab: u32) -> Result<Vec<(TokenId, f32)>, ApiError> {
    const NAME: &str = "logit_bias";
    let must = "an object of token ids with numbers from -100 to 100";
    let Some(map) = fields.typed::<BTreeMap<String, f32>>(NAME, must)? else {
        return Ok(Vec::new());
    };
    if map.len() > LOGIT_BIAS_MAX {
        return Err(fields.wrong(NAME, format_args!("of at most {LOGIT_BIAS_MAX} tokens")));
    }
    let mut biases = Vec::with_capacity(map.len());
    for (token, bias) in map {
        let known = token.parse::<TokenId>().ok().filter(|id| *id < vocab);
        let Some(id) = known else {
            let token = crate::fields::shortened(&token);
            let must = format!("an object of token ids below {vocab}, but names '{token}'");
            return Err(fields.wrong(NAME, must));
        };
        if !(-100.0..=100.0).contains(&bias) {
            return Err(fields.wrong(NAME, format_args!("{must}, but holds {bias}")));
        }
        biases.push((id, bias));
    }
    biases.sort_by_key(|(id, _)| *id);
    biases.dedup_by_key(|(id, _)| *id);
    Ok(biases)
}

/// Any whole number that fits 64 bits, signed or not.
fn seed(fields: &mut Fields<'_>) -> Result<Option<u64>, ApiError> {
    let must = "a whole number of 64 bits";
    let Some(number) = fields.typed::<Number>("seed", must)? else { return Ok(None) };
    let bits = number.as_u64().or(number.as_i64().map(i64::cast_unsigned));
    bits.map(Some).ok_or_else(|| fields.wrong("seed", format_args!("{must}, but is {number}")))
}

fn stop_token_ids(fields: &mut Fields<'_>, vocab: u32) -> Result<Vec<TokenId>, ApiError> {
    const NAME: &str = "stop_token_ids";
    let must = format_args!("an array of at most {STOP_TOKENS_MAX} token ids below {vocab}");
    let Some(List(ids)) = fields.typed::<List<TokenId, STOP_TOKENS_MAX>>(NAME, must)? else {
        return Ok(Vec::new());
    };
    match ids.iter().find(|id| **id >= vocab) {
        Some(id) => Err(fields.wrong(NAME, format_args!("{must}, but holds {id}"))),
        None => Ok(ids),
    }
}

/// OpenAI renamed the field; the new name wins.
fn max_tokens(fields: &mut Fields<'_>) -> Result<Option<u32>, ApiError> {
    let old = fields.count("max_tokens", 0)?;
    let new = fields.count("max_completion_tokens", 1)?;
    Ok(new.or(old))
}

fn stop(fields: &mut Fields<'_>) -> Result<Vec<String>, ApiError> {
    let must = format_args!(
        "a string or an array of at most {STOP_STRINGS_MAX} strings, each of 1 to \
         {STOP_BYTES_MAX} bytes"
    );
    let texts = fields.typed::<Strings<STOP_STRINGS_MAX>>("stop", must)?;
    let texts = texts.map_or(Vec::new(), |Strings(texts)| texts);
    match texts.iter().all(|text| (1..=STOP_BYTES_MAX).contains(&text.len())) {
        true => Ok(texts),
        false => Err(fields.wrong("stop", must)),
    }
}

/// Takes a number of alternatives per token.
pub(crate) fn alternatives(
    fields: &mut Fields<'_>,
    name: &'static str,
    most: u32,
) -> Result<Option<u32>, ApiError> {
    Ok(fields.integer(name, 0..=i64::from(most))?.map(|count| count as u32))
}

fn stream(fields: &mut Fields<'_>) -> Result<Option<StreamOptions>, ApiError> {
    let stream = fields.bool("stream")?.unwrap_or(false);
    let Some(raw) = fields.raw("stream_options") else {
        return Ok(stream.then(StreamOptions::default));
    };
    let mut inner = Fields::nested(fields.path_of("stream_options"), raw)?;
    let options = StreamOptions {
        include_usage: inner.bool("include_usage")?.unwrap_or(false),
        continuous_usage: inner.bool("continuous_usage_stats")?.unwrap_or(false),
    };
    inner.only_defaults(&[("include_obfuscation", &["false"])])?;
    inner.finish()?;
    if !stream {
        return Err(fields.wrong("stream_options", "absent unless 'stream' is true"));
    }
    Ok(Some(options))
}
