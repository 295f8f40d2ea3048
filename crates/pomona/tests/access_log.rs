//! The access log on the command line, with a model of a few KB.
#![allow(clippy::unwrap_used)] // A panic is how a test fails.

mod support;

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::process::Stdio;

use rustix::process::{Pid, Signal, kill_process};
use support::{pomona, tiny_model};

/// Serves, answers one chat, and ends; what was written to standard error.
fn log_of_a_chat(flags: &[&str]) -> String {
    let home = tempfile::tempdir().unwrap();
    let log = home.path().join("log");
    let mut child = pomona(home.path())
        .args(["serve", tiny_model().to_str().unwrap(), "--port", "0", "--threads", "1"])
        .args(flags)
        .stdout(Stdio::piped())
        .stderr(File::create(&log).unwrap())
        .spawn()
        .unwrap();
    let mut line = String::new();
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    stdout.read_line(&mut line).unwrap();
    let url = line.split_whitespace().nth(2).unwrap();
    let body = r#"{"messages": [{"role": "user", "content": "abcabc"}], "max_tokens": 3}"#;
    let answer = ureq::post(format!("{url}/v1/chat/completions"))
        .header("Content-Type", "application/json")
        .header("X-Request-Id", "breakfast")
        .send(body)
        .unwrap();
    assert_eq!(answer.headers()["x-request-id"], "breakfast");
    // Read to its end, which is when the line is written.
    drop(answer.into_body().read_to_string().unwrap());
    kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
    assert!(child.wait().unwrap().success());
    std::fs::read_to_string(log).unwrap()
}

#[test]
fn each_request_has_a_line_without_its_text() {
    let log = log_of_a_chat(&[]);
    let line = log.lines().find(|line| line.contains("POST")).unwrap_or_else(|| panic!("{log}"));
    assert!(line.contains("INFO POST /v1/chat/completions 200 "), "{line}");
    assert!(line.contains(" ms id=\"breakfast\""), "{line}");
    assert!(!log.contains("abcabc"), "{log}");
}

#[test]
fn the_lines_can_be_switched_off_under_both_names() {
    for flag in ["--disable-access-log", "--disable-uvicorn-access-log"] {
        let log = log_of_a_chat(&[flag]);
        assert!(log.contains("loading") && !log.contains("POST"), "{log}");
    }
}
