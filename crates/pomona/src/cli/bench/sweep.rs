//! `pomona bench sweep`: the search for cliffs.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;
use pomona_device::Pool;

use super::{Outcome, finish, on_this_machine, report};
use crate::bench::others::Watch;
use crate::bench::sweep::{self, BATCH_MAX, Case};
use crate::cli::args::{EngineArgs, ModelName};
use crate::compose;
use crate::models::progress::say;

/// Cores up to which every number of threads is tried.
const EVERY_CORE: usize = 4;

/// Flags of `bench sweep`.
#[derive(Args, Debug)]
#[command(
    after_help = "The engine alone, with room for 256 sequences. A neighbour that is slower \
    by more than the factor beside each series' name is a cliff, and is marked."
)]
pub struct SweepArgs {
    #[command(flatten)]
    model: ModelName,
    /// What to vary
    #[arg(
        long,
        value_enum,
        value_name = "CASE,...",
        value_delimiter = ',',
        default_value = "context,batch,threads,mixed"
    )]
    cases: Vec<Case>,
    /// Draw the series into this file
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    #[command(flatten)]
    outcome: Outcome,
    #[command(flatten)]
    engine: EngineArgs,
}

/// Runs the verb.
pub fn run(args: &SweepArgs) -> Result<()> {
    let model = args.model.require("bench sweep")?;
    on_this_machine(&args.engine, "bench sweep")?;
    let mut engine = args.engine.measured();
    engine.max_num_seqs = engine.max_num_seqs.max(BATCH_MAX);
    engine.max_num_batched_tokens = engine.max_num_batched_tokens.max(engine.max_num_seqs);
    let facts = compose::prepare(model, &engine)?.facts();
    let watch = Watch::start(&[]);
    let mut report = report(&engine, "none".to_owned());
    say("sweeping");
    let load = |threads: Option<u16>| {
        let mut engine = engine.clone();
        engine.threads = threads.or(engine.threads);
        compose::prepare(model, &engine)?.load()
    };
    let sweep = sweep::measure(&sweep::Options {
        cases: &args.cases,
        repeats: usize::from(args.outcome.repeats),
        threads: &thread_counts(Pool::default_threads()),
        load: &load,
    })?;
    if let Some(path) = &args.svg {
        let machine = &report.machine;
        // Pictures are shown to others: folders say nothing to them.
        let name = facts.name.rsplit('/').next().unwrap_or_default();
        let title = format!("{name} on {}, {} threads", machine.cpu, machine.threads);
        std::fs::write(path, sweep.svg(&title))
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    report.model = Some(facts);
    report.sweep = Some(sweep);
    finish(&args.outcome, report, &watch)
}

/// Up to twice the cores: every number where they are few, else doubling, and the cores.
fn thread_counts(cores: usize) -> Vec<u16> {
    let most = 2 * cores;
    let mut counts: Vec<usize> = match cores {
        ..=EVERY_CORE => (1..=most).collect(),
        _ => (0..=most.ilog2()).map(|n| 1 << n).chain([cores, most]).collect(),
    };
    counts.sort_unstable();
    counts.dedup();
    counts.into_iter().filter_map(|count| u16::try_from(count).ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_reach_twice_the_cores() {
        assert_eq!(thread_counts(2), [1, 2, 3, 4]);
        assert_eq!(thread_counts(12), [1, 2, 4, 8, 12, 16, 24]);
    }
}
