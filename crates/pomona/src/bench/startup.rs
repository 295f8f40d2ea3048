//! How long a start takes, from the start of the process to the first token, and what it needs in
//! memory: the first start of a model, which packs its weights; later ones, with the packed weights
//! in memory or on the disk.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::fs::{Advice, fadvise};
use serde::Serialize;
use serde_json::json;
use tokio::runtime::Runtime;

use super::served::Server;
use super::stats::Spread;
use crate::http::Client;
use crate::models::weight_cache::WeightCache;

/// One kind of start; times in ms from the start of the process.
#[derive(Clone, Debug, Serialize)]
pub struct Start {
    /// Which kind.
    pub what: String,
    /// How long a plain read of the files that it begins with takes, where these are on the disk.
    pub read_ms: Option<Spread>,
    /// Until the port took connections.
    pub listening_ms: Spread,
    /// Until the ready line.
    pub ready_ms: Spread,
    /// Until the first token of a request that was sent at the ready line.
    pub first_token_ms: Spread,
    /// Most bytes resident by then.
    pub resident_peak: f64,
    /// Those beside weights; keys and values of the few tokens are less than a mebibyte.
    pub beside_weights: f64,
}

/// What is started, and where it finds its weights.
pub struct Startup<'a> {
    /// The model as named.
    pub model: &'a str,
    /// Its file or folder.
    pub path: &'a Path,
    /// Flags of the server but for those of the weight cache.
    pub flags: Vec<String>,
    /// A cache of packed weights of its own, if there shall be one.
    pub cache: Option<WeightCache>,
    /// Bytes of its weights.
    pub weight_bytes: u64,
    /// Starts of each kind.
    pub repeats: usize,
}

impl Startup<'_> {
    /// Measures all kinds.
    pub fn measure(&self, runtime: &Runtime) -> Result<Vec<Start>> {
        let Some(cache) = &self.cache else {
            return Ok(vec![
                self.starts("cold", runtime, &|| forget(self.files()?))?,
                self.starts("warm", runtime, &|| Ok(Vec::new()))?,
            ]);
        };
        let _folder = Folder(cache.folder.clone());
        Ok(vec![
            self.starts("first, cold", runtime, &|| {
                cache.clear()?;
                forget(self.files()?)
            })?,
            self.starts("later, cold", runtime, &|| {
                forget(self.files()?)?;
                forget(cache.kept()?.into_iter().map(|file| file.path).collect())
            })?,
            self.starts("later, warm", runtime, &|| Ok(Vec::new()))?,
        ])
    }

    /// Starts after `prepare`, which says what files it took out of the system's memory.
    fn starts(
        &self,
        what: &str,
        runtime: &Runtime,
        prepare: &dyn Fn() -> Result<Vec<PathBuf>>,
    ) -> Result<Start> {
        let (mut listening, mut ready, mut first) = (Vec::new(), Vec::new(), Vec::new());
        let (mut reads, mut peaks) = (Vec::new(), Vec::new());
        for _ in 0..self.repeats {
            let cold = prepare()?;
            if !cold.is_empty() {
                reads.push(read(&cold)?.as_secs_f64() * 1e3);
                prepare()?;
            }
            let server = Server::start(self.model, &self.flags)?;
            let ms = |time: Duration| time.as_secs_f64() * 1e3;
            listening.push(ms(server.listening));
            ready.push(ms(server.ready));
            runtime.block_on(first_token(&server.url, self.model))?;
            first.push(ms(server.age()));
            peaks.extend(server.resident_peak().map(|bytes| bytes as f64));
            server.stop()?;
        }
        let resident_peak = Spread::of(&peaks).median;
        Ok(Start {
            what: what.to_owned(),
            read_ms: (!reads.is_empty()).then(|| Spread::of(&reads)),
            listening_ms: Spread::of(&listening),
            ready_ms: Spread::of(&ready),
            first_token_ms: Spread::of(&first),
            resident_peak,
            beside_weights: resident_peak - self.weight_bytes as f64,
        })
    }

    /// The model's files.
    fn files(&self) -> Result<Vec<PathBuf>> {
        if self.path.is_file() {
            return Ok(vec![self.path.to_owned()]);
        }
        let mut files = Vec::new();
        for item in fs::read_dir(self.path)? {
            let path = item?.path();
            if path.is_file() {
                files.push(path);
            }
        }
        Ok(files)
    }
}

/// A folder that goes when this does.
struct Folder(PathBuf);

impl Drop for Folder {
    fn drop(&mut self) {
        // What is left of it is packed weights: large, but harmless.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Takes files out of the system's memory, so that they are read from the disk again.
fn forget(paths: Vec<PathBuf>) -> Result<Vec<PathBuf>> {
    let forget = |path: &Path| -> std::io::Result<()> {
        let file = File::open(path)?;
        // Only what is on the disk can be forgotten.
        file.sync_all()?;
        Ok(fadvise(&file, 0, None, Advice::DontNeed)?)
    };
    for path in &paths {
        forget(path).with_context(|| format!("cannot forget {}", path.display()))?;
    }
    Ok(paths)
}

/// How long reading files from their first byte to their last takes.
fn read(paths: &[PathBuf]) -> Result<Duration> {
    let (started, mut buffer) = (Instant::now(), vec![0; 1 << 20]);
    for path in paths {
        let mut all = || -> std::io::Result<()> {
            let mut file = File::open(path)?;
            while file.read(&mut buffer)? > 0 {}
            Ok(())
        };
        all().with_context(|| format!("cannot read {}", path.display()))?;
    }
    Ok(started.elapsed())
}

async fn first_token(url: &str, model: &str) -> Result<()> {
    let body = json!({"model": model, "prompt": "Hello", "max_tokens": 1, "stream": true,
                      "ignore_eos": true});
    let mut events = Client::new(url, None)?.stream("/v1/completions", &body).await?;
    if events.next().await?.is_none() {
        bail!("the server sent no token");
    }
    Ok(())
}
