//! The binary with a model divided over processes: the same answers as alone, whichever way it is
//! divided and whoever dies. Skipped aloud without `POMONA_TEST_SMOLLM2` and `POMONA_TEST_GEMMA`.
#![allow(clippy::unwrap_used)] // A panic is how a test fails.

mod support;

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use support::{golden, pomona, test_model, tiny_moe};

const PROMPT: &str = "Tell me a story about a lighthouse.";
const TOKEN: &str = "0123456789abcdef-test";

/// The answer of `pomona run`, greedy, with these flags.
fn answer(model: &Path, flags: &str) -> Output {
    answer_to(model, PROMPT, flags)
}

fn answer_to(model: &Path, prompt: &str, flags: &str) -> Output {
    let home = tempfile::tempdir().unwrap();
    let mut run = pomona(home.path());
    run.args(["run", model.to_str().unwrap(), prompt, "--no-weight-cache"])
        .args(["--kv-cache-memory", "64MiB", "--max-tokens", "24", "--temperature", "0"])
        .args(flags.split_whitespace());
    run.output().unwrap()
}

fn same_as_alone(model: &Path, divisions: &[&str]) {
    same_as_alone_to(model, PROMPT, divisions);
}

fn same_as_alone_to(model: &Path, prompt: &str, divisions: &[&str]) {
    let alone = answer_to(model, prompt, "");
    assert!(alone.status.success() && alone.stdout.len() > 20, "{alone:?}");
    for flags in divisions {
        let divided = answer_to(model, prompt, flags);
        let said = String::from_utf8_lossy(&divided.stderr);
        assert!(divided.status.success(), "{flags}: {said}");
        assert_eq!(divided.stdout, alone.stdout, "{flags}: {said}");
    }
}

#[test]
fn smollm2_says_the_same_over_any_ranks() {
    let Some(model) = test_model("POMONA_TEST_SMOLLM2") else { return };
    same_as_alone(
        &model,
        &[
            "--tp 2",
            "--tp 3",
            "--tp 4",
            "--pp 2",
            "--pp 3",
            "--tp 2 --pp 2",
            "--dp 2",
            "--dp 2 --tp 2",
        ],
    );
}

#[test]
fn smollm2_says_the_same_where_several_ranks_keep_a_long_prompt() {
    let Some(model) = test_model("POMONA_TEST_SMOLLM2") else { return };
    same_as_alone_to(&model, &long_prompt(), &["--cp 2", "--cp 3", "--cp 2 --tp 2"]);
}

/// About 800 tokens: four splits.
fn long_prompt() -> String {
    let nights = (1..60).map(|n| format!("In night {n} the keeper counted {} ships. ", n * 7 % 13));
    format!("{}What did the keeper do?", nights.collect::<String>())
}

#[test]
fn gemma_says_the_same_over_any_ranks() {
    let Some(model) = test_model("POMONA_TEST_GEMMA") else { return };
    let divisions = ["--tp 2", "--tp 3", "--tp 4", "--pp 2", "--pp 3", "--tp 2 --pp 2", "--dp 2"];
    same_as_alone(&model, &divisions);
    same_as_alone_to(&model, &long_prompt(), &["--cp 2"]);
}

#[test]
fn experts_say_the_same_over_any_ranks() {
    let model = tiny_moe();
    let divisions =
        ["--tp 2 --ep", "--tp 3", "--tp 4 --ep", "--pp 2", "--tp 2 --pp 2", "--dp 2", "--cp 2"];
    same_as_alone(model.path(), &divisions);
}

/// A process that is killed with the test.
struct Guard(Child);

impl Drop for Guard {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A server, and where it is.
fn serve(model: &Path, flags: &str) -> (Guard, String) {
    let home = tempfile::tempdir().unwrap();
    let mut serve = pomona(home.path());
    serve
        .args(["serve", model.to_str().unwrap(), "--port", "0", "--served-model-name", "m"])
        .args(["--kv-cache-memory", "64MiB", "--no-weight-cache"])
        .args(flags.split_whitespace())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = Guard(serve.spawn().unwrap());
    let mut lines = BufReader::new(child.0.stdout.take().unwrap()).lines();
    let log = child.0.stderr.take().unwrap();
    // Read to its end, so that nobody waits for it.
    std::thread::spawn(move || BufReader::new(log).lines().for_each(drop));
    let first = lines.next().unwrap().unwrap();
    let url = first.split_whitespace().nth(2).unwrap().to_owned();
    std::thread::spawn(move || lines.for_each(drop));
    (child, url)
}

fn complete(url: &str, max_tokens: u32) -> Value {
    let body = json!({
        "model": "m",
        "prompt": PROMPT,
        "max_tokens": max_tokens,
        "temperature": 0.8,
        "seed": 5,
        "ignore_eos": true,
    });
    let request = ureq::post(format!("{url}/v1/completions"));
    let request = request.header("Content-Type", "application/json");
    let text = request.send(body.to_string()).unwrap().body_mut().read_to_string().unwrap();
    serde_json::from_str(&text).unwrap()
}

/// The processes that a process has started.
fn children(of: u32) -> Vec<i32> {
    let of = of.to_string();
    let parent = |stat: &str| stat.rsplit(')').next()?.split_whitespace().nth(1).map(str::to_owned);
    let processes = fs::read_dir("/proc").unwrap().flatten();
    let ids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let own = |id: &i32| {
        let stat = fs::read_to_string(format!("/proc/{id}/stat")).unwrap_or_default();
        parent(&stat).as_ref() == Some(&of)
    };
    ids.filter(own).collect()
}

fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(begun.elapsed() < Duration::from_secs(60), "{what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Generates while `disturb` is done to one of the ranks; the answer is the undisturbed one.
fn undisturbed(disturb: impl Fn(Pid) + Send + Sync) {
    let Some(model) = test_model("POMONA_TEST_SMOLLM2") else { return };
    let (server, url) = serve(&model, "--tp 3");
    let expected = complete(&url, 150);
    let ranks = children(server.0.id());
    assert_eq!(ranks.len(), 2, "two ranks beside the first");
    let answer = std::thread::scope(|scope| {
        let answer = scope.spawn(|| complete(&url, 150));
        let running = || {
            let text = ureq::get(format!("{url}/metrics")).call().unwrap();
            let text = text.into_body().read_to_string().unwrap();
            text.lines().any(|l| l.starts_with("vllm:num_requests_running") && l.ends_with(" 1"))
        };
        until("the request runs", || running().then_some(()));
        disturb(Pid::from_raw(ranks[1]).unwrap());
        answer.join().unwrap()
    });
    assert_eq!(answer["choices"], expected["choices"]);
    let again = until("two ranks are back", || {
        let again = children(server.0.id());
        (again.len() == 2 && !again.contains(&ranks[1])).then_some(again)
    });
    kill_process(Pid::from_child(&server.0), Signal::TERM).unwrap();
    let gone = |id: &i32| !Path::new(&format!("/proc/{id}")).exists();
    until("no rank is left over", || again.iter().all(gone).then_some(()));
}

#[test]
fn a_client_does_not_notice_that_a_rank_is_killed() {
    undisturbed(|rank| kill_process(rank, Signal::KILL).unwrap());
}

#[test]
fn a_client_does_not_notice_that_a_rank_stands_still() {
    undisturbed(|rank| kill_process(rank, Signal::STOP).unwrap());
}

/// `pomona node` for a leader at a port.
fn node(home: &Path, port: u16, token: &str, flags: &str) -> Command {
    let mut node = pomona(home);
    node.args(["node", "--join", &format!("127.0.0.1:{port}"), "--token", token])
        .args(["--patience", "30", "--no-weight-cache"])
        .args(flags.split_whitespace())
        .stdout(Stdio::null());
    node
}

fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

#[test]
fn nodes_that_join_say_the_same_and_strangers_are_refused() {
    let Some(model) = test_model("POMONA_TEST_SMOLLM2") else { return };
    let home = tempfile::tempdir().unwrap();
    let alone = answer(&model, "");
    for security in ["seal", "auth", "off"] {
        let port = free_port();
        let security_flag = format!("--node-security {security}");
        let start = |token, flags: &str| {
            let mut node = node(home.path(), port, token, flags);
            Guard(node.stderr(Stdio::piped()).spawn().unwrap())
        };
        // Who knows another token is turned away, and does not disturb.
        let mut stranger = start("another-token-of-16", &security_flag);
        let ranks: Vec<Guard> = (0..2).map(|_| start(TOKEN, &security_flag)).collect();
        let flags =
            format!("--tp 3 --node-listen 127.0.0.1:{port} --token {TOKEN} {security_flag}");
        let divided = answer(&model, &flags);
        let said = String::from_utf8_lossy(&divided.stderr);
        assert!(divided.status.success(), "{security}: {said}");
        assert_eq!(divided.stdout, alone.stdout, "{security}: {said}");
        for mut rank in ranks {
            assert!(rank.0.wait().unwrap().success(), "{security}: ends with the leader");
        }
        assert!(!stranger.0.wait().unwrap().success());
    }
}

#[test]
fn a_node_that_has_other_weights_is_told_so() {
    let Some(model) = test_model("POMONA_TEST_SMOLLM2") else { return };
    let (home, port) = (tempfile::tempdir().unwrap(), free_port());
    let mut other = node(home.path(), port, TOKEN, "--model")
        .arg(golden("llama"))
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut leader = pomona(home.path());
    leader
        .args(["run", model.to_str().unwrap(), PROMPT, "--tp", "2", "--token", TOKEN])
        .args(["--node-listen", &format!("127.0.0.1:{port}")])
        .stderr(Stdio::null());
    let _leader = Guard(leader.spawn().unwrap());
    let status = other.wait().unwrap();
    let mut said = String::new();
    std::io::Read::read_to_string(&mut other.stderr.take().unwrap(), &mut said).unwrap();
    assert!(!status.success() && said.contains("weights"), "{said}");
}

#[test]
fn splits_that_cannot_be_are_refused_before_anything_is_loaded() {
    let model = golden("llama");
    for (flags, advice) in [
        ("--tp 5", "choose 4 or fewer"),
        ("--pp 9", "choose 3 or fewer"),
        ("--tp 2 --cp 3", "choose 4 or fewer"),
        ("--tp 0", "1..=1024"),
        ("-tp 2", "with two dashes"),
    ] {
        let refused = answer(&model, flags);
        let said = String::from_utf8_lossy(&refused.stderr);
        assert!(!refused.status.success() && said.contains(advice), "{flags}: {said}");
    }
}

#[test]
fn inspect_shows_what_each_rank_would_hold() {
    let home = tempfile::tempdir().unwrap();
    let model: PathBuf = golden("llama");
    let mut inspect = pomona(home.path());
    inspect.args(["inspect", model.to_str().unwrap(), "--tp", "2", "--pp", "2", "--json"]);
    let output = inspect.output().unwrap();
    let found: Value = serde_json::from_slice(&output.stdout).unwrap();
    let ranks = found["memory"]["ranks"].as_array().unwrap();
    assert_eq!(ranks.len(), 4);
    let bytes: u64 = ranks.iter().map(|rank| rank["weight_bytes"].as_u64().unwrap()).sum();
    let formats = found["formats"].as_array().unwrap();
    let whole: u64 = formats.iter().map(|format| format["bytes"].as_u64().unwrap()).sum();
    // Norms are on both ranks of a stage.
    assert!((whole * 9 / 10..whole * 11 / 10).contains(&bytes), "{bytes} of {whole}");
}

/// The samples of a metric, in their order.
fn samples(url: &str, name: &str) -> Vec<f64> {
    let text = ureq::get(format!("{url}/metrics")).call().unwrap();
    let text = text.into_body().read_to_string().unwrap();
    let own = text.lines().filter(|line| line.starts_with(&format!("{name}{{")));
    own.map(|line| line.rsplit(' ').next().unwrap().parse().unwrap()).collect()
}

#[test]
fn copies_of_experts_change_no_answer() {
    let model = tiny_moe();
    let file = model.path().join("loads.json");
    let loads = format!("--expert-loads {}", file.display());
    let counted = || -> u64 {
        let found: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
        let layers = found["tokens"].as_array().unwrap().iter();
        layers.flat_map(|layer| layer.as_array().unwrap()).map(|n| n.as_u64().unwrap()).sum()
    };
    let (mut before, mut expected) = (0, None);
    for division in ["", "--tp 2 --ep", "--tp 4", "--tp 2 --pp 2", "--tp 2 --dp 2"] {
        let copies = if division.is_empty() { "" } else { "--num-redundant-experts 3" };
        let flags = format!("{division} {copies} {loads}");
        let (mut server, url) = serve(model.path(), &flags);
        let answer = complete(&url, 60);
        // Each token that was taken in has two experts; the last layer has those alone whose logits
        // were wanted.
        let taken = answer["usage"]["prompt_tokens"].as_f64().unwrap() + 59.0;
        let choices = answer["choices"].clone();
        assert_eq!(&choices, expected.get_or_insert(choices.clone()), "{division}");
        let name = "pomona:expert_tokens_total";
        let sum = until("all is told", || {
            let tokens = samples(&url, name);
            assert_eq!(tokens.len(), 2 * 5, "{division}");
            let layers = tokens.chunks(5).map(|layer| layer.iter().sum::<f64>());
            let layers: Vec<f64> = layers.collect();
            (layers == [2.0 * taken, 2.0 * 60.0]).then_some(layers[0] + layers[1])
        });
        let pairs = samples(&url, "pomona:expert_pairs_total");
        let balance = samples(&url, "pomona:expert_balance");
        if division.is_empty() {
            assert_eq!((pairs.len(), balance.len()), (0, 0));
        } else {
            assert_eq!(pairs.iter().sum::<f64>(), sum, "{division}");
            assert!((1.0..=4.0).contains(&balance[0]), "{division}: {balance:?}");
        }
        kill_process(Pid::from_child(&server.0), Signal::TERM).unwrap();
        assert!(server.0.wait().unwrap().success());
        assert_eq!(counted(), before + sum as u64, "{division}");
        before = counted();
    }
}

#[test]
fn flags_about_experts_are_refused_where_they_would_do_nothing() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let damaged = format!("--expert-loads {}", file.path().display());
    for (model, flags, advice) in [
        ("llama", "--tp 2 --enable-expert-parallel", "has no experts"),
        ("llama", damaged.as_str(), "has no experts"),
        ("mixtral", "--enable-expert-parallel", "add --tensor-parallel-size"),
        ("mixtral", "--ep --dp 2", "a replica of --data-parallel-size has all experts"),
        ("mixtral", "--num-redundant-experts 1 --pp 2", "add --tensor-parallel-size"),
        ("mixtral", "--tp 2 --num-redundant-experts 6", "choose 5 or fewer"),
        ("mixtral", damaged.as_str(), "name another file"),
    ] {
        let refused = answer(&golden(model), flags);
        let said = String::from_utf8_lossy(&refused.stderr);
        assert!(!refused.status.success() && said.contains(advice), "{flags}: {said}");
    }
}

#[test]
fn inspect_shows_who_would_have_which_experts() {
    let (home, model) = (tempfile::tempdir().unwrap(), golden("mixtral"));
    let look = |flags: &str| -> Value {
        let mut inspect = pomona(home.path());
        inspect.args(["inspect", model.to_str().unwrap(), "--json"]);
        let output = inspect.args(flags.split_whitespace()).output().unwrap();
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let bytes = |found: &Value| -> u64 {
        let ranks = found["memory"]["ranks"].as_array().unwrap().iter();
        ranks.map(|rank| rank["weight_bytes"].as_u64().unwrap()).sum()
    };
    let (plain, copied) = (look("--tp 4"), look("--tp 4 --num-redundant-experts 3"));
    let ranks = copied["memory"]["ranks"].as_array().unwrap();
    assert!(ranks.iter().all(|rank| rank["experts"] == 4), "two in each of two layers: {ranks:?}");
    assert_eq!(copied["placement"]["copies"], 6);
    // Five experts on four ranks: one rank had two, of a mean of 1.25.
    assert_eq!(plain["placement"]["balance"], 1.6);
    assert_eq!(copied["placement"]["balance"], 1.2);
    // Three matrices of 32 by 24 numbers of four bytes each.
    assert_eq!(bytes(&copied) - bytes(&plain), 6 * 3 * 32 * 24 * 4);
    assert_eq!(look("")["placement"], Value::Null);
}
