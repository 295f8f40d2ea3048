//! Each kind of matrix of a model by itself, through the operations that the engine uses, against
//! the machine's limits: which format or shape is the slow one, at one token and at many?

use std::collections::BTreeMap;
use std::hint::black_box;
use std::time::Instant;

use anyhow::{Context, Result};
use pomona_device::{DType, View};
use pomona_kernels::{CpuOps, Format, LinearPart, Matrix, Ops, WeightSource, Write};
use pomona_models::Checkpoint;
use serde::Serialize;

use super::prompts::Numbers;
use super::report::Machine;
use super::stats::Spread;

/// Numbers of tokens: a step that decodes, and one that reads a prompt.
const TOKENS: [usize; 2] = [1, 512];
/// Packed weights of a kind that take turns: no cache holds them all, as none holds a model.
const TURN_BYTES: usize = 256 << 20;
/// How long a round lasts at least, so that the clock's steps do not matter.
const ROUND_S: f64 = 0.02;

/// Matrices of one format and shape.
#[derive(Clone, Debug, Serialize)]
pub struct Kernel {
    /// Their names; a star stands for the number of a layer.
    pub tensors: Vec<String>,
    /// How many there are.
    pub count: usize,
    /// As they are stored.
    pub format: String,
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
    /// Which code multiplies them.
    pub path: &'static str,
    /// At each number of tokens.
    pub speeds: Vec<KernelSpeed>,
}

/// A product's time against the machine's limits.
#[derive(Clone, Debug, Serialize)]
pub struct KernelSpeed {
    /// Tokens that the weights meet.
    pub tokens: usize,
    /// Time of a product, microseconds.
    pub us: Spread,
    /// Bytes of weights over time, GB/s.
    pub gb_per_s: f64,
    /// Their share of the measured read bandwidth.
    pub of_bandwidth: f64,
    /// Two operations for each weight and token, GOP/s.
    pub gop_per_s: f64,
    /// Their share of the measured peak: that of int8 where weights are integers, of bf16
    /// where activations are bf16 too, else of f32.
    pub of_peak: f64,
}

/// Measures all kinds of matrices, `rounds` times each.
pub fn measure(
    checkpoint: &Checkpoint,
    machine: &dyn Fn() -> Machine,
    ops: &CpuOps,
    rounds: usize,
) -> Result<(Machine, Vec<Kernel>)> {
    let before = machine();
    let mut found = Vec::new();
    for ((format, rows, cols), sources) in kinds(checkpoint) {
        let matrices = matrices(ops, &sources)?;
        let names: Vec<String> = sources.into_iter().map(|source| source.name).collect();
        let mut speeds = Vec::new();
        for tokens in TOKENS {
            speeds.push((tokens, time(ops, &matrices, tokens, rounds)?));
        }
        found.push(((format, rows, cols), names, speeds));
    }
    // A limit is the most that was seen, before or after.
    let limits = before.or_better(&machine());
    let kernel =
        |((format, rows, cols), names, speeds): (Kind, Vec<String>, Vec<(usize, Spread)>)| {
            let path = ops.linear_path(format);
            let bytes = format.row_bytes(cols).unwrap_or_default() * rows;
            let speed = |(tokens, us): (usize, Spread)| {
                let rate = |amount: f64| amount / us.median / 1e3;
                let (gb, gop) = (rate(bytes as f64), rate(2.0 * (rows * cols * tokens) as f64));
                let shares = limits.limits(gb, gop);
                let of_peak = match path {
                    path if path.is_bfloat() => shares.of_bf16_peak,
                    path if path.is_integer() && limits.int8_gop_per_s > 0.0 => shares.of_int8_peak,
                    _ => shares.of_f32_peak,
                };
                let of_bandwidth = shares.of_bandwidth;
                KernelSpeed { tokens, us, gb_per_s: gb, of_bandwidth, gop_per_s: gop, of_peak }
            };
            Kernel {
                count: names.len(),
                tensors: patterns(&names),
                format: format!("{format:?}"),
                rows,
                cols,
                path: path.words(),
                speeds: speeds.into_iter().map(speed).collect(),
            }
        };
    let kernels = found.into_iter().map(kernel).collect();
    Ok((limits, kernels))
}

type Kind = (Format, usize, usize);

/// The matrices of each kind.
fn kinds(checkpoint: &Checkpoint) -> BTreeMap<Kind, Vec<WeightSource>> {
    let mut kinds: BTreeMap<Kind, Vec<WeightSource>> = BTreeMap::new();
    for source in checkpoint.tensors().iter().flat_map(|t| checkpoint.matrices(&t.name)) {
        kinds.entry((source.format, source.rows, source.cols)).or_default().push(source);
    }
    kinds
}

/// The matrices on their device, as often as it takes to fill [`TURN_BYTES`].
fn matrices(ops: &CpuOps, sources: &[WeightSource]) -> Result<Vec<Matrix>> {
    let mut matrices = Vec::new();
    let mut bytes = 0;
    for source in sources.iter().cycle() {
        bytes += source.format.row_bytes(source.cols).unwrap_or_default() * source.rows;
        let matrix = ops.matrix(source);
        matrices.push(matrix.with_context(|| format!("cannot load {}", source.name))?);
        if bytes >= TURN_BYTES {
            break;
        }
    }
    Ok(matrices)
}

/// Microseconds of a product.
fn time(ops: &CpuOps, matrices: &[Matrix], tokens: usize, rounds: usize) -> Result<Spread> {
    let first = matrices.first().context("a kind of matrix without one")?;
    let x = random(ops, &[tokens, first.cols])?;
    let out = ops.device().alloc_view(DType::F32, &[tokens, first.rows])?;
    let mut turn = matrices.iter().cycle();
    let mut calls = |count: usize| -> Result<f64> {
        let begun = Instant::now();
        for weight in turn.by_ref().take(count) {
            ops.linear(&x, &[LinearPart { weight, bias: None, out: &out }], Write::Set)?;
        }
        black_box(&out);
        Ok(begun.elapsed().as_secs_f64() / count as f64)
    };
    // Once for memory that is touched first, once to see how long it takes.
    calls(1)?;
    let count = (ROUND_S / calls(1)?).ceil().clamp(1.0, 1e6) as usize;
    let rounds: Result<Vec<f64>> = (0..rounds).map(|_| Ok(calls(count)? * 1e6)).collect();
    Ok(Spread::of(&rounds?))
}

fn random(ops: &CpuOps, shape: &[usize]) -> Result<View> {
    let view = ops.device().alloc_view(DType::F32, shape)?;
    let mut numbers = Numbers::new(7);
    let values = (0..view.elements()).map(|_| numbers.below(2001) as f32 / 1000.0 - 1.0);
    let bytes: Vec<u8> = values.flat_map(f32::to_ne_bytes).collect();
    ops.device().upload(&bytes, &view)?;
    Ok(view)
}

/// Names with a star for numbers between dots, each once.
pub fn patterns(names: &[String]) -> Vec<String> {
    let star = |part: &str| match part.bytes().all(|b| b.is_ascii_digit()) {
        true => "*".to_owned(),
        false => part.to_owned(),
    };
    let pattern = |name: &String| {
        // Part of a tensor: its rows stand behind the name.
        let name = name.split(' ').next().unwrap_or_default();
        name.split('.').map(star).collect::<Vec<_>>().join(".")
    };
    let mut patterns: Vec<String> = names.iter().map(pattern).collect();
    patterns.sort_unstable();
    patterns.dedup();
    patterns
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_share_a_pattern() {
        let names = ["blk.0.ffn_up.weight", "blk.11.ffn_up.weight 0..64", "output.weight"];
        let patterns = patterns(&names.map(str::to_owned));
        assert_eq!(patterns, ["blk.*.ffn_up.weight", "output.weight"]);
    }
}
