//! Paths, catalogue names, and what is said about names that are neither.

use super::*;
use crate::models::catalogue::HubFile;

fn around(folder: &Path) -> Surroundings {
    Surroundings {
        home: folder.join("home"),
        hub_cache: None,
        hub_endpoint: "http://127.0.0.1:9".into(),
        hub_token: None,
    }
}

fn refusal(name: &str) -> String {
    let folder = tempfile::tempdir().unwrap();
    format!("{:#}", resolve(name, &around(folder.path())).unwrap_err())
}

#[test]
fn a_missing_file_is_called_a_missing_file() {
    assert!(refusal("./absent.gguf").contains("no such file or folder"));
    assert!(refusal("absent.gguf").contains("no such file or folder"));
}

#[test]
fn an_unknown_name_lists_the_known_ones() {
    assert!(refusal("smolm2").contains("smollm2, gemma3-270m"));
    assert!(refusal("").contains("try `smollm2`"));
}

#[test]
fn a_folder_stands_for_its_only_gguf_file() {
    let folder = tempfile::tempdir().unwrap();
    let name = folder.path().to_str().unwrap();
    let around = around(folder.path());
    let text = format!("{:#}", resolve(name, &around).unwrap_err());
    assert!(text.contains("neither a config.json nor a .gguf"), "{text}");
    fs::write(folder.path().join("a.gguf"), "").unwrap();
    assert_eq!(resolve(name, &around).unwrap().path, folder.path().join("a.gguf"));
    fs::write(folder.path().join("b.gguf"), "").unwrap();
    let text = format!("{:#}", resolve(name, &around).unwrap_err());
    assert!(text.contains("several models"), "{text}");
    fs::write(folder.path().join("config.json"), "{}").unwrap();
    assert_eq!(resolve(name, &around).unwrap().path, folder.path());
}

fn entry() -> Entry {
    Entry {
        name: "test".into(),
        summary: String::new(),
        file: "m.gguf".into(),
        bytes: 5,
        sha256: "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824".into(),
        licence: "none".into(),
        notice: None,
        sampling: Default::default(),
        hub: Some(HubFile { repo: "o/r".into(), revision: "main".into(), file: "m.gguf".into() }),
        pypi: Vec::new(),
    }
}

#[test]
fn a_catalogue_model_in_the_cache_needs_no_source() {
    let folder = tempfile::tempdir().unwrap();
    let around = around(folder.path());
    let cached = around.home.join("models/test/m.gguf");
    fs::create_dir_all(cached.parent().unwrap()).unwrap();
    fs::write(&cached, "hello").unwrap();
    let found = from_catalogue(&entry(), &around).unwrap();
    assert_eq!((found.path, found.origin.as_str()), (cached, "cache"));
}

#[test]
fn a_damaged_cache_and_no_source_tells_both() {
    let folder = tempfile::tempdir().unwrap();
    let around = around(folder.path());
    let cached = around.home.join("models/test/m.gguf");
    fs::create_dir_all(cached.parent().unwrap()).unwrap();
    fs::write(&cached, "hullo").unwrap();
    let text = format!("{:#}", from_catalogue(&entry(), &around).unwrap_err());
    assert!(text.contains("no source has test") && text.contains("HF_ENDPOINT"), "{text}");
    assert!(!cached.exists() && cache::with_suffix(&cached, ".bad").exists());
}

#[test]
fn a_cache_that_cannot_be_made_says_so_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let mut around = around(folder.path());
    around.home = folder.path().join("file");
    fs::write(&around.home, "").unwrap();
    let text = format!("{:#}", from_catalogue(&entry(), &around).unwrap_err());
    assert!(text.contains("POMONA_HOME"), "{text}");
}
