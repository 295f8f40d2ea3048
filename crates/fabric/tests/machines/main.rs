//! Ranks on different machines: real processes in network namespaces joined by veth.
//!
//! Not a usual test harness, for the processes are this same program, and tests run one after the
//! other. Needs root and iproute2; says so and passes where it may not make namespaces, unless
//! `POMONA_REQUIRE` names `namespaces`.
#![allow(clippy::unwrap_used)]

mod bed;
mod rank;

use std::io::{BufRead, BufReader};
use std::net::Ipv4Addr;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use bed::{Bed, inside, ip};
use pomona_fabric::link::ofi::provider;
use pomona_fabric::secure::{Policy, Token};

/// Nothing takes longer, on however busy a machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// So soon survivors know of a wire that is cut.
const KNOWN: Duration = Duration::from_millis(600);
/// Tries to keep to that. Other programs on the machine make a try slower and none quicker, so one
/// that keeps to it shows that this can.
const TRIES: usize = 5;

/// How data is protected and carried.
type Way = (Policy, &'static str);

const OFF: Way = (Policy::Off, "tcp");
const AUTH: Way = (Policy::Auth, "tcp");
const SEAL: Way = (Policy::Seal, "tcp");
const LIBFABRIC: Way = (Policy::Auth, "libfabric");

/// A check by its name.
type Check = (&'static str, fn());

const CHECKS: &[Check] = &[
    ("collectives_between_machines_equal_plain_loops", collectives_equal_plain_loops),
    ("a_capture_shows_the_prompt_unless_it_is_sealed", a_capture_shows_the_prompt),
    ("a_machine_without_cable_is_named_by_all_survivors", an_unplugged_machine_is_named),
    ("a_killed_process_is_named_by_all_survivors", a_killed_process_is_named),
    ("a_stopped_process_is_named_by_all_survivors", a_stopped_process_is_named),
];

fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    match words.first().map(String::as_str) {
        Some("lead") => rank::lead(&words[1..]),
        Some("join") => rank::node(&words[1..]),
        Some("capture") => rank::capture(),
        _ => check(&words),
    }
}

/// Runs the checks whose names contain one of the words.
fn check(words: &[String]) {
    let filters: Vec<_> = words.iter().filter(|word| !word.starts_with('-')).collect();
    if let Err(why) = Bed::new(1) {
        let required = std::env::var("POMONA_REQUIRE").unwrap_or_default();
        let required = required.split(',').any(|name| name == "namespaces");
        assert!(!required, "network namespaces are required, but: {why}");
        println!("SKIPPED: tests between machines need network namespaces: {why}");
        return;
    }
    for (name, check) in CHECKS {
        if filters.is_empty() || filters.iter().any(|filter| name.contains(filter.as_str())) {
            println!("test {name} ...");
            check();
            println!("test {name} ... ok");
        }
    }
}

/// Those that can be taken here; says which cannot.
fn ways(all: &[Way]) -> Vec<Way> {
    let has_libfabric = match provider(Ipv4Addr::LOCALHOST.into()) {
        Ok(_) => true,
        Err(why) => {
            let required = std::env::var("POMONA_REQUIRE").unwrap_or_default();
            assert!(required.split(',').all(|name| name != "libfabric"), "required: {why}");
            println!("  SKIPPED: {why}");
            false
        }
    };
    all.iter().copied().filter(|way| *way != LIBFABRIC || has_libfabric).collect()
}

/// A line that a process has printed: whose, what, and when.
struct Line {
    from: usize,
    text: String,
    at: Instant,
}

/// Processes on machines. Killed when dropped.
struct Crew {
    children: Vec<Child>,
    lines: Receiver<Line>,
    sender: Sender<Line>,
}

impl Crew {
    fn new() -> Crew {
        let (sender, lines) = channel();
        Crew { children: Vec::new(), lines, sender }
    }

    /// Starts this program in a namespace.
    fn start(&mut self, namespace: &str, words: &[&str]) {
        let program = std::env::current_exe().unwrap();
        let mut command: Command = inside(namespace, &program);
        let mut child =
            command.args(words).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let (from, sender) = (self.children.len(), self.sender.clone());
        let output = BufReader::new(child.stdout.take().unwrap());
        std::thread::spawn(move || {
            for text in output.lines().map_while(Result::ok) {
                let _ = sender.send(Line { from, text, at: Instant::now() });
            }
        });
        self.children.push(child);
    }

    /// A leader on machine 0 and a node on each other one.
    fn group(bed: &Bed, machines: usize, (policy, transport): Way, work: &str) -> Crew {
        let mut crew = Crew::new();
        let (token, policy) = (Token::generate(), policy.to_string());
        let address = format!("{}:7000", bed.address(0));
        let nodes = (machines - 1).to_string();
        let lead = ["lead", &address, &policy, transport, token.reveal(), work, &nodes];
        crew.start(&bed.machine(0), &lead);
        for at in 1..machines {
            crew.start(&bed.machine(at), &["join", &address, &policy, token.reveal()]);
        }
        crew
    }

    /// Waits for a line of each of these processes that begins with `word`.
    fn expect(&self, word: &str, of: &[usize]) -> Vec<Line> {
        let deadline = Instant::now() + PATIENCE;
        let mut lines: Vec<Line> = Vec::new();
        while lines.len() < of.len() {
            let line = match self.lines.recv_timeout(deadline - Instant::now()) {
                Ok(line) => line,
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                    let here: Vec<_> = lines.iter().map(|line| line.from).collect();
                    panic!("{word} of {of:?}: came from {here:?} only");
                }
            };
            if of.contains(&line.from) {
                assert!(line.text.starts_with(word), "{} of {}, not {word}", line.text, line.from);
                lines.push(line);
            }
        }
        lines.sort_by_key(|line| line.from);
        lines
    }

    fn signal(&self, at: usize, signal: i32) {
        let process = self.children[at].id() as libc::pid_t;
        // SAFETY: no memory is handed over; the process is a child that was not waited for.
        assert_eq!(unsafe { libc::kill(process, signal) }, 0);
    }
}

impl Drop for Crew {
    fn drop(&mut self) {
        for child in &mut self.children {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn collectives_equal_plain_loops() {
    let bed = Bed::new(3).unwrap();
    for way in ways(&[OFF, AUTH, SEAL, LIBFABRIC]) {
        println!("  policy {} over {}", way.0, way.1);
        let crew = Crew::group(&bed, 3, way, "collectives");
        crew.expect("DONE", &[0, 1, 2]);
    }
}

/// In clear it is seen, so the check can fail.
fn a_capture_shows_the_prompt() {
    let bed = Bed::new(2).unwrap();
    for way in ways(&[OFF, AUTH, SEAL, LIBFABRIC]) {
        let mut capture = Crew::new();
        capture.start(&bed.hub(), &["capture"]);
        capture.expect("READY", &[0]);
        let crew = Crew::group(&bed, 2, way, "prompt");
        crew.expect("DONE", &[0, 1]);
        drop(capture.children[0].stdin.take());
        let said = capture.expect("SEEN", &[0]).remove(0).text;
        let numbers: Vec<usize> =
            said.split(' ').skip(1).map(|number| number.parse().unwrap()).collect();
        let [seen, packets] = numbers[..] else { panic!("{said}") };
        println!("  policy {} over {}: the prompt in {seen} of {packets} packets", way.0, way.1);
        assert!(packets > 20, "{said}");
        assert_eq!(seen == 0, way == SEAL, "{said}");
    }
}

/// Something happens to rank 2 of four while they work: the others name it. Says how soon, and
/// returns when all had.
fn is_named(way: Way, cause: &str, happens: impl Fn(&Bed, &Crew)) -> Duration {
    let bed = Bed::new(4).unwrap();
    let crew = Crew::group(&bed, 4, way, "sums");
    crew.expect("READY", &[0, 1, 2, 3]);
    let begun = Instant::now();
    happens(&bed, &crew);
    let mut last = Duration::ZERO;
    for line in crew.expect("LOST", &[0, 1, 3]) {
        let after = line.at.duration_since(begun);
        last = last.max(after);
        let (policy, transport) = way;
        let after = after.as_millis();
        println!("  {policy} {transport}: rank {} after {after} ms: {}", line.from, line.text);
        assert!(line.text.starts_with("LOST 2 "), "{}", line.text);
        assert!(line.text.contains(cause), "{}", line.text);
    }
    last
}

fn an_unplugged_machine_is_named() {
    let unplug =
        |bed: &Bed, _: &Crew| ip(&["-n", &bed.machine(2), "link", "set", "eth0", "down"]).unwrap();
    for way in ways(&[OFF, SEAL, LIBFABRIC]) {
        let mut tries = (0..TRIES).map(|_| is_named(way, "no sign of life", unplug));
        let known = tries.any(|after| after <= KNOWN);
        assert!(known, "policy {} over {}: never within {KNOWN:?}", way.0, way.1);
    }
}

fn a_killed_process_is_named() {
    for way in ways(&[SEAL, LIBFABRIC]) {
        is_named(way, "connection broke", |_, crew| crew.signal(2, libc::SIGKILL));
    }
}

fn a_stopped_process_is_named() {
    for way in ways(&[SEAL, LIBFABRIC]) {
        is_named(way, "no sign of life", |_, crew| crew.signal(2, libc::SIGSTOP));
    }
}
