//! Values as templates see them, and the texts that Python makes of them: templates are written
//! for Jinja2, so `{{ x }}` is `str(x)`, a list holds `repr`s, and `tojson` is `json.dumps`.

use std::fmt::Write;

use minijinja::value::{Value, ValueKind};
use serde_json::Value as Json;

/// Levels of lists and maps that are written. [`super::budget`] lets none be built that is deeper.
pub(super) const MAX_DEPTH: usize = 64;

/// Text that may not grow over a limit.
pub(super) struct Bounded {
    text: String,
    left: usize,
}

/// The text would have been longer than its limit, or too deep.
#[derive(Debug)]
pub(super) struct Overflow;

impl Bounded {
    pub(super) fn new(limit: usize) -> Self {
        Self { text: String::new(), left: limit }
    }

    pub(super) fn push(&mut self, text: &str) -> Result<(), Overflow> {
        self.left = self.left.checked_sub(text.len()).ok_or(Overflow)?;
        self.text.push_str(text);
        Ok(())
    }

    pub(super) fn into_text(self) -> String {
        self.text
    }
}

impl Write for Bounded {
    fn write_str(&mut self, text: &str) -> std::fmt::Result {
        self.push(text).map_err(|_| std::fmt::Error)
    }
}

/// A template's value for a JSON value; maps keep their order.
pub(super) fn from_json(json: &Json) -> Value {
    match json {
        Json::Null => Value::from(()),
        Json::Bool(flag) => Value::from(*flag),
        Json::Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(int), _) => Value::from(int),
            (_, Some(int)) => Value::from(int),
            _ => Value::from(number.as_f64().unwrap_or(f64::NAN)),
        },
        Json::String(text) => Value::from(text.as_str()),
        Json::Array(items) => items.iter().map(from_json).collect(),
        Json::Object(map) => {
            Value::from_pairs(map.iter().map(|(key, item)| (key.as_str(), from_json(item))))
        }
    }
}

/// `str(value)`.
pub(super) fn write_str(value: &Value, out: &mut Bounded) -> Result<(), Overflow> {
    match value.as_str() {
        Some(text) => out.push(text),
        None => write_repr(value, out, 0),
    }
}

/// `repr(value)`.
fn write_repr(value: &Value, out: &mut Bounded, depth: usize) -> Result<(), Overflow> {
    if depth > MAX_DEPTH {
        return Err(Overflow);
    }
    match value.kind() {
        ValueKind::Undefined => Ok(()),
        ValueKind::None => out.push("None"),
        ValueKind::Bool => out.push(if value.is_true() { "True" } else { "False" }),
        ValueKind::Number => out.push(&number(value)),
        ValueKind::String => write_quoted(value.as_str().unwrap_or_default(), out),
        ValueKind::Seq | ValueKind::Iterable => {
            out.push("[")?;
            for (at, item) in items(value).enumerate() {
                if at > 0 {
                    out.push(", ")?;
                }
                write_repr(&item, out, depth + 1)?;
            }
            out.push("]")
        }
        ValueKind::Map => {
            out.push("{")?;
            for (at, key) in items(value).enumerate() {
                if at > 0 {
                    out.push(", ")?;
                }
                write_repr(&key, out, depth + 1)?;
                out.push(": ")?;
                write_repr(&value.get_item(&key).unwrap_or_default(), out, depth + 1)?;
            }
            out.push("}")
        }
        // What has no text in Python either: macros, functions.
        _ => write!(out, "<{}>", value.kind()).map_err(|_| Overflow),
    }
}

/// The items of a list, or the keys of a map.
pub(super) fn items(value: &Value) -> impl Iterator<Item = Value> + use<> {
    value.try_iter().into_iter().flatten()
}

/// A Python string literal: in single quotes unless it has some and no double ones.
fn write_quoted(text: &str, out: &mut Bounded) -> Result<(), Overflow> {
    let quote = if text.contains('\'') && !text.contains('"') { "\"" } else { "'" };
    out.push(quote)?;
    let mut buffer = [0; 4];
    for letter in text.chars() {
        match letter {
            '\n' => out.push("\\n")?,
            '\r' => out.push("\\r")?,
            '\t' => out.push("\\t")?,
            '\\' => out.push("\\\\")?,
            '\'' if quote == "'" => out.push("\\'")?,
            letter if u32::from(letter) < 0x20 || u32::from(letter) == 0x7f => {
                write!(out, "\\x{:02x}", u32::from(letter)).map_err(|_| Overflow)?;
            }
            letter => out.push(letter.encode_utf8(&mut buffer))?,
        }
    }
    out.push(quote)
}

/// A number as both `repr` and `json.dumps` write it.
fn number(value: &Value) -> String {
    if value.is_integer() {
        return value.to_string();
    }
    match f64::try_from(value.clone()) {
        Ok(float) => float_text(float),
        Err(_) => value.to_string(),
    }
}

/// Python's shortest text of a float: positional between 1e-4 and 1e16, else with an exponent of
/// at least two digits.
fn float_text(float: f64) -> String {
    if float.is_nan() {
        return "nan".into();
    }
    if float.is_infinite() {
        return if float > 0.0 { "inf".into() } else { "-inf".into() };
    }
    let size = float.abs();
    if size != 0.0 && !(1e-4..1e16).contains(&size) {
        let text = format!("{float:e}");
        let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
        let (sign, exponent) = match exponent.strip_prefix('-') {
            Some(exponent) => ('-', exponent),
            None => ('+', exponent),
        };
        return format!("{digits}e{sign}{exponent:0>2}");
    }
    let text = format!("{float}");
    if text.contains('.') { text } else { text + ".0" }
}

/// How `json.dumps` lays its text out.
pub(super) struct JsonStyle {
    /// Spaces per level; `None` keeps all in one line.
    pub(super) indent: Option<usize>,
    /// Between items, and between a key and its value.
    pub(super) separators: (String, String),
    pub(super) sort_keys: bool,
    /// Characters outside ASCII become `\uXXXX`.
    pub(super) ensure_ascii: bool,
}

impl JsonStyle {
    /// `json.dumps(value, ...)`.
    pub(super) fn write(&self, value: &Value, out: &mut Bounded) -> Result<(), Overflow> {
        self.write_at(value, out, 1)
    }

    fn write_at(&self, value: &Value, out: &mut Bounded, depth: usize) -> Result<(), Overflow> {
        if depth > MAX_DEPTH {
            return Err(Overflow);
        }
        match value.kind() {
            ValueKind::Bool => out.push(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => out.push(match number(value).as_str() {
                "nan" => "NaN",
                "inf" => "Infinity",
                "-inf" => "-Infinity",
                text => text,
            }),
            ValueKind::String => self.write_quoted(value.as_str().unwrap_or_default(), out),
            ValueKind::Seq | ValueKind::Iterable => {
                let mut empty = true;
                out.push("[")?;
                for (at, item) in items(value).enumerate() {
                    self.next_item(at, depth, out)?;
                    self.write_at(&item, out, depth + 1)?;
                    empty = false;
                }
                self.close(empty, "]", depth, out)
            }
            ValueKind::Map => {
                let mut keys: Vec<Value> = items(value).collect();
                if self.sort_keys {
                    keys.sort();
                }
                out.push("{")?;
                for (at, key) in keys.iter().enumerate() {
                    self.next_item(at, depth, out)?;
                    match key.as_str() {
                        Some(text) => self.write_quoted(text, out)?,
                        None => self.write_quoted(&number(key), out)?,
                    }
                    out.push(&self.separators.1)?;
                    let item = value.get_item(key).unwrap_or_default();
                    self.write_at(&item, out, depth + 1)?;
                }
                self.close(keys.is_empty(), "}", depth, out)
            }
            _ => out.push("null"),
        }
    }

    fn next_item(&self, at: usize, depth: usize, out: &mut Bounded) -> Result<(), Overflow> {
        if at > 0 {
            out.push(&self.separators.0)?;
        }
        self.new_line(depth, out)
    }

    fn close(
        &self,
        empty: bool,
        bracket: &str,
        depth: usize,
        out: &mut Bounded,
    ) -> Result<(), Overflow> {
        if !empty {
            self.new_line(depth - 1, out)?;
        }
        out.push(bracket)
    }

    fn new_line(&self, depth: usize, out: &mut Bounded) -> Result<(), Overflow> {
        let Some(indent) = self.indent else { return Ok(()) };
        out.push("\n")?;
        (0..indent.saturating_mul(depth)).try_for_each(|_| out.push(" "))
    }

    fn write_quoted(&self, text: &str, out: &mut Bounded) -> Result<(), Overflow> {
        out.push("\"")?;
        let mut buffer = [0; 4];
        for letter in text.chars() {
            match letter {
                '"' => out.push("\\\"")?,
                '\\' => out.push("\\\\")?,
                '\n' => out.push("\\n")?,
                '\r' => out.push("\\r")?,
                '\t' => out.push("\\t")?,
                '\u{8}' => out.push("\\b")?,
                '\u{c}' => out.push("\\f")?,
                letter if letter < ' ' || (self.ensure_ascii && !letter.is_ascii()) => {
                    let mut units = [0; 2];
                    for unit in letter.encode_utf16(&mut units) {
                        write!(out, "\\u{unit:04x}").map_err(|_| Overflow)?;
                    }
                }
                letter => out.push(letter.encode_utf8(&mut buffer))?,
            }
        }
        out.push("\"")
    }
}
