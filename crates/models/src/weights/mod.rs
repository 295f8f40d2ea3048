//! Weight files: what tensors there are, and where their bytes lie.

pub mod gguf;
mod names;
pub mod safetensors;

use std::collections::BTreeMap;

use pomona_device::SharedBytes;
use pomona_kernels::{Format, WeightSource, dequantize_row};

use crate::{ModelError, TensorInfo, invalid};
pub(crate) use names::{Dialect, Name, Role};

/// Most axes of a weight.
pub const AXES_MAX: usize = 4;

/// A tensor in a mapped file.
#[derive(Clone)]
pub(crate) struct Tensor {
    /// How its numbers are stored; the file's own word for it where Pomona has no such format.
    pub(crate) format: Result<Format, String>,
    /// Outermost axis first.
    pub(crate) shape: Vec<usize>,
    pub(crate) file: SharedBytes,
    pub(crate) offset: usize,
    pub(crate) bytes: usize,
}

/// All tensors of a checkpoint by name.
pub(crate) struct Tensors {
    pub(crate) by_name: BTreeMap<String, Tensor>,
    pub(crate) dialect: Dialect,
}

impl Tensors {
    pub(crate) fn infos(&self) -> Vec<TensorInfo> {
        let info = |(name, tensor): (&String, &Tensor)| TensorInfo {
            name: name.clone(),
            format: tensor.format.clone().map_or_else(|word| word, |f| format!("{f:?}")),
            shape: tensor.shape.clone(),
            bytes: tensor.bytes as u64,
        };
        self.by_name.iter().map(info).collect()
    }

    /// The tensor that plays a role, with its name in the file.
    pub(crate) fn find(&self, name: Name) -> Option<(String, &Tensor)> {
        let text = self.dialect.text(name);
        self.by_name.get(&text).map(|tensor| (text, tensor))
    }

    fn need(&self, name: Name) -> Result<(String, &Tensor), ModelError> {
        self.find(name).ok_or_else(|| {
            invalid!("the checkpoint has no tensor {}: it is incomplete", self.dialect.text(name))
        })
    }

    /// A matrix `[rows, cols]` for a backend to take.
    pub(crate) fn matrix(
        &self,
        name: Name,
        rows: usize,
        cols: usize,
    ) -> Result<WeightSource, ModelError> {
        let (text, tensor) = self.need(name)?;
        let format = format(&text, tensor)?;
        if tensor.shape != [rows, cols] {
            return Err(invalid!("tensor {text} is {:?}, not {:?}", tensor.shape, [rows, cols]));
        }
        if format.row_bytes(cols).is_none() {
            return Err(invalid!("tensor {text}: rows of {cols} are not whole {format:?} blocks"));
        }
        let (bytes, offset) = (tensor.file.clone(), tensor.offset);
        Ok(WeightSource { name: text, format, rows, cols, bytes, offset })
    }

    /// A vector of `len` numbers in f32, if the tensor is there.
    pub(crate) fn vector(&self, name: Name, len: usize) -> Result<Option<Vec<f32>>, ModelError> {
        let Some((text, tensor)) = self.find(name) else { return Ok(None) };
        let format = format(&text, tensor)?;
        if tensor.shape != [len] || format.row_bytes(len) != Some(tensor.bytes) {
            return Err(invalid!("tensor {text} is {:?}, not [{len}]", tensor.shape));
        }
        let mut values = vec![0.0; len];
        let file = (*tensor.file).as_ref();
        dequantize_row(format, &file[tensor.offset..][..tensor.bytes], &mut values);
        Ok(Some(values))
    }
}

fn format(name: &str, tensor: &Tensor) -> Result<Format, ModelError> {
    tensor.format.clone().map_err(|word| {
        let known = Format::ALL.map(|f| format!("{f:?}")).join(", ");
        invalid!(
            "tensor {name} is stored as {word}, which is not supported: convert the model to one \
             of {known}"
        )
    })
}
