//! The cache folder: files that were checked once and are not read again to be trusted, locks
//! between processes, and errors about disks that say what to do.
//!
//! A file `F` counts as verified when a seal `F.verified` beside it records its size, time of
//! change and SHA-256. A start of the server compares the first two; only when they differ is the
//! file read again. Owns nothing about where files come from.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use anyhow::{Context, Result, anyhow};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::progress::{human_bytes, say};

/// Bytes read at a time while hashing.
const HASH_CHUNK: usize = 1 << 20;

/// Space left free when a download is planned, for whoever else uses the disk.
const DISK_MARGIN: u64 = 16 << 20;

/// What is known about a file in the cache.
#[derive(Debug, PartialEq, Eq)]
pub enum Cached {
    /// It is not there.
    Missing,
    /// It is there and what it should be.
    Ready,
    /// It was there, did not match, and has been set aside under this name.
    Corrupt(PathBuf),
}

#[derive(Serialize, Deserialize, PartialEq, Eq)]
struct Seal {
    bytes: u64,
    modified_ns: u64,
    sha256: String,
}

/// What a file should be; `None` where nobody said.
#[derive(Clone, Copy, Debug, Default)]
pub struct Expected<'a> {
    /// Its size.
    pub bytes: Option<u64>,
    /// Its SHA-256, lower-case hex.
    pub sha256: Option<&'a str>,
}

/// Whether `path` is a verified file. Costs two `stat` calls and a small read when it is; a file
/// without a fitting seal is hashed and sealed again, or set aside.
pub fn check(path: &Path, expected: Expected<'_>) -> Result<Cached> {
    if !path.exists() {
        return Ok(Cached::Missing);
    }
    let (bytes, modified_ns) = stat(path)?;
    let fits = |seal: &Seal| {
        seal.bytes == bytes
            && seal.modified_ns == modified_ns
            && expected.sha256.is_none_or(|sum| sum == seal.sha256)
            && expected.bytes.is_none_or(|wanted| wanted == bytes)
    };
    let seal: Option<Seal> =
        fs::read(seal_path(path)).ok().and_then(|text| serde_json::from_slice(&text).ok());
    if seal.as_ref().is_some_and(fits) {
        return Ok(Cached::Ready);
    }
    say(&format!("checking {}", path.display()));
    match verify(path, expected)? {
        Ok(sum) => {
            // A read-only cache (a mounted volume) serves as well; it is only slower to start.
            if let Err(error) = seal_with(path, sum) {
                tracing::debug!("{error:#}");
            }
            Ok(Cached::Ready)
        }
        Err(_) => Ok(Cached::Corrupt(set_aside(path)?)),
    }
}

/// Reads the file and compares; the inner error says what differs, the value is its SHA-256.
pub fn verify(path: &Path, expected: Expected<'_>) -> Result<Result<String, String>> {
    let (bytes, _) = stat(path)?;
    if let Some(wanted) = expected.bytes.filter(|wanted| *wanted != bytes) {
        return Ok(Err(format!("it has {bytes} bytes, not {wanted}")));
    }
    let sum = sha256(path)?;
    Ok(match expected.sha256 {
        Some(wanted) if wanted != sum => Err(format!("its SHA-256 is {sum}, not {wanted}")),
        _ => Ok(sum),
    })
}

/// Makes a finished `.part` file the file: checks it, writes it through to the disk, renames it
/// and seals it. On a mismatch it is set aside and the error says where.
pub fn adopt(part: &Path, path: &Path, expected: Expected<'_>) -> Result<()> {
    let sum = match verify(part, expected)? {
        Ok(sum) => sum,
        Err(why) => {
            let aside = set_aside(part)?;
            return Err(anyhow!(
                "{} did not arrive intact: {why}. It was set aside as {}; delete it and try again",
                path.display(),
                aside.display()
            ));
        }
    };
    let sync = || -> io::Result<()> {
        File::open(part)?.sync_all()?;
        fs::rename(part, path)?;
        match path.parent() {
            Some(folder) => File::open(folder)?.sync_all(),
            None => Ok(()),
        }
    };
    sync().map_err(|error| storage_error(error, "finish", path, None))?;
    seal_with(path, sum)
}

fn seal_with(path: &Path, sha256: String) -> Result<()> {
    let (bytes, modified_ns) = stat(path)?;
    let text = serde_json::to_vec(&Seal { bytes, modified_ns, sha256 })?;
    let target = seal_path(path);
    fs::write(&target, text).map_err(|error| storage_error(error, "write", &target, None))
}

fn seal_path(path: &Path) -> PathBuf {
    with_suffix(path, ".verified")
}

/// `path` with more at the end of its name.
pub fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

/// Renames a file that is not what it should be; an earlier one of that name is replaced.
fn set_aside(path: &Path) -> Result<PathBuf> {
    let aside = with_suffix(path, ".bad");
    fs::rename(path, &aside).map_err(|error| storage_error(error, "set aside", path, None))?;
    let _ = fs::remove_file(seal_path(path));
    Ok(aside)
}

fn stat(path: &Path) -> Result<(u64, u64)> {
    let meta = fs::metadata(path).with_context(|| format!("cannot read {}", path.display()))?;
    let modified = meta.modified().ok().and_then(|t| t.duration_since(UNIX_EPOCH).ok());
    Ok((meta.len(), modified.map_or(0, |d| d.as_nanos() as u64)))
}

/// SHA-256 of a file, lower-case hex.
pub fn sha256(path: &Path) -> Result<String> {
    let read = || -> io::Result<String> {
        let mut file = File::open(path)?;
        let mut hasher = Sha256::new();
        let mut chunk = vec![0; HASH_CHUNK];
        loop {
            match file.read(&mut chunk)? {
                0 => break,
                n => hasher.update(&chunk[..n]),
            }
        }
        Ok(hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
    };
    read().with_context(|| format!("cannot read {}", path.display()))
}

/// Makes a folder and its parents.
pub fn make_folder(path: &Path) -> Result<()> {
    fs::create_dir_all(path).map_err(|error| storage_error(error, "make the folder", path, None))
}

/// Refuses early when the disk that holds `folder` has less than `bytes` free.
pub fn need_space(folder: &Path, bytes: u64) -> Result<()> {
    // Not every file system says; then the write itself will.
    let Ok(found) = rustix::fs::statvfs(folder) else { return Ok(()) };
    let free = found.f_bavail.saturating_mul(found.f_frsize);
    if free >= bytes.saturating_add(DISK_MARGIN) || found.f_blocks == 0 {
        return Ok(());
    }
    let (free, needed) = (human_bytes(free), human_bytes(bytes.saturating_add(DISK_MARGIN)));
    let attempted = format!(
        "the disk that holds {} has {free} free, and {needed} are needed",
        folder.display()
    );
    let advice = "free some space, or set POMONA_HOME to a folder on another disk".to_owned();
    Err(StorageError { attempted, advice, source: None }.into())
}

/// The disk is in the way: no other source of a model would do better.
#[derive(Debug, thiserror::Error)]
#[error("{attempted}: {advice}")]
pub struct StorageError {
    /// What was attempted, or found.
    pub attempted: String,
    /// What to do.
    pub advice: String,
    /// The system's answer.
    pub source: Option<io::Error>,
}

/// An error of the file system in words that say what to do about it.
pub fn storage_error(
    error: io::Error,
    attempted: &str,
    path: &Path,
    missing_bytes: Option<u64>,
) -> anyhow::Error {
    use io::ErrorKind::{
        FileTooLarge, PermissionDenied, QuotaExceeded, ReadOnlyFilesystem, StorageFull,
    };
    let advice = match error.kind() {
        StorageFull | QuotaExceeded | FileTooLarge => {
            let missing = missing_bytes
                .map_or(String::new(), |b| format!(" ({} are still to come)", human_bytes(b)));
            format!(
                "the disk is full{missing}: free some space, or set POMONA_HOME to a folder on \
                 another disk; what has arrived is kept and the next attempt goes on from there"
            )
        }
        PermissionDenied | ReadOnlyFilesystem => {
            "make it writable, or set POMONA_HOME to a folder of yours".to_owned()
        }
        _ => "check the folder, or set POMONA_HOME to another".to_owned(),
    };
    let attempted = format!("cannot {attempted} {}", path.display());
    StorageError { attempted, advice, source: Some(error) }.into()
}

/// Keeps other processes from fetching the same thing. Dropped with the process, so a crash
/// leaves no stale lock.
pub struct Lock {
    _file: File,
}

/// Waits for its turn to fetch `name`.
pub fn lock(home: &Path, name: &str) -> Result<Lock> {
    let folder = home.join("locks");
    make_folder(&folder)?;
    let path = folder.join(format!("{name}.lock"));
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .map_err(|error| storage_error(error, "open", &path, None))?;
    if file.try_lock().is_err() {
        say(&format!("another pomona is fetching {name}; waiting for it"));
        file.lock().with_context(|| format!("cannot lock {}", path.display()))?;
    }
    Ok(Lock { _file: file })
}

#[cfg(test)]
mod tests {
    use super::*;

    const HELLO: &str = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824";
    const EXPECTED: Expected<'static> = Expected { bytes: Some(5), sha256: Some(HELLO) };

    fn adopted(folder: &Path) -> PathBuf {
        let path = folder.join("model.gguf");
        let part = with_suffix(&path, ".part");
        fs::write(&part, "hello").unwrap();
        adopt(&part, &path, EXPECTED).unwrap();
        path
    }

    #[test]
    fn an_adopted_file_is_ready_and_leaves_no_part() {
        let folder = tempfile::tempdir().unwrap();
        let path = adopted(folder.path());
        assert!(!with_suffix(&path, ".part").exists());
        assert_eq!(check(&path, EXPECTED).unwrap(), Cached::Ready);
    }

    #[test]
    fn a_sealed_file_is_not_read_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = adopted(folder.path());
        // Same size, same time, other bytes: only a second hash would notice.
        let time = fs::metadata(&path).unwrap().modified().unwrap();
        fs::write(&path, "HELLO").unwrap();
        File::options().write(true).open(&path).unwrap().set_modified(time).unwrap();
        assert_eq!(check(&path, EXPECTED).unwrap(), Cached::Ready);
    }

    #[test]
    fn a_changed_file_is_set_aside() {
        let folder = tempfile::tempdir().unwrap();
        let path = adopted(folder.path());
        fs::write(&path, "hellO").unwrap();
        File::options()
            .write(true)
            .open(&path)
            .unwrap()
            .set_modified(UNIX_EPOCH + std::time::Duration::from_secs(1))
            .unwrap();
        let aside = with_suffix(&path, ".bad");
        assert_eq!(check(&path, EXPECTED).unwrap(), Cached::Corrupt(aside.clone()));
        assert!(aside.exists() && !path.exists());
        assert_eq!(check(&path, EXPECTED).unwrap(), Cached::Missing);
    }

    #[test]
    fn a_touched_but_intact_file_is_sealed_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = adopted(folder.path());
        fs::remove_file(seal_path(&path)).unwrap();
        assert_eq!(check(&path, EXPECTED).unwrap(), Cached::Ready);
        assert!(seal_path(&path).exists());
    }

    #[test]
    fn a_part_that_does_not_match_is_refused_and_kept() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.gguf");
        let part = with_suffix(&path, ".part");
        fs::write(&part, "hullo").unwrap();
        let error = format!("{:#}", adopt(&part, &path, EXPECTED).unwrap_err());
        assert!(error.contains("did not arrive intact") && error.contains(".bad"), "{error}");
        assert!(!path.exists() && with_suffix(&part, ".bad").exists());
    }

    #[test]
    fn a_full_disk_says_what_to_do() {
        let error = io::Error::from(io::ErrorKind::StorageFull);
        let text = format!("{:#}", storage_error(error, "write", Path::new("x"), Some(1 << 20)));
        assert!(text.contains("disk is full (1.0 MiB are still to come)"), "{text}");
        assert!(text.contains("POMONA_HOME"), "{text}");
    }

    #[test]
    fn space_that_no_disk_has_is_refused_before_the_download() {
        let folder = tempfile::tempdir().unwrap();
        assert!(need_space(folder.path(), 1).is_ok());
        let text = format!("{:#}", need_space(folder.path(), u64::MAX / 2).unwrap_err());
        assert!(text.contains("POMONA_HOME"), "{text}");
    }

    #[test]
    fn a_second_fetch_waits_for_the_first() {
        let folder = tempfile::tempdir().unwrap();
        let first = lock(folder.path(), "m").unwrap();
        let home = folder.path().to_owned();
        let waiting = std::thread::spawn(move || lock(&home, "m").map(|_| ()));
        std::thread::sleep(std::time::Duration::from_millis(50));
        assert!(!waiting.is_finished());
        drop(first);
        waiting.join().unwrap().unwrap();
    }
}
