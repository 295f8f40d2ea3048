//! Files of a checkpoint.

use std::fs;
use std::path::Path;

use pomona_models::Checkpoint;
use pomona_models::weights::{gguf as format, safetensors as tensors};
use pomona_text::{ChatTemplate, Tokenizer};

/// Where temporary files go.
fn folder() -> tempfile::TempDir {
    tempfile::tempdir().expect("a test machine has room for a small folder")
}

fn write(path: &Path, bytes: &[u8]) {
    fs::write(path, bytes).expect("a test machine has room for a small file");
}

/// Opens a checkpoint and everything that comes with it.
fn open(path: &Path) {
    let Ok(checkpoint) = Checkpoint::open(path) else { return };
    // Whether they work is of no interest.
    let _ = Tokenizer::new(checkpoint.tokenizer());
    let _ = checkpoint.chat_template().map(|source| ChatTemplate::new(source, None, None));
    let _ = checkpoint.weight_bytes();
}

/// A GGUF file.
pub fn gguf(input: &[u8]) {
    if format::parse(input).is_err() {
        return;
    }
    let folder = folder();
    let path = folder.path().join("model.gguf");
    write(&path, input);
    open(&path);
}

/// The header of a safetensors file.
pub fn safetensors(input: &[u8]) {
    let _ = tensors::parse(input);
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
    open(folder.path());
}
