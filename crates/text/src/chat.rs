//! Chat templates: messages to the text a model was trained on.
//!
//! Templates come with models and may be hostile.

mod values;

use serde_json::{Map, Value};

use crate::TextError;

/// A compiled chat template.
#[derive(Clone, Debug)]
pub struct ChatTemplate {
    source: String,
    bos: Option<String>,
    eos: Option<String>,
}

/// What a template is rendered with.
#[derive(Clone, Debug, Default)]
pub struct ChatInput {
    /// The conversation: an array of objects with `role` and `content`.
    pub messages: Value,
    /// Tools the model may call, in the OpenAI shape.
    pub tools: Option<Value>,
    /// Whether the text ends with the beginning of the assistant's answer.
    pub add_generation_prompt: bool,
    /// Further variables (`enable_thinking`, `documents`, ...); they win over the names above.
    pub extra: Map<String, Value>,
    /// The time that `strftime_now` shows; without one, templates find that function undefined.
    pub now: Option<LocalTime>,
}

/// A time of day on a date, as a clock on the wall shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LocalTime {
    /// Year of the Gregorian calendar.
    pub year: i32,
    /// 1 to 12.
    pub month: u8,
    /// 1 to 31.
    pub day: u8,
    /// 0 to 23.
    pub hour: u8,
    /// 0 to 59.
    pub minute: u8,
    /// 0 to 60.
    pub second: u8,
}

impl ChatTemplate {
    /// Compiles a Jinja template; `bos` and `eos` are the texts of those tokens, which templates
    /// know as `bos_token` and `eos_token`.
    pub fn new(source: &str, bos: Option<&str>, eos: Option<&str>) -> Result<Self, TextError> {
        let mut env = minijinja::Environment::new();
        env.add_template("chat", source).map_err(|e| TextError::Template(e.to_string()))?;
        Ok(Self {
            source: source.to_owned(),
            bos: bos.map(str::to_owned),
            eos: eos.map(str::to_owned),
        })
    }

    /// The prompt for a conversation.
    pub fn render(&self, input: &ChatInput) -> Result<String, TextError> {
        let mut env = minijinja::Environment::new();
        env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        let context = serde_json::json!({
            "messages": input.messages,
            "bos_token": self.bos,
            "eos_token": self.eos,
            "add_generation_prompt": input.add_generation_prompt,
        });
        let context = values::from_json(&context);
        env.render_str(&self.source, context).map_err(|e| TextError::Render(e.to_string()))
    }
}
