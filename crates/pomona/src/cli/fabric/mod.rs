//! `pomona fabric`: what ranks can talk over here, how fast, and what that will cost.

mod bench;
mod calibrate;
mod probe;

use std::io::{IsTerminal, stderr};
use std::net::{IpAddr, Ipv4Addr};

use anyhow::{Result, bail};
use clap::{Args, Subcommand};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use pomona_fabric::link::ofi;
use pomona_fabric::secure::Policy;

use crate::bench::fabric::{Job, Run, Times, Wire, follow, measure};
use crate::models::progress::say;

/// Shown by `--help`.
pub const EXAMPLES: &str = "\
Examples:
  pomona fabric probe                          which transports this machine has
  pomona fabric bench                          collectives over shared memory, two processes
  pomona fabric bench --transport tcp --policy seal --sizes 8,64KiB,1MiB
  pomona fabric calibrate                      measure all of them, and keep what they cost
  pomona fabric bench --check                  is what was kept right

`pomona serve` chooses the algorithms for sums over ranks of this machine by what `calibrate` has
kept in POMONA_HOME.";

/// Most ranks of a measurement.
const RANKS_MAX: i64 = 64;

/// In how many starts rounds are made, if there are as many.
const STARTS: u32 = 3;

/// Flags of `fabric`.
#[derive(Args, Debug)]
pub struct FabricArgs {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand, Debug)]
enum Verb {
    /// Show which transports this machine has, and what others lack
    Probe(probe::ProbeArgs),
    /// Measure collectives between processes of this machine
    #[command(long_about = bench::ABOUT)]
    Bench(bench::BenchArgs),
    /// Measure what collectives cost, and keep it
    #[command(long_about = calibrate::ABOUT)]
    Calibrate(calibrate::CalibrateArgs),
    /// One rank of a measurement: started by the first of them
    #[command(hide = true)]
    Rank,
}

/// Runs the verb.
pub fn run(args: &FabricArgs) -> Result<()> {
    match &args.verb {
        Verb::Probe(args) => probe::run(args),
        Verb::Bench(args) => bench::run(args),
        Verb::Calibrate(args) => calibrate::run(args),
        Verb::Rank => follow(),
    }
}

/// A job, if it can be done here.
fn job(wire: Wire, policy: Policy, ranks: usize, sizes: Vec<usize>, rounds: u32) -> Result<Job> {
    if policy != Policy::Off && wire == Wire::Shm {
        bail!(
            "--policy {policy}: shared memory is no wire; write --transport tcp, or leave it out"
        );
    }
    if policy == Policy::Seal && wire == Wire::Ofi {
        bail!("--policy seal is not possible over libfabric: use --transport tcp, or auth");
    }
    let provider = match wire {
        Wire::Ofi => Some(ofi::provider(IpAddr::V4(Ipv4Addr::LOCALHOST))?.to_owned()),
        Wire::Shm | Wire::Tcp => None,
    };
    Ok(Job { wire, policy, ranks, sizes, rounds, provider })
}

/// Does jobs, in several starts: what chance gives to a process, such as its places in memory, is
/// another in each. Shows how far it is.
fn run_all(jobs: &[Job]) -> Result<Vec<Run>> {
    let mut found: Vec<Option<Times>> = jobs.iter().map(|_| None).collect();
    for start in 0..STARTS {
        for (job, found) in jobs.iter().zip(&mut found) {
            let rounds = (job.rounds + STARTS - 1 - start) / STARTS;
            if rounds == 0 {
                continue;
            }
            let times = show(&Job { rounds, ..job.clone() }, start)?;
            match found {
                Some(found) => found.join(times),
                None => *found = Some(times),
            }
        }
    }
    let run = |(job, times): (&Job, Option<Times>)| Some(Run::new(job.clone(), times?));
    Ok(jobs.iter().zip(found).filter_map(run).collect())
}

/// Does a job's part of one start.
fn show(job: &Job, start: u32) -> Result<Times> {
    let setting = job.setting();
    let label = format!("{} ranks over {}", setting.ranks, setting.transport.name());
    let bar = stderr().is_terminal().then(|| bar(&label));
    if bar.is_none() && start == 0 {
        say(&format!("measuring {label}"));
    }
    let times = measure(job, &mut |done, parts| {
        if let Some(bar) = &bar {
            bar.set_length(parts as u64);
            bar.set_position(done as u64);
        }
    });
    if let Some(bar) = bar {
        bar.finish_and_clear();
    }
    times
}

fn bar(label: &str) -> ProgressBar {
    let style = ProgressStyle::with_template("{msg} {wide_bar:.green/dim} {percent} %, {eta} left");
    let style = style.unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("━╸─");
    let bar = ProgressBar::with_draw_target(Some(1), ProgressDrawTarget::stderr());
    bar.set_style(style);
    bar.set_message(label.to_owned());
    bar
}

/// Bytes of each call: sums are made of numbers of four bytes.
fn parse_bytes(text: &str) -> std::result::Result<usize, String> {
    const BYTES_MAX: u64 = 256 << 20;
    let bytes = super::args::parse_size(text)?;
    match bytes % 4 == 0 && bytes <= BYTES_MAX {
        true => Ok(bytes as usize),
        false => Err("write a multiple of 4, at most 256MiB".to_owned()),
    }
}

/// How many processes.
fn parse_ranks(text: &str) -> std::result::Result<usize, String> {
    let number = text.parse().ok().filter(|number| (2..=RANKS_MAX).contains(number));
    number.map(|ranks| ranks as usize).ok_or_else(|| format!("write 2 to {RANKS_MAX}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_ranks_that_cannot_be_are_refused() {
        assert_eq!(parse_bytes("64KiB"), Ok(64 << 10));
        assert_eq!(parse_ranks("2"), Ok(2));
        for (text, advice) in [("6", "multiple of 4"), ("1GiB", "256MiB"), ("x", "512MiB")] {
            assert!(parse_bytes(text).unwrap_err().contains(advice), "{text}");
        }
        for text in ["1", "65", "-2", "two"] {
            assert!(parse_ranks(text).unwrap_err().contains("2 to 64"), "{text}");
        }
    }

    #[test]
    fn what_no_transport_does_is_refused() {
        let refused = |wire, policy| job(wire, policy, 2, vec![8], 1).unwrap_err().to_string();
        assert!(refused(Wire::Shm, Policy::Seal).contains("shared memory"));
        assert!(refused(Wire::Ofi, Policy::Seal).contains("libfabric"));
        assert!(job(Wire::Tcp, Policy::Seal, 2, vec![8], 1).is_ok());
    }
}
