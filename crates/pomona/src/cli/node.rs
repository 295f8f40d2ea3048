//! `pomona node`: a machine's rank of a model that another machine serves.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Args, Parser};
use pomona_fabric::coll::Choices;
use pomona_fabric::rendezvous::{JoinError, JoinOptions, join};
use pomona_fabric::secure::{Policy, Token};

use super::args::{EngineArgs, WeightCacheArgs, read_token};
use crate::compose::Follower;
use crate::crew::{self, Task};
use crate::models::progress::say;

/// Shown by `--help`.
pub const EXAMPLES: &str = "\
Examples:
  pomona serve ./model.gguf --tensor-parallel-size 2 --node-listen 0.0.0.0:7000
                                     on one machine; it prints the line for the others
  pomona node --join 10.0.0.1:7000 --token 0123456789abcdef
                                     on each of the others, one for each rank
  pomona node --join 10.0.0.1:7000 --token 0123456789abcdef --model /data/model.gguf
                                     where the weights lie elsewhere";

/// How long the leader may take to admit this node.
const ADMISSION: Duration = Duration::from_secs(60);

/// Flags of `node`.
#[derive(Args, Debug)]
pub struct NodeArgs {
    /// Where the leader listens for nodes
    #[arg(long, value_name = "HOST:PORT")]
    join: String,
    /// What the leader printed, or was given
    #[arg(long)]
    token: Option<Token>,
    /// A file that has it, for others can read flags
    #[arg(long, value_name = "FILE", conflicts_with = "token")]
    token_file: Option<PathBuf>,
    /// What is protected between machines, as on the leader: off, auth (mutual TLS for control) or
    /// seal (and all data encrypted)
    #[arg(long, value_name = "POLICY", default_value = "seal")]
    node_security: Policy,
    /// The weights on this machine, a file, a folder or a name [default: as the leader names them]
    #[arg(long)]
    model: Option<String>,
    /// Where other ranks connect to this one [default: a free port]
    #[arg(long, value_name = "ADDRESS:PORT")]
    data_address: Option<SocketAddr>,
    /// Seconds to try to reach the leader, which may start later
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    patience: u64,
    /// Worker threads [default: one for each core]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    #[command(flatten)]
    weight_cache: WeightCacheArgs,
}

/// The leader's flags, as they come.
#[derive(Parser)]
struct Flags {
    #[command(flatten)]
    engine: EngineArgs,
}

/// Runs the verb: until the leader ends. When ranks are lost, it joins again.
pub fn run(args: &NodeArgs) -> Result<()> {
    while let Some(error) = follow(args)? {
        say(&format!("{error:#}: joining again"));
    }
    Ok(())
}

/// Joins, and follows to the end, or until ranks are lost.
fn follow(args: &NodeArgs) -> Result<Option<anyhow::Error>> {
    let options = JoinOptions {
        leader: args.join.clone(),
        token: read_token(args.token.as_ref(), args.token_file.as_deref())?
            .context("give the --token that the leader printed, or a --token-file")?,
        policy: args.node_security,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        data: args.data_address,
        patience: Duration::from_secs(args.patience),
        admission: ADMISSION,
    };
    let mut follower = None;
    let seat = join(&options, |task| {
        let found = args.follower(task).map_err(|error| format!("{error:#}"))?;
        let weights = found.weights();
        follower = Some(found);
        Ok(weights)
    })?;
    let follower = follower.context("the leader admits nodes that have told their weights")?;
    say(&format!("joined {}", args.join));
    let link = match seat.start(None) {
        Ok(started) => started.link,
        Err(error @ (JoinError::Refused(_) | JoinError::Unfit(_))) => return Err(error.into()),
        // The epoch did not begin, or the leader is gone: which, is seen when it is looked for.
        Err(error) => return Ok(Some(error.into())),
    };
    Ok(crew::leave(link.as_ref(), follower.follow(0, link.clone(), Choices::default())).err())
}

impl NodeArgs {
    /// What the leader's task means here.
    fn follower(&self, task: &str) -> Result<Follower> {
        let task: Task = serde_json::from_str(task).context("the leader's task makes no sense")?;
        let flags = std::iter::once("pomona".to_owned()).chain(task.flags);
        let mut engine = Flags::try_parse_from(flags).context("the leader's flags")?.engine;
        engine.threads = self.threads;
        engine.weight_cache = self.weight_cache.clone();
        engine.nodes.joined = true;
        let model = self.model.as_ref().unwrap_or(&task.model);
        Follower::open(model, &engine).with_context(|| match self.model {
            Some(_) => "the weights of --model".to_owned(),
            None => format!(
                "the leader serves {}: say where it is here by --model",
                PathBuf::from(model).display()
            ),
        })
    }
}
