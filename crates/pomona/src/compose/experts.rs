//! Which rank gets which experts: by flags, and by what was counted in earlier runs. The first rank
//! chooses, and tells the others.

use anyhow::{Result, bail};
use pomona_models::{Checkpoint, Division, Parallel};
use pomona_policy::experts::{Counted, balance, place};
use pomona_types::ExpertsSpec;

use super::expert_file;
use crate::cli::EngineArgs;

/// A model's division as the flags want it, and what earlier runs have counted.
///
/// # Errors
/// When the model cannot be divided so, or the file of counts is not of this model.
pub fn divide(checkpoint: &Checkpoint, args: &EngineArgs) -> Result<(Division, Option<Counted>)> {
    let parallel = args.parallel.division();
    let division = Division::new(checkpoint.spec(), parallel)?;
    check(checkpoint, &parallel, args)?;
    let file = args.experts.expert_loads.as_deref();
    let counted = file.map(|file| expert_file::read(file, checkpoint)).transpose()?;
    let tokens = counted.as_ref().map_or(&[][..], |counted| counted.tokens.as_slice());
    let copies = args.experts.num_redundant_experts as usize;
    let ranks = division.hidden.len();
    let layers = division.experts.iter().enumerate().map(|(layer, plain)| {
        let zeros = vec![0; plain.experts()];
        place(plain.holders(), tokens.get(layer).unwrap_or(&zeros), ranks, copies)
    });
    let places = layers.collect();
    Ok((division.with_experts(places)?, counted))
}

/// Refuses flags that would do nothing.
fn check(checkpoint: &Checkpoint, parallel: &Parallel, args: &EngineArgs) -> Result<()> {
    let given = args.experts.given();
    let Some(ExpertsSpec { count, .. }) = checkpoint.spec().experts else {
        return match given.first() {
            None => Ok(()),
            Some(flag) => bail!(
                "{flag}: {} has no experts, its layers are dense: leave the flag out, and divide \
                 them by --tensor-parallel-size",
                checkpoint.name()
            ),
        };
    };
    let ranks = parallel.tensor * parallel.context;
    let needs_ranks = given.iter().find(|flag| !flag.starts_with("--expert-loads"));
    if let Some(flag) = needs_ranks.filter(|_| ranks == 1) {
        let replicas = match args.parallel.data_parallel_size {
            1 => "",
            _ => " (a replica of --data-parallel-size has all experts)",
        };
        bail!(
            "{flag}: experts are divided over the ranks that share layers, and there is one \
             only{replicas}: add --tensor-parallel-size, such as 2"
        );
    }
    let (copies, most) =
        (args.experts.num_redundant_experts, u64::from(count) * u64::from(ranks - 1));
    if u64::from(copies) > most {
        bail!(
            "--num-redundant-experts {copies}: each of {count} experts is on each of {ranks} ranks \
             once at most: choose {most} or fewer"
        );
    }
    Ok(())
}

/// How many copies a division has in all layers, and what its busiest rank has to do over the mean
/// of all ranks, on average over layers. `None` where there is nothing to divide.
pub fn expected(division: &Division, counted: Option<&Counted>) -> Option<(usize, f64)> {
    let (layers, ranks) = (division.experts.len(), division.hidden.len());
    if layers == 0 || ranks == 1 {
        return None;
    }
    let (mut copies, mut sum) = (0, 0.0);
    for (layer, placement) in division.experts.iter().enumerate() {
        let (holders, zeros) = (placement.holders(), vec![0; placement.experts()]);
        let loads = counted.and_then(|counted| counted.tokens.get(layer)).unwrap_or(&zeros);
        copies += holders.iter().map(Vec::len).sum::<usize>() - holders.len();
        sum += balance(holders, loads, ranks);
    }
    Some((copies, sum / layers as f64))
}
