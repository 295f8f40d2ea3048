//! Names, choices among files, and the cache that Python programs share.

use super::*;

fn listing(names: &[&str]) -> Listing {
    let siblings = names
        .iter()
        .map(|name| RepoFile { name: (*name).to_owned(), size: None, lfs: None })
        .collect();
    Listing { sha: "abc".into(), siblings }
}

fn chosen(name: &str, files: &[&str]) -> String {
    match select(&Repository::parse(name).unwrap(), &listing(files)) {
        Ok(Selection::Gguf(files) | Selection::Folder(files)) => files.join(" "),
        Err(error) => format!("error: {error:#}"),
    }
}

fn around(folder: &Path) -> Surroundings {
    Surroundings {
        home: folder.join("home"),
        hub_cache: Some(folder.join("hub")),
        hub_endpoint: "http://127.0.0.1:9".into(),
        hub_token: None,
    }
}

#[test]
fn names_are_read_in_all_forms() {
    let parsed = Repository::parse("org/repo@v1:Q8_0").unwrap();
    assert_eq!((parsed.id.as_str(), parsed.revision.as_str()), ("org/repo", "v1"));
    assert_eq!(parsed.pick.as_deref(), Some("Q8_0"));
    assert_eq!(Repository::parse("org/repo").unwrap().revision, "main");
    for bad in ["repo", "a/b/c", "../repo", "org/..", "org/re po", "org/repo:../x", "org/", ""] {
        assert_eq!(Repository::parse(bad), None, "{bad}");
    }
}

#[test]
fn a_quantisation_is_a_word_of_the_file_name() {
    let files = ["m-Q4_K_M.gguf", "m-Q4_K_S.gguf", "m.Q8_0.gguf", "README.md"];
    assert_eq!(chosen("o/r", &files), "m-Q4_K_M.gguf");
    assert_eq!(chosen("o/r:q8_0", &files), "m.Q8_0.gguf");
    assert_eq!(chosen("o/r:m-Q4_K_S.gguf", &files), "m-Q4_K_S.gguf");
    assert!(chosen("o/r:Q4", &files).contains("it has: m-Q4_K_M.gguf, m-Q4_K_S.gguf"));
}

#[test]
fn a_checkpoint_folder_takes_only_what_it_needs() {
    let files = ["config.json", "model.safetensors", "tokenizer.json", "pytorch_model.bin", "a.md"];
    assert_eq!(chosen("o/r", &files), "config.json model.safetensors tokenizer.json");
}

#[test]
fn a_repository_without_weights_is_refused() {
    assert!(chosen("o/r", &["README.md"]).contains("neither safetensors"));
}

#[test]
fn a_split_model_is_taken_whole_or_not_at_all() {
    let files = ["m-Q4_0-00002-of-00002.gguf", "m-Q4_0-00001-of-00002.gguf", "m-Q8_0.gguf"];
    let both = "m-Q4_0-00001-of-00002.gguf m-Q4_0-00002-of-00002.gguf";
    assert_eq!(chosen("o/r:Q4_0", &files), both);
    assert_eq!(chosen("o/r", &files), both);
    assert!(chosen("o/r:Q4_0", &files[1..]).contains("one of 2 parts, and 1 of them"));
}

#[test]
fn names_that_leave_the_folder_are_not_seen() {
    assert!(chosen("o/r", &["../../m-Q4_0.gguf", "sub/m-Q4_0.gguf"]).contains("neither"));
}

#[test]
fn a_complete_snapshot_of_the_shared_cache_is_used() {
    let folder = tempfile::tempdir().unwrap();
    let around = around(folder.path());
    let repo = folder.path().join("hub/models--o--r");
    let snapshot = repo.join("snapshots/c0ffee");
    fs::create_dir_all(&snapshot).unwrap();
    fs::create_dir_all(repo.join("refs")).unwrap();
    fs::write(repo.join("refs/main"), "c0ffee\n").unwrap();
    let repository = Repository::parse("o/r").unwrap();
    for file in ["config.json", "tokenizer.json"] {
        fs::write(snapshot.join(file), "{}").unwrap();
        assert_eq!(in_hub_cache(&repository, &around), None);
    }
    let index = r#"{"weight_map":{"a":"model-1.safetensors","b":"model-2.safetensors"}}"#;
    fs::write(snapshot.join("model.safetensors.index.json"), index).unwrap();
    fs::write(snapshot.join("model-1.safetensors"), "").unwrap();
    assert_eq!(in_hub_cache(&repository, &around), None, "one shard of two");
    fs::write(snapshot.join("model-2.safetensors"), "").unwrap();
    assert_eq!(in_hub_cache(&repository, &around), Some(snapshot.clone()));
    assert_eq!(resolve("o/r", &repository, &around).unwrap().path, snapshot);
}

#[test]
fn what_was_fetched_serves_when_the_hub_is_away() {
    let folder = tempfile::tempdir().unwrap();
    let around = around(folder.path());
    let repository = Repository::parse("o/r:Q4_0").unwrap();
    let error = format!("{:#}", resolve("o/r:Q4_0", &repository, &around).unwrap_err());
    assert!(error.contains("does not answer") && error.contains("HF_ENDPOINT"), "{error}");
    let commit = around.home.join("hub/o--r/c0ffee");
    fs::create_dir_all(&commit).unwrap();
    fs::write(commit.join("m-Q4_0.gguf"), "x").unwrap();
    fs::write(commit.join(".complete.Q4_0"), "m-Q4_0.gguf").unwrap();
    let found = resolve("o/r:Q4_0", &repository, &around).unwrap();
    assert_eq!(found.path, commit.join("m-Q4_0.gguf"));
}
