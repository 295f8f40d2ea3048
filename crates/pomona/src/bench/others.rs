//! Whether the machine had time for a measurement: which share of its cores' time went to
//! processes that had no part in it (proc(5)).

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::IpAddr;

use hyper::Uri;
use serde::Serialize;

/// Share of all cores' time from which on a result is not called one. Neighbours that take it
/// slow a measurement by about as much, and by more where they share memory or caches.
const BUSY_SHARE: f64 = 0.05;

/// What others did meanwhile.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Neighbours {
    /// Their share of the time of all cores, the hypervisor's included; `None` where the system
    /// does not tell, or the measured server's process is not among those that it shows.
    pub others_share: Option<f64>,
    /// Whether that is too much for a result.
    pub busy: bool,
}

impl Neighbours {
    fn of(others_share: Option<f64>) -> Neighbours {
        Neighbours { others_share, busy: others_share.is_some_and(|share| share > BUSY_SHARE) }
    }

    /// A line for the report.
    pub fn words(&self) -> String {
        match self.others_share {
            None => "others   not known: the system does not show the processes".to_owned(),
            Some(share) => format!("others   took {:.1} % of the cores' time", share * 100.0),
        }
    }
}

/// The machine was busy with other things: there are figures, but no result.
#[derive(Debug, thiserror::Error)]
#[error(
    "the machine was busy: other processes took {:.0} % of its cores' time, more than {:.0} %. \
     The figures above are no result; repeat when it is quiet",
    .0 * 100.0, BUSY_SHARE * 100.0
)]
pub struct Busy(pub f64);

/// A watch over a measurement: of this process, its children, and servers on this machine.
pub struct Watch {
    /// Of processes that are measured; `None` when one of them was not found.
    roots: Option<BTreeSet<u32>>,
    begun: Option<Ticks>,
}

/// Time in clock ticks.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Ticks {
    /// Of all cores, idle or not.
    all: u64,
    /// Of those at work.
    busy: u64,
    /// Of what is measured.
    ours: u64,
}

impl Watch {
    /// Begins to watch. Servers at `urls` are part of the measurement.
    pub fn start(urls: &[&str]) -> Watch {
        let servers: Option<Vec<Vec<u32>>> = urls.iter().map(|url| servers_of(url)).collect();
        let own = std::process::id();
        let roots = servers.map(|pids| pids.into_iter().flatten().chain([own]).collect());
        let begun = roots.as_ref().and_then(Ticks::now);
        Watch { roots, begun }
    }

    /// What others did since.
    pub fn look(&self) -> Neighbours {
        let now = self.roots.as_ref().and_then(Ticks::now);
        Neighbours::of(self.begun.zip(now).and_then(|(begun, now)| now.others_since(&begun)))
    }
}

impl Ticks {
    fn now(roots: &BTreeSet<u32>) -> Option<Ticks> {
        let stat = fs::read_to_string("/proc/stat").ok()?;
        let (all, busy) = cores(&stat)?;
        let processes: BTreeMap<u32, Process> = process_ids()
            .filter_map(|id| {
                let stat = fs::read_to_string(format!("/proc/{id}/stat")).ok()?;
                Some((id, Process::of(&stat)?))
            })
            .collect();
        Some(Ticks { all, busy, ours: ours(&processes, roots) })
    }

    fn others_since(&self, begun: &Ticks) -> Option<f64> {
        let all = self.all.checked_sub(begun.all).filter(|all| *all > 0)?;
        // A tick that ends between the readings may be counted once only.
        let busy = self.busy.saturating_sub(begun.busy);
        let others = busy.saturating_sub(self.ours.saturating_sub(begun.ours));
        Some(others as f64 / all as f64)
    }
}

/// Ticks of all cores, and of those at work: the first line of `/proc/stat`.
fn cores(stat: &str) -> Option<(u64, u64)> {
    let line = stat.lines().next()?.strip_prefix("cpu ")?;
    let ticks: Vec<u64> = line.split_whitespace().map_while(|word| word.parse().ok()).collect();
    // user nice system idle iowait irq softirq steal; guests are counted with user and nice.
    let all: u64 = ticks.iter().take(8).sum();
    let idle: u64 = ticks.get(3..5)?.iter().sum();
    Some((all, all - idle))
}

/// What `/proc/PID/stat` says of a process.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Process {
    parent: u32,
    /// Its own, and those of its children that it has waited for.
    ticks: u64,
}

impl Process {
    fn of(stat: &str) -> Option<Process> {
        // The name, in parentheses, may hold anything.
        let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
        // Fields 14 to 17 of the manual; the first one here is number 3.
        let ticks = fields.get(11..15)?.iter().map(|word| word.parse::<u64>().ok());
        Some(Process { parent: fields.get(1)?.parse().ok()?, ticks: ticks.sum::<Option<u64>>()? })
    }
}

/// Ticks of `roots` and their descendants.
fn ours(processes: &BTreeMap<u32, Process>, roots: &BTreeSet<u32>) -> u64 {
    let is_ours = |mut id: u32| {
        // Parents are older; a chain is not longer than there are processes.
        for _ in 0..processes.len() {
            if roots.contains(&id) {
                return true;
            }
            let Some(process) = processes.get(&id) else { return false };
            id = process.parent;
        }
        false
    };
    processes.iter().filter(|(id, _)| is_ours(**id)).map(|(_, process)| process.ticks).sum()
}

fn process_ids() -> impl Iterator<Item = u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

/// The processes that listen at an address of this machine; empty for one elsewhere, `None` when
/// there must be one and it is not to be seen.
fn servers_of(url: &str) -> Option<Vec<u32>> {
    let Ok(uri) = url.parse::<Uri>() else { return Some(Vec::new()) };
    let host = uri.host().unwrap_or_default().trim_matches(['[', ']']);
    let here = host == "localhost" || host.parse().is_ok_and(|ip: IpAddr| ip.is_loopback());
    if !here {
        return Some(Vec::new());
    }
    let https = uri.scheme_str() == Some("https");
    let port = uri.port_u16().unwrap_or(if https { 443 } else { 80 });
    let tables = ["/proc/net/tcp", "/proc/net/tcp6"].map(fs::read_to_string);
    let inodes: BTreeSet<String> =
        tables.iter().flatten().flat_map(|table| listeners(table, port)).collect();
    let holds = |id: &u32| {
        let files = fs::read_dir(format!("/proc/{id}/fd")).into_iter().flatten().flatten();
        let mut targets = files.filter_map(|file| fs::read_link(file.path()).ok());
        targets.any(|target| inodes.contains(target.to_string_lossy().as_ref()))
    };
    let servers: Vec<u32> = process_ids().filter(holds).collect();
    (!servers.is_empty()).then_some(servers)
}

/// Listening sockets of a port in `/proc/net/tcp`, as links to them read.
fn listeners(table: &str, port: u16) -> Vec<String> {
    const LISTEN: &str = "0A";
    let socket = |line: &str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let (_, local) = fields.get(1)?.rsplit_once(':')?;
        let same = u16::from_str_radix(local, 16) == Ok(port) && fields.get(3) == Some(&LISTEN);
        same.then(|| fields.get(9).map(|inode| format!("socket:[{inode}]"))).flatten()
    };
    table.lines().filter_map(socket).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_of_cores_is_busy_unless_idle_or_waiting() {
        let stat = "cpu  10 20 30 400 50 6 7 8 9 9\ncpu0 1 1 1 1 1 1 1 1 0 0\n";
        assert_eq!(cores(stat), Some((531, 81)));
        assert_eq!(cores("intr 5"), None);
    }

    #[test]
    fn a_process_may_have_any_name() {
        let stat = "42 (a) b (c) S 7 42 42 0 -1 4194304 1 2 3 4 100 20 3 4 20 0 1 0 5 6 7";
        assert_eq!(Process::of(stat), Some(Process { parent: 7, ticks: 127 }));
        assert_eq!(Process::of("42 (x"), None);
    }

    #[test]
    fn descendants_are_ours_and_others_are_not() {
        let process = |parent, ticks| Process { parent, ticks };
        let all = BTreeMap::from([
            (1, process(0, 1000)),
            (5, process(1, 1)),
            (6, process(5, 10)),
            (7, process(6, 100)),
            (9, process(1, 5000)),
        ]);
        assert_eq!(ours(&all, &BTreeSet::from([5])), 111);
        assert_eq!(ours(&all, &BTreeSet::from([6, 9])), 5110);
    }

    #[test]
    fn others_are_what_remains_of_busy_time() {
        let begun = Ticks { all: 1000, busy: 500, ours: 100 };
        let now = Ticks { all: 1200, busy: 650, ours: 230 };
        assert_eq!(now.others_since(&begun), Some(0.1));
        assert_eq!(begun.others_since(&begun), None);
        assert!(Neighbours::of(Some(0.06)).busy && !Neighbours::of(Some(0.04)).busy);
        assert!(!Neighbours::of(None).busy);
    }

    #[test]
    fn a_listener_is_found_by_its_port() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when\n\
             0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000 0 0 777 1\n\
             1: 0100007F:1F90 0100007F:9999 01 00000000:00000000 00:00000000 00000000 0 0 888 1\n";
        assert_eq!(listeners(table, 8080), ["socket:[777]"]);
        assert!(listeners(table, 8081).is_empty());
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_server_of_this_process_is_this_process() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        assert_eq!(servers_of(&url), Some(vec![std::process::id()]));
        assert_eq!(servers_of("http://192.0.2.1:80"), Some(Vec::new()));
        drop(listener);
        assert_eq!(servers_of(&url), None);
    }
}
