//! How fast links over a network are, beside a plain socket: two processes in network namespaces
//! joined by veth, in turns. As root: `cargo run --release -p pomona-fabric --example wires`. A
//! program that is given as its word is run after each round as `PROGRAM tcp;ofi_rxm OWN LEADER
//! [first]`: `tools/ofi/probe.c`, which is libfabric linked directly.
#![allow(clippy::unwrap_used)]

#[path = "../tests/machines/bed.rs"]
mod bed;

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bed::{Bed, inside};
use pomona_fabric::link::Link;
use pomona_fabric::link::ofi::provider;
use pomona_fabric::measure::{Pair, one_way, stream};
use pomona_fabric::rendezvous::{EpochPlan, JoinOptions, Lobby, LobbyOptions, Transport, join};
use pomona_fabric::secure::{Policy, Token};

const PATIENCE: Duration = Duration::from_secs(60);
const TOKEN: &str = "0123456789abcdef0123456789abcdef";
const PIECE: usize = 1 << 20;
const PINGS: u32 = 4000;
const PIECES: u32 = 500;
const TURNS: usize = 2;
const ROUNDS: usize = 5;

fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    match words.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["rank", rank, leader] => measure(rank == "0", leader),
        [] => start(None),
        [probe] => start(Some(probe)),
        _ => panic!("a program to measure beside, or nothing"),
    }
}

/// Two machines, a core for each; each round is a run of our two processes, then of the program's.
fn start(probe: Option<&str>) {
    let bed = Bed::new(2).unwrap();
    let own = std::env::current_exe().unwrap();
    let own = own.to_str().unwrap();
    let mut results: BTreeMap<String, (Vec<f64>, Vec<f64>)> = BTreeMap::new();
    for _ in 0..ROUNDS {
        let mut lines =
            both(&bed, |rank| [own, "rank", rank, &bed.address(0)].map(str::to_owned).to_vec());
        if let Some(probe) = probe {
            lines += &both(&bed, |rank| {
                let (at, leader) = (bed.address(rank.parse().unwrap()), bed.address(0));
                let mut words = vec![probe, "tcp;ofi_rxm", &at, &leader];
                words.extend((rank == "0").then_some("first"));
                words.into_iter().map(str::to_owned).collect()
            });
        }
        for line in lines.lines() {
            // A name, then the time and its unit, then the rate and its unit.
            let words: Vec<&str> = line.split(' ').collect();
            let [name @ .., time, _, rate, _] = &words[..] else { panic!("{line}") };
            let (times, rates) = results.entry(name.join(" ")).or_default();
            times.push(time.parse().unwrap());
            rates.push(rate.parse().unwrap());
        }
    }
    println!("{ROUNDS} rounds; median (smallest to largest)");
    println!("{:<18} {:>24} {:>24}", "", "8 bytes one way, us", "stream of 1 MiB, GB/s");
    for (name, (times, rates)) in results {
        println!("{name:<18} {:>24} {:>24}", spread(times), spread(rates));
    }
}

/// Runs a process on each machine; what the first has printed.
fn both(bed: &Bed, words: impl Fn(&str) -> Vec<String>) -> String {
    let start = |rank: usize| {
        let place = rank.to_string();
        let mut command: Command = inside(&bed.machine(rank), "taskset".as_ref());
        command.args(["-c", &place]).args(words(&place));
        command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap()
    };
    let (first, second) = (start(0), start(1));
    let first = first.wait_with_output().unwrap();
    assert!(first.status.success() && second.wait_with_output().unwrap().status.success());
    String::from_utf8(first.stdout).unwrap()
}

/// A way to measure, in microseconds and GB/s; only the first side's numbers are looked at.
type Measure = Box<dyn FnMut() -> (f64, f64)>;

fn measure(first: bool, leader: &str) {
    let mut ways: Vec<(&str, Measure)> = vec![
        ("plain socket", plain(first, leader)),
        ("tcp", linked(first, leader, (Policy::Off, 7001, false))),
        ("tcp, sealed", linked(first, leader, (Policy::Seal, 7002, false))),
    ];
    if provider(Ipv4Addr::LOCALHOST.into()).is_ok() {
        ways.push(("libfabric", linked(first, leader, (Policy::Auth, 7003, true))));
    }
    for _ in 0..TURNS {
        for (name, way) in &mut ways {
            let (time, rate) = way();
            if first {
                println!("{name} {time} us {rate} GB/s");
            }
        }
    }
}

fn spread(mut all: Vec<f64>) -> String {
    all.sort_by(f64::total_cmp);
    format!("{:.2} ({:.2} to {:.2})", all[all.len() / 2], all[0], all[all.len() - 1])
}

fn median(mut all: Vec<Duration>) -> f64 {
    all.sort();
    all[all.len() / 2].as_secs_f64() * 1e6
}

fn rate(time: Duration) -> f64 {
    (PIECE as f64 * f64::from(PIECES)) / time.as_secs_f64() / 1e9
}

/// Policy, the leader's port, and whether by libfabric.
type Way = (Policy, u16, bool);

fn linked(first: bool, leader: &str, way: Way) -> Measure {
    let link = link(first, leader, way);
    let mut seen = 0;
    Box::new(move || {
        let pair = Pair { peer: usize::from(first), first, bytes: 8, rounds: PINGS, seen };
        let time = median(one_way(&*link, pair).unwrap());
        let pair = Pair { bytes: PIECE, rounds: PIECES, seen: seen + PINGS, ..pair };
        let rate = rate(stream(&*link, pair).unwrap());
        seen += PINGS + PIECES;
        (time, rate)
    })
}

fn link(first: bool, leader: &str, (policy, port, libfabric): Way) -> Arc<dyn Link> {
    let address = format!("{leader}:{port}");
    let token: Token = TOKEN.parse().unwrap();
    let version = "measured".to_owned();
    if !first {
        let options = JoinOptions {
            leader: address,
            token,
            policy,
            version,
            data: None,
            patience: PATIENCE,
            admission: PATIENCE,
        };
        let seat = join(&options, |_| Ok([0; 32])).unwrap();
        return seat.start(None).unwrap().link;
    }
    let task = String::new();
    let (fingerprint, preparation) = ([0; 32], PATIENCE);
    let options =
        LobbyOptions { token, policy, version, task: task.clone(), fingerprint, preparation };
    let lobby = Lobby::open(address.as_str(), options).unwrap();
    let members = lobby.take(1, PATIENCE).unwrap();
    let transport = if libfabric { lobby.libfabric(&members).unwrap() } else { Transport::Tcp };
    let (arena_bytes, timeout) = (16 * PIECE, PATIENCE);
    let plan = EpochPlan { epoch: 1, transport, arena_bytes, timeout, task };
    lobby.start(&members, &plan).unwrap()
}

/// The same with nothing but a socket that is looked at without sleeping.
fn plain(first: bool, leader: &str) -> Measure {
    let address = format!("{leader}:7000");
    let mut socket = if first {
        TcpListener::bind(address).unwrap().accept().unwrap().0
    } else {
        let begun = Instant::now();
        loop {
            match TcpStream::connect(&address) {
                Ok(socket) => break socket,
                Err(_) if begun.elapsed() < PATIENCE => {}
                Err(error) => panic!("{error}"),
            }
        }
    };
    socket.set_nodelay(true).unwrap();
    let mut piece = vec![1; PIECE];
    Box::new(move || {
        socket.set_nonblocking(true).unwrap();
        let mut times = Vec::new();
        for _ in 0..PINGS {
            let begun = Instant::now();
            if first {
                socket.write_all(&[1; 8]).unwrap();
            }
            let mut have = 0;
            while have < 8 {
                match socket.read(&mut piece[..8]) {
                    Ok(got) => have += got,
                    Err(error) => assert_eq!(error.kind(), io::ErrorKind::WouldBlock),
                }
            }
            if !first {
                socket.write_all(&[1; 8]).unwrap();
            }
            times.push(begun.elapsed() / 2);
        }
        socket.set_nonblocking(false).unwrap();
        let begun = Instant::now();
        for _ in 0..PIECES {
            if first {
                socket.write_all(&piece).unwrap();
            } else {
                socket.read_exact(&mut piece).unwrap();
            }
        }
        if first {
            socket.read_exact(&mut [0; 1]).unwrap();
        } else {
            socket.write_all(&[1]).unwrap();
        }
        (median(times), rate(begun.elapsed()))
    })
}
