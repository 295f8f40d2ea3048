//! `pomona rank`: one rank of a divided model, started by the first of them.

use anyhow::Result;
use clap::Args;
use pomona_fabric::coll::Choices;

use super::args::EngineArgs;
use crate::compose::Follower;
use crate::crew;

/// Flags of `rank`.
#[derive(Args, Debug)]
pub struct RankArgs {
    /// As the first rank names it
    model: String,
    /// Of which of the replicas
    #[arg(long)]
    replica: usize,
    /// Which algorithm makes which sum; all ranks have to agree
    #[arg(long, default_value_t)]
    sums: Choices,
    #[command(flatten)]
    engine: EngineArgs,
}

/// Runs the verb: until the first rank says that it is over, or is gone.
pub fn run(args: &RankArgs) -> Result<()> {
    let member = crew::join()?;
    // An error means that there is none, as the first rank has ended: it tells its user why.
    let Ok(link) = member.next_epoch() else { return Ok(()) };
    let follow = || {
        let follower = Follower::open(&args.model, &args.engine)?;
        follower.follow(args.replica, link.clone(), args.sums.clone())
    };
    crew::leave(link.as_ref(), follow())?;
    crew::await_end(link.as_ref());
    Ok(())
}
