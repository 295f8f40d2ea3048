//! Libraries that are not there, or are not what they should be; and the real ones.

use std::path::{Path, PathBuf};

use pomona_fabric::nccl::{Nccl, NcclComm, Paths, survey};
use pomona_types::{GroupError, LostCause};

use super::checks::everything;
use super::fake::{Fake, variant};
use super::{PATIENCE, alone, each_device, shm};

fn refusal(nccl: &Path, driver: &Path) -> String {
    let paths = Paths { nccl: nccl.into(), driver: driver.into() };
    Nccl::open(&paths).err().unwrap().to_string()
}

#[test]
fn libraries_that_cannot_be_used_say_why_and_what_to_do() {
    let _alone = alone();
    let fine = Fake::new().paths().nccl;
    let nowhere = PathBuf::from("libnowhere.so.2");
    let why = refusal(&nowhere, &fine);
    assert!(
        why.starts_with("libnowhere.so.2 cannot be used: ") && why.contains("install"),
        "{why}"
    );
    let why = refusal(&fine, &nowhere);
    assert!(why.contains("it comes with NVIDIA's driver"), "{why}");
    let why = refusal(&variant("-DFAKE_INCOMPLETE"), &fine);
    assert!(why.contains("it has no ncclCommFinalize: another version is needed"), "{why}");
    let why = refusal(&variant("-DFAKE_OLD"), &fine);
    assert!(why.contains("2.12.12 is too old; install"), "{why}");
    // A library, but not this one.
    let why = refusal(&fine, Path::new("libc.so.6"));
    assert!(why.contains("it has no cuInit"), "{why}");
}

#[test]
fn a_survey_tells_what_there_is() {
    let _alone = alone();
    let found = survey(&Fake::new().paths());
    assert_eq!(found.version.as_deref(), Ok("2.20.3"));
    let devices = found.devices.unwrap();
    assert_eq!((devices.cuda.as_str(), devices.names.len()), ("12.4", 8));
    assert_eq!(devices.names[7], "no device 7");
    let nowhere = PathBuf::from("nowhere.so");
    let found = survey(&Paths { nccl: nowhere.clone(), driver: nowhere });
    assert!(found.version.is_err() && found.devices.is_err());
}

/// NCCL itself on a machine without a GPU: it opens, and says why no more is possible. CUDA's
/// driver is the stand-in, which NCCL does not use.
#[test]
#[ignore = "needs libnccl.so.2, see the head of this target"]
fn real_library_opens_and_fails_as_it_should() {
    let _alone = alone();
    let fake = Fake::new();
    let real = Paths { nccl: Paths::default().nccl, driver: fake.paths().driver };
    println!("NCCL: {:?}, here: {:?}", survey(&real).version.unwrap(), survey(&Paths::default()));
    if survey(&Paths::default()).devices.is_ok_and(|devices| !devices.names.is_empty()) {
        println!("there are devices: `nccl_on_a_gpu` is the test for them");
        return;
    }
    let nccl = Nccl::open(&real).unwrap();
    let errors = each_device(&fake.paths(), shm(2), PATIENCE, |control, _device| {
        NcclComm::begin(&nccl, control).map(drop).unwrap_err()
    });
    println!("{}", errors[0]);
    assert!(errors.iter().all(|error| *error == errors[0]), "{errors:?}");
    let GroupError::PeerLost { cause: LostCause::Failed(why), .. } = &errors[0] else {
        panic!("{}", errors[0])
    };
    assert!(why.starts_with("NCCL 2."), "{why}");
}

/// All checks on the devices that there are, from one rank to one on each.
#[test]
#[ignore = "needs GPUs and libnccl.so.2, see the head of this target"]
fn nccl_on_a_gpu() {
    let _alone = alone();
    let paths = Paths::default();
    let devices = survey(&paths).devices.unwrap().names;
    assert!(!devices.is_empty(), "there is a driver, and no device");
    println!("NCCL {}: {devices:?}", survey(&paths).version.unwrap());
    for ranks in 1..=devices.len() {
        everything(&paths, shm(ranks));
    }
}
