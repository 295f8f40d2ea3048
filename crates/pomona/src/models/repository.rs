//! `org/repo[@revision][:file or quantisation]`: a repository of the hub, as found in the hub
//! client's own cache, in Pomona's, or on the hub.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};

use super::cache::{self, Cached, Expected};
use super::hub::{self, Hub, Listing, RepoFile, is_plain_name};
use super::progress::say;
use super::resolve::Resolved;
use super::surroundings::Surroundings;

/// Quantisations in the order of preference when the user names none.
const QUANTS: [&str; 11] =
    ["Q4_K_M", "Q4_K_S", "Q4_0", "Q4_1", "Q5_K_M", "Q5_K_S", "Q6_K", "Q8_0", "BF16", "F16", "F32"];

/// Files beside the weights that a checkpoint folder may have; all small.
const SIDE_FILES: [&str; 8] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.json",
    "chat_template.jinja",
    "model.safetensors.index.json",
];

/// A repository as the user names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Repository {
    /// `organisation/repository`.
    pub id: String,
    /// Branch, tag or commit.
    pub revision: String,
    /// A GGUF file's name, or a part of it such as `Q4_K_M`.
    pub pick: Option<String>,
}

impl Repository {
    /// Reads `org/repo[@revision][:pick]`; `None` if it is not of that form.
    pub fn parse(name: &str) -> Option<Repository> {
        let (rest, pick) = match name.split_once(':') {
            Some((rest, pick)) => (rest, Some(pick)),
            None => (name, None),
        };
        let (id, revision) = rest.split_once('@').unwrap_or((rest, "main"));
        let (organisation, repo) = id.split_once('/')?;
        let plain = [organisation, repo, revision].into_iter().chain(pick).all(is_plain_name);
        plain.then(|| Repository {
            id: id.to_owned(),
            revision: revision.to_owned(),
            pick: pick.map(str::to_owned),
        })
    }
}

/// What to fetch: one GGUF file or its parts in order, or the files of a checkpoint folder.
#[derive(Debug, PartialEq, Eq)]
enum Selection {
    Gguf(Vec<String>),
    Folder(Vec<String>),
}

/// The repository on this machine.
pub fn resolve(name: &str, repository: &Repository, around: &Surroundings) -> Result<Resolved> {
    let resolved = |path: PathBuf, origin: String| Resolved { name: name.to_owned(), path, origin };
    if let Some(path) = in_hub_cache(repository, around) {
        return Ok(resolved(path, "the hub client's cache".to_owned()));
    }
    let label = repository.id.replace('/', "--");
    let folder = around.home.join("hub").join(&label);
    let token = around.hub_token.as_deref();
    let hub = Hub::new(&around.hub_endpoint, token, hub::CONNECT_TIMEOUT);
    let listing = match hub.list(&repository.id, &repository.revision) {
        Ok(listing) => listing,
        // Without the hub, the last commit that was fetched completely is as good.
        Err(error) => {
            return match complete_commit(&folder, repository) {
                Some(path) => {
                    say(&format!("the hub does not answer; using what was fetched: {error:#}"));
                    Ok(resolved(path, "cache".to_owned()))
                }
                None => Err(error),
            };
        }
    };
    let selection = select(repository, &listing)?;
    let target = folder.join(&listing.sha);
    let _turn = cache::lock(&around.home, &label)?;
    let (path, names) = match selection {
        Selection::Gguf(parts) => (target.join(&parts[0]), parts),
        Selection::Folder(files) => (target.clone(), files),
    };
    cache::make_folder(&target)?;
    let missing = fetch_all(&hub, repository, &listing, &target, &names)?;
    let marker = target.join(marker_name(repository));
    fs::write(&marker, path.file_name().unwrap_or_default().as_encoded_bytes())
        .map_err(|error| cache::storage_error(error, "write", &marker, None))?;
    let origin = if missing == 0 { "cache" } else { "the hub" };
    Ok(resolved(path, format!("{origin} ({} at {})", repository.id, listing.sha)))
}

/// Fetches what is not in `target`; how many files that were.
fn fetch_all(
    hub: &Hub,
    repository: &Repository,
    listing: &Listing,
    target: &Path,
    names: &[String],
) -> Result<usize> {
    let mut missing: Vec<&RepoFile> = Vec::new();
    for file in listing.siblings.iter().filter(|file| names.contains(&file.name)) {
        match cache::check(&target.join(&file.name), expected(file))? {
            Cached::Ready => {}
            Cached::Missing => missing.push(file),
            Cached::Corrupt(aside) => {
                say(&format!("a cached file was damaged; it is {} now", aside.display()));
                missing.push(file);
            }
        }
    }
    let bytes = missing.iter().filter_map(|f| f.size).fold(0u64, u64::saturating_add);
    cache::need_space(target, bytes)?;
    for file in &missing {
        let path = target.join(&file.name);
        hub.fetch(&repository.id, &listing.sha, &file.name, &path, expected(file))?;
    }
    Ok(missing.len())
}

fn expected(file: &RepoFile) -> Expected<'_> {
    Expected { bytes: file.size, sha256: file.lfs.as_ref().map(|lfs| lfs.sha256.as_str()) }
}

fn marker_name(repository: &Repository) -> String {
    format!(".complete.{}", repository.pick.as_deref().unwrap_or("default"))
}

/// A commit that was fetched completely, the newest first.
fn complete_commit(folder: &Path, repository: &Repository) -> Option<PathBuf> {
    let marker = marker_name(repository);
    let newest = fs::read_dir(folder)
        .ok()?
        .filter_map(|item| Some(item.ok()?.path()))
        .filter_map(|commit| {
            let time = fs::metadata(commit.join(&marker)).ok()?.modified().ok()?;
            Some((time, commit))
        })
        .max()?;
    let name = fs::read_to_string(newest.1.join(&marker)).ok()?;
    let file = newest.1.join(&name);
    if name.ends_with(".gguf") && file.is_file() { Some(file) } else { Some(newest.1) }
}

/// Chooses among the files at the top of the repository.
fn select(repository: &Repository, listing: &Listing) -> Result<Selection> {
    let names: Vec<&str> =
        listing.siblings.iter().map(|f| f.name.as_str()).filter(|n| is_plain_name(n)).collect();
    let ggufs: Vec<&str> = names.iter().copied().filter(|n| n.ends_with(".gguf")).collect();
    let weights: Vec<&str> =
        names.iter().copied().filter(|n| n.ends_with(".safetensors")).collect();
    let id = &repository.id;
    if let Some(pick) = &repository.pick {
        return match pick_gguf(pick, &ggufs) {
            Some(file) => Ok(Selection::Gguf(parts(file, &ggufs)?)),
            None => bail!("{id} has no GGUF file for {pick:?}; it has: {}", ggufs.join(", ")),
        };
    }
    if names.contains(&"config.json") && !weights.is_empty() {
        let wanted = names.iter().filter(|n| SIDE_FILES.contains(n) || weights.contains(n));
        return Ok(Selection::Folder(wanted.map(|n| (*n).to_owned()).collect()));
    }
    let firsts: Vec<&str> =
        ggufs.iter().copied().filter(|n| part_of(n).is_none_or(|(_, i, _)| i == 1)).collect();
    let chosen = match firsts.as_slice() {
        [one] => Some(*one),
        several => QUANTS.iter().find_map(|quant| pick_gguf(quant, several)),
    };
    match chosen {
        Some(file) => Ok(Selection::Gguf(parts(file, &ggufs)?)),
        None if ggufs.is_empty() => {
            bail!("{id} has neither safetensors with a config.json nor GGUF files")
        }
        None => bail!("name one of the files of {id}, as {id}:FILE: {}", ggufs.join(", ")),
    }
}

/// `NAME-00002-of-00005.gguf` as (`NAME`, 2, 5).
fn part_of(name: &str) -> Option<(&str, usize, usize)> {
    let mut words = name.strip_suffix(".gguf")?.rsplitn(4, '-');
    let (count, of, index) = (words.next()?, words.next()?, words.next()?);
    let stem = words.next()?;
    (of == "of").then_some(())?;
    Some((stem, index.parse().ok()?, count.parse().ok()?))
}

/// A file alone, or all parts of the split set that it belongs to, the first one first.
fn parts(file: &str, ggufs: &[&str]) -> Result<Vec<String>> {
    let Some((stem, _, count)) = part_of(file) else { return Ok(vec![file.to_owned()]) };
    let mut set: Vec<&str> = ggufs
        .iter()
        .copied()
        .filter(|name| part_of(name).is_some_and(|(s, _, c)| (s, c) == (stem, count)))
        .collect();
    set.sort_unstable();
    if set.len() != count || count == 0 {
        bail!("{file} is one of {count} parts, and {} of them are there", set.len());
    }
    Ok(set.into_iter().map(str::to_owned).collect())
}

/// The file of that name, or the one whose name has `pick` as a word (`-Q4_0.`, `.Q4_0.`).
fn pick_gguf<'a>(pick: &str, ggufs: &[&'a str]) -> Option<&'a str> {
    if let Some(exact) = ggufs.iter().find(|name| **name == pick) {
        return Some(exact);
    }
    let pick = pick.to_ascii_lowercase();
    ggufs.iter().copied().find(|name| {
        name.to_ascii_lowercase().trim_end_matches(".gguf").split(['-', '.']).any(|w| w == pick)
    })
}

/// The repository in the cache that Python's hub client keeps, if it is complete there: see
/// "Understand caching" in the documentation of `huggingface_hub`.
fn in_hub_cache(repository: &Repository, around: &Surroundings) -> Option<PathBuf> {
    let label = format!("models--{}", repository.id.replace('/', "--"));
    let folder = around.hub_cache.as_ref()?.join(label);
    let reference = folder.join("refs").join(&repository.revision);
    let commit = fs::read_to_string(reference).unwrap_or(repository.revision.clone());
    let commit = commit.trim();
    if !is_plain_name(commit) {
        return None;
    }
    let snapshot = folder.join("snapshots").join(commit);
    let siblings = fs::read_dir(&snapshot)
        .ok()?
        .filter_map(|item| item.ok()?.file_name().into_string().ok())
        .map(|name| RepoFile { name, size: None, lfs: None })
        .collect();
    let listing = Listing { sha: commit.to_owned(), siblings };
    match select(repository, &listing).ok()? {
        Selection::Gguf(parts) => {
            let here = parts.iter().all(|part| snapshot.join(part).exists());
            here.then(|| snapshot.join(&parts[0]))
        }
        Selection::Folder(files) => is_complete(&snapshot, &files).then_some(snapshot),
    }
}

/// Whether a folder has every shard that its index names, and a tokenizer.
fn is_complete(folder: &Path, files: &[String]) -> bool {
    let has = |name: &str| files.iter().any(|f| f == name) && folder.join(name).exists();
    let index = folder.join("model.safetensors.index.json");
    let weights = match fs::read(&index) {
        Err(_) => has("model.safetensors"),
        Ok(text) => serde_json::from_slice::<serde_json::Value>(&text).is_ok_and(|index| {
            let shards = index.get("weight_map").and_then(|m| m.as_object());
            shards.is_some_and(|m| m.values().all(|s| s.as_str().is_some_and(has)))
        }),
    };
    weights && has("tokenizer.json")
}

#[cfg(test)]
mod tests;
