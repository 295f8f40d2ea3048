//! Hugging Face folders: one safetensors file, or several with an index.
//! Format: <https://huggingface.co/docs/safetensors>.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path};

use pomona_device::{SharedBytes, map_file};
use pomona_kernels::Format;
use safetensors::tensor::{Dtype, SafeTensors};
use serde::Deserialize;

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

/// All tensors of a folder.
pub(crate) fn open(folder: &Path) -> Result<BTreeMap<String, Tensor>, ModelError> {
    let index = folder.join("model.safetensors.index.json");
    let files = if index.exists() {
        parse_index(&read(&index)?)?
    } else {
        vec!["model.safetensors".to_owned()]
    };
    let mut tensors = BTreeMap::new();
    for file in files {
        let path = folder.join(&file);
        let io = |source| ModelError::Io { path: path.display().to_string(), source };
        let bytes: SharedBytes = map_file(&path).map_err(io)?;
        let places = parse((*bytes).as_ref());
        let places = places.map_err(|e| invalid!("{}: {e}", path.display()))?;
        for (name, (format, shape, offset, len)) in places {
            let tensor = Tensor { format, shape, file: bytes.clone(), offset, bytes: len };
            if tensors.insert(name.clone(), tensor).is_some() {
                return Err(invalid!("tensor {name} stands in two files of {}", folder.display()));
            }
        }
    }
    Ok(tensors)
}
