//! Packed weights of earlier runs: a file for each checkpoint, mapped instead of being packed
//! again. Whatever stands in the way (no room, no right to write, another process that is at it)
//! costs time at the next start and nothing else: the weights are then packed in memory.
//!
//! A file is found again by what the file system says of the checkpoint's files, so a checkpoint
//! that was changed or replaced is another one. Files have a total size; those that were not used
//! for longest make room for new ones.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result};
use pomona_device::{Pieces, PiecesKey, PiecesWriter};
use pomona_kernels::{PACKED_LAYOUT, PackedStore};
use sha2::{Digest, Sha256};

use super::cache::{make_folder, need_space};
use super::progress::human_bytes;

/// How the names of files end that are whole.
const SUFFIX: &str = "packed";
/// The one file in the making; there is one at a time.
const PART: &str = "part";
/// Whoever holds it may write and remove files.
const LOCK: &str = "lock";
/// Packed weights take up to a few per cent more than stored ones, one part in this many.
const GROWTH_DIVISOR: u64 = 20;
/// Longest part of a model's name in a file's name.
const LABEL_CHARS_MAX: usize = 60;

/// A folder of packed weights.
#[derive(Clone, Debug)]
pub struct WeightCache {
    /// Where.
    pub folder: PathBuf,
    /// Most bytes of all its files.
    pub bytes_max: u64,
    /// How long to wait for another process that is packing, before it is done without a file.
    pub patience: Duration,
}

/// One of its files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kept {
    /// Where it is.
    pub path: PathBuf,
    /// Its size.
    pub bytes: u64,
    /// When a process last mapped it.
    pub used: SystemTime,
}

/// A file that is being written, and the right to do so.
struct Making {
    key: PiecesKey,
    path: PathBuf,
    lock: File,
}

/// What the cache has for a checkpoint.
pub struct Entry {
    /// For the operations that load it.
    pub store: PackedStore,
    making: Option<Making>,
}

impl Entry {
    /// No cache.
    pub fn none() -> Entry {
        Entry { store: PackedStore::Memory, making: None }
    }
}

/// A file that is being written through to the disk. Dropping it waits for that.
pub struct Finishing(Option<JoinHandle<()>>);

impl Drop for Finishing {
    fn drop(&mut self) {
        // A thread that panicked has left no file, which is all there is to say.
        let _ = self.0.take().map(JoinHandle::join);
    }
}

impl WeightCache {
    /// What there is for the checkpoint of this fingerprint, whose weights have so many bytes:
    /// packed weights, or a place for them. `model` only serves to name the file.
    pub fn entry(&self, model: &str, fingerprint: &str, bytes: u64) -> Entry {
        let digest = Sha256::digest(format!("layout {PACKED_LAYOUT}\n{fingerprint}"));
        let key: PiecesKey = digest.into();
        let short: String = key[..8].iter().map(|byte| format!("{byte:02x}")).collect();
        let path = self.folder.join(format!("{}-{short}.{SUFFIX}", label(model)));
        if let Ok(Some(pieces)) = Pieces::open(&path, &key) {
            return saved(pieces, &path);
        }
        self.make(path, key, bytes).unwrap_or_else(|error| {
            tracing::info!("packed weights will not be kept: {error:#}");
            Entry::none()
        })
    }

    /// A new file.
    fn make(&self, path: PathBuf, key: PiecesKey, weight_bytes: u64) -> Result<Entry> {
        let bytes = weight_bytes + weight_bytes / GROWTH_DIVISOR;
        if bytes > self.bytes_max {
            anyhow::bail!(
                "they need {}, and --weight-cache-size is {}",
                human_bytes(bytes),
                human_bytes(self.bytes_max)
            );
        }
        make_folder(&self.folder)?;
        let lock = self.lock()?.context("another process is packing at the moment")?;
        match Pieces::open(&path, &key) {
            // That process packed the same weights a moment ago.
            Ok(Some(pieces)) => return Ok(saved(pieces, &path)),
            Ok(None) => {
                tracing::warn!("{} is damaged: packing the weights again", path.display());
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => tracing::warn!("cannot use {}: {error}", path.display()),
        }
        self.make_room(bytes)?;
        need_space(&self.folder, bytes)?;
        let part = self.folder.join(PART);
        let writer = PiecesWriter::create(&part)
            .with_context(|| format!("cannot write {}", part.display()))?;
        let store = PackedStore::Saving(writer);
        Ok(Entry { store, making: Some(Making { key, path, lock }) })
    }

    /// The right to write, unless another process has it. Gone with the file or the process.
    fn lock(&self) -> Result<Option<File>> {
        const LOOK: Duration = Duration::from_millis(50);
        let path = self.folder.join(LOCK);
        let file = File::options().create(true).truncate(false).write(true).open(&path);
        let file = file.with_context(|| format!("cannot write {}", path.display()))?;
        let begun = Instant::now();
        while file.try_lock().is_err() {
            if begun.elapsed() >= self.patience {
                return Ok(None);
            }
            std::thread::sleep(LOOK);
        }
        Ok(Some(file))
    }

    /// Removes files until there is room for `bytes` more. A process that has one mapped keeps it.
    fn make_room(&self, bytes: u64) -> Result<()> {
        let kept = self.kept()?;
        let mut total: u64 = kept.iter().map(|file| file.bytes).sum();
        for file in kept {
            if total.saturating_add(bytes) <= self.bytes_max {
                break;
            }
            tracing::info!("removing {}, which was not used for longest", file.path.display());
            fs::remove_file(&file.path)
                .with_context(|| format!("cannot remove {}", file.path.display()))?;
            total -= file.bytes;
        }
        Ok(())
    }

    /// The files, the least recently used first. A folder that is not there has none.
    pub fn kept(&self) -> Result<Vec<Kept>> {
        let about = |path: PathBuf| {
            let meta = fs::metadata(&path).ok()?;
            Some(Kept { path, bytes: meta.len(), used: meta.modified().ok()? })
        };
        let mut kept: Vec<Kept> = match fs::read_dir(&self.folder) {
            Ok(items) => items
                .filter_map(|item| Some(item.ok()?.path()))
                .filter(|path| path.extension().is_some_and(|end| end == SUFFIX))
                .filter_map(about)
                .collect(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(error) => {
                return Err(error)
                    .with_context(|| format!("cannot read the folder {}", self.folder.display()));
            }
        };
        kept.sort_by(|a, b| (a.used, &a.path).cmp(&(b.used, &b.path)));
        Ok(kept)
    }

    /// Removes all files; says how many bytes they had.
    pub fn clear(&self) -> Result<u64> {
        let mut bytes = 0;
        for file in self.kept()? {
            fs::remove_file(&file.path)
                .with_context(|| format!("cannot remove {}", file.path.display()))?;
            bytes += file.bytes;
        }
        // What a process that was killed left half done, unless another is at it right now.
        let part = self.folder.join(PART);
        if part.exists() && self.lock()?.is_some() {
            fs::remove_file(&part).with_context(|| format!("cannot remove {}", part.display()))?;
        }
        Ok(bytes)
    }
}

impl Entry {
    /// Ends the load with the store that the operations give back: a file that was written gets
    /// its name once it is on the disk, which a thread sees to.
    pub fn finish(self, store: PackedStore) -> Finishing {
        let Some(Making { key, path, lock }) = self.making else { return Finishing(None) };
        let writer = match store {
            PackedStore::Saving(writer) => writer,
            PackedStore::Failed(error) => {
                tracing::warn!(
                    "cannot write {}: {error}. Free some space, choose a folder on another disk \
                     with --weight-cache, or write --no-weight-cache",
                    path.display()
                );
                return Finishing(None);
            }
            PackedStore::Memory | PackedStore::Saved(_) => return Finishing(None),
        };
        let work = move || {
            if let Err(error) = writer.finish(&key, &path) {
                tracing::warn!("cannot finish {}: {error}", path.display());
            }
            drop(lock);
        };
        // Without a thread there is no file this time.
        Finishing(std::thread::Builder::new().name("pomona-packed".into()).spawn(work).ok())
    }
}

/// Weights that an earlier run packed.
fn saved(pieces: Pieces, path: &Path) -> Entry {
    tracing::debug!("packed weights are in {}", path.display());
    // Notes the use. Where that is forbidden, another file stays longer.
    let now = SystemTime::now();
    let _ = File::options().append(true).open(path).and_then(|file| file.set_modified(now));
    Entry { store: PackedStore::Saved(pieces), making: None }
}

/// A model's name as part of a file's: its last component, plain characters only.
fn label(model: &str) -> String {
    let name = Path::new(model).file_stem().map(|name| name.to_string_lossy().into_owned());
    let plain = |c: char| if c.is_ascii_alphanumeric() || "-_.".contains(c) { c } else { '_' };
    name.unwrap_or_default().chars().map(plain).take(LABEL_CHARS_MAX).collect()
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use super::*;

    fn cache(folder: &Path) -> WeightCache {
        let (folder, patience) = (folder.join("weights"), Duration::ZERO);
        WeightCache { folder, bytes_max: 1 << 20, patience }
    }

    /// Packs `bytes` bytes for a model, as a load would.
    fn pack(cache: &WeightCache, model: &str, fingerprint: &str, bytes: usize) {
        let mut entry = cache.entry(model, fingerprint, bytes as u64);
        let PackedStore::Saving(mut writer) = std::mem::take(&mut entry.store) else {
            panic!("nothing to pack for {model}");
        };
        writer.write_at(&vec![1; bytes], 0).unwrap();
        writer.end_piece("p", bytes).unwrap();
        drop(entry.finish(PackedStore::Saving(writer)));
    }

    fn is_saved(cache: &WeightCache, model: &str, fingerprint: &str) -> bool {
        matches!(cache.entry(model, fingerprint, 10).store, PackedStore::Saved(_))
    }

    #[test]
    fn what_was_packed_is_found_again_under_the_same_fingerprint_only() {
        let folder = tempfile::tempdir().unwrap();
        let cache = cache(folder.path());
        pack(&cache, "org/model:Q4", "f", 10);
        assert!(is_saved(&cache, "org/model:Q4", "f"));
        assert!(!is_saved(&cache, "org/model:Q4", "g"));
        assert!(cache.clear().unwrap() > 10);
        assert_eq!(cache.clear().unwrap(), 0);
        assert!(!is_saved(&cache, "org/model:Q4", "f"));
    }

    #[test]
    fn a_damaged_file_is_packed_again() {
        let folder = tempfile::tempdir().unwrap();
        let cache = cache(folder.path());
        pack(&cache, "m", "f", 10_000);
        let path = cache.kept().unwrap().remove(0).path;
        let whole = fs::read(&path).unwrap();
        fs::write(&path, &whole[..5000]).unwrap();
        pack(&cache, "m", "f", 10_000);
        assert_eq!(fs::read(&path).unwrap(), whole);
    }

    #[test]
    fn the_least_recently_used_makes_room() {
        let folder = tempfile::tempdir().unwrap();
        let cache = cache(folder.path());
        for model in ["a", "b", "c"] {
            pack(&cache, model, model, 300_000);
        }
        let long_ago = |seconds| UNIX_EPOCH + Duration::from_secs(seconds);
        for (file, seconds) in cache.kept().unwrap().iter().zip([3, 1, 2]) {
            let file = File::options().append(true).open(&file.path).unwrap();
            file.set_modified(long_ago(seconds)).unwrap();
        }
        let oldest = cache.kept().unwrap().remove(0);
        pack(&cache, "d", "d", 300_000);
        assert!(!oldest.path.exists());
        assert_eq!(cache.kept().unwrap().len(), 3);
        // One that could never fit removes nothing.
        assert!(matches!(cache.entry("e", "e", 2 << 20).store, PackedStore::Memory));
        assert_eq!(cache.kept().unwrap().len(), 3);
    }

    #[test]
    fn while_one_packs_others_do_without() {
        let folder = tempfile::tempdir().unwrap();
        let cache = cache(folder.path());
        let first = cache.entry("m", "f", 10);
        assert!(matches!(first.store, PackedStore::Saving(_)));
        assert!(matches!(cache.entry("m", "f", 10).store, PackedStore::Memory));
        drop(first);
        assert!(matches!(cache.entry("m", "f", 10).store, PackedStore::Saving(_)));
    }

    #[test]
    fn a_folder_that_cannot_be_written_is_done_without() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("weights"), "a file in its place").unwrap();
        let entry = cache(folder.path()).entry("m", "f", 10);
        assert!(matches!(entry.store, PackedStore::Memory));
    }

    #[test]
    fn file_names_are_plain() {
        assert_eq!(label("org/mo del:Q4.gguf"), "mo_del_Q4");
        assert_eq!(label(".."), "");
    }
}
