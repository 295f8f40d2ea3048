//! Checkpoints with 4-bit integers in safetensors: GPTQ (Frantar et al., 2022), as AutoGPTQ and
//! GPTQModel write it, and AWQ (Lin et al., 2023), as AutoAWQ's `gemm` does. Both hold `scale *
//! (q - zero)`, which our own format holds too: only the order of the integers changes.
//!
//! | tensor | GPTQ | AWQ |
//! | --- | --- | --- |
//! | `qweight` | `[in / 8, out]`: eight inputs a word | `[in, out / 8]`: eight outputs a word |
//! | `qzeros` | `[groups, out / 8]`, less one in version 1 | `[groups, out / 8]` |
//! | `scales` | `[groups, out]` | `[groups, out]` |
//! | `g_idx` | `[in]`: the group of each input | none: groups follow each other |
//!
//! With `desc_act`, columns of a group lie anywhere. They are brought together here, and the model
//! reorders activations in the same way.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use pomona_kernels::{Format, Int4Group, WeightRows, dequantize_row};
use serde_json::Value as Json;

use super::Tensor;
use super::safetensors::Raw;
use crate::{ModelError, invalid};

/// Integers in a 32-bit word.
const PACKED: usize = 8;
/// Which nibble of a word AWQ keeps output `i` in.
const AWQ_NIBBLE: [usize; PACKED] = [0, 4, 1, 5, 2, 6, 3, 7];
/// One in each nibble of a word.
const ONES: u32 = 0x1111_1111;
const SUPPORTED: &str = "what is read: GPTQ of 4 bits (checkpoint_format gptq or gptq_v2), AWQ of \
    4 bits (version gemm), GGUF files, and unquantised models, which --quantization int8 or int4 \
    quantises while it loads them";

/// How a checkpoint's integers lie.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Layout {
    /// GPTQ; version 1 stores zero points less one.
    Gptq { zeros_less_one: bool },
    /// AWQ, gemm.
    Awq,
}

/// What `config.json` says of quantisation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Scheme {
    layout: Layout,
    /// Columns of a group; `None`: all of a row.
    group_size: Option<usize>,
}

impl Scheme {
    /// Reads `quantization_config`, if there is one.
    ///
    /// # Errors
    /// When it is of a kind that is not read; says which are.
    pub(crate) fn of(config: &Json) -> Result<Option<Scheme>, ModelError> {
        let known = ["quantization_config", "compression_config"];
        let found = known.iter().find_map(|key| config.get(key).filter(|c| !c.is_null()));
        let Some(found) = found else { return Ok(None) };
        let text = |key: &str| {
            found.get(key).and_then(Json::as_str).map(str::to_ascii_lowercase).unwrap_or_default()
        };
        let number = |keys: [&str; 2]| keys.iter().find_map(|key| found.get(key)?.as_i64());
        let refuse =
            |what: String| Err(invalid!("config.json: {what} is not supported; {SUPPORTED}"));
        let method = text("quant_method");
        let (format, version) = (text("checkpoint_format"), text("version"));
        let layout = match method.as_str() {
            "gptq" => match format.as_str() {
                "" | "gptq" => Layout::Gptq { zeros_less_one: true },
                "gptq_v2" => Layout::Gptq { zeros_less_one: false },
                other => return refuse(format!("GPTQ with checkpoint_format {other:?}")),
            },
            "awq" => match version.as_str() {
                "" | "gemm" => Layout::Awq,
                other => return refuse(format!("AWQ of version {other:?}")),
            },
            other => return refuse(format!("quantization_config of quant_method {other:?}")),
        };
        let bits = number(["bits", "w_bit"]);
        if bits != Some(4) {
            let bits = bits.map_or("an unknown number of".to_owned(), |bits| bits.to_string());
            return refuse(format!("{method} of {bits} bits"));
        }
        let group_size = match number(["group_size", "q_group_size"]) {
            None | Some(-1) => None,
            Some(size) if size > 0 => usize::try_from(size).ok(),
            Some(size) => return Err(invalid!("config.json: a group_size of {size}: impossible")),
        };
        Ok(Some(Scheme { layout, group_size }))
    }
}

/// Takes the tensors that belong together from `raw` and makes a matrix of each set.
///
/// # Errors
/// When a set is incomplete or its shapes contradict each other or `scheme`.
pub(crate) fn merge(
    raw: &mut BTreeMap<String, Raw>,
    scheme: Option<Scheme>,
) -> Result<Vec<(String, Tensor)>, ModelError> {
    let names = raw.keys().filter_map(|name| name.strip_suffix(".qweight"));
    let names: Vec<String> = names.map(str::to_owned).collect();
    let Some(first) = names.first() else { return Ok(Vec::new()) };
    let scheme = scheme.ok_or_else(|| {
        invalid!(
            "{first}.qweight is a quantised tensor, and config.json has no quantization_config \
             that says how: fetch a checkpoint that has one"
        )
    })?;
    let matrix = |name: String| {
        let weight = format!("{name}.weight");
        if raw.contains_key(&weight) {
            return Err(invalid!("tensor {weight} is there quantised and unquantised"));
        }
        let made = Matrix::take(raw, &name, scheme)?;
        let (format, shape) = (made.format, vec![made.rows, made.cols]);
        let bytes = format.row_bytes(made.cols).and_then(|bytes| bytes.checked_mul(made.rows));
        let bytes = bytes.ok_or_else(|| invalid!("{name}.qweight is impossibly large"))?;
        let order = made.order.clone();
        Ok((weight, Tensor { format: Ok(format), shape, bytes, content: Arc::new(made), order }))
    };
    names.into_iter().map(matrix).collect()
}

/// A matrix `[rows = out, cols = in]` of such integers.
struct Matrix {
    layout: Layout,
    format: Format,
    rows: usize,
    cols: usize,
    qweight: Raw,
    qzeros: Raw,
    scales: Raw,
    /// The number format of the scales.
    scale: Format,
    /// Which of the checkpoint's groups each group of the format belongs to.
    groups: Vec<usize>,
    /// The checkpoint's column of each of ours, unless they are the same.
    order: Option<Arc<[u32]>>,
}

impl Matrix {
    fn take(
        raw: &mut BTreeMap<String, Raw>,
        name: &str,
        scheme: Scheme,
    ) -> Result<Matrix, ModelError> {
        let mut take = |what: &str| raw.remove(&format!("{name}.{what}"));
        let [qweight, qzeros, scales] = ["qweight", "qzeros", "scales"]
            .map(|what| take(what).ok_or_else(|| invalid!("tensor {name}.{what} is missing")));
        let (qweight, qzeros, scales) = (qweight?, qzeros?, scales?);
        let g_idx = take("g_idx").filter(|_| scheme.layout != Layout::Awq);
        let fail = |why: String| invalid!("tensor {name}.qweight: {why}");
        let [down, across] = qweight.shape[..] else {
            return Err(fail(format!("its shape is {:?}, not of two axes", qweight.shape)));
        };
        let (cols, rows) = match scheme.layout {
            Layout::Gptq { .. } => (down.checked_mul(PACKED), Some(across)),
            Layout::Awq => (Some(down), across.checked_mul(PACKED)),
        };
        let (Some(cols), Some(rows)) = (cols, rows) else {
            return Err(fail("impossibly large".to_owned()));
        };
        let groups = scales.shape.first().copied().unwrap_or_default();
        let shapes = qzeros.shape == [groups, rows / PACKED]
            && scales.shape == [groups, rows]
            && rows.is_multiple_of(PACKED);
        let words = [Some(&qweight), Some(&qzeros), g_idx.as_ref()].into_iter().flatten();
        if !shapes || !words.into_iter().all(Raw::is_words) {
            return Err(fail(format!(
                "{:?} does not fit qzeros {:?} and scales {:?}, or they are not 32-bit integers",
                qweight.shape, qzeros.shape, scales.shape
            )));
        }
        let scale = scales.format.clone().ok().filter(|format| format.is_dense());
        let scale = scale.ok_or_else(|| fail("its scales are no numbers".to_owned()))?;
        let by_column = match &g_idx {
            Some(index) => index.words(cols).map(|words| words.map(|g| g as usize).collect()),
            None => {
                let size = scheme.group_size.unwrap_or(cols);
                Some((0..cols).map(|col| col / size).collect())
            }
        };
        let by_column: Vec<usize> = by_column
            .filter(|by_column: &Vec<usize>| by_column.iter().all(|group| *group < groups))
            .ok_or_else(|| {
                fail(format!("not each of {cols} columns has one of {groups} groups"))
            })?;
        let (order, sorted) = order(&by_column);
        let borders = (1..cols).filter(|col| sorted[*col] != sorted[col - 1]);
        let format = Format::int4(borders.fold(cols, greatest_common_divisor));
        let format = format.ok_or_else(|| {
            fail(format!("its groups ({groups} in {cols} columns) are not of whole 32 columns"))
        })?;
        let groups = sorted.into_iter().step_by(format.block_len()).collect();
        let layout = scheme.layout;
        Ok(Matrix { layout, format, rows, cols, qweight, qzeros, scales, scale, groups, order })
    }

    /// Scales of a group and some rows.
    fn scales(&self, group: usize, rows: &Range<usize>) -> Option<Vec<f32>> {
        let size = self.scale.block_bytes();
        let (start, end) = (group * self.rows + rows.start, group * self.rows + rows.end);
        let mut scales = vec![0.0; rows.len()];
        dequantize_row(
            self.scale,
            self.scales.bytes()?.get(start * size..end * size)?,
            &mut scales,
        );
        Some(scales)
    }

    /// The nibble of output `row` in a row of words that hold eight outputs each.
    fn across(&self, words: &[[u8; 4]], row: usize) -> u8 {
        let word = u32::from_le_bytes(words[row / PACKED]);
        match self.layout {
            Layout::Gptq { zeros_less_one } => {
                // As one addition to the word: how GPTQModel turns version 1 into 2, carries and
                // all, which undoes how it was written.
                let word = if zeros_less_one { word.wrapping_add(ONES) } else { word };
                (word >> (row % PACKED * 4)) as u8 & 15
            }
            Layout::Awq => (word >> (AWQ_NIBBLE[row % PACKED] * 4)) as u8 & 15,
        }
    }
}

impl WeightRows for Matrix {
    fn rows<'a>(&'a self, rows: Range<usize>, room: &'a mut Vec<u8>) -> Option<&'a [u8]> {
        if rows.end > self.rows {
            return None;
        }
        let (len, row_bytes) = (self.format.block_len(), self.format.row_bytes(self.cols)?);
        let weights = self.qweight.bytes()?.as_chunks::<4>().0;
        let zeros = self.qzeros.bytes()?.as_chunks::<4>().0;
        let width = self.rows / PACKED;
        room.clear();
        room.resize(rows.len() * row_bytes, 0);
        // The integers of a group: columns of each row.
        let mut integers = vec![0; rows.len() * len];
        for (block, group) in self.groups.iter().enumerate() {
            let scales = self.scales(*group, &rows)?;
            let zeros = &zeros[group * width..][..width];
            for i in 0..len {
                let col = block * len + i;
                let col = self.order.as_ref().map_or(col, |order| order[col] as usize);
                match self.layout {
                    Layout::Gptq { .. } => {
                        let words = &weights[col / PACKED * self.rows..][rows.clone()];
                        for (r, word) in words.iter().enumerate() {
                            let word = u32::from_le_bytes(*word);
                            integers[r * len + i] = (word >> (col % PACKED * 4)) as u8 & 15;
                        }
                    }
                    Layout::Awq => {
                        let words = &weights[col * width..][..width];
                        for (r, row) in rows.clone().enumerate() {
                            integers[r * len + i] = self.across(words, row);
                        }
                    }
                }
            }
            let integers = integers.chunks_exact(len);
            let made = room.chunks_exact_mut(row_bytes).zip(integers);
            for ((row, scale), (made, integers)) in rows.clone().zip(scales).zip(made) {
                let mut made = Int4Group::of(self.format, made, block);
                made.set_scale(scale, self.across(zeros, row));
                integers.iter().enumerate().for_each(|(i, q)| made.set(i, *q));
            }
        }
        Some(room)
    }

    fn done_with(&self, rows: Range<usize>) {
        // Each row takes a little of every page: they are done with together.
        if rows.end == self.rows {
            [&self.qweight, &self.qzeros, &self.scales].into_iter().for_each(Raw::done_with);
        }
    }

    fn identity(&self) -> Option<String> {
        let parts = [&self.qweight, &self.qzeros, &self.scales].map(Raw::identity);
        let parts = parts.into_iter().collect::<Option<Vec<_>>>()?.join(" ");
        // Groups and order are in the same files, but for the size of a group.
        Some(format!("{:?} {:?} {parts}", self.layout, self.groups))
    }
}

/// Columns sorted by group, unless they are, and the sorted groups.
fn order(by_column: &[usize]) -> (Option<Arc<[u32]>>, Vec<usize>) {
    if by_column.is_sorted() {
        return (None, by_column.to_vec());
    }
    let mut order: Vec<u32> = (0..by_column.len() as u32).collect();
    order.sort_by_key(|col| by_column[*col as usize]);
    let sorted = order.iter().map(|col| by_column[*col as usize]).collect();
    (Some(order.into()), sorted)
}

fn greatest_common_divisor(a: usize, b: usize) -> usize {
    if b == 0 { a } else { greatest_common_divisor(b, a % b) }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::json;

    use super::*;
    use crate::weights::safetensors;

    #[test]
    fn settings_are_read_under_both_spellings() {
        let scheme = |config: Json| Scheme::of(&json!({ "quantization_config": config })).unwrap();
        let gptq = |zeros_less_one| Layout::Gptq { zeros_less_one };
        let found = scheme(json!({"quant_method": "gptq", "bits": 4, "group_size": -1}));
        assert_eq!(found, Some(Scheme { layout: gptq(true), group_size: None }));
        let found = scheme(json!({
            "quant_method": "gptq", "bits": 4, "group_size": 64, "checkpoint_format": "gptq_v2",
        }));
        assert_eq!(found, Some(Scheme { layout: gptq(false), group_size: Some(64) }));
        let found = scheme(json!({
            "quant_method": "awq", "w_bit": 4, "q_group_size": 128, "version": "GEMM",
        }));
        assert_eq!(found, Some(Scheme { layout: Layout::Awq, group_size: Some(128) }));
        assert_eq!(Scheme::of(&json!({})).unwrap(), None);
    }

    #[test]
    fn other_kinds_are_refused_with_what_is_read() {
        for config in [
            json!({"quant_method": "fp8"}),
            json!({"quant_method": "bitsandbytes", "load_in_4bit": true}),
            json!({"quant_method": "compressed-tensors"}),
            json!({"quant_method": "gptq", "bits": 8, "group_size": 128}),
            json!({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}),
            json!({"quant_method": "awq", "bits": 4, "version": "gemv"}),
            json!({"quant_method": "gptq"}),
        ] {
            let refusal = Scheme::of(&json!({ "quantization_config": config })).unwrap_err();
            let text = refusal.to_string();
            assert!(text.contains("not supported; what is read: GPTQ of 4 bits"), "{text}");
        }
    }

    #[test]
    fn numbers_are_those_of_the_checkpoint_bit_by_bit() {
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
        for name in ["gptq-v1", "gptq-v2-row", "gptq-desc-act", "awq"] {
            let folder = golden.join(name);
            let config = std::fs::read(folder.join("config.json")).unwrap();
            let scheme = Scheme::of(&serde_json::from_slice(&config).unwrap()).unwrap();
            let tensors = safetensors::open(&folder, scheme).unwrap();
            let tensor = &tensors["model.layers.0.self_attn.k_proj.weight"];
            let (format, rows) = (tensor.format.clone().unwrap(), tensor.shape[0]);
            let cols = tensor.shape[1];
            assert_eq!(tensor.order.is_some(), name == "gptq-desc-act");
            let expected = std::fs::read(folder.join("k_proj.f32")).unwrap();
            let expected: Vec<f32> =
                expected.as_chunks::<4>().0.iter().map(|v| f32::from_le_bytes(*v)).collect();
            let (mut room, mut found) = (Vec::new(), vec![0.0; cols]);
            for row in 0..rows {
                // One by one and from the middle: no row depends on which are asked for.
                let bytes = tensor.content.rows(row..row + 1, &mut room).unwrap();
                dequantize_row(format, bytes, &mut found);
                for (i, value) in found.iter().enumerate() {
                    let col = tensor.order.as_ref().map_or(i, |order| order[i] as usize);
                    assert_eq!(*value, expected[row * cols + col], "{name} {row} {col}");
                }
            }
            assert!(tensor.content.rows(rows..rows + 1, &mut room).is_none());
        }
    }

    #[test]
    fn sets_that_contradict_themselves_are_refused() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/gptq-v1");
        let refusal = |scheme| match safetensors::open(&folder, scheme) {
            Ok(_) => String::new(),
            Err(error) => error.to_string(),
        };
        assert!(refusal(None).contains("no quantization_config"));
        let awq = Scheme { layout: Layout::Awq, group_size: Some(64) };
        assert!(refusal(Some(awq)).contains("does not fit qzeros"));
    }

    #[test]
    fn columns_are_sorted_by_group_and_keep_their_order_within() {
        let (order, sorted) = order(&[1, 0, 1, 0]);
        assert_eq!(order.unwrap().to_vec(), [1, 3, 0, 2]);
        assert_eq!(sorted, [0, 0, 1, 1]);
        assert_eq!([64, 96, 128].into_iter().fold(128, greatest_common_divisor), 32);
    }
}
