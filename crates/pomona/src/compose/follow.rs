//! A rank that follows: what the first one tells it before it loads, and its life.

use std::sync::Arc;

use anyhow::{Context, Result, bail};
use pomona_engine::{FollowConfig, Seat};
use pomona_fabric::link::Link;
use pomona_models::{Checkpoint, Division};
use pomona_types::Collective;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::replica::take_cores;
use super::{Prepared, Weights, open_to_load, threads};
use crate::cli::EngineArgs;
use crate::memory::Fit;

/// What the first rank tells the others.
#[derive(Serialize, Deserialize)]
pub(super) struct Setup {
    version: String,
    weights: String,
    fit: Fit,
}

impl Setup {
    /// Of a model that is about to be loaded.
    pub(super) fn of(prepared: &Prepared) -> Result<Setup> {
        Ok(Setup {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            weights: digest(&prepared.checkpoint)?,
            fit: prepared.fit,
        })
    }

    pub(super) fn send(&self, world: &dyn Collective) -> Result<()> {
        let mut message = serde_json::to_vec(self)?;
        Ok(world.broadcast(world.rank(), &mut message)?)
    }

    fn receive(world: &dyn Collective) -> Result<Setup> {
        let mut message = Vec::new();
        world.broadcast(0, &mut message)?;
        serde_json::from_slice(&message).context("the first rank is of another version of Pomona")
    }

    /// Refuses to be part of another model, or of another Pomona.
    fn check(&self, checkpoint: &Checkpoint) -> Result<()> {
        let own = env!("CARGO_PKG_VERSION");
        if self.version != own {
            bail!("this rank is Pomona {own}, the first one {}: install one version", self.version);
        }
        if self.weights != digest(checkpoint)? {
            bail!("this rank has other weights than the first one: give both the same files");
        }
        Ok(())
    }
}

/// Differs where weights do: names, shapes, formats, and some numbers of each tensor.
fn digest(checkpoint: &Checkpoint) -> Result<String> {
    let mut hash = Sha256::new();
    checkpoint.sample(&mut |bytes| hash.update(bytes))?;
    Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Runs one rank of a model that another process leads, until that says that it is over.
pub fn follow(name: &str, replica: usize, args: &EngineArgs, link: Arc<dyn Link>) -> Result<()> {
    take_cores(replica * link.ranks() + link.rank(), threads(args));
    let (resolved, checkpoint) = open_to_load(name, args)?;
    let division = Division::new(checkpoint.spec(), args.parallel.division())?;
    let Seat { world, ranks } = Seat::take(link, &division)?;
    let setup = Setup::receive(world.as_ref())?;
    setup.check(&checkpoint)?;
    let (name, args, fit, draft) = (name.to_owned(), args.clone(), setup.fit, None);
    let stages = division.parallel.pipeline as usize;
    let prepared = Prepared { name, division, resolved, checkpoint, fit, draft, args };
    let Weights { model, ops, finishing, .. } = prepared.load_weights_of(Some(ranks))?;
    world.barrier()?;
    let config = FollowConfig {
        max_num_seqs: prepared.args.max_num_seqs,
        max_num_batched_tokens: prepared.args.max_num_batched_tokens,
        kv_dtype: prepared.kv_dtype(),
        kv_blocks: fit.kv_blocks,
        stages,
    };
    pomona_engine::follow(&config, model, ops.as_ref(), world.as_ref())?;
    drop(finishing);
    Ok(())
}
