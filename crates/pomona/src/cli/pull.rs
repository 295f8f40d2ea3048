//! `pomona pull`: fetch models ahead of time.

use std::io::{Write, stdout};

use anyhow::Result;
use clap::Args;

use crate::models::progress::human_bytes;
use crate::models::{Surroundings, catalogue, resolve};

/// Flags of `pull`.
#[derive(Args, Debug)]
pub struct PullArgs {
    /// Models to fetch: catalogue names or org/repo[:FILE]
    #[arg(value_name = "MODEL", required_unless_present = "list")]
    models: Vec<String>,
    /// Print the catalogue instead
    #[arg(long)]
    list: bool,
}

/// Runs the verb. Prints where each model is, one path a line.
pub fn run(args: &PullArgs) -> Result<()> {
    let mut out = stdout();
    if args.list {
        for entry in catalogue::entries()? {
            let size = human_bytes(entry.bytes);
            writeln!(out, "{:<12} {size:>8}  {} ({})", entry.name, entry.summary, entry.licence)?;
        }
        return Ok(());
    }
    let around = Surroundings::from_env()?;
    for name in &args.models {
        writeln!(out, "{}", resolve(name, &around)?.path.display())?;
    }
    Ok(())
}
