//! `pomona pull` against hubs that work, break off, lie and refuse. The real binary each time.

#![allow(clippy::unwrap_used)] // A panic is how a test fails.

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Output;

use support::hub::{FakeHub, Manners};
use support::{pomona, refusal};

const MODEL: &str = "m-Q4_0.gguf";

fn content() -> Vec<u8> {
    (0..1_000_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect()
}

fn hub(change: impl FnOnce(&mut Manners)) -> FakeHub {
    let files = BTreeMap::from([(MODEL.to_owned(), content())]);
    let mut manners = Manners { files, ..Manners::default() };
    change(&mut manners);
    FakeHub::start(manners)
}

fn pull(hub: &FakeHub, home: &Path) -> Output {
    pomona(home).args(["pull", "org/repo"]).env("HF_ENDPOINT", &hub.url).output().unwrap()
}

fn cached(home: &Path) -> PathBuf {
    home.join("hub/org--repo/c0ffee").join(MODEL)
}

fn assert_pulled(output: &Output, home: &Path) {
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}");
    assert!(fs::read(cached(home)).unwrap() == content(), "other bytes arrived");
    let printed = String::from_utf8_lossy(&output.stdout);
    assert_eq!(printed.trim(), cached(home).to_str().unwrap());
}

#[test]
fn a_model_is_fetched_once() {
    let home = tempfile::tempdir().unwrap();
    let hub = hub(|_| {});
    assert_pulled(&pull(&hub, home.path()), home.path());
    assert_pulled(&pull(&hub, home.path()), home.path());
    let files = hub.log().iter().filter(|line| line.contains("/resolve/")).count();
    assert_eq!(files, 1, "{:?}", hub.log());
}

#[test]
fn a_lost_connection_goes_on_where_it_ended() {
    let home = tempfile::tempdir().unwrap();
    let hub = hub(|m| (m.cut_after, m.cuts, m.redirects) = (300_000, 2, true));
    assert_pulled(&pull(&hub, home.path()), home.path());
    let starts: Vec<usize> = hub
        .log()
        .iter()
        .filter(|line| line.contains("/storage/"))
        .map(|line| line.rsplit(' ').next().unwrap().parse().unwrap())
        .collect();
    assert_eq!(starts, [0, 300_000, 600_000]);
}

#[test]
fn a_hub_without_ranges_starts_over() {
    let home = tempfile::tempdir().unwrap();
    let hub = hub(|m| (m.cut_after, m.cuts, m.ignores_ranges) = (300_000, 1, true));
    assert_pulled(&pull(&hub, home.path()), home.path());
}

#[test]
fn a_part_of_an_earlier_run_is_kept() {
    let home = tempfile::tempdir().unwrap();
    let hub = hub(|_| {});
    let part = cached(home.path()).with_extension("gguf.part");
    fs::create_dir_all(part.parent().unwrap()).unwrap();
    fs::write(&part, &content()[..123_456]).unwrap();
    assert_pulled(&pull(&hub, home.path()), home.path());
    assert!(hub.log().iter().any(|line| line.ends_with(" 123456")), "{:?}", hub.log());
}

#[test]
fn wrong_bytes_are_set_aside() {
    let home = tempfile::tempdir().unwrap();
    let hub = hub(|m| m.lies = true);
    let text = refusal(&pull(&hub, home.path()));
    assert!(text.contains("did not arrive intact") && text.contains(".bad"), "{text}");
    assert!(!cached(home.path()).exists());
    hub.set(|m| m.lies = false);
    assert_pulled(&pull(&hub, home.path()), home.path());
}

#[test]
fn a_damaged_cache_is_noticed_and_fetched_again() {
    let home = tempfile::tempdir().unwrap();
    let hub = hub(|_| {});
    assert_pulled(&pull(&hub, home.path()), home.path());
    fs::write(cached(home.path()), b"short").unwrap();
    let output = pull(&hub, home.path());
    assert!(String::from_utf8_lossy(&output.stderr).contains("was damaged"));
    assert_pulled(&output, home.path());
}

#[test]
fn refusals_of_the_hub_say_what_to_do() {
    for (status, words) in
        [(401, "HF_TOKEN"), (403, "HF_TOKEN"), (404, "check the spelling"), (503, "try again")]
    {
        let home = tempfile::tempdir().unwrap();
        let text = refusal(&pull(&hub(|m| m.status = Some(status)), home.path()));
        assert!(text.contains(words), "{status}: {text}");
    }
}

#[test]
fn a_token_opens_a_gated_repository_and_is_not_sent_elsewhere() {
    let home = tempfile::tempdir().unwrap();
    let hub = hub(|m| (m.token, m.redirects) = (Some("secret".into()), true));
    assert!(refusal(&pull(&hub, home.path())).contains("HF_TOKEN"));
    let output = pomona(home.path())
        .args(["pull", "org/repo"])
        .env("HF_ENDPOINT", &hub.url)
        .env("HF_TOKEN", "secret")
        .output()
        .unwrap();
    assert_pulled(&output, home.path());
    assert!(!String::from_utf8_lossy(&output.stderr).contains("secret"));
}

#[test]
fn a_hub_that_is_not_there_is_named_quickly() {
    let home = tempfile::tempdir().unwrap();
    let begun = std::time::Instant::now();
    let text = refusal(&pomona(home.path()).args(["pull", "org/repo"]).output().unwrap());
    assert!(text.contains("http://127.0.0.1:9 does not answer") && text.contains("HF_ENDPOINT"));
    assert!(begun.elapsed().as_secs() < 12);
}

/// A limit on file size stands in for a full disk: the write fails in the same place.
#[test]
fn a_full_disk_keeps_what_arrived() {
    let home = tempfile::tempdir().unwrap();
    let hub = hub(|_| {});
    let output = std::process::Command::new("sh")
        .args(["-c", "trap '' XFSZ; ulimit -f 600; exec \"$0\" pull org/repo"])
        .arg(env!("CARGO_BIN_EXE_pomona"))
        .env("POMONA_HOME", home.path())
        .env("HF_HUB_CACHE", home.path().join("none"))
        .env("HF_ENDPOINT", &hub.url)
        .output()
        .unwrap();
    let text = refusal(&output);
    assert!(text.contains("the disk is full") && text.contains("POMONA_HOME"), "{text}");
    assert!(!cached(home.path()).exists());
    assert_pulled(&pull(&hub, home.path()), home.path());
    assert!(!hub.log().last().unwrap().ends_with(" 0"), "{:?}", hub.log());
}

#[test]
fn a_cache_without_permission_says_so() {
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("file");
    fs::write(&file, "").unwrap();
    let text = refusal(&pull(&hub(|_| {}), &file));
    assert!(text.contains("POMONA_HOME"), "{text}");
}

#[test]
fn two_pulls_at_once_fetch_once() {
    let home = tempfile::tempdir().unwrap();
    let hub = hub(|_| {});
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| assert_pulled(&pull(&hub, home.path()), home.path()));
        }
    });
    let files = hub.log().iter().filter(|line| line.contains("/resolve/")).count();
    assert_eq!(files, 1, "{:?}", hub.log());
}
