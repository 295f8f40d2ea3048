//! The file of `--expert-loads`: how many tokens each expert of a model got, in all runs that kept
//! it.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use pomona_models::Checkpoint;
use pomona_policy::experts::Counted;
use pomona_types::Replica;

use super::follow;

/// Longest file: a thousand layers of a thousand experts.
const BYTES_MAX: u64 = 32 << 20;
/// How often it is written while there is something new.
const INTERVAL: Duration = Duration::from_secs(60);

/// Of a model with these weights, nothing.
fn none(checkpoint: &Checkpoint) -> Result<Counted> {
    let digest = follow::digest(checkpoint)?;
    let weights = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    let spec = checkpoint.spec();
    let experts = spec.experts.map_or(0, |experts| experts.count as usize);
    let tokens = vec![vec![0; experts]; spec.layers.len()];
    Ok(Counted { model: checkpoint.name().to_owned(), weights, tokens })
}

/// What a file says of a model; nothing where there is no file.
pub(super) fn read(path: &Path, checkpoint: &Checkpoint) -> Result<Counted> {
    let none = none(checkpoint)?;
    if !path.exists() {
        return Ok(none);
    }
    let read = || -> Result<Counted> {
        if std::fs::metadata(path)?.len() > BYTES_MAX {
            bail!("it has more than {BYTES_MAX} bytes");
        }
        Ok(none.of_same_model(serde_json::from_slice(&std::fs::read(path)?)?)?)
    };
    read().with_context(|| {
        let path = path.display();
        format!("cannot use --expert-loads {path}: name another file, or remove it")
    })
}

/// Writes it, whole or not at all.
fn write(counted: &Counted, path: &Path) -> Result<()> {
    let write = || -> Result<()> {
        let mut name = path.file_name().context("it has no name")?.to_owned();
        name.push(format!(".part-{}", std::process::id()));
        let part = path.with_file_name(name);
        let mut file = std::fs::File::create(&part)?;
        file.write_all(&serde_json::to_vec(counted)?)?;
        file.sync_all()?;
        Ok(std::fs::rename(&part, path)?)
    };
    write().with_context(|| format!("cannot write --expert-loads {}", path.display()))
}

/// Keeps a file up to date until it is dropped.
pub struct Keeper {
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Keeper {
    /// Adds to a file what a replica counts.
    ///
    /// # Errors
    /// When it cannot be written: better now than in the end.
    pub fn start(path: PathBuf, before: Counted, replica: Arc<dyn Replica>) -> Result<Keeper> {
        write(&before, &path)?;
        let (stop, stopped) = channel();
        let keep = move || {
            let mut written = before.clone();
            let mut ends = false;
            while !ends {
                ends = stopped.recv_timeout(INTERVAL) != Err(RecvTimeoutError::Timeout);
                let now = replica.experts().unwrap_or_default();
                let now = before.with(&now.tokens);
                if now != written {
                    match write(&now, &path) {
                        Ok(()) => written = now,
                        Err(error) => tracing::warn!("{error:#}"),
                    }
                }
            }
        };
        let thread = std::thread::Builder::new().name("pomona-experts".to_owned()).spawn(keep)?;
        Ok(Keeper { stop: Some(stop), thread: Some(thread) })
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // What it could not write, it has said.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use pomona_types::{ExpertLoads, Load, Refusal, ReplicaInfo, Request, RequestId, TokenSink};

    use super::*;

    /// Has counted a token for the first expert.
    struct Counter;

    impl Replica for Counter {
        fn info(&self) -> &ReplicaInfo {
            unreachable!("nobody asks")
        }
        fn submit(&self, _: Request, _: Box<dyn TokenSink>) -> Result<(), Refusal> {
            Err(Refusal::Unavailable("a fake".to_owned()))
        }
        fn cancel(&self, _: RequestId) {}
        fn load(&self) -> Load {
            Load::default()
        }
        fn experts(&self) -> Option<Arc<ExpertLoads>> {
            let tokens = vec![vec![1, 0, 0, 0, 0]];
            Some(Arc::new(ExpertLoads { tokens, ..ExpertLoads::default() }))
        }
    }

    fn checkpoint(name: &str) -> Checkpoint {
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/tests/golden");
        Checkpoint::open(&golden.join(name)).unwrap()
    }

    #[test]
    fn counts_add_up_from_run_to_run() {
        let (folder, model) = (tempfile::tempdir().unwrap(), checkpoint("mixtral"));
        let path = folder.path().join("loads.json");
        for runs in 0..3 {
            let before = read(&path, &model).unwrap();
            assert_eq!(before.tokens, [vec![runs, 0, 0, 0, 0], vec![0; 5]]);
            drop(Keeper::start(path.clone(), before, Arc::new(Counter)).unwrap());
        }
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
        let nowhere = folder.path().join("no/folder.json");
        let before = read(&nowhere, &model).unwrap();
        let refused = Keeper::start(nowhere, before, Arc::new(Counter)).err().unwrap();
        assert!(format!("{refused:#}").contains("cannot write --expert-loads"), "{refused:#}");
    }

    #[test]
    fn files_of_other_models_and_damaged_ones_are_refused() {
        let (folder, model) = (tempfile::tempdir().unwrap(), checkpoint("mixtral"));
        let path = folder.path().join("loads.json");
        let counted = none(&model).unwrap();
        let whole = serde_json::to_string(&counted).unwrap();
        let mut flat = counted.clone();
        flat.tokens[1].pop();
        let other = none(&checkpoint("qwen3-moe")).unwrap();
        for (text, why) in [
            (serde_json::to_string(&other).unwrap(), "other weights"),
            (serde_json::to_string(&flat).unwrap(), "other layers or experts"),
            (whole[..whole.len() / 2].to_owned(), "EOF"),
            (whole.replace("[[0", "[[-1"), "-1"),
            (whole.replace("[[0", "[[1e99"), "floating point"),
            ("[".repeat(100_000), "invalid type"),
            (String::new(), "EOF"),
        ] {
            std::fs::write(&path, &text).unwrap();
            let error = format!("{:#}", read(&path, &model).unwrap_err());
            assert!(error.contains(why) && error.contains("name another file"), "{error}");
        }
        std::fs::write(&path, &whole).unwrap();
        assert_eq!(read(&path, &model).unwrap(), counted);
    }
}
