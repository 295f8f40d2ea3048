//! What the binary says when something is wrong with what it is given. The real binary each time.
#![allow(clippy::unwrap_used)] // A panic is how a test fails.

mod support;

use std::fs;
use std::net::TcpListener;
use std::process::Command;

use support::{pomona, refusal, test_model, tiny_model};

/// Runs with arguments; what the refusal says.
fn refused(arguments: &[&str]) -> String {
    let home = tempfile::tempdir().unwrap();
    refusal(&pomona(home.path()).args(arguments).output().unwrap())
}

#[test]
fn a_missing_model_says_what_a_model_can_be() {
    assert!(refused(&["serve", "nonsense", "--port", "0"]).contains("smollm2, gemma3-270m"));
    let absent = refused(&["serve", "./absent.gguf", "--port", "0"]);
    assert!(absent.contains("no such file") && absent.contains("check the path"), "{absent}");
    assert!(refused(&["inspect", "org/repo"]).contains("HF_ENDPOINT"));
}

#[test]
fn a_model_that_no_source_has_names_each_source_and_its_remedy() {
    let home = tempfile::tempdir().unwrap();
    // No hub answers, and without a path there is no pip.
    let output = pomona(home.path()).args(["pull", "smollm2"]).env("PATH", home.path()).output();
    let text = refusal(&output.unwrap());
    for words in ["no source has smollm2", "HF_ENDPOINT", "no pip", "the path of a model file"] {
        assert!(text.contains(words), "{words}: {text}");
    }
}

#[test]
fn a_port_in_use_is_known_before_anything_is_loaded() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let text = refused(&["serve", "./absent.gguf", "--port", &port]);
    assert!(text.contains("another program listens") && text.contains("--port"), "{text}");
}

#[test]
fn an_empty_file_is_no_model() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("empty.gguf");
    fs::write(&path, "").unwrap();
    let text = refused(&["serve", path.to_str().unwrap(), "--port", "0"]);
    assert!(text.contains("empty.gguf"), "{text}");
}

#[test]
fn noise_is_no_model() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("noise.gguf");
    let noise: Vec<u8> =
        (0..100_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 7) as u8).collect();
    fs::write(&path, &noise).unwrap();
    let text = refused(&["inspect", path.to_str().unwrap()]);
    assert!(text.contains("noise.gguf: the file does not begin with"), "{text}");
    assert!(text.contains("give one, or the folder of a Hugging Face model"), "{text}");
    // The right beginning, then noise.
    fs::write(&path, [b"GGUF\x03\0\0\0", &noise[..]].concat()).unwrap();
    assert!(refused(&["inspect", path.to_str().unwrap()]).contains("noise.gguf"));
}

#[test]
fn a_folder_without_a_model_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let text = refused(&["inspect", folder.path().to_str().unwrap()]);
    assert!(text.contains("neither a config.json nor a .gguf file"), "{text}");
    fs::write(folder.path().join("config.json"), "{}").unwrap();
    refused(&["inspect", folder.path().to_str().unwrap()]);
}

#[test]
fn half_a_download_says_to_fetch_it_again() {
    let whole = fs::read(tiny_model()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("half.gguf");
    for length in [300, whole.len() / 2] {
        fs::write(&path, &whole[..length]).unwrap();
        let text = refused(&["serve", path.to_str().unwrap(), "--port", "0"]);
        assert!(text.contains("half.gguf") && text.contains("fetch it again"), "{text}");
        assert_eq!(text.matches("half.gguf").count(), 1, "{text}");
    }
}

#[test]
fn a_truncated_model_is_refused_at_any_length() {
    let Some(model) = test_model("POMONA_TEST_SMOLLM2") else { return };
    let whole = fs::read(model).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("cut.gguf");
    for length in [3, 4, 23, 24, 100, 5_000, 1_000_000, whole.len() / 2, whole.len() - 1] {
        fs::write(&path, &whole[..length]).unwrap();
        let text = refused(&["serve", path.to_str().unwrap(), "--port", "0"]);
        assert!(text.contains("cut.gguf") && text.contains("fetch it again"), "{length}: {text}");
    }
}

#[test]
fn limits_that_cannot_be_met_say_which_can() {
    let model = tiny_model();
    let model = model.to_str().unwrap();
    let serve = |flags: &[&str]| refused(&[&["serve", model, "--port", "0"], flags].concat());
    let long = serve(&["--max-model-len", "1000K"]);
    assert!(long.contains("the 64 tokens that the model declares: choose at most that"), "{long}");
    let much = serve(&["--kv-cache-memory", "100TiB"]);
    assert!(much.contains("--kv-cache-memory 100 TiB is more than"), "{much}");
    assert!(much.contains("choose less"), "{much}");
    let short = serve(&["--max-model-len", "64", "--kv-cache-memory", "2KiB"]);
    assert!(short.contains("at most --max-model-len 32 or more --kv-cache-memory"), "{short}");
    let little = serve(&["--kv-cache-memory", "10"]);
    assert!(little.contains("give more --kv-cache-memory"), "{little}");
}

#[test]
fn a_draft_model_of_another_vocabulary_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let draft = folder.path().join("draft.gguf");
    let mut bytes = fs::read(tiny_model()).unwrap();
    let name = b"<|im_end|>";
    let at = bytes.windows(name.len()).position(|window| window == name).unwrap();
    bytes[at + name.len() - 3] = b'D';
    fs::write(&draft, &bytes).unwrap();
    let model = tiny_model();
    let serve = |draft: &std::path::Path| {
        let draft = draft.to_str().unwrap();
        refused(&["serve", model.to_str().unwrap(), "--port", "0", "--model-draft", draft])
    };
    let other = serve(&draft);
    assert!(other.contains("another vocabulary") && other.contains("same family"), "{other}");
    let absent = serve(&folder.path().join("absent.gguf"));
    assert!(absent.contains("cannot use the draft model"), "{absent}");
}

/// A limit on address space stands in for a machine that promises more memory than it has.
#[test]
fn memory_that_the_system_does_not_give_says_which_flag_takes_less() {
    let home = tempfile::tempdir().unwrap();
    let output = Command::new("sh")
        .args(["-c", "ulimit -v 600000; exec \"$0\" \"$@\""])
        .arg(env!("CARGO_BIN_EXE_pomona"))
        .args(["serve", tiny_model().to_str().unwrap(), "--port", "0", "--threads", "1"])
        .args(["--kv-cache-memory", "600MiB"])
        .env("POMONA_HOME", home.path())
        .output()
        .unwrap();
    let text = refusal(&output);
    assert!(text.contains("600 MiB of keys and values"), "{text}");
    assert!(text.contains("choose less --kv-cache-memory"), "{text}");
}

#[test]
fn flags_of_other_servers_are_translated() {
    for (flags, words) in [
        (vec!["-m", "x.gguf"], "the model follows the verb"),
        (vec!["-c", "4096"], "--max-model-len"),
        (vec!["--ctx-size", "4096"], "--max-model-len"),
        (vec!["-ngl", "99"], "on CPUs only"),
        (vec!["--n-predict", "9"], "--max-tokens"),
        (vec!["-tp", "2"], "with two dashes"),
    ] {
        let text = refused(&[vec!["serve", "smollm2"], flags].concat());
        assert!(text.contains(words) && !text.contains("as a value"), "{text}");
    }
}

/// As `head` does when it has enough.
#[test]
fn an_output_that_nobody_reads_ends_quietly() {
    let home = tempfile::tempdir().unwrap();
    let model = tiny_model();
    let model = model.to_str().unwrap();
    for verb in
        [vec!["inspect", model, "--tensors"], vec!["tokenize", model, "ab"], vec!["pull", "--list"]]
    {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let output = pomona(home.path()).args(&verb).stdout(writer).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!((output.status.code(), said.as_ref()), (Some(141), ""), "{verb:?}");
    }
}

#[test]
fn flags_that_make_no_sense_are_explained() {
    for (flags, words) in [
        (vec!["--dtype", "bfloat16"], "write auto or float32"),
        (vec!["--kv-cache-dtype", "fp8"], "float16, bfloat16, or int8"),
        (vec!["--max-model-len", "long"], "such as 8192 or 8K"),
        (vec!["--kv-cache-memory", "much"], "such as 512MiB or 2GiB"),
        (vec!["--max-num-seqs", "0"], "1..=4096"),
        (vec!["--scheduling-policy", "random"], "fcfs, priority, fair"),
        (vec!["--port", "99999"], "99999"),
    ] {
        let text = refused(&[vec!["serve", "smollm2"], flags].concat());
        assert!(text.contains(words), "{text}");
    }
}

#[test]
fn a_bench_of_nothing_and_of_nobody_says_what_to_give() {
    assert!(refused(&["serve"]).contains("pomona serve smollm2"));
    assert!(refused(&["bench"]).contains("pomona bench smollm2"));
    assert!(refused(&["chat"]).contains("pomona chat smollm2"));
    assert!(refused(&["chat", "--url", "localhost"]).contains("http://HOST:PORT"));
    assert!(refused(&["chat", "--url", "http://127.0.0.1:9"]).contains("is the server running?"));
}

#[test]
fn measurements_refuse_flags_that_would_change_nothing() {
    let model = tiny_model();
    let model = model.to_str().unwrap();
    let url = "http://127.0.0.1:9";
    for (measure, flags, advice) in [
        ("bench MODEL --quality", "--tp 2", "--tensor-parallel-size: bench --quality reads logits"),
        ("bench MODEL --quality", "--pp 2", "--pipeline-parallel-size: bench --quality reads"),
        ("bench MODEL --quality", "--cp 2", "--context-parallel-size: bench --quality reads"),
        ("bench MODEL --quality", "--dp 2", "neither ranks nor drafts change them: leave the flag"),
        ("bench MODEL --quality", "--expert-loads x.json", "--expert-loads: bench --quality"),
        ("bench MODEL --quality", "--model-draft smollm2", "--model-draft: bench --quality reads"),
        ("bench MODEL --quality", "--no-server", "cannot be used with '--no-server'"),
        ("bench MODEL --quality", "--clients 1", "cannot be used with '--clients"),
        ("bench MODEL --no-server", "--input-tokens 9", "cannot be used with '--input-tokens"),
        ("bench MODEL --startup", "--n-prompt 9", "cannot be used with '--n-prompt"),
        ("bench MODEL", "--node-listen 127.0.0.1:0 --tp 2", "measure that by `pomona bench --url`"),
        ("bench --url URL", "--tp 2", "the server at --url has its own ranks and drafts"),
        ("bench serve --url URL", "--pp 2", "--pipeline-parallel-size: the server at --url"),
        ("bench serve MODEL", "--node-listen 127.0.0.1:0 --tp 2", "starts servers of this machine"),
        (
            "bench startup MODEL",
            "--node-listen 127.0.0.1:0 --tp 2",
            "starts servers of this machine",
        ),
        ("bench sweep MODEL", "--node-listen 127.0.0.1:0 --tp 2", "starts servers of this machine"),
        ("bench kernel MODEL", "--tp 2", "--tensor-parallel-size: bench kernel times the"),
        ("perplexity MODEL FILE", "--max-model-len 64", "as long as --context says"),
        ("perplexity MODEL FILE", "--model-draft smollm2", "drafts are for answers"),
    ] {
        let words = format!("{measure} {flags}").replace("MODEL", model).replace("URL", url);
        let said = refused(&words.split_whitespace().collect::<Vec<_>>());
        assert!(said.contains(advice), "{words}: {said}");
    }
}
