//! Engines on tiny models.
// Each test file uses a part.
#![allow(dead_code)]

use std::path::PathBuf;
use std::sync::Arc;

use pomona_device::DType;
use pomona_engine::{Engine, EngineConfig, Lookup, Method, Speculation};
use pomona_kernels::{CpuOps, Ops};
use pomona_models::{Checkpoint, LoadOptions, Model};
use pomona_scheduler::batch::Ordering;

/// Starts one with room for four sequences, on what `wrap` makes of the model. `ends`: whether the
/// model's end tokens end an answer.
pub fn tiny_engine(
    prefix_caching: bool,
    ends: bool,
    wrap: impl FnOnce(Box<dyn Model>) -> Box<dyn Model>,
) -> Engine {
    let ops = ops();
    let config = tiny_config(prefix_caching, ends);
    Engine::start(config, wrap(tiny_model("llama", &ops)), None, ops).unwrap()
}

pub fn ops() -> Arc<dyn Ops> {
    ops_on(1)
}

/// With so many threads.
pub fn ops_on(threads: usize) -> Arc<dyn Ops> {
    Arc::new(CpuOps::detect(threads))
}

/// A model of the golden tests.
pub fn tiny_model(name: &str, ops: &Arc<dyn Ops>) -> Box<dyn Model> {
    let options = LoadOptions { max_tokens: 32, max_outputs: 32 };
    checkpoint(name).load(ops.as_ref(), &options, &mut |_| {}).unwrap()
}

pub fn tiny_config(prefix_caching: bool, ends: bool) -> EngineConfig {
    let ends = if ends { checkpoint("llama").eos_token_ids().to_vec() } else { Vec::new() };
    EngineConfig {
        name: "tiny".into(),
        max_model_len: 128,
        max_num_seqs: 4,
        max_num_batched_tokens: 32,
        kv_dtype: DType::F32,
        kv_blocks: 32,
        prefix_caching,
        ordering: Ordering::Fcfs,
        max_waiting: 64,
        step_target: None,
        eos_token_ids: ends,
        seed: 0,
        speculation: None,
    }
}

pub fn checkpoint(name: &str) -> Checkpoint {
    let golden = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../models/tests/golden");
    Checkpoint::open(&golden.join(name)).unwrap()
}

/// Drafts wherever there is room, whatever they cost.
pub fn eager(method: Method, num_speculative_tokens: u32) -> Speculation {
    Speculation { method, num_speculative_tokens, free_tokens: f32::MAX, draft_cost: 0.0 }
}

pub fn ngram() -> Method {
    Method::Lookup(Lookup { min: 1, max: 4, drafts_per_token: f32::INFINITY })
}

pub fn suffix() -> Method {
    Method::Lookup(Lookup { min: 1, max: 24, drafts_per_token: 1.0 })
}
