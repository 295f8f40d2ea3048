//! `pomona cache`: what is kept of packed weights, and removing it.

use std::io::{Write, stdout};
use std::time::SystemTime;

use anyhow::{Context, Result};
use clap::Args;

use super::args::WeightCacheArgs;
use crate::models::progress::human_bytes;

/// Shown by `--help`.
pub const ABOUT: &str = "Show what is kept of packed weights.

The first start of a model packs its weights into a file; later starts map that file, and processes
share its memory. The files can be removed at any time: the next start packs again.";

/// Flags of `cache`.
#[derive(Args, Debug)]
pub struct CacheArgs {
    /// Remove all of it
    #[arg(long)]
    clear: bool,
    #[command(flatten)]
    cache: WeightCacheArgs,
}

/// Runs the verb.
pub fn run(args: &CacheArgs) -> Result<()> {
    let cache = args.cache.cache()?.context("--no-weight-cache leaves nothing to show")?;
    let mut out = stdout();
    if args.clear {
        writeln!(out, "removed {}", human_bytes(cache.clear()?))?;
        return Ok(());
    }
    let now = SystemTime::now();
    let mut total = 0;
    for file in cache.kept()?.iter().rev() {
        let days = now.duration_since(file.used).unwrap_or_default().as_secs() / 86_400;
        let used = if days == 0 { "today".to_owned() } else { format!("{days} days ago") };
        let size = human_bytes(file.bytes);
        writeln!(out, "{size:>8}  used {used:<14} {}", file.path.display())?;
        total += file.bytes;
    }
    writeln!(out, "{:>8}  of packed weights in {}", human_bytes(total), cache.folder.display())?;
    Ok(())
}
