//! Whole tiny checkpoints, cut at many places and with bits flipped: opening and loading them gives
//! a model or an error that says what is wrong, within limits on memory. Each case is the same on
//! every machine.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use pomona_hostile::load;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Address space of this process; above it an allocation fails, and with it the test.
const ADDRESS_BYTES_MAX: u64 = 4 << 30;
/// Bytes at the beginning of a file where each length and each byte is tried. Behind it come long
/// vocabularies and numbers.
const DENSE_BYTES: usize = 400;
/// Distance between the places that are tried further on; prime, so that all alignments occur.
const STRIDE: usize = 257;

/// A checkpoint in a temporary folder, one file of which is damaged again and again.
struct Patient {
    _folder: tempfile::TempDir,
    /// What is loaded: a file or a folder.
    model: PathBuf,
    file: PathBuf,
    whole: Vec<u8>,
}

impl Patient {
    fn gguf(name: &str) -> Patient {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join(format!("{name}.gguf"));
        let whole = fs::read(repository().join("fuzz/corpus/gguf").join(name)).unwrap();
        fs::write(&file, &whole).unwrap();
        Patient { _folder: folder, model: file.clone(), file, whole }
    }

    /// A copy of a folder of golden checkpoints.
    fn folder(name: &str, file: &str) -> Patient {
        let folder = tempfile::tempdir().unwrap();
        let from = repository().join("crates/models/tests/golden").join(name);
        for item in fs::read_dir(from).unwrap() {
            let path = item.unwrap().path();
            fs::copy(&path, folder.path().join(path.file_name().unwrap())).unwrap();
        }
        let (model, file) = (folder.path().to_owned(), folder.path().join(file));
        let model =
            if file.extension().is_some_and(|e| e == "gguf") { file.clone() } else { model };
        let whole = fs::read(&file).unwrap();
        Patient { _folder: folder, model, file, whole }
    }

    /// Loads the checkpoint with these bytes in place of the file's; what was said against it.
    fn with(&self, bytes: &[u8], what: &str) -> Result<(), String> {
        // Another file rather than the same one written over, which file systems may flush.
        fs::remove_file(&self.file).unwrap();
        fs::write(&self.file, bytes).unwrap();
        let loaded = catch_unwind(AssertUnwindSafe(|| load(&self.model)));
        let loaded = loaded.unwrap_or_else(|_| panic!("{what} of {} panics", self.file.display()));
        loaded.map_err(|error| error.to_string())
    }

    /// Cuts the file at many lengths. None is a model, and each is said to be broken.
    fn cut(&self) {
        assert_eq!(self.with(&self.whole, "nothing"), Ok(()));
        for length in places(self.whole.len()) {
            let what = format!("a cut after {length} bytes");
            let error = self.with(&self.whole[..length], &what).expect_err(&what);
            let name = self.model.file_name().unwrap().to_str().unwrap();
            let clear =
                ["fetch it again", "truncated", "is empty"].iter().any(|w| error.contains(w));
            assert!(clear && error.contains(name), "{what}: {error}");
        }
    }

    /// Flips a bit at many places, and whole bytes too. What still loads is a model with another
    /// number in it.
    fn flip(&self) {
        let mut loaded = 0;
        let mut refused = 0;
        for place in places(self.whole.len()) {
            for mask in [1u8 << (place % 8), 0xff] {
                let mut bytes = self.whole.clone();
                bytes[place] ^= mask;
                match self.with(&bytes, &format!("{mask:#x} at byte {place}")) {
                    Ok(()) => loaded += 1,
                    Err(error) => {
                        refused += 1;
                        assert!(error.len() > 20, "byte {place}: {error:?} says little");
                    }
                }
            }
        }
        assert!(loaded > 0 && refused > 0, "{loaded} loaded, {refused} refused");
    }
}

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// Offsets into a file of that length.
fn places(length: usize) -> impl Iterator<Item = usize> {
    let dense = DENSE_BYTES.min(length);
    (0..dense).chain((dense..length).step_by(STRIDE)).chain([length - 1])
}

fn bounded() {
    let old = getrlimit(Resource::As);
    setrlimit(Resource::As, Rlimit { current: Some(ADDRESS_BYTES_MAX), maximum: old.maximum })
        .unwrap();
}

#[test]
fn a_cut_gguf_file_is_refused_at_any_length() {
    bounded();
    for name in ["tiny-llama", "tiny-quantised", "tiny-qwen2", "tiny-qwen3", "tiny-gemma3"] {
        Patient::gguf(name).cut();
    }
    Patient::folder("qwen3-moe-gguf", "model.gguf").cut();
}

#[test]
fn a_gguf_file_with_a_flipped_bit_is_loaded_or_refused() {
    bounded();
    for name in ["tiny-quantised", "tiny-gemma3"] {
        Patient::gguf(name).flip();
    }
    Patient::folder("mixtral-gguf", "model.gguf").flip();
}

#[test]
fn a_cut_safetensors_file_is_refused_at_any_length() {
    bounded();
    Patient::folder("qwen3-bf16", "model.safetensors").cut();
    Patient::folder("llama-f16-sharded", "model-00002-of-00003.safetensors").cut();
}

#[test]
fn a_safetensors_file_with_a_flipped_bit_is_loaded_or_refused() {
    bounded();
    Patient::folder("qwen3-bf16", "model.safetensors").flip();
    Patient::folder("llama-f16-sharded", "model-00003-of-00003.safetensors").flip();
    Patient::folder("gptq-desc-act", "model.safetensors").flip();
    Patient::folder("qwen3-moe-joined", "model.safetensors").flip();
}

#[test]
fn a_settings_file_with_a_flipped_bit_is_loaded_or_refused() {
    bounded();
    Patient::folder("gemma3", "config.json").flip();
    Patient::folder("awq", "config.json").flip();
    Patient::folder("llama-f16-sharded", "model.safetensors.index.json").flip();
}
