//! How fast links over a network are, beside a plain socket: two processes in network namespaces
//! joined by veth, in turns. As root: `cargo run --release -p pomona-fabric --example wires`.
#![allow(clippy::unwrap_used)]

#[path = "../tests/machines/bed.rs"]
mod bed;

use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use bed::{Bed, inside};
use pomona_fabric::link::Link;
use pomona_fabric::measure::{Pair, one_way, stream};
use pomona_fabric::rendezvous::{EpochPlan, JoinOptions, Lobby, LobbyOptions, join};
use pomona_fabric::secure::{Policy, Token};

const PATIENCE: Duration = Duration::from_secs(60);
const TOKEN: &str = "0123456789abcdef0123456789abcdef";
const PIECE: usize = 1 << 20;
const PINGS: u32 = 4000;
const PIECES: u32 = 2000;
const TURNS: usize = 7;

fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    match words.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["rank", rank, leader] => measure(rank == "0", leader),
        _ => start(),
    }
}

/// Two machines, a core for each.
fn start() {
    let bed = Bed::new(2).unwrap();
    let program = std::env::current_exe().unwrap();
    let start = |rank: usize| {
        let mut command: Command = inside(&bed.machine(rank), "taskset".as_ref());
        command.args(["-c", &rank.to_string()]).arg(&program);
        command.args(["rank", &rank.to_string(), &bed.address(0)]);
        command.stdin(Stdio::null()).spawn().unwrap()
    };
    let mut both = [start(0), start(1)];
    for child in &mut both {
        assert!(child.wait().unwrap().success());
    }
}

/// A way to measure, in microseconds and GB/s; only the first side's numbers are looked at.
type Measure = Box<dyn FnMut() -> (f64, f64)>;

fn measure(first: bool, leader: &str) {
    let mut ways: Vec<(&str, Measure)> = vec![
        ("plain socket", plain(first, leader)),
        ("tcp", linked(first, leader, Policy::Off, 7001)),
        ("tcp, sealed", linked(first, leader, Policy::Seal, 7002)),
    ];
    let mut results = vec![(Vec::new(), Vec::new()); ways.len()];
    for _ in 0..TURNS {
        for ((_, way), (times, rates)) in ways.iter_mut().zip(&mut results) {
            let (time, rate) = way();
            times.push(time);
            rates.push(rate);
        }
    }
    if !first {
        return;
    }
    println!("{TURNS} turns; median (smallest to largest)");
    println!("{:<14} {:>26} {:>26}", "", "8 bytes one way, us", "stream of 1 MiB, GB/s");
    for ((name, _), (times, rates)) in ways.iter().zip(results) {
        println!("{name:<14} {:>26} {:>26}", spread(times), spread(rates));
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

fn linked(first: bool, leader: &str, policy: Policy, port: u16) -> Measure {
    let link: Box<dyn Link> = Box::new(link(first, leader, policy, port));
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

fn link(first: bool, leader: &str, policy: Policy, port: u16) -> impl Link + use<> {
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
    let plan = EpochPlan { epoch: 1, arena_bytes: 16 * PIECE, timeout: PATIENCE, task };
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
