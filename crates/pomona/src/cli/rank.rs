//! `pomona rank`: one rank of a divided model, started by the first of them.

use anyhow::Result;
use clap::Args;

use super::args::EngineArgs;
use crate::{compose, crew};

/// Flags of `rank`.
#[derive(Args, Debug)]
pub struct RankArgs {
    /// As the first rank names it
    model: String,
    /// Which one this is
    #[arg(long)]
    rank: usize,
    /// Of which of the replicas
    #[arg(long)]
    replica: usize,
    #[command(flatten)]
    engine: EngineArgs,
}

/// Runs the verb: until the first rank says that it is over, or is gone.
pub fn run(args: &RankArgs) -> Result<()> {
    let link = crew::join(args.rank)?;
    crew::leave(
        link.as_ref(),
        compose::follow(&args.model, args.replica, &args.engine, link.clone()),
    )
}
