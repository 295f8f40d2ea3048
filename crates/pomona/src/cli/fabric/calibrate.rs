//! `pomona fabric calibrate`: what collectives cost here, kept.

use std::io::{Write, stdout};
use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use pomona_fabric::secure::Policy;
use pomona_policy::cost::{CostModel, Sample};

use super::{job, parse_bytes, parse_ranks, run_all};
use crate::bench::fabric::{Job, Run, Wire};
use crate::bench::others::{Busy, Neighbours, Watch};
use crate::calibration::Calibration;
use crate::models::progress::say;

/// Shown by `--help`.
pub const ABOUT: &str = "\
Measures what collectives cost between processes of this machine, over each transport that it has, \
and keeps it in a file. Servers whose ranks share memory choose their algorithms by the file in \
POMONA_HOME; TCP and libfabric are measured on the loopback interface, which tells nothing of a \
network, so that ranks of other machines go by built-in sizes.";

/// Closer together where caches end, for no line leads over their edges; and not powers of two
/// alone, which collide in caches as others do not.
const SIZES: &str = "64,256,1KiB,4KiB,16KiB,64KiB,96KiB,128KiB,192KiB,256KiB,384KiB,512KiB,768KiB,\
                     1MiB,1536KiB,2MiB,3MiB,4MiB";

/// Flags of `fabric calibrate`.
#[derive(Args, Debug)]
pub struct CalibrateArgs {
    /// Numbers of processes [default: 2 up to the cores that there are]
    #[arg(long, value_name = "N,...", value_delimiter = ',', value_parser = parse_ranks)]
    ranks: Vec<usize>,
    /// What carries the bytes [default: all that this machine has, TCP in clear and sealed]
    #[arg(long, value_name = "TRANSPORT,...", value_delimiter = ',')]
    transport: Vec<Wire>,
    /// Bytes of each call; between them costs are interpolated
    #[arg(long, value_name = "BYTES,...", value_delimiter = ',', value_parser = parse_bytes,
          default_value = SIZES)]
    sizes: Vec<usize>,
    /// How often all calls are repeated, one after the other
    #[arg(long, value_name = "N", default_value_t = 20,
          value_parser = clap::value_parser!(u32).range(1..=10_000))]
    rounds: u32,
    /// Keep it even where other processes kept the machine busy
    #[arg(long)]
    keep_busy: bool,
    /// Where it is kept [default: fabric.json in POMONA_HOME]
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
}

/// Most processes that are measured unless more are asked for.
const RANKS_DEFAULT_MAX: usize = 8;

/// Runs the verb.
pub fn run(args: &CalibrateArgs) -> Result<()> {
    let path = args.output.clone().map_or_else(Calibration::default_path, Ok)?;
    let jobs = args.jobs()?;
    let watch = Watch::start(&[]);
    let runs = run_all(&jobs)?;
    let samples: Vec<Sample> = runs.iter().flat_map(Run::samples).collect();
    let costs = CostModel::fit(&samples);
    table(&costs)?;
    let neighbours = watch.look();
    writeln!(stdout(), "\n{}", neighbours.words())?;
    match neighbours {
        Neighbours { others_share: Some(share), busy: true } if !args.keep_busy => {
            say(&format!("nothing is kept in {}", path.display()));
            Err(Busy(share).into())
        }
        _ => {
            Calibration::new(costs).write(&path)?;
            say(&format!("kept in {}", path.display()));
            Ok(())
        }
    }
}

impl CalibrateArgs {
    fn jobs(&self) -> Result<Vec<Job>> {
        let cores = pomona_device::usable_cores().len().clamp(2, RANKS_DEFAULT_MAX);
        let ranks = if self.ranks.is_empty() { (2..=cores).collect() } else { self.ranks.clone() };
        let all = [Wire::Shm, Wire::Tcp, Wire::Ofi];
        let wires = if self.transport.is_empty() { &all[..] } else { &self.transport[..] };
        let mut jobs = Vec::new();
        for wire in wires {
            let policies: &[Policy] = match wire {
                Wire::Tcp => &[Policy::Off, Policy::Seal],
                Wire::Shm | Wire::Ofi => &[Policy::Off],
            };
            for (policy, ranks) in policies.iter().flat_map(|p| ranks.iter().map(move |r| (*p, *r)))
            {
                match job(*wire, policy, ranks, self.sizes.clone(), self.rounds) {
                    Ok(job) => jobs.push(job),
                    // What the machine does not have need not be measured, unless it was asked for.
                    Err(error) if self.transport.is_empty() => {
                        say(&format!("left out: {error:#}"));
                        break;
                    }
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(jobs)
    }
}

/// What was found, as latencies and costs of bytes.
fn table(costs: &CostModel) -> std::io::Result<()> {
    let mut out = stdout().lock();
    for setting in costs.settings() {
        let transport = setting.transport;
        writeln!(out, "\n{} ranks over {}: latency and cost", setting.ranks, transport.name())?;
        for one in costs.costs().iter().filter(|one| one.setting == setting) {
            let (alpha, beta) = one.curve.line();
            let name = one.operation.to_string();
            writeln!(out, "  {name:<24} {alpha:>9.2} us {:>9.4} us/KiB", beta * 1024.0)?;
        }
        let choices = costs.choices(transport).to_string();
        let prefix = format!("{}:", setting.ranks);
        let own: Vec<&str> =
            choices.split(',').filter_map(|one| one.strip_prefix(&prefix)).collect();
        writeln!(out, "  sums up to so many bytes  {}", own.join("  "))?;
    }
    Ok(())
}
