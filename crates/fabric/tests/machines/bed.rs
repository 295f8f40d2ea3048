//! Machines, as network namespaces joined by a switch: each has an interface `eth0` of its own, and
//! reaches the others through a bridge in a namespace that stands between them. The network of the
//! machine that runs this is not touched.

use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

/// Beds that this process has made.
static BEDS: AtomicU32 = AtomicU32::new(0);

/// Some machines. Gone when dropped.
pub struct Bed {
    machines: usize,
    number: u32,
}

impl Bed {
    /// Fails with the reason where namespaces cannot be made.
    pub fn new(machines: usize) -> Result<Bed, String> {
        let bed = Bed { machines, number: BEDS.fetch_add(1, Ordering::Relaxed) };
        let hub = bed.hub();
        ip(&["netns", "add", &hub])?;
        ip(&["-n", &hub, "link", "add", "switch", "type", "bridge"])?;
        ip(&["-n", &hub, "link", "set", "switch", "up"])?;
        for at in 0..machines {
            let (machine, port) = (bed.machine(at), format!("port{at}"));
            let address = format!("{}/24", bed.address(at));
            ip(&["netns", "add", &machine])?;
            let ends = ["type", "veth", "peer", "name", "eth0", "netns", &machine];
            ip(&[&["-n", &hub, "link", "add", &port][..], &ends].concat())?;
            ip(&["-n", &hub, "link", "set", &port, "master", "switch", "up"])?;
            ip(&["-n", &machine, "addr", "add", &address, "dev", "eth0"])?;
            ip(&["-n", &machine, "link", "set", "eth0", "up"])?;
            ip(&["-n", &machine, "link", "set", "lo", "up"])?;
        }
        Ok(bed)
    }

    /// Names a namespace, so that no two runs and no two beds meet.
    fn name(&self, part: &str) -> String {
        format!("pomona-{}-{}-{part}", std::process::id(), self.number)
    }

    /// The namespace of the switch.
    pub fn hub(&self) -> String {
        self.name("hub")
    }

    /// A machine's namespace.
    pub fn machine(&self, at: usize) -> String {
        self.name(&at.to_string())
    }

    /// Its address.
    pub fn address(&self, at: usize) -> String {
        format!("10.77.0.{}", at + 1)
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        for at in 0..self.machines {
            let _ = ip(&["netns", "del", &self.machine(at)]);
        }
        let _ = ip(&["netns", "del", &self.hub()]);
    }
}

/// A program that will run inside of a namespace, as this very process: no shell between.
pub fn inside(namespace: &str, program: &std::path::Path) -> Command {
    let mut command = Command::new("ip");
    command.args(["netns", "exec", namespace]).arg(program);
    command
}

/// Runs `ip`; the error has what it said.
pub fn ip(words: &[&str]) -> Result<(), String> {
    let output = Command::new("ip").args(words).output();
    let output = output.map_err(|error| format!("cannot run ip (iproute2): {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(format!("ip {}: {}", words.join(" "), said.trim()))
}
