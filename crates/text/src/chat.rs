//! Chat templates: messages to the text a model was trained on.
//!
//! Templates are Jinja2 programs written for Hugging Face's `apply_chat_template`; they come with
//! models and may be hostile. They run in the `minijinja` engine under limits on instructions
//! (`functions.rs`), on what each instruction costs (`guard.rs`, `budget.rs`), and on what their
//! source may look like (`limits.rs`).

mod budget;
mod clock;
mod functions;
mod guard;
mod limits;
#[cfg(test)]
mod tests;
mod values;

use std::collections::BTreeMap;
use std::error::Error as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use minijinja::machinery::ast::Stmt;
use minijinja::machinery::{CodeGenerator, Instructions, eval, make_string_output, parse};
use minijinja::syntax::SyntaxConfig;
use minijinja::{AutoEscape, Environment, Error, ErrorKind};
use self_cell::self_cell;
use serde_json::{Map, Value};

use self::budget::Exhausted;
use self::functions::Refusal;
use crate::TextError;

/// A chat template, compiled. Cheap to clone; rendering takes `&self`.
#[derive(Clone, Debug)]
pub struct ChatTemplate {
    compiled: Arc<Compiled>,
    environment: Environment<'static>,
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

/// The instructions of a template and of its blocks.
#[derive(Debug)]
struct Program<'source> {
    main: Instructions<'source>,
    blocks: BTreeMap<&'source str, Instructions<'source>>,
}

self_cell!(
    /// A template's source with its program, which borrows names and texts from it: compiling
    /// takes far longer than rendering, and is done once.
    struct Compiled {
        owner: String,
        #[covariant]
        dependent: Program,
    }

    impl {Debug}
);

impl ChatTemplate {
    /// Compiles a Jinja template; `bos` and `eos` are the texts of those tokens, which templates
    /// know as `bos_token` and `eos_token`. Fails with [`TextError::Template`].
    pub fn new(source: &str, bos: Option<&str>, eos: Option<&str>) -> Result<Self, TextError> {
        // As `apply_chat_template` sets them.
        let syntax = SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .build()
            .map_err(|error| TextError::Template(chain(&error)))?;
        let source = without_generation_tags(source);
        let compiled =
            compiling(|| Compiled::try_new(source, |source| Program::compile(source, syntax)))?;
        Ok(Self {
            compiled: Arc::new(compiled),
            environment: functions::environment(),
            bos: bos.map(str::to_owned),
            eos: eos.map(str::to_owned),
        })
    }

    /// The template in a `tokenizer_config.json`: its `chat_template`, or of several the one that
    /// is called `default`.
    pub fn source_in(config: &Value) -> Option<&str> {
        let template = config.get("chat_template")?;
        let named = |entry: &&Value| entry.get("name").and_then(Value::as_str) == Some("default");
        template
            .as_str()
            .or_else(|| template.as_array()?.iter().find(named)?.get("template")?.as_str())
    }

    /// The prompt for a conversation. Costs some microseconds per message, about a second at the
    /// very most, and no more than some hundred MB of memory however hostile the template is.
    ///
    /// Fails with [`TextError::Refused`] if the template says no to the conversation, with
    /// [`TextError::Exhausted`] at a limit, and else with [`TextError::Render`].
    pub fn render(&self, input: &ChatInput) -> Result<String, TextError> {
        let rendered = shielded(|| self.run(input));
        rendered.map_err(TextError::Render)?.map_err(|error| self::error(&error))
    }

    fn run(&self, input: &ChatInput) -> Result<String, Error> {
        let Program { main, blocks } = self.compiled.borrow_dependent();
        let mut out = String::new();
        let mut output = make_string_output(&mut out);
        let context = self.context(input);
        eval(&self.environment, main, context, blocks, &mut output, AutoEscape::None)?;
        drop(output);
        Ok(out)
    }

    /// The variables of a rendering.
    fn context(&self, input: &ChatInput) -> minijinja::Value {
        let none = minijinja::Value::from(());
        let tools = input.tools.as_ref().map_or(none.clone(), values::from_json);
        let mut variables = BTreeMap::from([
            ("messages", values::from_json(&input.messages)),
            ("tools", tools),
            ("documents", none),
            ("add_generation_prompt", minijinja::Value::from(input.add_generation_prompt)),
        ]);
        let texts = [("bos_token", &self.bos), ("eos_token", &self.eos)];
        variables.extend(
            texts.into_iter().filter_map(|(name, text)| Some((name, text.as_deref()?.into()))),
        );
        variables.extend(input.now.map(|now| ("strftime_now", functions::strftime_now(now))));
        let extra = input.extra.iter();
        variables.extend(extra.map(|(name, value)| (name.as_str(), values::from_json(value))));
        minijinja::Value::from_pairs(variables)
    }
}

impl<'source> Program<'source> {
    fn compile(source: &'source str, syntax: SyntaxConfig) -> Result<Self, Error> {
        limits::check_source(source, &syntax)?;
        let tree: Stmt<'_> = parse(source, "chat template", syntax)?;
        limits::check_constants(&tree)?;
        let mut generator = CodeGenerator::new("chat template", source);
        generator.compile_stmt(&tree);
        let (main, blocks) = generator.finish();
        let blocks = blocks.iter().map(|(name, code)| (*name, guard::guarded(code))).collect();
        Ok(Self { main: guard::guarded(&main), blocks })
    }
}

/// What compiling leads to, in the terms of this crate.
fn compiling<T>(compile: impl FnOnce() -> Result<T, Error>) -> Result<T, TextError> {
    let compiled = shielded(compile).map_err(TextError::Template)?;
    compiled.map_err(|error| TextError::Template(chain(&error)))
}

/// Runs the engine, which can panic where we cannot look ahead: minijinja 3.0.5 does on `[][::-1]`
/// when it renders, and has assertions where it compiles. What was
/// compiled is used again all the same: a run only reads it.
fn shielded<T>(run: impl FnOnce() -> T) -> Result<T, String> {
    let panicked = |_| "the engine met a case it does not handle".to_owned();
    catch_unwind(AssertUnwindSafe(run)).map_err(panicked)
}

/// `{% generation %}` marks what an assistant said, for training only. It becomes a condition that
/// always holds, with its marks for white space kept.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at + 2);
        out.push_str(before);
        let inner = tag.trim_start_matches(['-', '+']);
        let mark = &tag[..tag.len() - inner.len()];
        let word = inner.trim_start();
        let is_tag =
            |after: &str| after.trim_start().trim_start_matches(['-', '+']).starts_with("%}");
        let replaced =
            [("generation", "if true"), ("endgeneration", "endif")].into_iter().find_map(
                |(name, other)| Some((word.strip_prefix(name).filter(|x| is_tag(x))?, other)),
            );
        match replaced {
            Some((after, other)) => {
                out.push_str(mark);
                out.push(' ');
                out.push_str(other);
                out.push(' ');
                rest = after.trim_start();
            }
            None => rest = tag,
        }
    }
    out.push_str(rest);
    out
}

/// An error of the engine, in the terms of this crate.
fn error(error: &Error) -> TextError {
    let mut cause: Option<&dyn std::error::Error> = Some(error);
    while let Some(current) = cause {
        if let Some(Refusal(message)) = current.downcast_ref() {
            return TextError::Refused(message.clone());
        }
        if let Some(Exhausted(message)) = current.downcast_ref() {
            return TextError::Exhausted(message.clone());
        }
        cause = current.source();
    }
    match error.kind() {
        ErrorKind::OutOfFuel => TextError::Exhausted("it runs for too long".into()),
        _ => TextError::Render(chain(error)),
    }
}

/// An error with its causes, in one line, cut where it gets long.
fn chain(error: &Error) -> String {
    const MAX_MESSAGE: usize = 600;
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(current) = cause {
        text = format!("{text}: {current}");
        cause = current.source();
    }
    if let Some((at, _)) = text.char_indices().nth(MAX_MESSAGE) {
        text.truncate(at);
        text.push('…');
    }
    text
}
