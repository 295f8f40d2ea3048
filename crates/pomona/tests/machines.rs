//! The binary on several machines, which are network namespaces joined by a switch: a divided model
//! says what it says alone, and a cable that is pulled changes no answer. Skipped aloud without
//! `POMONA_TEST_SMOLLM2`, or where namespaces cannot be made (root and iproute2).
#![allow(clippy::unwrap_used)] // A panic is how a test fails.

#[path = "../../fabric/tests/machines/bed.rs"]
mod bed;
mod support;

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use bed::{Bed, inside, ip};
use support::{pomona, test_model, tiny_moe};

const PROMPT: &str = "Tell me a story about a lighthouse.";
const TOKEN: &str = "0123456789abcdef-test";
/// Nothing takes longer, on however busy a machine.
const PATIENCE: Duration = Duration::from_secs(120);

/// A model and the machines, where both are to be had.
fn world(model: &str, machines: usize) -> Option<(PathBuf, Bed)> {
    Some((test_model(model)?, bed(machines)?))
}

fn bed(machines: usize) -> Option<Bed> {
    let bed = Bed::new(machines);
    bed.map_err(|why| skip("namespaces", &format!("network namespaces: {why}"))).ok()
}

/// Says that a test is left out, unless what it lacks is required.
fn skip(name: &str, what: &str) {
    let required = std::env::var("POMONA_REQUIRE").unwrap_or_default();
    assert!(!required.split(',').any(|required| required == name), "required: {what}");
    eprintln!("SKIPPED: tests between machines need {what}");
}

/// A program on a machine, with a home of its own and nothing else.
fn on(namespace: &str, home: &Path) -> Command {
    let mut command = inside(namespace, Path::new(env!("CARGO_BIN_EXE_pomona")));
    command.env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default());
    command.env("POMONA_HOME", home);
    command
}

fn ask<'a>(command: &'a mut Command, model: &Path, max_tokens: &str) -> &'a mut Command {
    ask_for(command, (model, PROMPT), max_tokens)
}

fn ask_for<'a>(
    command: &'a mut Command,
    (model, prompt): (&Path, &str),
    max_tokens: &str,
) -> &'a mut Command {
    command.args(["run", model.to_str().unwrap(), prompt, "--no-weight-cache"]).args([
        "--kv-cache-memory",
        "64MiB",
        "--max-tokens",
        max_tokens,
        "--temperature",
        "0",
    ])
}

/// Killed with the test.
struct Guard(Child);

impl Drop for Guard {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A node on a machine, with what it says.
fn node(bed: &Bed, at: usize, home: &Path, flags: &[&str]) -> (Guard, Receiver<String>) {
    let mut node = on(&bed.machine(at), home);
    node.args(["node", "--join", &format!("{}:7000", bed.address(0)), "--token", TOKEN])
        .args(["--no-weight-cache"])
        .args(flags)
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    let mut child = node.spawn().unwrap();
    let (send, said) = channel();
    let lines = BufReader::new(child.stderr.take().unwrap()).lines();
    std::thread::spawn(move || lines.map_while(Result::ok).try_for_each(|line| send.send(line)));
    (Guard(child), said)
}

fn listen(bed: &Bed) -> [String; 4] {
    let address = format!("{}:7000", bed.address(0));
    ["--node-listen".into(), address, "--token".into(), TOKEN.into()]
}

fn check(divided: &Output, alone: &Output, how: &str) {
    let said = String::from_utf8_lossy(&divided.stderr);
    assert!(divided.status.success() && alone.stdout.len() > 20, "{how}: {said}");
    assert_eq!(divided.stdout, alone.stdout, "{how}: {said}");
}

/// A division of a model, its machines, of which the first has a rank of each replica, what is
/// protected between them, and what carries data.
type Case = (&'static str, usize, &'static str, &'static str);

/// Checks that a model, a rank of it on each machine, answers as it does alone.
fn says_the_same(bed: &Bed, model: &Path, prompt: &str, cases: &[Case]) {
    let home = tempfile::tempdir().unwrap();
    let what = (model, prompt);
    let alone = ask_for(&mut pomona(home.path()), what, "24").output().unwrap();
    for (division, ranks, security, transport) in cases {
        let how = format!("{division}, {security} over {transport}");
        let security = ["--node-security", security];
        let nodes: Vec<_> = (1..*ranks).map(|at| node(bed, at, home.path(), &security)).collect();
        let mut leader = on(&bed.machine(0), home.path());
        ask_for(&mut leader, what, "24").args(listen(bed)).args(security);
        leader.args(division.split(' ')).args(["--node-transport", transport]);
        let divided = leader.output().unwrap();
        if String::from_utf8_lossy(&divided.stderr).contains("ranks talk over tcp") {
            skip("libfabric", "libfabric");
        }
        check(&divided, &alone, &how);
        drop(nodes);
    }
}

#[test]
fn smollm2_over_machines_says_what_it_says_alone() {
    let Some((model, bed)) = world("POMONA_TEST_SMOLLM2", 4) else { return };
    let cases = [
        ("--tp 2", 2, "auth", "tcp"),
        ("--tp 2", 2, "auth", "libfabric"),
        ("--tp 3", 3, "seal", "tcp"),
        ("--tp 3", 3, "auth", "libfabric"),
        ("--tp 4", 4, "off", "tcp"),
        ("--tp 4", 4, "off", "libfabric"),
        ("--pp 2", 2, "seal", "tcp"),
        ("--pp 2", 2, "auth", "libfabric"),
        ("--pp 3", 3, "seal", "tcp"),
        ("--pp 3", 3, "auth", "libfabric"),
        ("--tp 2 --dp 2", 3, "seal", "tcp"),
        ("--tp 2 --dp 2", 3, "auth", "libfabric"),
        ("--tp 2 --pp 2", 4, "seal", "tcp"),
        ("--tp 2 --pp 2", 4, "auth", "libfabric"),
    ];
    says_the_same(&bed, &model, PROMPT, &cases);
    let nights = (1..40).map(|n| format!("In night {n} the keeper counted {} ships. ", n * 7 % 13));
    // More than a split of 256 tokens.
    let long = format!("{}What did the keeper do?", nights.collect::<String>());
    let cases = [("--cp 2", 2, "seal", "tcp"), ("--cp 2", 2, "auth", "libfabric")];
    says_the_same(&bed, &model, &long, &cases);
}

#[test]
fn gemma_over_machines_says_what_it_says_alone() {
    let Some((model, bed)) = world("POMONA_TEST_GEMMA", 2) else { return };
    let cases = [
        ("--tp 2", 2, "seal", "tcp"),
        ("--tp 2", 2, "auth", "libfabric"),
        ("--pp 2", 2, "seal", "tcp"),
        ("--pp 2", 2, "auth", "libfabric"),
    ];
    says_the_same(&bed, &model, PROMPT, &cases);
}

#[test]
fn experts_over_machines_say_what_they_say_alone() {
    let (model, Some(bed)) = (tiny_moe(), bed(4)) else { return };
    let cases = [
        ("--tp 2 --enable-expert-parallel", 2, "seal", "tcp"),
        ("--tp 2 --enable-expert-parallel", 2, "auth", "libfabric"),
        ("--tp 4 --enable-expert-parallel", 4, "seal", "tcp"),
        ("--tp 4 --num-redundant-experts 2", 4, "auth", "libfabric"),
        ("--cp 2", 2, "seal", "tcp"),
        ("--tp 2 --pp 2", 4, "seal", "tcp"),
    ];
    says_the_same(&bed, model.path(), PROMPT, &cases);
}

#[test]
fn a_pulled_cable_changes_no_answer() {
    let Some((model, bed)) = world("POMONA_TEST_SMOLLM2", 2) else { return };
    let home = tempfile::tempdir().unwrap();
    let alone = ask(&mut pomona(home.path()), &model, "60").output().unwrap();
    let (_node, said) = node(&bed, 1, home.path(), &["--patience", "60"]);
    let heard = |word: &str| {
        let line = || said.recv_timeout(PATIENCE).unwrap_or_else(|_| panic!("no '{word}'"));
        while !line().contains(word) {}
    };
    let cable = |state| ip(&["-n", &bed.machine(1), "link", "set", "eth0", state]).unwrap();
    let mut leader = on(&bed.machine(0), home.path());
    ask(&mut leader, &model, "60").args(listen(&bed)).args(["--tp", "2"]);
    let mut leader = leader.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    heard("joined");
    // The answer has begun when its first word is there.
    let mut out = leader.stdout.take().unwrap();
    let mut first = [0; 1];
    std::io::Read::read_exact(&mut out, &mut first).unwrap();
    cable("down");
    heard("joining again");
    cable("up");
    let mut rest = first.to_vec();
    std::io::Read::read_to_end(&mut out, &mut rest).unwrap();
    let mut divided = leader.wait_with_output().unwrap();
    divided.stdout = rest;
    check(&divided, &alone, "with a pulled cable");
}

#[test]
fn without_libfabric_ranks_talk_over_tcp_and_say_so_once() {
    let Some((model, bed)) = world("POMONA_TEST_SMOLLM2", 2) else { return };
    let home = tempfile::tempdir().unwrap();
    let alone = ask(&mut pomona(home.path()), &model, "24").output().unwrap();
    // Found before the system's own, and no library.
    let broken = home.path().join("libfabric.so.1");
    std::fs::write(&broken, "no library").unwrap();
    let security = ["--node-security", "auth"];
    let _node = node(&bed, 1, home.path(), &security);
    let mut leader = on(&bed.machine(0), home.path());
    leader.env("LD_LIBRARY_PATH", home.path());
    ask(&mut leader, &model, "24").args(listen(&bed)).args(["--tp", "2"]);
    leader.args(security).args(["--node-transport", "libfabric"]);
    let divided = leader.output().unwrap();
    check(&divided, &alone, "without libfabric");
    let said = String::from_utf8_lossy(&divided.stderr);
    assert_eq!(said.matches("ranks talk over tcp").count(), 1, "{said}");
}
