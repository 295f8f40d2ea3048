//! The GGUF container (<https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>), versions 2
//! and 3. Written for files from strangers: nothing is allocated that the file has not the bytes
//! for, and every offset is checked.

use std::collections::BTreeMap;

use pomona_kernels::Format;

use super::AXES_MAX;
use crate::{ModelError, invalid};

/// Nesting of arrays; real files have one level.
const DEPTH_MAX: u32 = 4;
/// Longest key or tensor name; the specification allows 65,535 and 64.
const NAME_BYTES_MAX: u64 = 65_535;
/// Elements of an array that get room at once: more than a vocabulary has.
const ROOM_MAX: u64 = 1 << 19;
/// Largest alignment of tensor data.
const ALIGNMENT_MAX: u64 = 1 << 20;

/// A metadata value.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)]
pub enum Value {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Bool(bool),
    String(String),
    /// An array of strings: vocabularies are such.
    Strings(Vec<String>),
    /// An array of numbers of any type.
    Numbers(Vec<f64>),
    /// An array of anything else.
    Array(Vec<Value>),
}

impl Value {
    /// A non-negative integer.
    pub fn as_u64(&self) -> Option<u64> {
        match self {
            Value::Unsigned(v) => Some(*v),
            Value::Signed(v) => (*v).try_into().ok(),
            _ => None,
        }
    }

    /// Any number.
    pub fn as_f64(&self) -> Option<f64> {
        match self {
            Value::Unsigned(v) => Some(*v as f64),
            Value::Signed(v) => Some(*v as f64),
            Value::Float(v) => Some(*v),
            _ => None,
        }
    }

    /// A string.
    pub fn as_str(&self) -> Option<&str> {
        match self {
            Value::String(v) => Some(v),
            _ => None,
        }
    }

    /// A truth value.
    pub fn as_bool(&self) -> Option<bool> {
        match self {
            Value::Bool(v) => Some(*v),
            _ => None,
        }
    }

    /// An array of strings.
    pub fn into_strings(self) -> Option<Vec<String>> {
        match self {
            Value::Strings(v) => Some(v),
            _ => None,
        }
    }

    /// An array of numbers.
    pub fn into_numbers(self) -> Option<Vec<f64>> {
        match self {
            Value::Numbers(v) => Some(v),
            _ => None,
        }
    }
}

/// Where a tensor lies.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    /// How its numbers are stored, or ggml's number for a type that Pomona does not have.
    pub format: Result<Format, String>,
    /// Outermost axis first (the file has it the other way round).
    pub shape: Vec<usize>,
    /// First byte in the file.
    pub offset: usize,
    /// Its size; for unknown formats, up to the next tensor or the end.
    pub bytes: usize,
}

/// A parsed header.
#[derive(Clone, Debug, PartialEq)]
pub struct Gguf {
    /// Metadata by key.
    pub metadata: BTreeMap<String, Value>,
    /// Tensors by name.
    pub tensors: BTreeMap<String, Entry>,
}

impl Gguf {
    /// A key under the architecture's prefix.
    pub fn arch_value(&self, key: &str) -> Option<&Value> {
        let architecture = self.metadata.get("general.architecture")?.as_str()?;
        self.metadata.get(&format!("{architecture}.{key}"))
    }
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

/// Parses a file's header.
///
/// # Errors
/// When the bytes are not a GGUF file, or any count, offset or type in it cannot be true.
pub fn parse(bytes: &[u8]) -> Result<Gguf, ModelError> {
    let mut reader = Reader { bytes, at: 0 };
    if bytes.is_empty() {
        return Err(invalid!("the file is empty"));
    }
    if reader.take(4)? != b"GGUF" {
        return Err(invalid!(
            "the file does not begin with \"GGUF\": it is not a GGUF file; give \
             one, or the folder of a Hugging Face model"
        ));
    }
    let version = reader.u32()?;
    if version.swap_bytes() == 2 || version.swap_bytes() == 3 {
        return Err(invalid!("the file is big-endian GGUF: convert it to little-endian"));
    }
    if !(2..=3).contains(&version) {
        return Err(invalid!("GGUF version {version} is not supported, only 2 and 3"));
    }
    let (tensor_count, key_count) = (reader.u64()?, reader.u64()?);
    // A key takes at least 13 bytes, a tensor at least 32.
    reader.plausible(key_count, 13, "metadata keys")?;
    reader.plausible(tensor_count, 24, "tensors")?;
    let mut metadata = BTreeMap::new();
    for _ in 0..key_count {
        let key = reader.string(NAME_BYTES_MAX)?;
        let kind = reader.u32()?;
        let value = reader.value(kind, 0)?;
        if metadata.insert(key.clone(), value).is_some() {
            return Err(invalid!("the metadata key {key:?} occurs twice"));
        }
    }
    let infos = (0..tensor_count).map(|_| reader.tensor_info()).collect::<Result<Vec<_>, _>>()?;
    let alignment = match metadata.get("general.alignment") {
        None => 32,
        Some(value) => value
            .as_u64()
            .filter(|a| a.is_power_of_two() && *a <= ALIGNMENT_MAX)
            .ok_or_else(|| invalid!("general.alignment is {value:?}, not a power of two"))?,
    };
    let data = reader.at.next_multiple_of(alignment as usize);
    let tensors = place(infos, data, alignment, bytes.len())?;
    Ok(Gguf { metadata, tensors })
}

/// What the file says of a tensor.
struct Info {
    name: String,
    shape: Vec<usize>,
    kind: u32,
    offset: u64,
}

/// Checks that each tensor lies within the file.
fn place(
    infos: Vec<Info>,
    data: usize,
    alignment: u64,
    len: usize,
) -> Result<BTreeMap<String, Entry>, ModelError> {
    let mut tensors = BTreeMap::new();
    for Info { name, shape, kind, offset } in infos {
        if !offset.is_multiple_of(alignment) {
            return Err(invalid!(
                "tensor {name} starts at {offset}, not a multiple of {alignment}"
            ));
        }
        let start = usize::try_from(offset).ok().and_then(|o| data.checked_add(o));
        let start = start.filter(|s| *s <= len);
        let start = start.ok_or_else(|| truncated(&name))?;
        let format = format_of(kind);
        let bytes = match &format {
            Err(_) => 0,
            Ok(format) => {
                let (last, rest) = shape.split_last().expect("tensor_info gives an axis");
                let row = format.row_bytes(*last).ok_or_else(|| {
                    invalid!("tensor {name}: rows of {last} are not whole {format:?} blocks")
                })?;
                let rows = rest.iter().try_fold(1usize, |a, b| a.checked_mul(*b));
                rows.and_then(|r| r.checked_mul(row)).ok_or_else(|| truncated(&name))?
            }
        };
        if start.checked_add(bytes).is_none_or(|end| end > len) {
            return Err(truncated(&name));
        }
        let entry = Entry { format, shape, offset: start, bytes };
        if tensors.insert(name.clone(), entry).is_some() {
            return Err(invalid!("the tensor {name} occurs twice"));
        }
    }
    Ok(tensors)
}

fn truncated(name: &str) -> ModelError {
    invalid!("tensor {name} ends outside the file: the file is truncated, fetch it again")
}

/// ggml's type numbers.
fn format_of(kind: u32) -> Result<Format, String> {
    Ok(match kind {
        0 => Format::F32,
        1 => Format::F16,
        2 => Format::Q4_0,
        3 => Format::Q4_1,
        6 => Format::Q5_0,
        7 => Format::Q5_1,
        8 => Format::Q8_0,
        12 => Format::Q4_K,
        13 => Format::Q5_K,
        14 => Format::Q6_K,
        30 => Format::BF16,
        10 => return Err("Q2_K".to_owned()),
        11 => return Err("Q3_K".to_owned()),
        16..=23 | 29 => return Err(format!("an IQ format (ggml type {kind})")),
        other => return Err(format!("ggml type {other}")),
    })
}

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8], ModelError> {
        let end = self.at.checked_add(count).filter(|end| *end <= self.bytes.len());
        let end = end.ok_or_else(|| {
            let len = self.bytes.len();
            invalid!("the header ends after {len} bytes: the file is truncated, fetch it again")
        })?;
        let taken = &self.bytes[self.at..end];
        self.at = end;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], ModelError> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N)?);
        Ok(array)
    }

    fn u32(&mut self) -> Result<u32, ModelError> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64, ModelError> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// Refuses a count that the rest of the file cannot hold.
    fn plausible(&self, count: u64, least_bytes: u64, what: &str) -> Result<(), ModelError> {
        let left = (self.bytes.len() - self.at) as u64;
        match count.checked_mul(least_bytes) {
            Some(bytes) if bytes <= left => Ok(()),
            _ => Err(invalid!(
                "the header announces {count} {what}, the file has {left} bytes left: it is \
                 damaged or truncated, fetch it again"
            )),
        }
    }

    fn string(&mut self, most: u64) -> Result<String, ModelError> {
        let len = self.u64()?;
        if len > most {
            return Err(invalid!("a name of {len} bytes: the file is damaged"));
        }
        self.plausible(len, 1, "bytes of text")?;
        let bytes = self.take(len as usize)?;
        // Vocabularies contain broken characters now and then; they stand for bytes elsewhere.
        Ok(String::from_utf8_lossy(bytes).into_owned())
    }

    /// A plausible number of elements.
    fn list<T>(
        &mut self,
        count: u64,
        each: impl Fn(&mut Self) -> Result<T, ModelError>,
    ) -> Result<Vec<T>, ModelError> {
        let mut list = Vec::with_capacity(count.min(ROOM_MAX) as usize);
        for _ in 0..count {
            list.push(each(self)?);
        }
        Ok(list)
    }

    /// A number of an array.
    fn number(&mut self, kind: u32) -> Result<f64, ModelError> {
        Ok(self.value(kind, DEPTH_MAX)?.as_f64().unwrap_or_default())
    }

    fn value(&mut self, kind: u32, depth: u32) -> Result<Value, ModelError> {
        Ok(match kind {
            0 => Value::Unsigned(u64::from(self.array::<1>()?[0])),
            1 => Value::Signed(i64::from(i8::from_le_bytes(self.array()?))),
            2 => Value::Unsigned(u64::from(u16::from_le_bytes(self.array()?))),
            3 => Value::Signed(i64::from(i16::from_le_bytes(self.array()?))),
            4 => Value::Unsigned(u64::from(self.u32()?)),
            5 => Value::Signed(i64::from(i32::from_le_bytes(self.array()?))),
            6 => Value::Float(f64::from(f32::from_le_bytes(self.array()?))),
            7 => Value::Bool(self.array::<1>()?[0] != 0),
            8 => Value::String(self.string(u64::MAX)?),
            9 => {
                if depth == DEPTH_MAX {
                    return Err(invalid!("arrays nest deeper than {DEPTH_MAX}"));
                }
                let (kind, count) = (self.u32()?, self.u64()?);
                let least = match kind {
                    0 | 1 | 7 => 1,
                    2 | 3 => 2,
                    4..=6 => 4,
                    8 | 10..=12 => 8,
                    _ => 12,
                };
                self.plausible(count, least, "array elements")?;
                match kind {
                    8 => Value::Strings(self.list(count, |r| r.string(u64::MAX))?),
                    0..=6 | 10..=12 => Value::Numbers(self.list(count, |r| r.number(kind))?),
                    _ => Value::Array(self.list(count, |r| r.value(kind, depth + 1))?),
                }
            }
            10 => Value::Unsigned(self.u64()?),
            11 => Value::Signed(i64::from_le_bytes(self.array()?)),
            12 => Value::Float(f64::from_le_bytes(self.array()?)),
            other => return Err(invalid!("a metadata value has the unknown type {other}")),
        })
    }

    fn tensor_info(&mut self) -> Result<Info, ModelError> {
        let name = self.string(NAME_BYTES_MAX)?;
        let axes = self.u32()? as usize;
        if !(1..=AXES_MAX).contains(&axes) {
            return Err(invalid!("tensor {name} has {axes} axes, 1 to {AXES_MAX} are possible"));
        }
        let mut shape = (0..axes)
            .map(|_| {
                let n = self.u64()?;
                let n = usize::try_from(n).ok().filter(|n| *n > 0);
                n.ok_or_else(|| invalid!("tensor {name} has an axis of impossible length"))
            })
            .collect::<Result<Vec<_>, _>>()?;
        shape.reverse();
        let (kind, offset) = (self.u32()?, self.u64()?);
        Ok(Info { name, shape, kind, offset })
    }
}
