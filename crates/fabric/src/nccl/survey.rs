//! What NCCL and CUDA's driver have on this machine, for people who ask.

use super::NcclError;
use super::library::{Driver, Library, Paths, words_of};

/// What was found.
#[derive(Debug)]
pub struct Survey {
    /// NCCL's version.
    pub version: Result<String, NcclError>,
    /// What CUDA sees.
    pub devices: Result<Devices, NcclError>,
}

/// The devices of a machine.
#[derive(Debug)]
pub struct Devices {
    /// The version of CUDA that the driver knows.
    pub cuda: String,
    /// By ordinal.
    pub names: Vec<String>,
}

/// Opens what is there, and asks it.
pub fn survey(paths: &Paths) -> Survey {
    let version = Library::open(&paths.nccl).map(|library| words_of(library.version));
    let devices = Driver::open(&paths.driver).and_then(|driver| driver.devices());
    let devices = devices.map(|(cuda, names)| Devices {
        cuda: format!("{}.{}", cuda / 1000, cuda % 1000 / 10),
        names,
    });
    Survey { version, devices }
}
