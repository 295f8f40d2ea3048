//! A rank that follows: what the first one tells it before it loads, and its life.

use std::sync::{Arc, OnceLock};

use anyhow::{Context, Result, bail};
use pomona_engine::{FollowConfig, Seat};
use pomona_fabric::coll::Choices;
use pomona_fabric::link::Link;
use pomona_fabric::rendezvous::Fingerprint;
use pomona_models::{Checkpoint, Division};
use pomona_types::Collective;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::replica::take_cores;
use super::{Prepared, Weights, open_to_load, rank_needs, threads};
use crate::cli::EngineArgs;
use crate::memory::{Fit, Needs};
use crate::models::Resolved;
use crate::models::progress::human_bytes;

/// What the first rank tells the others.
#[derive(Serialize, Deserialize)]
pub(super) struct Setup {
    weights: Fingerprint,
    fit: Fit,
    /// By layer and expert, the ranks that have it.
    experts: Vec<Vec<Vec<usize>>>,
}

impl Setup {
    /// Of a model that is about to be loaded.
    pub(super) fn of(prepared: &Prepared) -> Result<Setup> {
        let places = prepared.division.experts.iter().map(|layer| layer.holders().to_vec());
        let (weights, experts) = (prepared.digest()?, places.collect());
        Ok(Setup { weights, fit: prepared.fit, experts })
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
}

/// Differs where weights do: names, shapes, formats, and some numbers of each tensor.
pub(super) fn digest(checkpoint: &Checkpoint) -> Result<Fingerprint> {
    let mut hash = Sha256::new();
    checkpoint.sample(&mut |bytes| hash.update(bytes))?;
    Ok(hash.finalize().into())
}

/// Returns when all ranks have come here, however long that takes while they are alive.
pub(super) fn await_all(world: &dyn Collective) -> Result<()> {
    let mut message = Vec::new();
    for rank in 0..world.ranks() {
        world.broadcast(rank, &mut message)?;
    }
    Ok(())
}

/// A rank of a model that another process leads, before it has its place.
pub struct Follower {
    name: String,
    args: EngineArgs,
    resolved: Resolved,
    checkpoint: Checkpoint,
    weights: Fingerprint,
}

impl Follower {
    /// Finds the model and reads its headers.
    pub fn open(name: &str, args: &EngineArgs) -> Result<Follower> {
        let (resolved, checkpoint) = open_to_load(name, args)?;
        let weights = digest(&checkpoint)?;
        let (name, args) = (name.to_owned(), args.clone());
        Ok(Follower { name, args, resolved, checkpoint, weights })
    }

    /// Tells the weights from others.
    pub fn weights(&self) -> Fingerprint {
        self.weights
    }

    /// Takes the place that the link has, loads, and follows until the leader says that it is over.
    /// Sums go by the first rank's choice of algorithms.
    pub fn follow(self, replica: usize, link: Arc<dyn Link>, choices: Choices) -> Result<()> {
        let Follower { name, args, resolved, checkpoint, weights } = self;
        let threads = threads(&args);
        if !args.nodes.apart() {
            take_cores(replica * link.ranks() + link.rank(), threads);
        }
        let rank = link.rank();
        let division = Division::new(checkpoint.spec(), args.parallel.division())?;
        let Seat { world, mut ranks } = Seat::take(link, &division, choices)?;
        let Setup { weights: theirs, fit, experts } = Setup::receive(world.as_ref())?;
        if theirs != weights {
            bail!("this rank has other weights than the first one: give both the same files");
        }
        let division = division.with_experts(experts)?;
        ranks.division = division.clone();
        if args.nodes.apart() {
            has_room(&rank_needs(&checkpoint, &division, rank, &args), &fit)?;
        }
        let stages = division.parallel.pipeline as usize;
        let (draft, counted, digest) = (None, None, OnceLock::from(weights));
        let prepared = Prepared {
            name,
            division,
            counted,
            resolved,
            checkpoint,
            digest,
            fit,
            draft,
            args,
            threads,
        };
        let Weights { model, ops, finishing, .. } = prepared.load_weights_of(Some(ranks))?;
        await_all(world.as_ref())?;
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
}

/// Refuses what this machine has no room for.
fn has_room(needs: &Needs, fit: &Fit) -> Result<()> {
    let kv = needs.block_bytes * u64::from(fit.kv_blocks);
    let wanted = needs.weight_bytes + needs.scratch_bytes + kv;
    match pomona_device::available_memory() {
        Some(available) if available < wanted => bail!(
            "this machine has {} available, its rank needs {} ({} of them for keys and values): \
             stop other programs here, or give the leader less --kv-cache-memory or a larger \
             --tensor-parallel-size",
            human_bytes(available),
            human_bytes(wanted),
            human_bytes(kv),
        ),
        _ => Ok(()),
    }
}
