//! The processes of a divided model: the first rank starts the others on this machine, and sees
//! when one ends.

use std::io::stdin;
use std::os::fd::AsFd;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use anyhow::{Context, Result};
use pomona_fabric::link::Link;
use pomona_fabric::link::shm::{ShmEpoch, ShmOptions};
use pomona_types::{GroupError, LostCause};

use crate::cli::EngineArgs;

/// Of each rank: what it is sent lies there until it has taken it. Only what is used takes memory.
const ARENA_BYTES: usize = 256 << 20;

/// The other ranks, running.
pub struct Crew {
    link: Arc<dyn Link>,
    ending: Arc<AtomicBool>,
    watchers: Vec<JoinHandle<()>>,
}

impl Crew {
    /// Starts ranks 1 and up of one of a model's replicas as processes of this machine.
    pub fn start(model: &str, replica: usize, args: &EngineArgs) -> Result<Crew> {
        let ranks = args.parallel.division().ranks();
        let epoch = ShmEpoch::create(ShmOptions::new(ranks, ARENA_BYTES))
            .context("cannot make the memory that ranks share")?;
        let link: Arc<dyn Link> = Arc::new(epoch.link(0).context("an epoch has a rank 0")?);
        let program = std::env::current_exe().context("cannot find this program's file")?;
        let ending = Arc::new(AtomicBool::new(false));
        let mut crew = Crew { link, ending, watchers: Vec::new() };
        for rank in 1..ranks {
            let child = Command::new(&program)
                .args(["rank", model, "--rank", &rank.to_string()])
                .args(["--replica", &replica.to_string()])
                .args(args.to_flags())
                .stdin(Stdio::from(epoch.descriptor().try_clone_to_owned()?))
                .spawn()
                .with_context(|| format!("cannot start the process of rank {rank}"))?;
            crew.watch(rank, child)?;
        }
        Ok(crew)
    }

    /// The first rank's own ends.
    pub fn link(&self) -> Arc<dyn Link> {
        self.link.clone()
    }

    /// Has a thread wait for the process's end, which ends the group unless that is its time.
    fn watch(&mut self, rank: usize, mut child: Child) -> Result<()> {
        let (link, ending) = (self.link.clone(), self.ending.clone());
        let watch = move || {
            let _ = child.wait();
            if !ending.load(Ordering::Acquire) {
                let (epoch, cause) = (link.epoch(), LostCause::Exited);
                link.abort(GroupError::PeerLost { rank, epoch, cause });
            }
        };
        let name = format!("pomona-rank-{rank}");
        self.watchers.push(std::thread::Builder::new().name(name).spawn(watch)?);
        Ok(())
    }
}

impl Drop for Crew {
    fn drop(&mut self) {
        self.ending.store(true, Ordering::Release);
        // Those that were told so have ended; the others end now.
        self.link.abort(GroupError::Ended("the first rank has ended".to_owned()));
        for watcher in self.watchers.drain(..) {
            // It cannot panic; there is nothing to learn from it.
            let _ = watcher.join();
        }
    }
}

/// Takes the place of a rank in the process that was started for it.
pub fn join(rank: usize) -> Result<Arc<dyn Link>> {
    let shared = stdin().as_fd().try_clone_to_owned()?;
    let epoch = ShmEpoch::open(shared).context(
        "`pomona rank` is started by the first rank: write --tensor-parallel-size or the like to \
         `pomona serve`",
    )?;
    let link = epoch.link(rank).with_context(|| format!("there is no rank {rank}"))?;
    Ok(Arc::new(link))
}

/// Tells the other ranks why this one ends, if it is not because the group has.
pub fn leave(link: &dyn Link, outcome: Result<()>) -> Result<()> {
    let Err(error) = outcome else { return Ok(()) };
    if matches!(link.aborted(), Some(GroupError::Ended(_))) {
        return Ok(());
    }
    let (rank, epoch) = (link.rank(), link.epoch());
    let cause = LostCause::Failed(format!("{error:#}"));
    link.abort(GroupError::PeerLost { rank, epoch, cause });
    Err(error.context(format!("rank {rank}")))
}
