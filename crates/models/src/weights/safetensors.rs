//! Hugging Face folders: one safetensors file, or several with an index.
//! Format: <https://huggingface.co/docs/safetensors>.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::{Component, Path};

use pomona_device::{SharedBytes, map_file};
use pomona_kernels::Format;
use safetensors::tensor::{Dtype, SafeTensors};
use serde::Deserialize;

use super::int4::{self, Scheme};
use super::{AXES_MAX, Tensor};
use crate::checkpoint::read;
use crate::{ModelError, invalid};

/// Most files of one model.
const SHARDS_MAX: usize = 10_000;

/// Where a tensor lies: format (or the file's word for one that Pomona lacks), shape, byte range.
pub type Place = (Result<Format, String>, Vec<usize>, usize, usize);

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// Parses a file's header: tensors by name.
///
/// # Errors
/// When the header is not one, or a tensor lies outside the file.
pub fn parse(bytes: &[u8]) -> Result<BTreeMap<String, Place>, ModelError> {
    let file = SafeTensors::deserialize(bytes)
        .map_err(|e| invalid!("this is not a whole safetensors file ({e}): fetch it again"))?;
    let base = bytes.as_ptr() as usize;
    file.iter()
        .map(|(name, view)| {
            let shape = view.shape().to_vec();
            if shape.len() > AXES_MAX || shape.contains(&0) {
                return Err(invalid!("tensor {name} has the impossible shape {shape:?}"));
            }
            let format = match view.dtype() {
                Dtype::F32 => Ok(Format::F32),
                Dtype::F16 => Ok(Format::F16),
                Dtype::BF16 => Ok(Format::BF16),
                other => Err(format!("{other:?}")),
            };
            let offset = view.data().as_ptr() as usize - base;
            Ok((name.to_owned(), (format, shape, offset, view.data().len())))
        })
        .collect()
}

/// Parses an index: the files that it names.
///
/// # Errors
/// When it is not an index, or names anything but plain files beside it.
pub fn parse_index(text: &[u8]) -> Result<Vec<String>, ModelError> {
    let index: Index = serde_json::from_slice(text)
        .map_err(|e| invalid!("model.safetensors.index.json is not an index: {e}"))?;
    let files: BTreeSet<String> = index.weight_map.into_values().collect();
    if files.is_empty() || files.len() > SHARDS_MAX {
        return Err(invalid!("model.safetensors.index.json names {} files", files.len()));
    }
    for file in &files {
        let mut parts = Path::new(file).components();
        let plain = matches!(parts.next(), Some(Component::Normal(_))) && parts.next().is_none();
        if !plain {
            return Err(invalid!(
                "model.safetensors.index.json names {file:?}, outside its folder"
            ));
        }
    }
    Ok(files.into_iter().collect())
}

/// A tensor as it lies in a file.
pub(crate) struct Raw {
    pub(crate) format: Result<Format, String>,
    pub(crate) shape: Vec<usize>,
    file: SharedBytes,
    range: Range<usize>,
}

impl Raw {
    /// All its bytes.
    pub(crate) fn bytes(&self) -> Option<&[u8]> {
        (*self.file).as_ref().get(self.range.clone())
    }

    /// Whether it consists of 32-bit integers.
    pub(crate) fn is_words(&self) -> bool {
        self.format.as_ref().is_err_and(|word| word == "I32" || word == "U32")
    }

    /// Its 32-bit integers, if it has `count` of them.
    pub(crate) fn words(&self, count: usize) -> Option<impl Iterator<Item = u32>> {
        let words = self.bytes()?.as_chunks::<4>().0;
        (words.len() == count).then(|| words.iter().map(|word| u32::from_le_bytes(*word)))
    }

    /// A hint that it will hardly be read again.
    pub(crate) fn done_with(&self) {
        self.file.done_with(self.range.clone());
    }

    /// What the file system knows of its file, and where it lies there.
    pub(crate) fn identity(&self) -> Option<String> {
        Some(format!("{:?} {:?}", self.file.identity()?, self.range))
    }

    fn into_tensor(self) -> Tensor {
        let Raw { format, shape, file, range } = self;
        Tensor::stored(format, shape, file, range)
    }
}

/// All tensors of a folder; those that `scheme` says are quantised as one matrix each.
pub(crate) fn open(
    folder: &Path,
    scheme: Option<Scheme>,
) -> Result<BTreeMap<String, Tensor>, ModelError> {
    let index = folder.join("model.safetensors.index.json");
    let files = if index.exists() {
        parse_index(&read(&index)?)?
    } else {
        vec!["model.safetensors".to_owned()]
    };
    let mut raw = BTreeMap::new();
    for file in files {
        let path = folder.join(&file);
        let io = |source| ModelError::Io { path: path.display().to_string(), source };
        let bytes: SharedBytes = map_file(&path).map_err(io)?;
        let places = parse((*bytes).as_ref());
        let places = places.map_err(|e| invalid!("{}: {e}", path.display()))?;
        for (name, (format, shape, offset, len)) in places {
            let tensor = Raw { format, shape, file: bytes.clone(), range: offset..offset + len };
            if raw.insert(name.clone(), tensor).is_some() {
                return Err(invalid!("tensor {name} stands in two files of {}", folder.display()));
            }
        }
    }
    let made = int4::merge(&mut raw, scheme)?;
    let stored = raw.into_iter().map(|(name, raw)| (name, raw.into_tensor()));
    Ok(stored.chain(made).collect())
}
