//! An engine on a tiny model.

use std::path::PathBuf;
use std::sync::Arc;

use pomona_device::DType;
use pomona_engine::{Engine, EngineConfig};
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
    let golden = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../models/tests/golden/llama");
    let checkpoint = Checkpoint::open(&golden).unwrap();
    let ops: Arc<dyn Ops> = Arc::new(CpuOps::detect(1));
    let options = LoadOptions { max_tokens: 32, max_outputs: 32 };
    let model = checkpoint.load(ops.as_ref(), &options, &mut |_| {}).unwrap();
    let config = EngineConfig {
        name: checkpoint.name().into(),
        max_model_len: 128,
        max_num_seqs: 4,
        max_num_batched_tokens: 32,
        kv_dtype: DType::F32,
        kv_blocks: 32,
        prefix_caching,
        ordering: Ordering::Fcfs,
        max_waiting: 8,
        eos_token_ids: if ends { checkpoint.eos_token_ids().to_vec() } else { Vec::new() },
        seed: 0,
    };
    Engine::start(config, wrap(model), ops).unwrap()
}
