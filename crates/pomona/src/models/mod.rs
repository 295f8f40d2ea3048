//! Models as files: names, sources, downloads, the cache. Ends where a path is known; what is in
//! the file is the business of `pomona_models`.

pub mod cache;
pub mod catalogue;
mod hub;
pub mod progress;
mod pypi;
mod repository;
mod resolve;
mod surroundings;
pub mod weight_cache;

pub use resolve::{Resolved, resolve};
pub use surroundings::Surroundings;
