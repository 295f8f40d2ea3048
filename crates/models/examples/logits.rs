//! Writes a model's logits to standard output, for `tools/golden/compare.py`.
//!
//! `logits MODEL TOKENS.json`: the JSON is a list of token lists; each is a sequence of its own,
//! prefilled in chunks of 128. Output: `f32 [tokens, vocab]`, little-endian, sequence by sequence.

use std::error::Error;
use std::io::{Write as _, stdout};
use std::path::Path;

use pomona_device::{DType, Device, Pool, View};
use pomona_kernels::{Batch, CpuOps, KvLayer, Ops, Span};
use pomona_models::{Checkpoint, KvCache, LoadOptions};

const CHUNK: usize = 128;
const BLOCK: usize = 16;

fn upload(device: &dyn Device, values: &[u32]) -> Result<View, Box<dyn Error>> {
    let view = device.alloc_view(DType::U32, &[values.len()])?;
    let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_ne_bytes()).collect();
    device.upload(&bytes, &view)?;
    Ok(view)
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, model, tokens] = &arguments[..] else {
        return Err("usage: logits MODEL TOKENS".into());
    };
    let sequences: Vec<Vec<u32>> = serde_json::from_slice(&std::fs::read(tokens)?)?;
    let longest = sequences.iter().map(Vec::len).max().unwrap_or(0);
    let ops = CpuOps::detect(Pool::default_threads());
    let device = ops.device().clone();
    let options = LoadOptions { max_tokens: CHUNK, max_outputs: CHUNK };
    let mut model = Checkpoint::open(Path::new(model))?.load(&ops, &options, &mut |_| {})?;
    let spec = model.spec().clone();
    let blocks = longest.div_ceil(BLOCK);
    let shape = [blocks, spec.kv_heads as usize, BLOCK, spec.head_dim as usize];
    let cache = || device.alloc_view(DType::F16, &shape);
    let layers = spec.layers.iter().map(|_| Ok(KvLayer { k: cache()?, v: cache()? }));
    let layers = layers.collect::<Result<_, Box<dyn Error>>>()?;
    // Every layer has a cache of its own here, so one table serves all groups.
    let kv = KvCache { layers, group_of: vec![0; spec.layers.len()] };
    let out = device.alloc_view(DType::F32, &[1, spec.vocab as usize])?;
    let mut bytes = vec![0; out.bytes()];
    for sequence in &sequences {
        for (i, chunk) in sequence.chunks(CHUNK).enumerate() {
            let start = (i * CHUNK) as u32;
            let positions: Vec<u32> = (start..start + chunk.len() as u32).collect();
            let rows: Vec<u32> = (0..chunk.len() as u32).collect();
            let (first_row, count, table_len) = (0, chunk.len() as u32, blocks as u32);
            let span = Span { first_row, rows: count, start, table: 0, table_len };
            let batch = Batch {
                tokens: upload(device.as_ref(), chunk)?,
                slots: vec![upload(device.as_ref(), &positions)?],
                positions: upload(device.as_ref(), &positions)?,
                tables: vec![(0..table_len).collect()],
                spans: vec![span],
                origins: Vec::new(),
                logit_rows: upload(device.as_ref(), &rows)?,
                logit_spans: vec![span],
            };
            model.forward(&ops, &batch, &kv)?;
            model.outputs(&ops, chunk.len())?;
            for row in 0..chunk.len() {
                model.logits(&ops, row..row + 1, &out)?;
                device.download(&out, &mut bytes)?;
                stdout().write_all(&bytes)?;
            }
        }
    }
    Ok(())
}
