//! What the environment says about models: where the cache is, which hub, which token. Read once,
//! here and nowhere else, and handed on as a value so that tests can make their own.

use std::env;
use std::path::PathBuf;

use anyhow::{Result, bail};

/// The hub that is asked unless `HF_ENDPOINT` names another.
const HUB_DEFAULT: &str = "https://huggingface.co";

/// Paths and addresses that resolving a model depends on.
#[derive(Clone, Debug)]
pub struct Surroundings {
    /// Pomona's cache folder: `POMONA_HOME`, else `pomona` in the user's cache folder.
    pub home: PathBuf,
    /// The hub client's cache, shared with Python programs: `HF_HUB_CACHE`, else `HF_HOME/hub`.
    pub hub_cache: Option<PathBuf>,
    /// Address of the hub, without a slash at the end.
    pub hub_endpoint: String,
    /// Token for gated and private repositories: `HF_TOKEN`.
    pub hub_token: Option<String>,
}

impl Surroundings {
    /// Reads the environment.
    ///
    /// # Errors
    /// When no cache folder can be derived.
    pub fn from_env() -> Result<Surroundings> {
        let user_cache =
            folder("XDG_CACHE_HOME").or_else(|| folder("HOME").map(|home| home.join(".cache")));
        let Some(home) =
            folder("POMONA_HOME").or_else(|| user_cache.as_ref().map(|c| c.join("pomona")))
        else {
            bail!("there is no cache folder: set POMONA_HOME (HOME is not set either)");
        };
        let hub_cache = folder("HF_HUB_CACHE")
            .or_else(|| folder("HF_HOME").map(|f| f.join("hub")))
            .or_else(|| user_cache.map(|c| c.join("huggingface").join("hub")));
        let endpoint = text("HF_ENDPOINT").unwrap_or_else(|| HUB_DEFAULT.to_owned());
        let hub_endpoint = endpoint.trim_end_matches('/').to_owned();
        if !hub_endpoint.starts_with("http://") && !hub_endpoint.starts_with("https://") {
            bail!("HF_ENDPOINT={hub_endpoint:?} is not a web address: write https://HOST");
        }
        Ok(Surroundings { home, hub_cache, hub_endpoint, hub_token: text("HF_TOKEN") })
    }
}

/// A variable's value; an empty one counts as absent.
fn text(name: &str) -> Option<String> {
    env::var(name).ok().map(|v| v.trim().to_owned()).filter(|v| !v.is_empty())
}

fn folder(name: &str) -> Option<PathBuf> {
    env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from)
}
