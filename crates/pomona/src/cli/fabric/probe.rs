//! `pomona fabric probe`: which transports this machine has.

use std::fmt::Write as _;
use std::io::{Write, stdout};
use std::net::{IpAddr, Ipv4Addr, TcpListener, TcpStream};

use anyhow::Result;
use clap::Args;
use pomona_fabric::link::ofi;
use pomona_fabric::link::shm::{ShmEpoch, ShmOptions};
use serde::Serialize;

use crate::bench::machine::cpu_name;

/// Flags of `fabric probe`.
#[derive(Args, Debug)]
pub struct ProbeArgs {
    /// An address of the interface that libfabric is to use
    #[arg(long, value_name = "ADDRESS", default_value_t = IpAddr::V4(Ipv4Addr::LOCALHOST))]
    address: IpAddr,
    /// As JSON
    #[arg(long)]
    json: bool,
}

/// What was found.
#[derive(Debug, Serialize)]
struct Probe {
    pomona: &'static str,
    cpu: String,
    cores: usize,
    shm: Found,
    tcp: Found,
    libfabric: Libfabric,
}

/// Whether something works; why, if it does not.
#[derive(Debug, Serialize)]
struct Found {
    works: bool,
    why_not: Option<String>,
}

#[derive(Debug, Serialize)]
struct Libfabric {
    #[serde(flatten)]
    found: Found,
    version: Option<String>,
    providers: Vec<Provider>,
}

#[derive(Debug, Serialize)]
struct Provider {
    name: &'static str,
    #[serde(flatten)]
    found: Found,
}

impl Found {
    fn of<E: std::fmt::Display>(outcome: std::result::Result<(), E>) -> Found {
        let why_not = outcome.err().map(|error| format!("{error:#}"));
        Found { works: why_not.is_none(), why_not }
    }

    fn words(&self) -> &str {
        self.why_not.as_deref().unwrap_or("yes")
    }
}

/// Runs the verb.
pub fn run(args: &ProbeArgs) -> Result<()> {
    let probe = probe(args.address);
    let text = match args.json {
        true => serde_json::to_string_pretty(&probe)? + "\n",
        false => table(&probe),
    };
    stdout().write_all(text.as_bytes())?;
    Ok(())
}

fn probe(address: IpAddr) -> Probe {
    Probe {
        pomona: env!("CARGO_PKG_VERSION"),
        cpu: cpu_name(),
        cores: pomona_device::usable_cores().len(),
        shm: Found::of(shm()),
        tcp: Found::of(tcp()),
        libfabric: libfabric(address),
    }
}

/// Sealed memory of nobody's name, mapped twice, as two ranks do.
fn shm() -> std::io::Result<()> {
    const BYTES: usize = 1 << 20;
    let epoch = ShmEpoch::create(ShmOptions::new(2, BYTES))?;
    ShmEpoch::open(epoch.descriptor().try_clone_to_owned()?).map(drop)
}

/// A connection within the machine.
fn tcp() -> std::io::Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    TcpStream::connect(listener.local_addr()?)?.set_nodelay(true)
}

fn libfabric(address: IpAddr) -> Libfabric {
    let survey = match ofi::survey(address) {
        Ok(survey) => survey,
        Err(error) => {
            let found = Found::of(Err(error));
            return Libfabric { found, version: None, providers: Vec::new() };
        }
    };
    let providers = survey.providers.into_iter();
    let provider = |(name, outcome)| Provider { name, found: Found::of(outcome) };
    let providers: Vec<Provider> = providers.map(provider).collect();
    let any = providers.iter().any(|provider| provider.found.works);
    let found = Found::of(any.then_some(()).ok_or("no provider works"));
    let (major, minor) = survey.version;
    Libfabric { found, version: Some(format!("{major}.{minor}")), providers }
}

fn table(probe: &Probe) -> String {
    let mut text = String::new();
    let mut line = |name: &str, words: &str| {
        // Writing to a string does not fail.
        let _ = writeln!(text, "{name:<16} {words}");
    };
    line("machine", &format!("{}, {} cores", probe.cpu, probe.cores));
    line("shm", probe.shm.words());
    line("tcp", probe.tcp.words());
    let Libfabric { found, version, providers } = &probe.libfabric;
    let version = version.as_ref().map(|version| format!(" (API {version})"));
    line("libfabric", &format!("{}{}", found.words(), version.unwrap_or_default()));
    for provider in providers {
        line(&format!("  {}", provider.name), provider.found.words());
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_says_why() {
        let found = Found::of(Err("it is not installed"));
        let libfabric = Libfabric { found, version: None, providers: Vec::new() };
        let probe = Probe { libfabric, ..probe(IpAddr::V4(Ipv4Addr::LOCALHOST)) };
        let text = table(&probe);
        assert!(text.contains("libfabric        it is not installed"), "{text}");
        assert!(text.contains("tcp              yes"), "{text}");
        let json = serde_json::to_value(&probe).unwrap();
        assert_eq!(json["libfabric"]["works"], false);
    }
}
