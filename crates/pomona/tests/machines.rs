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
use support::{pomona, test_model};

const PROMPT: &str = "Tell me a story about a lighthouse.";
const TOKEN: &str = "0123456789abcdef-test";
/// Nothing takes longer, on however busy a machine.
const PATIENCE: Duration = Duration::from_secs(120);

/// The model and the machines, where both are to be had.
fn world(machines: usize) -> Option<(PathBuf, Bed)> {
    let model = test_model("POMONA_TEST_SMOLLM2")?;
    match Bed::new(machines) {
        Ok(bed) => Some((model, bed)),
        Err(why) => {
            let required = std::env::var("POMONA_REQUIRE").unwrap_or_default();
            let required = required.split(',').any(|name| name == "namespaces");
            assert!(!required, "network namespaces are required, but: {why}");
            eprintln!("SKIPPED: tests between machines need network namespaces: {why}");
            None
        }
    }
}

/// A program on a machine, with a home of its own and nothing else.
fn on(namespace: &str, home: &Path) -> Command {
    let mut command = inside(namespace, Path::new(env!("CARGO_BIN_EXE_pomona")));
    command.env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default());
    command.env("POMONA_HOME", home);
    command
}

fn ask<'a>(command: &'a mut Command, model: &Path, max_tokens: &str) -> &'a mut Command {
    command.args(["run", model.to_str().unwrap(), PROMPT, "--no-weight-cache"]).args([
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

#[test]
fn a_model_over_machines_says_what_it_says_alone() {
    let Some((model, bed)) = world(3) else { return };
    let home = tempfile::tempdir().unwrap();
    let alone = ask(&mut pomona(home.path()), &model, "24").output().unwrap();
    for (split, security) in [("--tp", "seal"), ("--pp", "auth")] {
        let security = ["--node-security", security];
        let nodes = [1, 2].map(|at| node(&bed, at, home.path(), &security));
        let mut leader = on(&bed.machine(0), home.path());
        ask(&mut leader, &model, "24").args(listen(&bed)).args([split, "3"]).args(security);
        check(&leader.output().unwrap(), &alone, split);
        drop(nodes);
    }
}

#[test]
fn a_pulled_cable_changes_no_answer() {
    let Some((model, bed)) = world(2) else { return };
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
