//! A JSON object read field by field: each mistake names its field, and a field that nobody took
//! is refused at the end. Values stay unparsed text until they are taken, so that a hostile body
//! costs no more memory than its own bytes.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::ops::RangeInclusive;

use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;

use crate::error::ApiError;

/// Most fields of one object.
const FIELDS_MAX: usize = 256;
/// A name that differs by this many letters from a known one was probably meant to be it.
const TYPO_LETTERS: usize = 2;
/// Longest part of a caller's text that an error repeats.
const QUOTE_CHARS: usize = 64;

/// The fields of an object that nobody has taken yet. A field that is `null` counts as absent.
pub(crate) struct Fields<'a> {
    path: String,
    left: BTreeMap<Cow<'a, str>, &'a RawValue>,
    known: Vec<&'static str>,
}

struct Object<'a>(BTreeMap<Cow<'a, str>, &'a RawValue>);

impl<'de> Deserialize<'de> for Object<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Fields;
        impl<'de> Visitor<'de> for Fields {
            type Value = Object<'de>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a JSON object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut fields = BTreeMap::new();
                while let Some(name) = map.next_key::<Name<'de>>()? {
                    let name = name.0;
                    if fields.len() == FIELDS_MAX {
                        return Err(serde::de::Error::custom("too many fields"));
                    }
                    let value = map.next_value::<&'de RawValue>()?;
                    if fields.insert(name.clone(), value).is_some() {
                        let message = format!("the field '{}' stands twice", shortened(&name));
                        return Err(serde::de::Error::custom(message));
                    }
                }
                Ok(Object(fields))
            }
        }
        deserializer.deserialize_map(Fields)
    }
}

#[derive(serde::Deserialize)]
struct Name<'a>(#[serde(borrow)] Cow<'a, str>);

impl<'a> Fields<'a> {
    /// The body's object.
    pub(crate) fn body(text: &'a str) -> Result<Fields<'a>, ApiError> {
        let Object(left) = serde_json::from_str(text)
            .map_err(|error| ApiError::body(format!("cannot read the body as JSON: {error}")))?;
        Ok(Fields { path: String::new(), left, known: Vec::new() })
    }

    /// An object inside another; `path` is where it stands, as `messages[3]`.
    pub(crate) fn nested(path: String, raw: &'a RawValue) -> Result<Fields<'a>, ApiError> {
        let Object(left) = serde_json::from_str(raw.get())
            .map_err(|_| ApiError::field(&path, format!("'{path}' must be an object")))?;
        Ok(Fields { path, left, known: Vec::new() })
    }

    /// The whole name of a field of this object.
    pub(crate) fn path_of(&self, name: &str) -> String {
        if self.path.is_empty() { name.to_owned() } else { format!("{}.{name}", self.path) }
    }

    /// Takes a field as it stands.
    pub(crate) fn raw(&mut self, name: &'static str) -> Option<&'a RawValue> {
        self.known.push(name);
        self.left.remove(name).filter(|raw| raw.get() != "null")
    }

    /// A refusal of the field `name`.
    pub(crate) fn wrong(&self, name: &str, must: impl fmt::Display) -> ApiError {
        let path = self.path_of(name);
        ApiError::field(&path, format!("'{path}' must be {must}"))
    }

    /// Takes a field of any type that serde knows; `must` says what it must be.
    pub(crate) fn typed<T: Deserialize<'a>>(
        &mut self,
        name: &'static str,
        must: impl fmt::Display,
    ) -> Result<Option<T>, ApiError> {
        let Some(raw) = self.raw(name) else { return Ok(None) };
        match serde_json::from_str(raw.get()) {
            Ok(value) => Ok(Some(value)),
            Err(_) => {
                Err(self.wrong(name, format_args!("{must}, but is {}", shortened(raw.get()))))
            }
        }
    }

    /// Takes a text.
    pub(crate) fn string(&mut self, name: &'static str) -> Result<Option<String>, ApiError> {
        self.typed(name, "a string")
    }

    /// Takes a truth value.
    pub(crate) fn bool(&mut self, name: &'static str) -> Result<Option<bool>, ApiError> {
        self.typed(name, "true or false")
    }

    /// Takes a whole number within `range`.
    pub(crate) fn integer(
        &mut self,
        name: &'static str,
        range: RangeInclusive<i64>,
    ) -> Result<Option<i64>, ApiError> {
        let must = format_args!("a whole number from {} to {}", range.start(), range.end());
        let value = self.typed::<i64>(name, must)?;
        match value {
            Some(value) if !range.contains(&value) => {
                Err(self.wrong(name, format_args!("{must}, but is {value}")))
            }
            value => Ok(value),
        }
    }

    /// Takes a whole number from `least` to the largest `u32`.
    pub(crate) fn count(
        &mut self,
        name: &'static str,
        least: u32,
    ) -> Result<Option<u32>, ApiError> {
        let value = self.integer(name, i64::from(least)..=i64::from(u32::MAX))?;
        Ok(value.and_then(|value| u32::try_from(value).ok()))
    }

    /// Takes a number within `range`.
    pub(crate) fn number(
        &mut self,
        name: &'static str,
        range: RangeInclusive<f32>,
    ) -> Result<Option<f32>, ApiError> {
        let must = format_args!("a number from {} to {}", range.start(), range.end());
        let value = self.typed::<f64>(name, must)?;
        match value {
            Some(value) if !range.contains(&(value as f32)) => {
                Err(self.wrong(name, format_args!("{must}, but is {value}")))
            }
            value => Ok(value.map(|value| value as f32)),
        }
    }

    /// Takes the fields that are not implemented. Each may be absent, `null` or one of its
    /// defaults, given as JSON; anything else is refused.
    pub(crate) fn only_defaults(
        &mut self,
        fields: &[(&'static str, &[&str])],
    ) -> Result<(), ApiError> {
        for (name, defaults) in fields {
            let Some(raw) = self.raw(name) else { continue };
            if defaults.iter().any(|default| same_json(default, raw.get())) {
                continue;
            }
            let path = self.path_of(name);
            let but = if defaults.is_empty() {
                "leave it out".to_owned()
            } else {
                format!("leave it out or send {}", defaults.join(" or "))
            };
            let message = format!("'{path}' is not supported by this server; {but}");
            let code = Some("unsupported_parameter");
            return Err(ApiError::Invalid { param: Some(path), code, message });
        }
        Ok(())
    }

    /// Refuses what nobody took.
    pub(crate) fn finish(self) -> Result<(), ApiError> {
        let Some(name) = self.left.keys().next() else { return Ok(()) };
        let path = self.path_of(&shortened(name));
        let near = self
            .known
            .iter()
            .map(|known| (distance(name, known), known))
            .min()
            .filter(|(letters, _)| *letters <= TYPO_LETTERS);
        let hint = match near {
            Some((_, known)) => format!("did you mean '{known}'?"),
            None => format!("the fields are {}", self.known.join(", ")),
        };
        let message = format!("unknown field '{path}'; {hint}");
        Err(ApiError::Invalid { param: Some(path), code: Some("unknown_parameter"), message })
    }
}

/// The same value, whatever the white space. Long texts are never a default.
fn same_json(default: &str, raw: &str) -> bool {
    const LONGEST_DEFAULT: usize = 256;
    let parse = |text: &str| serde_json::from_str::<serde_json::Value>(text).ok();
    raw.len() <= LONGEST_DEFAULT && parse(default).is_some_and(|value| parse(raw) == Some(value))
}

/// A caller's text, short enough for an error.
pub(crate) fn shortened(text: &str) -> String {
    match text.char_indices().nth(QUOTE_CHARS) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

/// Letters to change, add or leave out to make one name of the other (Levenshtein 1965); names of
/// very different length count as far apart.
fn distance(name: &str, known: &str) -> usize {
    let (name, known) = (name.as_bytes(), known.as_bytes());
    if name.len().abs_diff(known.len()) > TYPO_LETTERS {
        return usize::MAX;
    }
    let mut row: Vec<usize> = (0..=known.len()).collect();
    for (i, a) in name.iter().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, b) in known.iter().enumerate() {
            let change = diagonal + usize::from(a != b);
            diagonal = row[j + 1];
            row[j + 1] = change.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[known.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error<T>(result: Result<T, ApiError>) -> String {
        result.err().map(|error| error.to_string()).unwrap_or_default()
    }

    #[test]
    fn a_wrong_type_names_the_field_and_what_it_must_be() {
        let mut fields = Fields::body(r#"{"top_p": "x", "n": 1.5, "seed": 99}"#).unwrap();
        let got = error(fields.number("top_p", 0.0..=1.0));
        assert_eq!(got, r#"'top_p' must be a number from 0 to 1, but is "x""#);
        assert!(error(fields.integer("n", 1..=8)).contains("whole number from 1 to 8"));
        assert!(error(fields.integer("seed", 0..=9)).contains("but is 99"));
    }

    #[test]
    fn an_unknown_field_is_refused_with_its_nearest_neighbour() {
        let mut fields = Fields::body(r#"{"max_token": 3}"#).unwrap();
        assert_eq!(fields.count("max_tokens", 0).unwrap(), None);
        assert_eq!(error(fields.finish()), "unknown field 'max_token'; did you mean 'max_tokens'?");
    }

    #[test]
    fn a_field_at_its_default_is_accepted_and_otherwise_refused() {
        let table: &[(&str, &[&str])] = &[("format", &[r#"{"type":"text"}"#])];
        let mut fields = Fields::body(r#"{"format": { "type" : "text" }}"#).unwrap();
        assert_eq!(fields.only_defaults(table), Ok(()));
        assert_eq!(fields.finish(), Ok(()));
        let mut fields = Fields::body(r#"{"format": {"type":"json"}}"#).unwrap();
        assert!(error(fields.only_defaults(table)).contains("'format' is not supported"));
    }

    #[test]
    fn null_is_absent() {
        let mut fields = Fields::body(r#"{"n": null}"#).unwrap();
        assert_eq!(fields.integer("n", 1..=2), Ok(None));
        assert_eq!(fields.finish(), Ok(()));
    }

    #[test]
    fn hostile_objects_are_refused() {
        let deep = format!("{{\"a\":{}1{}}}", "[".repeat(100_000), "]".repeat(100_000));
        let mut fields = Fields::body(&deep).unwrap();
        assert!(fields.typed::<serde_json::Value>("a", "shallow").is_err());
        let wide: Vec<String> = (0..300).map(|i| format!("\"f{i}\":0")).collect();
        assert!(error(Fields::body(&format!("{{{}}}", wide.join(",")))).contains("too many"));
        assert!(error(Fields::body(r#"{"a":1,"a":2}"#)).contains("twice"));
        assert!(error(Fields::body("[]")).contains("a JSON object"));
        assert!(error(Fields::body("")).contains("JSON"));
    }
}
