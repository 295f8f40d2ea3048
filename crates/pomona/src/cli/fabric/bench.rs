//! `pomona fabric bench`: collectives between processes of this machine.

use std::io::stdout;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::Args;
use pomona_fabric::secure::Policy;
use pomona_policy::cost::{Setting, Transport};

use super::{job, parse_bytes, parse_ranks, run_all};
use crate::bench::fabric::{Job, Record, Verdict, Wire, print, sizes_to_check};
use crate::bench::machine::cpu_name;
use crate::bench::others::{Busy, Neighbours, Watch};
use crate::calibration::Calibration;

/// Shown by `--help`.
pub const ABOUT: &str = "\
Measures collectives between processes of this machine: sums by each algorithm, gathers, \
broadcasts, one way between two ranks, barriers. A time is that from a barrier until the last rank \
has its result. Beside them stands what a copy of as many bytes takes, or one way over a plain \
socket, and each best time's share of it.

With --check, it measures where a calibration did, at its sizes and between them, and fails unless \
each prediction lies within 25 % of the median, and each chosen algorithm within 1.3 times the \
best.";

/// Flags of `fabric bench`.
#[derive(Args, Debug)]
pub struct BenchArgs {
    /// Processes
    #[arg(long, value_name = "N", default_value = "2", value_parser = parse_ranks)]
    ranks: usize,
    /// What carries the bytes
    #[arg(long, default_value = "shm")]
    transport: Wire,
    /// What is protected: off, auth or seal
    #[arg(long, default_value = "off")]
    policy: Policy,
    /// Bytes of each call
    #[arg(long, value_name = "BYTES,...", value_delimiter = ',', value_parser = parse_bytes,
          default_value = "8,512,4KiB,64KiB,256KiB,1MiB,4MiB")]
    sizes: Vec<usize>,
    /// How often all calls are repeated, one after the other
    #[arg(long, value_name = "N", default_value_t = 20,
          value_parser = clap::value_parser!(u32).range(1..=10_000))]
    rounds: u32,
    /// Compare with a calibration instead [default: the one in POMONA_HOME]
    #[arg(long, value_name = "CALIBRATION",
          conflicts_with_all = ["ranks", "transport", "policy", "sizes"])]
    check: Option<Option<PathBuf>>,
    /// Write the findings to this file as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// Runs the verb.
pub fn run(args: &BenchArgs) -> Result<()> {
    let calibration = args.check.as_ref().map(|path| calibration(path.as_deref())).transpose()?;
    let jobs = match &calibration {
        Some(calibration) => jobs_of(calibration, args.rounds)?,
        None => {
            vec![job(args.transport, args.policy, args.ranks, args.sizes.clone(), args.rounds)?]
        }
    };
    let watch = Watch::start(&[]);
    let runs = run_all(&jobs)?;
    let model = calibration.map(|calibration| calibration.costs);
    let verdict = |model| runs.iter().map(|run| Verdict::of(run, model)).collect();
    let record = Record {
        pomona: env!("CARGO_PKG_VERSION"),
        cpu: cpu_name(),
        cores: pomona_device::usable_cores().len(),
        verdicts: model.as_ref().map(verdict).unwrap_or_default(),
        runs,
        neighbours: watch.look(),
    };
    if let Some(path) = &args.json {
        let text = serde_json::to_string_pretty(&record)? + "\n";
        std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    print(&mut stdout().lock(), &record)?;
    if let Neighbours { others_share: Some(share), busy: true } = record.neighbours {
        return Err(Busy(share).into());
    }
    let wrong: usize = record.verdicts.iter().map(|one| one.wrong().count()).sum();
    let bad: usize = record.verdicts.iter().map(|one| one.bad().count()).sum();
    if wrong + bad > 0 {
        bail!("{wrong} predictions and {bad} choices are wrong: `pomona fabric calibrate` anew");
    }
    Ok(())
}

fn calibration(path: Option<&Path>) -> Result<Calibration> {
    let path = path.map_or_else(Calibration::default_path, |path| Ok(path.to_path_buf()))?;
    let read = Calibration::read(&path)?;
    match read.stranger() {
        Some(why) => bail!("{} does not tell of this machine: {why}", path.display()),
        None => Ok(read),
    }
}

/// The measurements that a calibration is to be compared with.
fn jobs_of(calibration: &Calibration, rounds: u32) -> Result<Vec<Job>> {
    let job = |setting: Setting| {
        let (wire, policy) = match setting.transport {
            Transport::Shm => (Wire::Shm, Policy::Off),
            Transport::Tcp => (Wire::Tcp, Policy::Off),
            Transport::TcpSealed => (Wire::Tcp, Policy::Seal),
            Transport::Ofi => (Wire::Ofi, Policy::Off),
        };
        let sizes = sizes_to_check(&calibration.costs, setting);
        job(wire, policy, setting.ranks, sizes, rounds)
    };
    calibration.costs.settings().into_iter().map(job).collect()
}
