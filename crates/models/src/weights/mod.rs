//! Weight files: what tensors there are, and where their bytes lie.

pub mod gguf;
pub(crate) mod int4;
mod names;
pub mod safetensors;

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use pomona_device::SharedBytes;
use pomona_kernels::{Format, QuantisedRows, StoredRows, WeightRows, WeightSource, dequantize_row};

use crate::{ModelError, TensorInfo, invalid};
pub(crate) use names::{Dialect, Name, Role};

/// Most axes of a weight.
pub const AXES_MAX: usize = 4;

/// What weight matrices are quantised to while they are loaded.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Quantization {
    /// Signed bytes.
    Int8,
    /// Nibbles with zero points, in groups of 32; signed bytes where tokens go in and come out,
    /// which small models feel most.
    Int4,
}

impl Quantization {
    /// The format for rows of `cols`, `None` where they are not of whole groups.
    fn format(self, cols: usize, vocabulary: bool) -> Option<Format> {
        match self {
            Quantization::Int4 if !vocabulary => {
                Some(Format::Int4G32).filter(|format| cols.is_multiple_of(format.block_len()))
            }
            _ => Format::int8(cols),
        }
    }
}

/// A tensor in a mapped file, or made from several.
#[derive(Clone)]
pub(crate) struct Tensor {
    /// How its numbers are stored; the file's own word for it where Pomona has no such format.
    pub(crate) format: Result<Format, String>,
    /// Outermost axis first.
    pub(crate) shape: Vec<usize>,
    /// Its size in this format.
    pub(crate) bytes: usize,
    /// Its rows: the last axis.
    pub(crate) content: Arc<dyn WeightRows>,
    /// For each column, which of the inputs it belongs to, unless they have one order.
    pub(crate) order: Option<Arc<[u32]>>,
}

impl Tensor {
    /// A tensor that lies in a file.
    pub(crate) fn stored(
        format: Result<Format, String>,
        shape: Vec<usize>,
        file: SharedBytes,
        range: Range<usize>,
    ) -> Tensor {
        let rows: usize = shape[..shape.len().saturating_sub(1)].iter().product();
        let row_bytes = range.len() / rows.max(1);
        let content = Arc::new(StoredRows { bytes: file, offset: range.start, row_bytes });
        Tensor { format, shape, bytes: range.len(), content, order: None }
    }

    /// Its format's name.
    fn word(&self) -> String {
        self.format.clone().map_or_else(|word| word, |format| format!("{format:?}"))
    }

    /// Rows and columns, were all matrices one below the other.
    fn rows_and_cols(&self) -> Option<[usize; 2]> {
        let (cols, outer) = self.shape.split_last().filter(|(_, outer)| !outer.is_empty())?;
        Some([outer.iter().product(), *cols])
    }

    /// The same in another format, if it is a matrix of numbers, or several, and the format has
    /// its width.
    fn quantised(&self, to: Quantization, vocabulary: bool) -> Option<Tensor> {
        let ([rows, cols], from) = (self.rows_and_cols()?, *self.format.as_ref().ok()?);
        let to = to.format(cols, vocabulary).filter(|_| from.is_dense())?;
        let bytes = to.row_bytes(cols)?.checked_mul(rows)?;
        let content = QuantisedRows { source: self.content.clone(), from, to, cols };
        let (format, shape) = (Ok(to), self.shape.clone());
        Some(Tensor { format, shape, bytes, content: Arc::new(content), order: None })
    }
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
            format: tensor.word(),
            shape: tensor.shape.clone(),
            bytes: tensor.bytes as u64,
            of_experts: self.dialect.is_of_experts(name),
        };
        self.by_name.iter().map(info).collect()
    }

    /// Has every matrix of plain numbers quantised when it is read, but for routers: they are
    /// small, and who is chosen hangs on them. Says what stays as it is: the formats of matrices
    /// that do, and how many.
    pub(crate) fn quantise(&mut self, to: Quantization) -> BTreeMap<String, usize> {
        let mut others = BTreeMap::new();
        let vocabulary = [Name::Embedding, Name::Output].map(|name| self.dialect.text(name));
        for (name, tensor) in self.by_name.iter_mut().filter(|(_, t)| t.shape.len() >= 2) {
            let quantised = match self.dialect.is_router(name) {
                true => None,
                false => tensor.quantised(to, vocabulary.contains(name)),
            };
            match quantised {
                Some(quantised) => *tensor = quantised,
                None => *others.entry(tensor.word()).or_default() += 1,
            }
        }
        others
    }

    /// The tensor that plays a role, with its name in the file.
    pub(crate) fn find(&self, name: Name) -> Option<(String, &Tensor)> {
        let texts = [Some(self.dialect.text(name)), self.dialect.other_text(name)];
        let found = |text: String| self.by_name.get(&text).map(|tensor| (text, tensor));
        texts.into_iter().flatten().find_map(found)
    }

    /// For each column of a matrix, which of the inputs it belongs to, unless they have one order.
    pub(crate) fn order(&self, name: Name) -> Option<&[u32]> {
        self.find(name)?.1.order.as_deref()
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
        source(&text, tensor, &[rows, cols])
    }

    /// A matrix `[rows, cols]` of one of `count` experts, whether it is a tensor or part of one.
    pub(crate) fn expert(
        &self,
        at: (u32, Role, u32),
        count: usize,
        [rows, cols]: [usize; 2],
    ) -> Result<WeightSource, ModelError> {
        let places = self.dialect.expert(at);
        let found = places
            .iter()
            .find_map(|(name, part)| self.by_name.get(name).map(|tensor| (name, part, tensor)));
        let (name, part, tensor) = found.ok_or_else(|| {
            invalid!("the checkpoint has no tensor {}: it is incomplete", places[0].0)
        })?;
        if tensor.order.is_some() {
            return Err(invalid!(
                "tensor {name} has columns in another order, which is not supported in experts: \
                 choose a checkpoint without desc_act"
            ));
        }
        let Some([part, parts]) = *part else { return source(name, tensor, &[rows, cols]) };
        let all = source(name, tensor, &[count, parts * rows, cols])?;
        let first = (at.2 as usize * parts + part) * rows;
        Ok(all.part(first..first + rows))
    }

    /// The matrices of a tensor by its name in the file, if a backend takes such: of experts, there
    /// may be several.
    pub(crate) fn sources(&self, name: &str) -> Vec<WeightSource> {
        let whole = self.by_name.get(name).and_then(|t| source(name, t, &t.shape).ok());
        let Some(whole) = whole else { return Vec::new() };
        let shape = &self.by_name[name].shape;
        let count: usize = shape[..shape.len() - 2].iter().product();
        let rows = whole.rows / count;
        (0..count).map(|i| whole.part(i * rows..(i + 1) * rows)).collect()
    }

    /// A vector of `len` numbers in f32, if the tensor is there.
    pub(crate) fn vector(&self, name: Name, len: usize) -> Result<Option<Vec<f32>>, ModelError> {
        let Some((text, tensor)) = self.find(name) else { return Ok(None) };
        let format = format(&text, tensor)?;
        if tensor.shape != [len] || format.row_bytes(len) != Some(tensor.bytes) {
            return Err(invalid!("tensor {text} is {:?}, not [{len}]", tensor.shape));
        }
        let mut values = vec![0.0; len];
        let mut room = Vec::new();
        let bytes = tensor.content.rows(0..1, &mut room).filter(|b| b.len() == tensor.bytes);
        let bytes = bytes.ok_or_else(|| invalid!("tensor {text} is not all there"))?;
        dequantize_row(format, bytes, &mut values);
        Ok(Some(values))
    }
}

/// A tensor of this shape for a backend to take, its matrices one below the other.
fn source(name: &str, tensor: &Tensor, shape: &[usize]) -> Result<WeightSource, ModelError> {
    let format = format(name, tensor)?;
    if tensor.shape != shape {
        return Err(invalid!("tensor {name} is {:?}, not {shape:?}", tensor.shape));
    }
    let [rows, cols] =
        tensor.rows_and_cols().ok_or_else(|| invalid!("tensor {name} is a vector"))?;
    if format.row_bytes(cols).is_none() {
        return Err(invalid!("tensor {name}: rows of {cols} are not whole {format:?} blocks"));
    }
    let (name, content) = (name.to_owned(), tensor.content.clone());
    Ok(WeightSource { name, format, rows, cols, content })
}

fn format(name: &str, tensor: &Tensor) -> Result<Format, ModelError> {
    tensor.format.clone().map_err(|word| {
        let known = Format::ALL.into_iter().filter(|format| !format.is_grouped());
        let known = known.map(|f| format!("{f:?}")).collect::<Vec<_>>().join(", ");
        invalid!(
            "tensor {name} is stored as {word}, which is not supported: convert the model to one \
             of {known}"
        )
    })
}
