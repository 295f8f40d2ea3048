//! The binary with a real model: served, chatted with, drained, weighed. Skipped aloud without
//! `POMONA_TEST_SMOLLM2`.
#![allow(clippy::unwrap_used)] // A panic is how a test fails.

mod support;

use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use support::{pomona, test_model};

/// What the process may hold beside weights and KV.
const RESIDENT_EXTRA_MAX: u64 = 120 << 20;
/// KV memory that the tests give.
const KV_BYTES: u64 = 64 << 20;

struct Served {
    child: Child,
    url: String,
    ready_s: f64,
    _stdout: BufReader<ChildStdout>,
}

impl Served {
    fn start(model: &Path, flags: &[&str]) -> Served {
        Served::start_in(tempfile::tempdir().unwrap().path(), model, flags)
    }

    fn start_in(home: &Path, model: &Path, flags: &[&str]) -> Served {
        Served::spawn(pomona(home), model, flags)
    }

    fn spawn(mut command: Command, model: &Path, flags: &[&str]) -> Served {
        let mut child = command
            .args(["serve", model.to_str().unwrap(), "--port", "0"])
            .args(["--kv-cache-memory", &KV_BYTES.to_string(), "--served-model-name", "m"])
            .args(flags)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        stdout.read_line(&mut line).unwrap();
        let words: Vec<&str> = line.split_whitespace().collect();
        assert_eq!(words[..2], ["ready", "at"], "{line}");
        let (url, ready_s) = (words[2].to_owned(), words[4].parse().unwrap());
        Served { child, url, ready_s, _stdout: stdout }
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    fn post(&self, path: &str, body: Value) -> ureq::http::Response<ureq::Body> {
        let config = ureq::Agent::config_builder().http_status_as_error(false).build();
        let request = ureq::Agent::new_with_config(config).post(format!("{}{path}", self.url));
        let request = request.header("Content-Type", "application/json");
        request.send(body.to_string()).unwrap()
    }

    fn completion(&self, prompt: &str, max_tokens: u32) -> Value {
        let body =
            json!({"model": "m", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0});
        let text = self.post("/v1/completions", body).body_mut().read_to_string().unwrap();
        serde_json::from_str(&text).unwrap()
    }

    fn field(&self, name: &str) -> u64 {
        let path = format!("/proc/{}/status", self.child.id());
        let status = std::fs::read_to_string(path).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
    }

    fn wait(&mut self, limit: Duration) -> Option<i32> {
        let begun = Instant::now();
        while begun.elapsed() < limit {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code();
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("the server did not end within {limit:?}");
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn model() -> Option<PathBuf> {
    test_model("POMONA_TEST_SMOLLM2")
}

#[test]
fn it_is_ready_soon_and_holds_little_beside_weights_and_kv() {
    let Some(model) = model() else { return };
    let weights = std::fs::metadata(&model).unwrap().len();
    let mut served = Served::start(&model, &[]);
    // Unoptimised builds repack weights slowly; the promise is about release builds.
    let limit_s = if cfg!(debug_assertions) { 20.0 } else { 1.0 };
    assert!(served.ready_s < limit_s, "ready after {} s", served.ready_s);
    let answer = served.completion(&"word ".repeat(600), 8);
    assert_eq!(answer["usage"]["completion_tokens"], 8, "{answer}");
    let peak = served.field("VmHWM:");
    assert!(peak <= weights + KV_BYTES + RESIDENT_EXTRA_MAX, "{} MiB at most", peak >> 20);
    served.signal(Signal::TERM);
    assert_eq!(served.wait(Duration::from_secs(10)), Some(0));
}

/// The files of packed weights in a home.
fn packed(home: &Path) -> Vec<PathBuf> {
    let items = std::fs::read_dir(home.join("weights")).unwrap().map(|item| item.unwrap().path());
    items.filter(|path| path.extension().is_some_and(|end| end == "packed")).collect()
}

/// Starts a server, has it answer, and ends it: the answer, and bytes that were its own alone.
fn answer_of(mut served: Served) -> (Value, u64) {
    let answer = served.completion("The three primary colours are", 16);
    let own = served.field("RssAnon:");
    served.signal(Signal::TERM);
    assert_eq!(served.wait(Duration::from_secs(10)), Some(0));
    (answer["choices"].clone(), own)
}

#[test]
fn later_starts_map_what_the_first_one_packed() {
    let Some(model) = model() else { return };
    let weights = std::fs::metadata(&model).unwrap().len();
    let home = tempfile::tempdir().unwrap();
    let start = || answer_of(Served::start_in(home.path(), &model, &[]));
    let (first, own) = start();
    assert!(own < weights * 3 / 4, "{} MiB are the first process's own", own >> 20);
    let file = packed(home.path()).pop().unwrap();
    let (later, own) = start();
    assert_eq!(later, first);
    assert!(own < weights * 3 / 4, "{} MiB are a later process's own", own >> 20);
    // Half a file is not used, and made whole again.
    let whole = std::fs::read(&file).unwrap();
    std::fs::write(&file, &whole[..whole.len() / 2]).unwrap();
    assert_eq!(start().0, first);
    assert!(std::fs::read(&file).unwrap() == whole, "it was packed again");
    let (without, own) = answer_of(Served::start_in(home.path(), &model, &["--no-weight-cache"]));
    assert_eq!(without, first);
    assert!(own > weights * 3 / 4, "{} MiB are its own", own >> 20);
}

#[test]
fn a_disk_without_room_for_packed_weights_is_done_without() {
    let Some(model) = model() else { return };
    let home = tempfile::tempdir().unwrap();
    let expected = answer_of(Served::start_in(home.path(), &model, &["--no-weight-cache"])).0;
    // No file may grow beyond some 40 MB, the middle of the weights.
    let plain = pomona(home.path());
    let mut shell = Command::new("sh");
    shell.args(["-c", "trap '' XFSZ; ulimit -f 80000; exec \"$0\" \"$@\""]);
    shell.arg(plain.get_program()).args(plain.get_args());
    for (name, value) in plain.get_envs() {
        value.map(|value| shell.env(name, value));
    }
    assert_eq!(answer_of(Served::spawn(shell, &model, &[])).0, expected);
    assert_eq!(packed(home.path()), [] as [PathBuf; 0]);
    assert!(!home.path().join("weights/part").exists());
}

#[test]
fn a_signal_lets_a_running_answer_finish() {
    let Some(model) = model() else { return };
    let mut served = Served::start(&model, &[]);
    let body = json!({"model": "m", "prompt": "Once", "max_tokens": 60, "ignore_eos": true,
                      "stream": true});
    let mut answer = served.post("/v1/completions", body);
    let mut reader = BufReader::new(answer.body_mut().as_reader());
    let mut first = String::new();
    reader.read_line(&mut first).unwrap();
    served.signal(Signal::TERM);
    let mut rest = String::new();
    reader.read_to_string(&mut rest).unwrap();
    assert!(rest.contains("\"length\"") && rest.ends_with("data: [DONE]\n\n"), "{rest}");
    assert_eq!(served.wait(Duration::from_secs(10)), Some(0));
}

#[test]
fn a_second_signal_ends_at_once() {
    let Some(model) = model() else { return };
    let mut served = Served::start(&model, &[]);
    let body = json!({"model": "m", "prompt": "Once", "max_tokens": 1000, "ignore_eos": true,
                      "stream": true});
    let mut answer = served.post("/v1/completions", body);
    let mut reader = BufReader::new(answer.body_mut().as_reader());
    reader.read_line(&mut String::new()).unwrap();
    served.signal(Signal::INT);
    // The first signal is taken when new requests are refused.
    while served.post("/v1/completions", json!({"prompt": "x"})).status() != 503 {}
    served.signal(Signal::INT);
    assert_eq!(served.wait(Duration::from_secs(2)), Some(130));
}

#[test]
fn run_answers_the_same_twice_and_tokenize_agrees_with_itself() {
    let Some(model) = model() else { return };
    let home = tempfile::tempdir().unwrap();
    let model = model.to_str().unwrap().to_owned();
    let run = || {
        let mut command = pomona(home.path());
        command.args(["run", &model, "Name a colour.", "--temperature", "0", "--max-tokens", "8"]);
        String::from_utf8(command.output().unwrap().stdout).unwrap()
    };
    let answer = run();
    assert!(!answer.trim().is_empty());
    assert_eq!(answer, run());
    let count = pomona(home.path()).args(["tokenize", &model, "a b", "--count"]).output().unwrap();
    let ids = pomona(home.path()).args(["tokenize", &model, "a b", "--json"]).output().unwrap();
    let ids: Vec<u32> = serde_json::from_slice(&ids.stdout).unwrap();
    assert_eq!(String::from_utf8_lossy(&count.stdout).trim(), ids.len().to_string());
}

#[test]
fn chat_remembers_and_takes_commands_from_a_pipe() {
    let Some(model) = model() else { return };
    let home = tempfile::tempdir().unwrap();
    let mut child = pomona(home.path())
        .args(["chat", model.to_str().unwrap(), "--temperature", "0", "--max-tokens", "12"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(b"Say hello.\n/set top_k 1\n/reset\n/exit\n").unwrap();
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    assert!(!String::from_utf8_lossy(&output.stdout).trim().is_empty());
    assert!(said.contains("tokens/s") && said.contains("a new conversation"), "{said}");
}

#[test]
fn perplexity_is_that_of_a_model_that_reads() {
    let Some(model) = model() else { return };
    let home = tempfile::tempdir().unwrap();
    let text = home.path().join("text");
    std::fs::write(&text, "The cat sat on the mat, and the dog sat on the floor. ".repeat(20))
        .unwrap();
    let output = pomona(home.path())
        .args(["perplexity", model.to_str().unwrap(), text.to_str().unwrap()])
        .args(["--context", "64", "--json"])
        .output()
        .unwrap();
    let found: Value = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|_| panic!("{}", String::from_utf8_lossy(&output.stderr)));
    let perplexity = found["perplexity"].as_f64().unwrap();
    // Repeated text is nearly certain by the second half of a chunk; noise would be near 49,152.
    assert!((1.0..5.0).contains(&perplexity), "{found}");
    assert_eq!(found["tokens"], found["chunks"].as_u64().unwrap() * 31, "{found}");
}

/// The report of a measurement. Whether the machine had time for it is not this test's to choose:
/// the exit code has to agree with the report.
fn measured(output: &Output, json: &Path) -> Value {
    let said = String::from_utf8_lossy(&output.stderr);
    let report = std::fs::read(json).unwrap_or_else(|_| panic!("{said}"));
    let report: Value = serde_json::from_slice(&report).unwrap();
    let busy = report["neighbours"]["busy"].as_bool().unwrap();
    assert_eq!(output.status.code(), Some(if busy { 75 } else { 0 }), "{said}");
    assert_eq!(said.contains("the machine was busy"), busy, "{said}");
    report
}

#[test]
fn bench_measures_kinds_of_matrices() {
    let Some(model) = model() else { return };
    let home = tempfile::tempdir().unwrap();
    let json = home.path().join("report.json");
    let output = pomona(home.path())
        .args(["bench", "kernel", model.to_str().unwrap(), "--repeats", "1", "--json"])
        .arg(&json)
        .output()
        .unwrap();
    let report = measured(&output, &json);
    let kernels = report["kernels"].as_array().unwrap();
    // Queries and outputs, keys and values, gate and up, down, the vocabulary.
    assert!(kernels.len() >= 5, "{report}");
    for kernel in kernels {
        let speeds = kernel["speeds"].as_array().unwrap();
        let us = |i: usize| speeds[i]["us"]["median"].as_f64().unwrap();
        assert!(speeds.len() == 2 && us(0) > 0.0 && us(1) > us(0), "{kernel}");
        assert!(!kernel["path"].as_str().unwrap().is_empty(), "{kernel}");
    }
}

#[test]
fn bench_sweeps_batches_and_draws_them() {
    let Some(model) = model() else { return };
    let home = tempfile::tempdir().unwrap();
    let (json, svg) = (home.path().join("report.json"), home.path().join("plot.svg"));
    let output = pomona(home.path())
        .args(["bench", "sweep", model.to_str().unwrap(), "--repeats", "1", "--cases", "batch"])
        .args(["--max-model-len", "128", "--kv-cache-memory", &KV_BYTES.to_string(), "--svg"])
        .arg(&svg)
        .arg("--json")
        .arg(&json)
        .output()
        .unwrap();
    let report = measured(&output, &json);
    let points = report["sweep"]["series"][0]["points"].as_array().unwrap();
    assert!(points.len() > 1 && points[0]["at"] == "1", "{report}");
    let table = String::from_utf8_lossy(&output.stdout);
    assert!(table.contains("decode together") && table.contains("worst "), "{table}");
    let plot = std::fs::read_to_string(svg).unwrap();
    assert_eq!(plot.matches("<circle").count(), points.len(), "{plot}");
}

#[test]
fn bench_times_starts() {
    let Some(model) = model() else { return };
    let home = tempfile::tempdir().unwrap();
    let json = home.path().join("report.json");
    let output = pomona(home.path())
        .args(["bench", "startup", model.to_str().unwrap(), "--repeats", "1", "--json"])
        .arg(&json)
        .output()
        .unwrap();
    let report = measured(&output, &json);
    let starts = report["startup"].as_array().unwrap();
    assert_eq!(starts.len(), 3, "{report}");
    for start in starts {
        let times = ["listening_ms", "ready_ms", "first_token_ms"];
        let times = times.map(|name| start[name]["median"].as_f64().unwrap());
        assert!(times.is_sorted() && times[0] > 0.0, "{start}");
        assert!(start["resident_peak"].as_f64().unwrap() > 0.0, "{start}");
    }
    let left = std::fs::read_dir(home.path().join("weights")).unwrap().count();
    assert_eq!(left, 0, "the bench's own packed weights are gone");
}

#[test]
fn bench_reports_every_figure() {
    let Some(model) = model() else { return };
    let home = tempfile::tempdir().unwrap();
    let json = home.path().join("report.json");
    let output = pomona(home.path())
        .args(["bench", model.to_str().unwrap(), "--repeats", "1", "--clients", "1,2"])
        .args([
            "--input-tokens",
            "32",
            "--output-tokens",
            "8",
            "--requests-per-client",
            "1",
            "--max-model-len",
            "128",
        ])
        .args(["--kv-cache-memory", &KV_BYTES.to_string(), "--json"])
        .arg(&json)
        .output()
        .unwrap();
    let report = measured(&output, &json);
    for path in [
        "/machine/read_gb_per_s",
        "/machine/f32_gflop_per_s",
        "/model/step_bytes",
        "/engine/0/tokens_per_s/median",
        "/engine/2/limits/of_bandwidth",
        "/ready_s/median",
        "/memory/resident_peak",
        "/served/1/output_tokens_per_s/median",
        "/served/1/ttft_ms/p99",
        "/served/1/inter_token_ms/p50",
        "/served/1/limits/of_f32_peak",
    ] {
        let value = report.pointer(path).and_then(Value::as_f64);
        assert!(value.is_some_and(|v| v > 0.0), "{path}: {report}");
    }
    assert_eq!(report["served"][0]["failed"], 0);
    let table = String::from_utf8_lossy(&output.stdout);
    assert!(table.contains("prefill 64") && table.contains("clients"), "{table}");
}
