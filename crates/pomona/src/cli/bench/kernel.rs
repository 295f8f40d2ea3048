//! `pomona bench kernel`: kinds of matrices against the machine's limits.

use anyhow::Result;
use clap::Args;

use super::{Outcome, finish, on_one_rank};
use crate::bench::others::Watch;
use crate::bench::report::Report;
use crate::bench::{kernels, machine};
use crate::cli::args::{EngineArgs, ModelName};
use crate::compose;
use crate::models::progress::say;

/// Flags of `bench kernel`.
#[derive(Args, Debug)]
#[command(after_help = "Products of 1 and of 512 tokens, with weights that no cache holds. \
    Activations are two 8-bit terms where weights are integers, and half the int8 peak is the \
    most, unless --activation-bits is 8; with that, those of BF16 weights are bf16 where the \
    processor has products of such.")]
pub struct KernelArgs {
    #[command(flatten)]
    model: ModelName,
    #[command(flatten)]
    outcome: Outcome,
    #[command(flatten)]
    engine: EngineArgs,
}

/// Runs the verb.
pub fn run(args: &KernelArgs) -> Result<()> {
    on_one_rank(
        &args.engine,
        "bench kernel times the matrices of the undivided model by themselves",
    )?;
    let prepared = compose::prepare(args.model.require("bench kernel")?, &args.engine)?;
    let watch = Watch::start(&[]);
    let threads = compose::threads(&args.engine);
    let ops = compose::cpu_ops(&args.engine, threads);
    say("measuring kinds of matrices");
    let limits = || machine::measure(threads);
    let rounds = usize::from(args.outcome.repeats);
    let (machine, kernels) = kernels::measure(&prepared.checkpoint, &limits, &ops, rounds)?;
    let mut report = Report::new(machine, "none".to_owned());
    report.model = Some(prepared.facts());
    report.kernels = kernels;
    finish(&args.outcome, report, &watch)
}
