//! `pomona fabric probe`: which transports this machine has.

use std::fmt::Write as _;
use std::io::{Write, stdout};
use std::net::{IpAddr, Ipv4Addr, TcpListener, TcpStream};

use anyhow::Result;
use clap::Args;
use pomona_fabric::link::ofi;
use pomona_fabric::link::shm::{ShmEpoch, ShmOptions};
use pomona_fabric::nccl;
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
    nccl: Nccl,
    cuda: Cuda,
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

/// Whether NCCL is here. It moves nothing without devices.
#[derive(Debug, Serialize)]
struct Nccl {
    #[serde(flatten)]
    found: Found,
    version: Option<String>,
}

#[derive(Debug, Serialize)]
struct Cuda {
    #[serde(flatten)]
    found: Found,
    version: Option<String>,
    devices: Vec<String>,
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
    let (nccl, cuda) = gpus();
    Probe {
        pomona: env!("CARGO_PKG_VERSION"),
        cpu: cpu_name(),
        cores: pomona_device::usable_cores().len(),
        shm: Found::of(shm()),
        tcp: Found::of(tcp()),
        libfabric: libfabric(address),
        nccl,
        cuda,
    }
}

fn gpus() -> (Nccl, Cuda) {
    let nccl::Survey { version, devices } = nccl::survey(&nccl::Paths::default());
    let nccl = match version {
        Ok(version) => Nccl { found: Found::of(Ok::<_, &str>(())), version: Some(version) },
        Err(error) => Nccl { found: Found::of(Err(error)), version: None },
    };
    let cuda = match devices {
        Ok(nccl::Devices { cuda, names }) => {
            let any = (!names.is_empty()).then_some(()).ok_or("there is no device");
            Cuda { found: Found::of(any), version: Some(cuda), devices: names }
        }
        Err(error) => Cuda { found: Found::of(Err(error)), version: None, devices: Vec::new() },
    };
    (nccl, cuda)
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
    let in_words = |found: &Found, version: &Option<String>| {
        let version = version.as_ref().map(|version| format!(" ({version})"));
        format!("{}{}", found.words(), version.unwrap_or_default())
    };
    line("nccl", &in_words(&probe.nccl.found, &probe.nccl.version));
    line("cuda", &in_words(&probe.cuda.found, &probe.cuda.version));
    for (ordinal, name) in probe.cuda.devices.iter().enumerate() {
        line(&format!("  device {ordinal}"), name);
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
        let nccl = Nccl { found: Found::of(Ok::<_, &str>(())), version: Some("2.20.3".into()) };
        let found = Found::of(Err("there is no device"));
        let devices = vec!["a GPU".to_owned()];
        let cuda = Cuda { found, version: None, devices };
        let rest = probe(IpAddr::V4(Ipv4Addr::LOCALHOST));
        let probe = Probe { libfabric, nccl, cuda, ..rest };
        let text = table(&probe);
        assert!(text.contains("libfabric        it is not installed"), "{text}");
        assert!(text.contains("tcp              yes"), "{text}");
        assert!(text.contains("nccl             yes (2.20.3)"), "{text}");
        assert!(text.contains("cuda             there is no device"), "{text}");
        assert!(text.contains("  device 0       a GPU"), "{text}");
        let json = serde_json::to_value(&probe).unwrap();
        assert_eq!(json["libfabric"]["works"], false);
    }
}
