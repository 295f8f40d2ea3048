//! What libfabric has on this machine, for people who ask.

use std::net::IpAddr;

use super::endpoint::Endpoint;
use super::library::Library;
use super::{Memory, OfiError, PROVIDERS};

/// A library that was found.
#[derive(Debug)]
pub struct Survey {
    /// Its API, major and minor.
    pub version: (u32, u32),
    /// Each of [`PROVIDERS`], in their order: whether an endpoint for writes of ours can be opened.
    pub providers: Vec<(&'static str, Result<(), OfiError>)>,
}

/// Tries all providers on the interface of `source`.
///
/// # Errors
/// When there is no library that can be used.
pub fn survey(source: IpAddr) -> Result<Survey, OfiError> {
    let library = Library::open()?;
    let memory = Memory::new(1);
    let open = |provider| Endpoint::open(library, provider, source, &memory).map(drop);
    let providers = PROVIDERS.iter().map(|provider| (*provider, open(provider))).collect();
    Ok(Survey { version: (library.version >> 16, library.version & 0xffff), providers })
}
