//! A server of this binary as a child process: started, timed, weighed, stopped. A process of its
//! own, so that its memory is its own and its start is what a user sees.

use std::io::{BufRead, BufReader};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use rustix::process::{Pid, Signal, kill_process};

use crate::local::READY_PREFIX;

/// Longest wait for the server's end after it was asked to.
const STOP_TIMEOUT: Duration = Duration::from_secs(40);

/// A running server.
pub struct Server {
    child: Child,
    // Held so that the server can go on printing.
    _stdout: BufReader<ChildStdout>,
    /// Its address.
    pub url: String,
    /// Time from the start of the process until its port took connections.
    pub listening: Duration,
    /// Time from the start of the process to its ready line.
    pub ready: Duration,
    begun: Instant,
}

impl Server {
    /// Starts `pomona serve MODEL FLAGS` on a free port and waits until it is ready.
    pub fn start(model: &str, flags: &[String]) -> Result<Server> {
        let binary = std::env::current_exe().context("cannot find this binary")?;
        // Known beforehand, so that it can be watched. Nobody else is likely to get it in between.
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let begun = Instant::now();
        let mut child = Command::new(binary)
            .args(["serve", model, "--host", "127.0.0.1"])
            .args(["--port", &port.to_string()])
            .args(flags)
            // Its trouble is shown, its everyday log is not.
            .env("RUST_LOG", "warn")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start the server")?;
        let connected = std::thread::spawn(move || connected(port, begun));
        let stdout = child.stdout.take().ok_or_else(|| anyhow!("the server has no output"))?;
        let mut stdout = BufReader::new(stdout);
        let mut line = String::new();
        while stdout.read_line(&mut line).context("cannot read what the server prints")? > 0 {
            if let Some(rest) = line.strip_prefix(READY_PREFIX) {
                let ready = begun.elapsed();
                let url = rest.split_whitespace().next().unwrap_or_default().to_owned();
                let listening = connected.join().unwrap_or(ready);
                return Ok(Server { child, _stdout: stdout, url, listening, ready, begun });
            }
            line.clear();
        }
        let status = child.wait().context("cannot wait for the server")?;
        bail!("the server ended before it was ready ({status}); its own words are above")
    }

    /// Time since the start of the process.
    pub fn age(&self) -> Duration {
        self.begun.elapsed()
    }

    /// Most bytes that were resident at once, if the system tells.
    pub fn resident_peak(&self) -> Option<u64> {
        resident_peak(self.child.id())
    }

    /// Asks it to end and waits.
    pub fn stop(mut self) -> Result<()> {
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw);
        if let Some(pid) = pid {
            kill_process(pid, Signal::TERM).context("cannot stop the server")?;
        }
        let asked = Instant::now();
        while asked.elapsed() < STOP_TIMEOUT {
            if self.child.try_wait()?.is_some() {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        bail!("the server does not end")
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // After `stop` there is nothing left to end; after an error there is.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Waits until a port takes connections; the time that took.
fn connected(port: u16, begun: Instant) -> Duration {
    while begun.elapsed() < STOP_TIMEOUT && TcpStream::connect(("127.0.0.1", port)).is_err() {
        std::thread::sleep(Duration::from_micros(200));
    }
    begun.elapsed()
}

/// `VmHWM` of a process (proc_pid_status(5)).
fn resident_peak(pid: u32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().split(' ').next()?.parse().ok()?;
    Some(kib * 1024)
}
