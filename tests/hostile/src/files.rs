//! Files of a checkpoint.

use std::fs;
use std::path::Path;

use pomona_kernels::CpuOps;
use pomona_models::weights::{gguf as format, safetensors as tensors};
use pomona_models::{Checkpoint, LoadOptions, ModelError};
use pomona_text::{ChatTemplate, Tokenizer};

/// Tokens that the loaded models have room for: their scratch memory stays small.
const TOKENS_MAX: usize = 4;
/// The model that `fuzz/corpus/safetensors/tiny-llama` has the weights of.
const TINY_CONFIG: &str = r#"{
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 64,
    "max_position_embeddings": 128, "rms_norm_eps": 1e-6, "tie_word_embeddings": true
}"#;

/// Where temporary files go.
fn folder() -> tempfile::TempDir {
    tempfile::tempdir().expect("a test machine has room for a small folder")
}

fn write(path: &Path, bytes: &[u8]) {
    fs::write(path, bytes).expect("a test machine has room for a small file");
}

/// Opens a checkpoint and everything that comes with it, and loads its weights.
///
/// # Errors
/// Those of opening and loading. Whether tokenizer and chat template work is of no interest.
pub fn load(path: &Path) -> Result<(), ModelError> {
    thread_local! {
        static OPS: CpuOps = CpuOps::detect(1);
    }
    let checkpoint = Checkpoint::open(path)?;
    let _ = Tokenizer::new(checkpoint.tokenizer());
    let _ = checkpoint.chat_template().map(|source| ChatTemplate::new(source, None, None));
    let options = LoadOptions { max_tokens: TOKENS_MAX, max_outputs: TOKENS_MAX };
    OPS.with(|ops| checkpoint.load(ops, &options, &mut |_| {}).map(drop))
}

/// A GGUF file.
pub fn gguf(input: &[u8]) {
    if format::parse(input).is_err() {
        return;
    }
    let folder = folder();
    let path = folder.path().join("model.gguf");
    write(&path, input);
    let _ = load(&path);
}

/// A safetensors file, as the weights of a tiny model.
pub fn safetensors(input: &[u8]) {
    if tensors::parse(input).is_err() {
        return;
    }
    let folder = folder();
    write(&folder.path().join("config.json"), TINY_CONFIG.as_bytes());
    write(&folder.path().join("model.safetensors"), input);
    let _ = load(folder.path());
}

/// The index of a sharded checkpoint.
pub fn safetensors_index(input: &[u8]) {
    let _ = tensors::parse_index(input);
}

/// The `config.json` of a checkpoint folder whose other files are harmless.
pub fn hf_config(input: &[u8]) {
    let folder = folder();
    let header = br#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#;
    let length = (header.len() as u64).to_le_bytes();
    write(&folder.path().join("model.safetensors"), &[&length, &header[..], &[0; 4]].concat());
    write(&folder.path().join("config.json"), input);
    let _ = load(folder.path());
}
