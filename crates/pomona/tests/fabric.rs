//! `pomona fabric`: the verbs as a user calls them, with real processes as ranks. No time that is
//! measured here is held against anything, for others may be at work on the machine.
#![allow(clippy::unwrap_used)]

mod support;

use std::path::Path;
use std::process::Output;

use serde_json::Value;
use support::{pomona, refusal, tiny_model};

/// Ended well, or because others kept the machine busy, or because predictions were wrong.
fn text(output: &Output) -> String {
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(matches!(output.status.code(), Some(0 | 1 | 75)), "{error}");
    assert!(!error.contains("panicked"), "{error}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn fabric(home: &Path, words: &str) -> Output {
    pomona(home).arg("fabric").args(words.split_whitespace()).output().unwrap()
}

/// Two sizes over shared memory, kept.
fn calibrated(home: &Path) -> Value {
    let words = "calibrate --transport shm --ranks 2 --sizes 64,4KiB --rounds 1 --keep-busy";
    let output = fabric(home, words);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&std::fs::read(home.join("fabric.json")).unwrap()).unwrap()
}

#[test]
fn what_the_machine_has_is_told_to_people_and_programs() {
    let home = tempfile::tempdir().unwrap();
    let words = text(&fabric(home.path(), "probe"));
    assert!(words.contains("shm              yes"), "{words}");
    let json: Value = serde_json::from_str(&text(&fabric(home.path(), "probe --json"))).unwrap();
    assert_eq!(json["tcp"]["works"], true, "{json}");
    for kind in ["libfabric", "nccl", "cuda"] {
        let found = &json[kind];
        assert_eq!(found["works"].as_bool().unwrap(), found["why_not"].is_null(), "{json}");
    }
}

#[test]
fn every_transport_is_measured_between_processes() {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("record.json");
    let probe: Value = serde_json::from_str(&text(&fabric(home.path(), "probe --json"))).unwrap();
    let ways = ["shm", "tcp", "tcp --policy seal", "shm --ranks 3", "ofi"];
    for way in ways {
        if way == "ofi" && probe["libfabric"]["works"] == false {
            eprintln!("SKIPPED: {}", probe["libfabric"]["why_not"]);
            continue;
        }
        let flags = format!("bench --rounds 1 --sizes 8,64KiB --transport {way} --json");
        let words: Vec<&str> = flags.split(' ').collect();
        let output = pomona(home.path()).arg("fabric").args(words).arg(&path).output().unwrap();
        let table = text(&output);
        assert!(table.contains("one-shot") && table.contains("barrier"), "{way}: {table}");
        let record: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        let figures = record["runs"][0]["figures"].as_array().unwrap();
        // Four sums, a gather, a broadcast, one way; and a barrier.
        assert_eq!(figures.len(), 2 * 7 + 1, "{way}: {record}");
        for figure in figures {
            assert!(figure["us"]["p50"].as_f64().unwrap() > 0.0, "{way}: {figure}");
        }
    }
}

#[test]
fn what_was_kept_can_be_checked() {
    let home = tempfile::tempdir().unwrap();
    let kept = calibrated(home.path());
    assert_eq!(kept["costs"].as_array().unwrap().len(), 8, "{kept}");
    let table = text(&fabric(home.path(), "bench --check --rounds 1"));
    assert!(table.contains("2 ranks over shm, predicted:"), "{table}");
    assert!(table.contains("of 22 calls within 25 %"), "{table}");
    assert!(table.contains("of 3 choices within 1.3 times the best"), "{table}");

    let path = home.path().join("fabric.json");
    let mut other = kept;
    other["cpu"] = "another".into();
    std::fs::write(&path, other.to_string()).unwrap();
    let text = refusal(&fabric(home.path(), "bench --check"));
    assert!(text.contains("does not tell of this machine"), "{text}");
    std::fs::write(&path, "{}").unwrap();
    let text = refusal(&fabric(home.path(), "bench --check"));
    assert!(text.contains("pomona fabric calibrate"), "{text}");
}

#[test]
fn ranks_of_a_model_go_by_what_was_kept_and_say_the_same() {
    let home = tempfile::tempdir().unwrap();
    let model = tiny_model();
    let answer = || {
        let mut command = pomona(home.path());
        command.args(["-v", "run", model.to_str().unwrap(), "--tensor-parallel-size", "2"]);
        command.args(["--max-tokens", "8", "--temperature", "0", "Tell me"]);
        let output = command.output().unwrap();
        let log = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{log}");
        (output.stdout, log)
    };
    let (without, log) = answer();
    assert!(!log.contains("has measured"), "{log}");
    // As if rings were the quickest: nothing else was measured.
    let mut kept = calibrated(home.path());
    let costs = kept["costs"].as_array_mut().unwrap();
    costs.retain(|one| one["operation"]["all-reduce"] == "ring");
    assert_eq!(costs.len(), 1);
    std::fs::write(home.path().join("fabric.json"), kept.to_string()).unwrap();
    let (with, log) = answer();
    assert!(log.contains("2:*:ring"), "{log}");
    assert_eq!(with, without);
}

#[test]
fn ranks_are_started_by_the_first_one_only() {
    let home = tempfile::tempdir().unwrap();
    let output = pomona(home.path())
        .args(["fabric", "rank"])
        .stdin(std::process::Stdio::null())
        .output()
        .unwrap();
    assert!(refusal(&output).contains("pomona fabric bench"));
}

/// Libraries that only some machines have are opened when they are asked for.
#[cfg(target_os = "linux")]
#[test]
fn the_binary_needs_no_library_that_a_machine_may_lack() {
    let listed = std::process::Command::new("ldd").arg(env!("CARGO_BIN_EXE_pomona")).output();
    let listed = listed.unwrap();
    let listed = String::from_utf8(listed.stdout).unwrap();
    assert!(listed.contains("libc."), "{listed}");
    for library in ["fabric", "nccl", "cuda", "nvrtc", "ibverbs", "ucp", "ssl"] {
        assert!(!listed.contains(library), "{library}: {listed}");
    }
}
