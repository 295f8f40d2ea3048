//! What collectives over shared memory cost among two processes, each on a core of its own.
//!
//!     cargo bench -p pomona-fabric [-- --peer OPENMPI_PROGRAM] [--rounds N]
//!
//! Microseconds of a call, the writing of its input included: the median of 21 batches, and of the
//! rounds. With a peer (`mpicc -O2 -o openmpi tools/bench/openmpi.c`) rounds alternate with its.
#![allow(clippy::unwrap_used)]

use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pomona_fabric::coll::{Comm, World};
use pomona_fabric::group::GroupOptions;
use pomona_fabric::group::local::{LocalGroup, LocalMember, LocalOptions};
use pomona_fabric::link::Link;
use pomona_types::Collective;
use rustix::thread::{CpuSet, sched_setaffinity};

const BATCHES: usize = 21;
const ARENA_BYTES: usize = 32 << 20;
/// Bytes, and calls of a batch.
const SIZES: [(usize, usize); 5] =
    [(128, 2000), (4 << 10, 1000), (64 << 10, 200), (1 << 20, 20), (16 << 20, 3)];
const IDENTITY: &str = "a bench of collectives";

fn main() {
    let args: Vec<String> = std::env::args().skip(1).filter(|arg| arg != "--bench").collect();
    if args.first().is_some_and(|arg| arg == "rank") {
        let member = LocalMember::join(IDENTITY).unwrap();
        let comm = world(member.next_epoch().unwrap());
        pin(1);
        while comm.barrier().is_ok() && measure(&comm).is_some() {}
        return;
    }
    let value = |name: &str| args.iter().skip_while(|arg| *arg != name).nth(1);
    let rounds = value("--rounds").map_or(5, |rounds| rounds.parse().unwrap());
    lead(value("--peer").map(String::as_str), rounds);
}

fn lead(peer: Option<&str>, rounds: usize) {
    let group = GroupOptions { identity: IDENTITY.into(), ..GroupOptions::new(2) };
    let options = LocalOptions { group, spares: 0, arena_bytes: ARENA_BYTES };
    let group = LocalGroup::spawn(&options, |_| {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.arg("rank");
        command
    });
    let group = group.unwrap();
    let comm = world(group.next_epoch().unwrap());
    // Not before: how long waits spin follows from the cores that there are.
    pin(0);
    let (mut own, mut theirs) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        comm.barrier().unwrap();
        own.push(measure(&comm).unwrap());
        theirs.extend(peer.map(ask));
    }
    println!("call       bytes    us    in place   peer   ratios, smallest to largest");
    for (row, (name, bytes)) in rows().enumerate() {
        let column = |index: usize| median(own.iter().map(|round| round[row][index]).collect());
        print!("{name:8} {bytes:9} {:7.2} {:7.2}", column(0), column(1));
        if !theirs.is_empty() {
            let peer = median(theirs.iter().map(|round| round[row]).collect());
            let ratio = |index: usize| {
                let rounds = own.iter().zip(&theirs);
                let mut ratios: Vec<f64> =
                    rounds.map(|(own, theirs)| theirs[row] / own[row][index]).collect();
                ratios.sort_by(f64::total_cmp);
                format!(
                    "{:.2} ({:.2} to {:.2})",
                    median(ratios.clone()),
                    ratios[0],
                    ratios[ratios.len() - 1]
                )
            };
            print!(" {peer:8.2}   {}, in place {}", ratio(0), ratio(1));
        }
        println!();
    }
}

/// One group, whose ranks wait while the peer runs.
fn world(link: Arc<dyn Link>) -> Comm {
    World::new(link).with_limit(Duration::from_secs(600)).all(ARENA_BYTES).unwrap()
}

/// What is measured, in this order.
fn rows() -> impl Iterator<Item = (&'static str, usize)> {
    let sizes = || SIZES.iter().map(|(bytes, _)| *bytes);
    sizes().map(|bytes| ("reduce", bytes)).chain(sizes().map(|bytes| ("gather", bytes)))
}

/// All rows: the call, and the plan whose input is made in place. None when the group has ended.
fn measure(comm: &Comm) -> Option<Vec<[f64; 2]>> {
    let mut rows = Vec::new();
    for (bytes, calls) in SIZES {
        let (mut values, mut sums) = (vec![0.0; bytes / 4], vec![0.0; bytes / 4]);
        let call = batches(comm, calls, |call| {
            values.fill(call as f32);
            comm.all_reduce(&mut values).is_ok()
        })?;
        let mut plan = comm.plan_reduce(bytes / 4);
        let planned =
            batches(comm, calls, |call| plan.run(|own| own.fill(call as f32), &mut sums).is_ok())?;
        rows.push([call, planned]);
    }
    for (bytes, calls) in SIZES {
        let (mut own, mut all) = (vec![0; bytes], vec![0; 2 * bytes]);
        let call = batches(comm, calls, |call| {
            own.fill(call as u8);
            comm.all_gather(1, &[bytes; 2], &own, &mut all).is_ok()
        })?;
        let mut plan = comm.plan_gather(1, &[bytes; 2]).ok()?;
        let planned =
            batches(comm, calls, |call| plan.run(|own| own.fill(call as u8), &mut all).is_ok())?;
        rows.push([call, planned]);
    }
    Some(rows)
}

/// Microseconds of a call.
fn batches(comm: &Comm, calls: usize, mut call: impl FnMut(usize) -> bool) -> Option<f64> {
    let mut times = Vec::new();
    for batch in 0..=BATCHES {
        comm.barrier().ok()?;
        let start = Instant::now();
        (0..calls).all(&mut call).then_some(())?;
        // The first is for warmth.
        if batch > 0 {
            times.push(start.elapsed().as_secs_f64() * 1e6 / calls as f64);
        }
    }
    Some(median(times))
}

/// One run of the peer.
fn ask(program: &str) -> Vec<f64> {
    let mut command = Command::new("mpirun");
    command.args(["--allow-run-as-root", "--bind-to", "core", "-n", "2", program]);
    let calls_of = |bytes| SIZES.iter().find(|(size, _)| *size == bytes).unwrap().1;
    for (name, bytes) in rows() {
        command.args([name.to_string(), bytes.to_string(), calls_of(bytes).to_string()]);
    }
    let output = command.output().expect("mpirun is part of Open MPI (Debian: openmpi-bin)");
    let text = String::from_utf8(output.stdout).unwrap();
    let rows: Vec<f64> = text.lines().map(|line| line.parse().unwrap()).collect();
    assert_eq!(rows.len(), 2 * SIZES.len(), "{}", String::from_utf8_lossy(&output.stderr));
    rows
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

/// Keeps this thread on one core, and what it starts.
fn pin(core: usize) {
    let mut set = CpuSet::new();
    set.set(core);
    sched_setaffinity(None, &set).unwrap();
}
