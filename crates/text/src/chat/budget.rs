//! What one rendering may use. The engine's fuel counts instructions; this counts what a single
//! instruction can cost: comparing long texts, joining them, walking deep lists.

use minijinja::value::{Value, ValueKind};
use minijinja::{Error, ErrorKind, State};

use super::values::{self, MAX_DEPTH};

/// Bytes of one text.
pub(super) const MAX_STRING_BYTES: usize = crate::MAX_TEXT_BYTES;
/// Values in one list or map, counted through all its levels.
pub(super) const MAX_NODES: u64 = 1_000_000;
/// Bytes of all texts in one list or map.
const MAX_LIST_BYTES: usize = 2 * MAX_STRING_BYTES;
/// Work of one rendering: values looked at, and 64-byte pieces of text. About a second.
const MAX_WORK: u64 = 20_000_000;
/// Bytes of all texts that one rendering makes.
const MAX_BYTES: u64 = 1 << 28;

/// The reason why a rendering was stopped, as the source of the engine's error.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct Exhausted(pub(super) String);

/// An error that says that `what` is too much.
pub(super) fn exhausted(what: impl Into<String>) -> Error {
    let what = what.into();
    Error::new(ErrorKind::OutOfFuel, what.clone()).with_source(Exhausted(what))
}

/// What a value holds in all its levels.
#[derive(Default)]
struct Size {
    nodes: u64,
    bytes: usize,
}

/// What is left to one rendering. Kept in the engine's state.
#[derive(Debug)]
pub(super) struct Budget {
    work: u64,
    bytes: u64,
}

impl Default for Budget {
    fn default() -> Self {
        Self { work: MAX_WORK, bytes: MAX_BYTES }
    }
}

impl Budget {
    /// The budget of the rendering that `state` belongs to.
    pub(super) fn of<'a>(state: &'a mut State<'_, '_>) -> &'a mut Budget {
        state.get_or_insert_extension_with(Budget::default)
    }

    pub(super) fn work(&mut self, units: u64) -> Result<(), Error> {
        self.work = self
            .work
            .checked_sub(units)
            .ok_or_else(|| exhausted(format!("it takes more than {MAX_WORK} units of work")))?;
        Ok(())
    }

    /// Pays for a text of `length` bytes about to be made.
    pub(super) fn make(&mut self, length: usize) -> Result<(), Error> {
        if length > MAX_STRING_BYTES {
            return Err(exhausted(format!(
                "it makes a text of more than {MAX_STRING_BYTES} bytes"
            )));
        }
        self.work(length as u64 / 64 + 1)?;
        self.bytes = self
            .bytes
            .checked_sub(length as u64)
            .ok_or_else(|| exhausted(format!("it makes more than {MAX_BYTES} bytes of text")))?;
        Ok(())
    }

    /// Pays for looking at a value without going into its items.
    pub(super) fn touch(&mut self, value: &Value) -> Result<(), Error> {
        match value.as_str() {
            Some(text) => self.work(text.len() as u64 / 64 + 1),
            None => self.work(1),
        }
    }

    /// Pays for walking a value through all its levels; what it cost, which is at least the
    /// number of values met. Too deep or too many: an error.
    pub(super) fn weigh(&mut self, value: &Value) -> Result<u64, Error> {
        let before = self.work;
        self.walk(value, 0, &mut Size::default())?;
        Ok(before - self.work)
    }

    fn walk(&mut self, value: &Value, depth: usize, size: &mut Size) -> Result<(), Error> {
        self.touch(value)?;
        size.nodes += 1;
        if size.nodes > MAX_NODES {
            return Err(exhausted(format!("it builds a list of more than {MAX_NODES} values")));
        }
        size.bytes += value.as_str().map_or(0, str::len);
        if size.bytes > MAX_LIST_BYTES {
            return Err(exhausted(format!("it builds a list of over {MAX_LIST_BYTES} bytes")));
        }
        let kind = value.kind();
        if !matches!(kind, ValueKind::Seq | ValueKind::Iterable | ValueKind::Map) {
            return Ok(());
        }
        if depth == MAX_DEPTH {
            return Err(exhausted(format!("it builds a list more than {MAX_DEPTH} levels deep")));
        }
        for item in values::items(value) {
            self.walk(&item, depth + 1, size)?;
            if kind == ValueKind::Map {
                self.walk(&value.get_item(&item).unwrap_or_default(), depth + 1, size)?;
            }
        }
        Ok(())
    }

    /// Takes in a value that an instruction made: within limits, and with its items in memory
    /// rather than to be computed, so that computations cannot pile up.
    pub(super) fn settle(&mut self, value: Value) -> Result<Value, Error> {
        if let Some(text) = value.as_str() {
            self.make(text.len())?;
            return Ok(value);
        }
        match value.kind() {
            ValueKind::Iterable => {
                let mut items = Vec::new();
                let mut size = Size::default();
                for item in value.try_iter()? {
                    self.walk(&item, 1, &mut size)?;
                    items.push(item);
                }
                Ok(Value::from(items))
            }
            ValueKind::Seq | ValueKind::Map => {
                self.weigh(&value)?;
                Ok(value)
            }
            _ => Ok(value),
        }
    }
}
