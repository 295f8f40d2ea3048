//! Ranks that are processes of this machine. They meet over shared memory, whatever is measured.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use pomona_fabric::coll::{Comm, World};
use pomona_fabric::group::GroupOptions;
use pomona_fabric::group::local::{LocalGroup, LocalMember, LocalOptions};
use pomona_fabric::link::Link;
use pomona_fabric::link::mesh::MeshOptions;
use pomona_fabric::link::ofi::{OfiLink, OfiOptions};
use pomona_fabric::link::tcp::{TcpLink, TcpOptions};
use pomona_fabric::secure::EpochSecret;
use pomona_types::Collective;

use super::{Job, Times, Wire, limits, trial};
use crate::crew;

/// For what ranks say to each other before and after.
const CONTROL_BYTES: usize = 1 << 20;
/// For what is measured: of each rank, and among many ranks more, so that no call of the usual
/// sizes is cut in pieces, as none is in a server's arenas. Only what is used takes memory.
const ARENA_BYTES: usize = 64 << 20;
/// How long a call may take.
const LIMIT: Duration = Duration::from_secs(60);
/// How long ranks may take to connect.
const CONNECT_LIMIT: Duration = Duration::from_secs(30);
/// How long a rank goes on looking for the last of what it sent: libfabric moves nothing else.
const LAST_LOOKS: Duration = Duration::from_millis(50);

/// Starts processes, measures with them, and ends them. `tick` is called for each part that is done
/// of so many.
pub fn measure(job: &Job, tick: &mut (dyn FnMut(usize, usize) + Send)) -> Result<Times> {
    let program = std::env::current_exe().context("cannot find this program's file")?;
    let group =
        GroupOptions { identity: identity(), ranks_min: job.ranks, ..GroupOptions::new(job.ranks) };
    let arena_bytes = CONTROL_BYTES * job.ranks + arena_bytes(job.ranks);
    let options = LocalOptions { group, spares: 0, arena_bytes };
    let start = |_| {
        let mut command = Command::new(&program);
        command.args(["fabric", "rank"]);
        command
    };
    let group = LocalGroup::spawn(&options, start).context("cannot start the ranks' processes")?;
    let link = group.next_epoch().context("the ranks did not start")?;
    // On a thread of its own, which may be kept to a core.
    let work = || take_part(link.clone(), serde_json::to_vec(job)?, tick);
    let outcome = std::thread::scope(|scope| {
        let thread = scope.spawn(work);
        thread.join().unwrap_or_else(|_| bail!("the first rank failed"))
    });
    let mut times = None;
    crew::leave(link.as_ref(), outcome.map(|done| times = Some(done)))?;
    times.context("the ranks ended before they were done")
}

/// A process that [`measure`] has started.
pub fn follow() -> Result<()> {
    let member = LocalMember::join(&identity())
        .context("`pomona fabric rank` is started by `pomona fabric bench`")?;
    // An error means that there is no measurement any more.
    let Ok(link) = member.next_epoch() else { return Ok(()) };
    let outcome = take_part(link.clone(), Vec::new(), &mut |_, _| {});
    crew::leave(link.as_ref(), outcome.map(drop))?;
    crew::await_end(link.as_ref());
    Ok(())
}

fn identity() -> String {
    format!("pomona {} fabric", env!("CARGO_PKG_VERSION"))
}

fn arena_bytes(ranks: usize) -> usize {
    ARENA_BYTES / 2 * ranks.max(2)
}

/// One rank's part; the first one brings the job.
fn take_part(
    link: Arc<dyn Link>,
    mut job: Vec<u8>,
    tick: &mut (dyn FnMut(usize, usize) + Send),
) -> Result<Times> {
    let (rank, ranks) = (link.rank(), link.ranks());
    let mut world = World::new(link).with_limit(LIMIT);
    let control = world.all(CONTROL_BYTES * ranks)?;
    control.broadcast(0, &mut job)?;
    let job: Job = serde_json::from_slice(&job).context("the job makes no sense")?;
    let cores = pomona_device::usable_cores();
    if ranks <= cores.len() {
        pomona_device::restrict_to(&cores[rank..=rank]);
    }
    let limits = limits::measure(&control, &job)?;
    let (mut comm, link) = match job.wire {
        Wire::Shm => (world.all(arena_bytes(ranks))?, None),
        Wire::Tcp | Wire::Ofi => {
            let link = connect(&control, &job)?;
            let comm = World::new(link.clone()).with_limit(LIMIT).all(arena_bytes(ranks))?;
            (comm, Some(link))
        }
    };
    let times = trial::run(&mut comm, &job, tick)?;
    if let Some(link) = link {
        let begun = std::time::Instant::now();
        while begun.elapsed() < LAST_LOOKS {
            link.count((rank + 1) % ranks, 0);
        }
    }
    control.barrier()?;
    Ok(Times { limits, times })
}

/// Joins the ranks by the transport that is to be measured.
fn connect(control: &Comm, job: &Job) -> Result<Arc<dyn Link>> {
    let (rank, ranks) = (control.rank(), control.ranks());
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("no port for a rank")?;
    let port = listener.local_addr().context("no port for a rank")?.port();
    let mut ports = vec![0; 2 * ranks];
    control.all_gather(1, &vec![2; ranks], &port.to_le_bytes(), &mut ports)?;
    let (ports, _) = ports.as_chunks::<2>();
    let address =
        |port: &[u8; 2]| SocketAddr::from((Ipv4Addr::LOCALHOST, u16::from_le_bytes(*port)));
    let mut secret = match rank {
        0 => EpochSecret::generate().to_hex().into_bytes(),
        _ => Vec::new(),
    };
    control.broadcast(0, &mut secret)?;
    let secret = std::str::from_utf8(&secret).ok().and_then(EpochSecret::from_hex);
    let mesh = MeshOptions {
        rank,
        addresses: ports.iter().map(address).collect(),
        epoch: 1,
        secret: secret.context("the first rank sent no secret")?,
        policy: job.policy,
        timeout: CONNECT_LIMIT,
    };
    let bytes = arena_bytes(ranks);
    Ok(match &job.provider {
        None => Arc::new(TcpLink::connect(&listener, &TcpOptions::new(mesh, bytes))?),
        Some(name) => Arc::new(OfiLink::connect(&listener, &OfiOptions::new(mesh, bytes, name))?),
    })
}
