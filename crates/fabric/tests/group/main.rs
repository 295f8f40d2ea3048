//! Groups of real processes: how they begin, how they lose ranks, and what is left of them.
//!
//! Rank 0 is the test; the other ranks are this binary again, running the test `rank_process`. The
//! figures of 100 kills: `cargo test -p pomona-fabric --test group -- --ignored --nocapture
//! hundred`.
#![allow(clippy::unwrap_used)]

mod kills;
mod leftovers;
mod rank;
mod rebuilds;

use std::process::{Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};

use pomona_fabric::group::GroupOptions;
use pomona_fabric::group::local::{LocalGroup, LocalMember, LocalOptions};

/// Bytes of each arena.
const ARENA_BYTES: usize = 4 << 20;

/// One group at a time: tests measure times, and count descriptors.
static ONE: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    ONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn options(ranks: usize, spares: usize) -> LocalOptions {
    let group = GroupOptions { identity: rank::IDENTITY.into(), ..GroupOptions::new(ranks) };
    LocalOptions { group, spares, arena_bytes: ARENA_BYTES }
}

/// Starts this binary for each rank but 0.
fn spawn(options: &LocalOptions) -> LocalGroup {
    LocalGroup::spawn(options, |_| {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--ignored", "--exact", "rank_process"]).stdout(Stdio::null());
        command
    })
    .unwrap()
}

#[test]
#[ignore = "a rank of the other tests, which start it"]
fn rank_process() {
    let member = LocalMember::join(rank::IDENTITY).unwrap();
    rank::follow(&member);
}
