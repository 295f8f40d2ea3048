//! A conversation: from JSON to the model's chat template to tokens.

use std::sync::Arc;

use pomona_text::{ChatInput, LocalTime};
use pomona_types::TokenId;
use serde_json::value::RawValue;
use serde_json::{Map, Value, json};

use crate::error::ApiError;
use crate::fields::{Fields, shortened};
use crate::gateway::{Model, unix_now};
use crate::list::List;

/// Most messages of a conversation.
const MESSAGES_MAX: usize = 16_384;
/// Most parts of one message.
const PARTS_MAX: usize = 4096;
/// Longest `chat_template_kwargs`, as JSON.
const KWARGS_BYTES_MAX: usize = 64 << 10;
/// Above this many bytes of text, tokenising leaves the threads that serve connections.
const INLINE_BYTES_MAX: usize = 16 << 10;

/// Fields of a message that come back from clients who send our answers again; they hold nothing.
const EMPTY_IN_MESSAGES: &[(&str, &[&str])] = &[
    ("annotations", &["[]"]),
    ("audio", &[]),
    ("function_call", &[]),
    ("reasoning", &[]),
    ("reasoning_content", &[]),
    ("refusal", &[]),
    ("tool_call_id", &[]),
    ("tool_calls", &["[]"]),
];

/// What a chat template is rendered with.
pub(crate) struct Conversation {
    input: ChatInput,
    /// Bytes of all texts.
    bytes: usize,
    add_special: bool,
}

impl Conversation {
    /// Takes `messages` and the fields that say how to render them.
    pub(crate) fn take(fields: &mut Fields<'_>) -> Result<Conversation, ApiError> {
        fields.only_defaults(&[
            ("chat_template", &[]),
            ("continue_final_message", &["false"]),
            ("documents", &["[]"]),
            ("tools", &["[]"]),
        ])?;
        let must = format_args!("an array of 1 to {MESSAGES_MAX} messages");
        let list = fields.typed::<List<&RawValue, MESSAGES_MAX>>("messages", must)?;
        let Some(List(raw)) = list.filter(|List(raw)| !raw.is_empty()) else {
            return Err(fields.wrong("messages", must));
        };
        let mut bytes = 0;
        let mut messages = Vec::with_capacity(raw.len());
        for (index, raw) in raw.into_iter().enumerate() {
            messages.push(message(format!("messages[{index}]"), raw, &mut bytes)?);
        }
        let input = ChatInput {
            messages: Value::Array(messages),
            tools: None,
            add_generation_prompt: fields.bool("add_generation_prompt")?.unwrap_or(true),
            extra: template_kwargs(fields)?,
            now: Some(now()),
        };
        let add_special = fields.bool("add_special_tokens")?.unwrap_or(false);
        Ok(Conversation { input, bytes, add_special })
    }

    /// The conversation as tokens of `model`.
    pub(crate) async fn tokens(self, model: &Arc<Model>) -> Result<Vec<TokenId>, ApiError> {
        let Some(template) = model.served.template.clone() else {
            let message = format!(
                "the model '{}' has no chat template; use /v1/completions with a prompt",
                model.name()
            );
            return Err(ApiError::field("model", message));
        };
        let tokenizer = model.served.tokenizer.clone();
        aside(self.bytes, move || {
            let text =
                template.render(&self.input).map_err(|error| ApiError::text("messages", &error))?;
            tokenizer
                .encode(&text, self.add_special)
                .map_err(|error| ApiError::text("messages", &error))
        })
        .await
    }
}

/// Does short work here and long work on a thread that may block.
pub(crate) async fn aside<T: Send + 'static>(
    bytes: usize,
    work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    if bytes <= INLINE_BYTES_MAX {
        return work();
    }
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| {
        tracing::error!(%error, "tokenising failed");
        Err(ApiError::Internal("tokenising the text failed".to_owned()))
    })
}

fn message(path: String, raw: &RawValue, bytes: &mut usize) -> Result<Value, ApiError> {
    let mut fields = Fields::nested(path, raw)?;
    let must = "'system', 'developer', 'user' or 'assistant'";
    let role = match fields.string("role")?.as_deref() {
        // OpenAI renamed the role; models know the old name.
        Some("system" | "developer") => "system",
        Some("user") => "user",
        Some("assistant") => "assistant",
        Some("tool" | "function") => {
            let must = format!("{must}; tool calls are not supported by this server");
            return Err(fields.wrong("role", must));
        }
        _ => return Err(fields.wrong("role", must)),
    };
    fields.only_defaults(EMPTY_IN_MESSAGES)?;
    let content = content(&mut fields, role)?;
    let name = fields.string("name")?;
    fields.finish()?;
    *bytes += content.len();
    let mut message = json!({ "role": role, "content": content });
    if let (Some(name), Some(object)) = (name, message.as_object_mut()) {
        object.insert("name".to_owned(), Value::String(name));
    }
    Ok(message)
}

/// The text of a message; parts are joined by line ends, as vLLM does.
fn content(fields: &mut Fields<'_>, role: &str) -> Result<String, ApiError> {
    const NAME: &str = "content";
    let must = "a string or an array of text parts";
    let Some(raw) = fields.raw(NAME) else {
        // An answer that was cut off before its first word.
        return if role == "assistant" { Ok(String::new()) } else { Err(fields.wrong(NAME, must)) };
    };
    if raw.get().starts_with('"') {
        return serde_json::from_str(raw.get()).map_err(|_| fields.wrong(NAME, "valid text"));
    }
    let List(parts) = serde_json::from_str::<List<&RawValue, PARTS_MAX>>(raw.get())
        .map_err(|_| fields.wrong(NAME, format_args!("{must} (at most {PARTS_MAX})")))?;
    let mut texts = Vec::with_capacity(parts.len());
    for (index, raw) in parts.into_iter().enumerate() {
        let mut part = Fields::nested(format!("{}[{index}]", fields.path_of(NAME)), raw)?;
        match part.string("type")?.as_deref() {
            Some("text") => {}
            Some(other) => {
                let must = format!(
                    "'text', but is '{}': this server serves text models, images, audio and \
                     files are not supported",
                    shortened(other)
                );
                return Err(part.wrong("type", must));
            }
            None => return Err(part.wrong("type", "'text'")),
        }
        let text = part.string("text")?;
        texts.push(text.ok_or_else(|| part.wrong("text", "a string"))?);
        part.finish()?;
    }
    Ok(texts.join("\n"))
}

fn template_kwargs(fields: &mut Fields<'_>) -> Result<Map<String, Value>, ApiError> {
    const NAME: &str = "chat_template_kwargs";
    let must = format_args!("an object of at most {KWARGS_BYTES_MAX} bytes");
    let Some(raw) = fields.raw(NAME) else { return Ok(Map::new()) };
    if raw.get().len() > KWARGS_BYTES_MAX {
        return Err(fields.wrong(NAME, must));
    }
    serde_json::from_str(raw.get()).map_err(|_| fields.wrong(NAME, must))
}

/// The time in UTC, for templates that show a date.
fn now() -> LocalTime {
    local_time(unix_now())
}

/// Unix seconds as a date and a time (Hinnant, "chrono-compatible low-level date algorithms",
/// 2013: `civil_from_days`).
fn local_time(seconds: u64) -> LocalTime {
    let (days, second_of_day) = (seconds / 86_400 + 719_468, seconds % 86_400);
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    // Months count from March, so that the leap day is the year's last.
    let month_from_march = (5 * day_of_year + 2) / 153;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    LocalTime {
        year: (year_of_era + era * 400 + u64::from(month <= 2)) as i32,
        month: month as u8,
        day: (day_of_year - (153 * month_from_march + 2) / 5 + 1) as u8,
        hour: (second_of_day / 3600) as u8,
        minute: (second_of_day / 60 % 60) as u8,
        second: (second_of_day % 60) as u8,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(seconds: u64, want: (i32, u8, u8, u8, u8, u8)) {
        let t = local_time(seconds);
        assert_eq!((t.year, t.month, t.day, t.hour, t.minute, t.second), want, "{seconds}");
    }

    #[test]
    fn unix_seconds_become_dates() {
        check(0, (1970, 1, 1, 0, 0, 0));
        check(951_782_399, (2000, 2, 28, 23, 59, 59));
        check(951_782_400, (2000, 2, 29, 0, 0, 0));
        check(1_735_689_599, (2024, 12, 31, 23, 59, 59));
        check(1_740_787_200, (2025, 3, 1, 0, 0, 0));
    }
}
