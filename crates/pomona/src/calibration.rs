//! What was measured of this machine's fabric, kept in a file: which algorithm suits which sum
//! here.

use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use pomona_fabric::coll::Choices;
use pomona_policy::cost::{CostModel, Transport};
use serde::{Deserialize, Serialize};

use crate::bench::machine::cpu_name;
use crate::models::Surroundings;
use crate::models::progress::say;

/// Its name in `POMONA_HOME`.
const FILE: &str = "fabric.json";
/// Longest file.
const BYTES_MAX: u64 = 16 << 20;

/// A machine, and what calls between its processes cost.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Calibration {
    /// The version that measured.
    pub pomona: String,
    /// Of the machine.
    pub cpu: String,
    /// That could be used.
    pub cores: usize,
    /// What was found.
    pub costs: CostModel,
}

impl Calibration {
    /// Of this machine, now.
    pub fn new(costs: CostModel) -> Calibration {
        Calibration {
            pomona: env!("CARGO_PKG_VERSION").to_owned(),
            cpu: cpu_name(),
            cores: pomona_device::usable_cores().len(),
            costs,
        }
    }

    /// Where it is looked for.
    pub fn default_path() -> Result<PathBuf> {
        Ok(Surroundings::from_env()?.home.join(FILE))
    }

    /// Reads one.
    pub fn read(path: &Path) -> Result<Calibration> {
        let read = || -> Result<Calibration> {
            if std::fs::metadata(path)?.len() > BYTES_MAX {
                bail!("it has more than {BYTES_MAX} bytes");
            }
            Ok(serde_json::from_slice(&std::fs::read(path)?)?)
        };
        read().with_context(|| {
            let path = path.display();
            format!("cannot read {path}: write it again by `pomona fabric calibrate`")
        })
    }

    /// Writes it, whole or not at all.
    pub fn write(&self, path: &Path) -> Result<()> {
        let write = || -> Result<()> {
            let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
            std::fs::create_dir_all(folder.unwrap_or(Path::new(".")))?;
            let part = path.with_extension(format!("part-{}", std::process::id()));
            let mut file = std::fs::File::create(&part)?;
            file.write_all(&serde_json::to_vec_pretty(self)?)?;
            file.sync_all()?;
            Ok(std::fs::rename(&part, path)?)
        };
        write().with_context(|| format!("cannot write {}", path.display()))
    }

    /// Whether this machine is not the one that was measured, and why.
    pub fn stranger(&self) -> Option<String> {
        let now = Calibration::new(CostModel::default());
        if self.cpu != now.cpu || self.cores != now.cores {
            let (there, here) = ((&self.cpu, self.cores), (&now.cpu, now.cores));
            let words = |(cpu, cores): (&String, usize)| format!("{cores} cores of {cpu}");
            return Some(format!("it was measured on {}, not {}", words(there), words(here)));
        }
        let (there, here) = (&self.pomona, &now.pomona);
        (there != here).then(|| format!("Pomona {there} measured it, this is {here}"))
    }
}

/// The algorithms for sums between processes of this machine, as far as they were measured. A file
/// that is of no use is remarked upon, and done without.
pub fn choices() -> Choices {
    let found = || -> Result<Option<Calibration>> {
        let path = Calibration::default_path()?;
        if !path.exists() {
            return Ok(None);
        }
        let read = Calibration::read(&path)?;
        match read.stranger() {
            Some(why) => bail!("{} is not used: {why}", path.display()),
            None => Ok(Some(read)),
        }
    };
    match found() {
        Ok(None) => Choices::default(),
        Ok(Some(found)) => {
            let choices = found.costs.choices(Transport::Shm);
            tracing::info!(%choices, "sums go by what `pomona fabric calibrate` has measured");
            choices
        }
        Err(error) => {
            say(&format!("{error:#}; `pomona fabric calibrate` measures anew"));
            Choices::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use pomona_policy::cost::{Algorithm, Operation, Sample, Setting};

    use super::*;

    fn calibration() -> Calibration {
        let setting = Setting { transport: Transport::Shm, ranks: 2 };
        let sample = |algorithm, bytes, micros| Sample {
            setting,
            operation: Operation::AllReduce(algorithm),
            bytes,
            micros,
        };
        let samples = [
            sample(Algorithm::OneShot, 64, 1.5),
            sample(Algorithm::OneShot, 4096, 9.25),
            sample(Algorithm::TwoShot, 64, 3.0),
            sample(Algorithm::TwoShot, 4096, 4.0),
            Sample { setting, operation: Operation::Barrier, bytes: 0, micros: 0.5 },
        ];
        Calibration::new(CostModel::fit(&samples))
    }

    #[test]
    fn a_file_says_what_was_written() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("new").join("fabric.json");
        calibration().write(&path).unwrap();
        assert_eq!(Calibration::read(&path).unwrap(), calibration());
        assert_eq!(std::fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
        assert_eq!(calibration().stranger(), None);
    }

    #[test]
    fn damaged_files_are_refused_with_what_to_do() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("fabric.json");
        let whole = serde_json::to_string(&calibration()).unwrap();
        let turned = whole.replace("\"micros\":1.5", "\"micros\":-1.5");
        assert_ne!(turned, whole);
        for text in ["", "{}", &whole[..whole.len() / 2], &turned] {
            std::fs::write(&path, text).unwrap();
            let error = format!("{:#}", Calibration::read(&path).unwrap_err());
            assert!(error.contains("pomona fabric calibrate"), "{error}");
        }
    }

    #[test]
    fn another_machine_or_version_is_noticed() {
        let cpu = "another".to_owned();
        let other = Calibration { cpu, ..calibration() };
        assert!(other.stranger().unwrap().contains("cores of another"));
        let other = Calibration { pomona: "0.0.0".to_owned(), ..calibration() };
        assert!(other.stranger().unwrap().contains("Pomona 0.0.0"));
    }
}
