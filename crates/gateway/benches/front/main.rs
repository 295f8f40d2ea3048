//! The front end without a model behind it: what an answer costs, and how much later than the
//! engine's word a client reads it.
//!
//!     cargo bench -p pomona-gateway \
//!         [-- requests|scrapes|streams|together|apart [gateway|tasks|writes] [busy]]
//!
//! The real gateway serves on loopback, with a byte-level BPE tokenizer and the chat template of
//! Qwen 3 (both from the golden files of `pomona-text`), its log off. The client runs in this
//! process and takes its share of the same cores, which is printed beside the server's. Figures are
//! medians of several rounds with the smallest and the largest; CPU time is what Linux counts for
//! the threads. With `busy`, as many threads as there are cores compute meanwhile. Fails where a
//! promise of `docs/promises.md` does not hold; what is added to a token's time is measured and not
//! promised. It is shown beside what two bare servers add in the same minute: one with a task for
//! each connection, and one that writes from the replica's thread. What all have in common is the
//! machine's and its neighbours'.
#![allow(clippy::unwrap_used)]

mod client;
mod cpu;
mod floor;
mod model;
mod replica;
mod scrapes;

use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pomona_gateway::{Config, SamplingDefaults, ServedModel};

use client::Load;
use floor::Way;
use replica::{Pace, PacedReplica};

const ROUNDS: usize = 5;
/// How long a round of requests lasts.
const ROUND: Duration = Duration::from_secs(1);
/// Requests under way at once, each on a connection of its own.
const CONNECTIONS: usize = 64;
/// Tokens of each answer.
const ANSWER_TOKENS: usize = 16;
/// Streams at once, and the tokens that each gets, one per interval.
const STREAMS: usize = 256;
const STREAM_TOKENS: usize = 50;
const INTERVAL: Duration = Duration::from_millis(50);
/// What the server's threads are called: ours, and those of the gateway that write.
const SERVER: &str = "server";
const WRITER: &str = "pomona-writer";

/// What is promised of whole answers.
const REQUESTS_PER_S_MIN: f64 = 10_000.0;

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).filter(|w| !w.starts_with('-')).collect();
    let wanted = |what: &str| words.is_empty() || words.iter().any(|word| word == what);
    let cores = std::thread::available_parallelism().unwrap().get();
    if words.iter().any(|word| word == "busy") {
        // As a model's threads would; to the end of the process.
        (0..cores).for_each(|_| {
            drop(std::thread::spawn(|| {
                loop {
                    std::hint::spin_loop()
                }
            }))
        });
    }
    println!("{cores} cores, shared by server, client and replica");
    let kept = !wanted("requests") || requests();
    if wanted("scrapes") {
        scrapes::measure();
    }
    for pace in [Pace::Together, Pace::Apart] {
        if wanted("streams") || wanted(pace.word()) {
            streams(pace, &words);
        }
    }
    if kept {
        return ExitCode::SUCCESS;
    }
    println!("a promise is broken: {REQUESTS_PER_S_MIN} requests/s");
    ExitCode::FAILURE
}

/// Requests that are answered at once.
fn requests() -> bool {
    let server = Server::start(replica::null(ANSWER_TOKENS));
    println!(
        "\n{CONNECTIONS} connections, {} tokens in a chat's prompt, {ANSWER_TOKENS} in an answer",
        model::chat_tokens()
    );
    println!(
        "answers                     requests/s (min to max)   CPU us/request: server, client"
    );
    let mut kept = true;
    for load in Load::ALL {
        let mut rounds: Vec<(f64, f64, f64)> = (0..ROUNDS)
            .map(|_| {
                let before = (cpu::of_threads(&[SERVER, WRITER]), cpu::own());
                let (count, seconds) = client::saturate(server.address, load, CONNECTIONS, ROUND);
                let us = |seconds: f64| seconds * 1e6 / count as f64;
                let (server, client) = (cpu::of_threads(&[SERVER, WRITER]), cpu::own());
                (count as f64 / seconds, us(server - before.0), us(client - before.1))
            })
            .collect();
        rounds.sort_by(|a, b| a.0.total_cmp(&b.0));
        let (median, server, client) = rounds[ROUNDS / 2];
        let (min, max) = (rounds[0].0, rounds[ROUNDS - 1].0);
        println!(
            "{:<25} {median:>10.0} ({min:.0} to {max:.0}) {server:>12.1} {client:>8.1}",
            load.name()
        );
        kept &= load.streamed() || median >= REQUESTS_PER_S_MIN;
    }
    kept
}

/// Streams that get their tokens at a pace.
fn streams(pace: Pace, words: &[String]) {
    println!(
        "\n{STREAMS} streams of chats, a token each every {} ms, {}",
        INTERVAL.as_millis(),
        pace.name()
    );
    println!(
        "from        added ms: p50 (min to max)   p99 (min to max)   CPU us/token: server, client"
    );
    let mut fronts = vec![Front::Gateway, Front::Bare(Way::Tasks), Front::Bare(Way::Direct)];
    if fronts.iter().any(|front| words.iter().any(|word| word == front.name())) {
        fronts.retain(|front| words.iter().any(|word| word == front.name()));
    }
    let mut found = vec![Vec::with_capacity(ROUNDS); fronts.len()];
    for _ in 0..ROUNDS {
        for (front, rounds) in fronts.iter().zip(&mut found) {
            rounds.push(paced_round(*front, pace));
        }
    }
    for (front, mut rounds) in fronts.into_iter().zip(found) {
        let mut column = |at: usize| {
            rounds.sort_by(|a: &[f64; 4], b| a[at].total_cmp(&b[at]));
            (rounds[ROUNDS / 2][at], rounds[0][at], rounds[ROUNDS - 1][at])
        };
        let [p50, p99, server, client] = [0, 1, 2, 3].map(&mut column);
        println!(
            "{:<8} {:>8.3} ({:.3} to {:.3}) {:>8.3} ({:.3} to {:.3}) {:>8.1} {:>8.1}",
            front.name(),
            p50.0,
            p50.1,
            p50.2,
            p99.0,
            p99.1,
            p99.2,
            server.0,
            client.0
        );
    }
}

/// Who serves.
#[derive(Clone, Copy)]
enum Front {
    Gateway,
    Bare(Way),
}

impl Front {
    fn name(self) -> &'static str {
        match self {
            Front::Gateway => "gateway",
            Front::Bare(Way::Tasks) => "tasks",
            Front::Bare(Way::Direct) => "writes",
        }
    }
}

/// The median and the 99th percentile of what was added, in ms, and CPU us per token of server and
/// client.
fn paced_round(front: Front, pace: Pace) -> [f64; 4] {
    let replica = PacedReplica::new(STREAMS, STREAM_TOKENS);
    let served = match front {
        Front::Gateway => Server::start(replica.clone()),
        Front::Bare(way) => Server::bare(replica.clone(), way),
    };
    let reading = {
        let (address, clock) = (served.address, replica.clock());
        std::thread::spawn(move || {
            let read = client::read_streams(address, STREAMS, STREAM_TOKENS, clock);
            (read, cpu::own())
        })
    };
    replica.await_all();
    let before = cpu::of_threads(&[SERVER, WRITER]);
    let told = replica.run(pace, INTERVAL);
    let (read, client) = reading.join().unwrap();
    let server = cpu::of_threads(&[SERVER, WRITER]) - before;
    let mut added: Vec<f64> = told
        .iter()
        .zip(&read)
        .flat_map(|(told, read)| told.iter().zip(read).map(|(t, r)| (r - t) as f64 / 1e6))
        .collect();
    assert_eq!(added.len(), STREAMS * STREAM_TOKENS);
    added.sort_by(f64::total_cmp);
    let us = |seconds: f64| seconds * 1e6 / added.len() as f64;
    [added[added.len() / 2], added[added.len() * 99 / 100], us(server), us(client)]
}

/// The gateway over a replica, its log off.
fn gateway(replica: Arc<dyn pomona_types::Replica>) -> pomona_gateway::Gateway {
    let served = ServedModel {
        names: vec![model::NAME.to_owned()],
        replica,
        tokenizer: model::tokenizer(),
        template: Some(model::template()),
        defaults: SamplingDefaults::default(),
    };
    let writer_begins = pomona_device::ask_for_short_turns;
    let config = Config { access_log: false, writer_begins, ..Config::default() };
    pomona_gateway::router(config, vec![served])
}

/// The gateway on a socket.
struct Server {
    address: SocketAddr,
    _runtime: tokio::runtime::Runtime,
}

impl Server {
    fn start(replica: Arc<dyn pomona_types::Replica>) -> Server {
        let gateway = gateway(replica);
        let runtime = Server::runtime();
        let (listener, address) = runtime.block_on(floor::listen());
        runtime.spawn(pomona_gateway::serve(gateway, listener, std::future::pending()));
        Server { address, _runtime: runtime }
    }

    fn bare(replica: Arc<dyn pomona_types::Replica>, way: Way) -> Server {
        let runtime = Server::runtime();
        let (listener, address) = runtime.block_on(floor::listen());
        runtime.spawn(floor::serve(listener, replica, way));
        Server { address, _runtime: runtime }
    }

    fn runtime() -> tokio::runtime::Runtime {
        let mut builder = tokio::runtime::Builder::new_multi_thread();
        builder.thread_name(SERVER).enable_all().build().unwrap()
    }
}

/// Nanoseconds since the beginning of a round.
#[derive(Clone, Copy)]
struct Clock(Instant);

impl Clock {
    fn now(self) -> u64 {
        self.0.elapsed().as_nanos() as u64
    }
}
