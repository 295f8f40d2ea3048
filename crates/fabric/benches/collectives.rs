//! What collectives over shared memory cost among two ranks that are threads.
//!
//!     cargo bench -p pomona-fabric
#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::time::Instant;

use pomona_fabric::coll::{Algorithm, Comm, World};
use pomona_fabric::link::shm::{ShmEpoch, ShmOptions};
use pomona_types::Collective;

fn median(comm: &Comm, rounds: usize, mut call: impl FnMut()) -> f64 {
    let mut times: Vec<f64> = (0..rounds)
        .map(|_| {
            comm.barrier().unwrap();
            let start = Instant::now();
            call();
            start.elapsed().as_secs_f64() * 1e6
        })
        .collect();
    times.sort_by(f64::total_cmp);
    times[rounds / 2]
}
fn stream(rounds: usize, mut call: impl FnMut()) -> f64 {
    let mut times: Vec<f64> = (0..20)
        .map(|_| {
            let start = Instant::now();
            (0..rounds / 20).for_each(|_| call());
            start.elapsed().as_secs_f64() * 1e6 / (rounds / 20) as f64
        })
        .collect();
    times.sort_by(f64::total_cmp);
    times[10]
}

fn main() {
    let epoch = ShmEpoch::create(ShmOptions::new(2, 32 << 20)).unwrap();
    let run = |rank: usize| {
        let mut comm = World::new(Arc::new(epoch.link(rank).unwrap())).all(32 << 20).unwrap();
        for bytes in [100, 4 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20] {
            let rounds = (400_000_000 / (bytes + 20_000)).min(20_000);
            let mut line = format!("{bytes:8}");
            for algorithm in [Algorithm::OneShot, Algorithm::TwoShot] {
                comm.force(Some(algorithm));
                let mut values = vec![0.0; bytes / 4];
                let b = median(&comm, rounds, || comm.all_reduce(&mut values).unwrap());
                let s = stream(rounds, || comm.all_reduce(&mut values).unwrap());
                line += &format!("  {algorithm:?} {b:9.2} {s:9.2}");
            }
            comm.force(Some(Algorithm::OneShot));
            let mut values = vec![0.0; bytes / 4];
            let mut plan = comm.plan_reduce(bytes / 4);
            let b = stream(rounds, || plan.run(|_| {}, &mut values).unwrap());
            let own = vec![1; bytes];
            let mut all = vec![0; 2 * bytes];
            let g = stream(rounds, || comm.all_gather(1, &[bytes; 2], &own, &mut all).unwrap());
            line += &format!("  in place {b:9.2}  gather {g:9.2}");
            if rank == 0 {
                println!("{line}");
            }
        }
        let b = stream(20000, || comm.barrier().unwrap());
        if rank == 0 {
            println!("barrier {b:9.3}");
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(|| run(1));
        run(0);
    });
}
