//! The functions, filters and methods that templates use: the engine's own, those that Hugging
//! Face adds, and replacements for those whose result can be far longer than what they get.

use minijinja::value::{Kwargs, Rest, Value, ValueKind};
use minijinja::{Environment, Error, ErrorKind, Output, State, UndefinedBehavior};
use minijinja_contrib::pycompat;

use super::LocalTime;
use super::budget::{Budget, MAX_NODES, MAX_STRING_BYTES, exhausted};
use super::clock::strftime;
use super::values::{self, Bounded, JsonStyle, Overflow};

/// Instructions that one rendering may execute, the budget's own among them. A conversation of a
/// thousand messages takes some 300,000.
const MAX_FUEL: u64 = 5_000_000;
/// Levels of macros, blocks and loops, in the engine's counting (a macro counts four).
const MAX_RECURSION: usize = 200;
/// Bytes that one rendering may emit, into captured texts too.
const MAX_EMITTED_BYTES: usize = 4 * MAX_STRING_BYTES;
/// Spaces that `tojson` and `indent` may put in front of a line.
const MAX_INDENT: usize = 64;

/// Filters that no chat template needs and that would have to be bounded.
const LEFT_OUT: &[&str] =
    &["batch", "slice", "pprint", "chain", "zip", "sum", "groupby", "urlencode"];

/// What `raise_exception` said, as the source of the engine's error.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct Refusal(pub(super) String);

/// Bytes that have been emitted, kept in the engine's state.
#[derive(Default)]
struct Emitted(usize);

/// The environment that templates run in.
pub(super) fn environment<'source>() -> Environment<'source> {
    let mut env = Environment::new();
    env.set_fuel(Some(MAX_FUEL));
    env.set_recursion_limit(MAX_RECURSION);
    env.set_undefined_behavior(UndefinedBehavior::Lenient);
    env.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    env.set_debug(false);
    env.set_formatter(emit);
    env.set_unknown_method_callback(method);
    for name in LEFT_OUT {
        env.remove_filter(name);
    }
    env.remove_global("debug");
    env.add_function("raise_exception", |message: String| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, message.clone()).with_source(Refusal(message)))
    });
    env.add_filter("tojson", tojson);
    env.add_filter("string", string);
    env.add_filter("replace", replace);
    env.add_filter("join", join);
    env.add_filter("indent", indent);
    let plain = Environment::new();
    env.add_filter("format", move |state: &mut State, format: Value, args: Rest<Value>| {
        check_format(state, format.as_str().unwrap_or_default(), &args)?;
        let all: Vec<Value> = std::iter::once(format).chain(args.0).collect();
        plain.empty_state().apply_filter("format", &all)
    });
    for (name, parts) in [("list", Parts::Letters), ("split", Parts::Any), ("lines", Parts::Lines)]
    {
        bound_parts(&mut env, name, parts);
    }
    super::guard::add_functions(&mut env);
    env
}

/// `strftime_now(format)` for a time that was given.
pub(super) fn strftime_now(now: LocalTime) -> Value {
    Value::from_function(move |format: &str| -> Result<String, Error> {
        strftime(&now, format).ok_or_else(|| exhausted("strftime_now makes too long a text"))
    })
}

/// Writes a value to the output, as `str(value)`.
fn emit(out: &mut Output, state: &mut State, value: &Value) -> Result<(), Error> {
    let emitted = state.get_or_insert_extension_with(Emitted::default).0;
    let left = MAX_EMITTED_BYTES.saturating_sub(emitted);
    let mut text = Bounded::new(left.min(MAX_STRING_BYTES));
    values::write_str(value, &mut text).map_err(|Overflow| {
        exhausted(format!(
            "it writes more than {MAX_STRING_BYTES} bytes at once or {MAX_EMITTED_BYTES} in all"
        ))
    })?;
    let text = text.into_text();
    state.get_or_insert_extension_with(Emitted::default).0 = emitted + text.len();
    Budget::of(state).work(text.len() as u64 / 64)?;
    out.write_str(&text).map_err(Error::from)
}

fn written(
    state: &mut State,
    write: impl FnOnce(&mut Bounded) -> Result<(), Overflow>,
) -> Result<Value, Error> {
    let mut text = Bounded::new(MAX_STRING_BYTES);
    write(&mut text).map_err(|Overflow| {
        exhausted(format!("it makes a text of more than {MAX_STRING_BYTES} bytes"))
    })?;
    let text = text.into_text();
    Budget::of(state).make(text.len())?;
    Ok(Value::from(text))
}

fn string(state: &mut State, value: &Value) -> Result<Value, Error> {
    written(state, |out| values::write_str(value, out))
}

/// Hugging Face's `tojson`: `json.dumps(value, ensure_ascii=False, ...)`, without the HTML escapes
/// that Jinja adds.
fn tojson(state: &mut State, value: &Value, options: Kwargs) -> Result<Value, Error> {
    let indent = match options.get::<Option<usize>>("indent")? {
        Some(indent) if indent > MAX_INDENT => {
            return Err(exhausted(format!("tojson indents by {indent} spaces")));
        }
        indent => indent,
    };
    let separators = match options.get::<Option<Value>>("separators")? {
        Some(pair) if !pair.is_none() => {
            let text = |at: usize| -> Result<String, Error> {
                let text = pair.get_item_by_index(at)?;
                Ok(text.as_str().filter(|text| text.len() <= MAX_INDENT).unwrap_or(",").to_owned())
            };
            (text(0)?, text(1)?)
        }
        _ => (if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned()),
    };
    let flag = |name| Ok::<_, Error>(options.get::<Option<bool>>(name)?.unwrap_or(false));
    let style = JsonStyle {
        indent,
        separators,
        sort_keys: flag("sort_keys")?,
        ensure_ascii: flag("ensure_ascii")?,
    };
    options.assert_all_used()?;
    written(state, |out| style.write(value, out))
}

fn replace(
    state: &mut State,
    text: String,
    from: String,
    to: String,
    count: Option<usize>,
) -> Result<Value, Error> {
    let count = text.matches(from.as_str()).count().min(count.unwrap_or(usize::MAX));
    Budget::of(state).make(text.len().saturating_add(count.saturating_mul(to.len())))?;
    Ok(Value::from(text.replacen(&from, &to, count)))
}

fn join(
    state: &mut State,
    list: &Value,
    separator: Option<String>,
    attribute: Option<String>,
    options: Kwargs,
) -> Result<Value, Error> {
    let separator = match separator {
        Some(separator) => separator,
        None => options.get::<Option<String>>("d")?.unwrap_or_default(),
    };
    let attribute = match attribute {
        Some(attribute) => Some(attribute),
        None => options.get::<Option<String>>("attribute")?,
    };
    options.assert_all_used()?;
    let items = list.try_iter()?;
    let item = |item: Value| match &attribute {
        Some(path) => path.split('.').try_fold(item, |item, name| item.get_attr(name)),
        None => Ok(item),
    };
    let items: Vec<Value> =
        items.take(MAX_NODES as usize).map(item).collect::<Result<_, Error>>()?;
    written(state, |out| write_joined(&items, &separator, out))
}

fn write_joined(items: &[Value], separator: &str, out: &mut Bounded) -> Result<(), Overflow> {
    for (at, item) in items.iter().enumerate() {
        if at > 0 {
            out.push(separator)?;
        }
        values::write_str(item, out)?;
    }
    Ok(())
}

fn indent(
    state: &mut State,
    text: String,
    width: Option<usize>,
    first: Option<bool>,
    options: Kwargs,
) -> Result<Value, Error> {
    let width = width.or(options.get("width")?).unwrap_or(4);
    let first = first.or(options.get("first")?).unwrap_or(false);
    let blank = options.get::<Option<bool>>("blank")?.unwrap_or(false);
    options.assert_all_used()?;
    if width > MAX_INDENT {
        return Err(exhausted(format!("indent puts {width} spaces in front of a line")));
    }
    let space = " ".repeat(width);
    written(state, |out| {
        for (at, line) in text.split('\n').enumerate() {
            if at > 0 {
                out.push("\n")?;
            }
            if (at > 0 || first) && (blank || !line.is_empty()) {
                out.push(&space)?;
            }
            out.push(line)?;
        }
        Ok(())
    })
}

/// Refuses formats that would make a long text: wide fields, or many of a long argument.
fn check_format(state: &mut State, format: &str, args: &[Value]) -> Result<(), Error> {
    let digits = |run: &str| run.len() > 3;
    if format.split(|letter: char| !letter.is_ascii_digit()).any(digits) {
        return Err(exhausted("a format has a field of more than 999 characters"));
    }
    let mut bytes = 1000usize;
    for value in args {
        let mut text = Bounded::new(MAX_STRING_BYTES);
        values::write_str(value, &mut text)
            .map_err(|Overflow| exhausted("a format has too long an argument"))?;
        bytes += text.into_text().len();
    }
    let fields = format.matches(['{', '%']).count();
    Budget::of(state).make(format.len().saturating_add(fields.saturating_mul(bytes)))
}

/// How a filter or method cuts a text into parts.
#[derive(Clone, Copy)]
enum Parts {
    Letters,
    Lines,
    /// At most one for each byte.
    Any,
}

impl Parts {
    fn check(self, text: &str) -> Result<(), Error> {
        let parts = match self {
            Parts::Letters | Parts::Any => text.len(),
            Parts::Lines => text.matches(['\n', '\r']).count(),
        };
        if parts as u64 > MAX_NODES {
            return Err(exhausted(format!("it cuts a text into up to {parts} parts")));
        }
        Ok(())
    }
}

/// Puts a check in front of one of the engine's filters that makes a list from a text.
fn bound_parts(env: &mut Environment<'_>, name: &'static str, parts: Parts) {
    let plain = Environment::new();
    env.add_filter(name, move |value: Value, args: Rest<Value>| -> Result<Value, Error> {
        if let Some(text) = value.as_str() {
            parts.check(text)?;
        }
        let all: Vec<Value> = std::iter::once(value).chain(args.0).collect();
        plain.empty_state().apply_filter(name, &all)
    });
}

/// Python's methods of texts, maps and lists.
fn method(state: &mut State, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    if let Some(text) = value.as_str() {
        let text_at = |at: usize| args.get(at).and_then(|value| value.as_str());
        match name {
            "split" => {
                let cuts = match text_at(0) {
                    Some(separator) => text.matches(separator).count(),
                    None => text.matches(char::is_whitespace).count(),
                };
                if cuts as u64 > MAX_NODES {
                    return Err(exhausted(format!("it splits a text into {cuts} parts")));
                }
            }
            "splitlines" => Parts::Lines.check(text)?,
            "replace" => {
                let (from, to) = (text_at(0).unwrap_or(""), text_at(1).unwrap_or(""));
                let added = text.matches(from).count().saturating_mul(to.len());
                Budget::of(state).make(text.len().saturating_add(added))?;
            }
            "format" => check_format(state, text, args)?,
            "join" => {
                let items: Vec<Value> = match args.first() {
                    Some(list) => list.try_iter()?.take(MAX_NODES as usize).collect(),
                    None => Vec::new(),
                };
                return written(state, |out| write_joined(&items, text, out));
            }
            _ => {}
        }
    }
    if value.kind() == ValueKind::Map && name == "items" && args.is_empty() {
        let pair = |key: Value| {
            let item = value.get_item(&key).unwrap_or_default();
            Value::from(vec![key, item])
        };
        return Ok(values::items(value).map(pair).collect());
    }
    pycompat::unknown_method_callback(state, value, name, args)
}
