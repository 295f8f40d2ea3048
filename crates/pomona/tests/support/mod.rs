//! What the tests of the binary share: a way to run it, and a hub that misbehaves on demand.
// Each test file uses a part; a panic is how a test fails.
#![allow(dead_code, clippy::unwrap_used)]

pub mod hub;

use std::path::Path;
use std::process::{Command, Output};

/// The binary with an empty environment but for what it needs, its cache in `home`.
pub fn pomona(home: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pomona"));
    command
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap_or_default())
        .env("POMONA_HOME", home)
        .env("HF_HUB_CACHE", home.join("no-shared-cache"))
        // Nobody listens on the discard port of this machine.
        .env("HF_ENDPOINT", "http://127.0.0.1:9");
    command
}

/// Standard error, which must be that of a refusal: a failure with words and without a panic.
pub fn refusal(output: &Output) -> String {
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success(), "it succeeded: {text}");
    assert!(output.status.code().is_some(), "it was killed: {text}");
    assert!(!text.contains("panicked"), "{text}");
    assert!(text.contains("error:"), "{text}");
    text
}

/// A model of 27 KB with a tokenizer and a chat template. It speaks nonsense.
pub fn tiny_model() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus/gguf/tiny-llama")
}

/// A tiny checkpoint folder, without a tokenizer.
pub fn golden(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/tests/golden").join(name)
}

/// A tiny mixture of experts with a tokenizer of single bytes.
pub fn tiny_moe() -> tempfile::TempDir {
    let (folder, source) = (tempfile::tempdir().unwrap(), golden("mixtral"));
    for file in ["config.json", "model.safetensors"] {
        std::fs::copy(source.join(file), folder.path().join(file)).unwrap();
    }
    // Bytes that are no characters stand as those from 256 on, as in GPT-2's vocabulary.
    let mut others = 256..;
    let letter = |byte: u32| match byte {
        0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff => byte,
        _ => others.next().unwrap(),
    };
    let letters = (0..256).map(letter).map(|code| char::from_u32(code).unwrap().to_string());
    let tokens = letters.chain((256..272).map(|id| format!("<{id}>")));
    let vocab: serde_json::Map<String, serde_json::Value> =
        tokens.enumerate().map(|(id, token)| (token, id.into())).collect();
    let bytes = serde_json::json!({
        "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false,
    });
    let tokenizer = serde_json::json!({
        "version": "1.0", "added_tokens": [], "normalizer": null, "post_processor": null,
        "pre_tokenizer": bytes, "decoder": bytes,
        "model": { "type": "BPE", "vocab": vocab, "merges": [] },
    });
    std::fs::write(folder.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    folder
}

/// The model of the environment variable, or `None`, said aloud.
pub fn test_model(variable: &str) -> Option<std::path::PathBuf> {
    let path = std::env::var_os(variable).map(std::path::PathBuf::from);
    if path.is_none() {
        eprintln!("SKIPPED: {variable} names no model file");
    }
    path
}
