//! Replays the corpora of `fuzz/` and some seeded damage to each input, within limits on time and
//! memory.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use pomona_hostile::mutation::Mutation;
use pomona_hostile::{TARGETS, Target};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Time that one input may take. Much, since machines that test are busy and builds are slow.
const TIME_MAX: Duration = Duration::from_secs(20);
/// Address space of this process; above it an allocation fails, and with it the test.
const ADDRESS_BYTES_MAX: u64 = 4 << 30;
/// Damaged versions of each input.
const DAMAGED: usize = 60;

fn corpus(target: &Target) -> Vec<(PathBuf, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus").join(target.name);
    let files = fs::read_dir(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    let mut paths: Vec<PathBuf> = files.map(|file| file.unwrap().path()).collect();
    paths.sort();
    paths.into_iter().map(|path| (path.clone(), fs::read(path).unwrap())).collect()
}

fn feed(target: &Target, input: &[u8], what: &str) {
    let begun = Instant::now();
    (target.run)(input);
    let took = begun.elapsed();
    assert!(took < TIME_MAX, "{}: {what} takes {took:?}", target.name);
}

#[test]
fn every_input_is_survived_and_so_is_damage_to_it() {
    let old = getrlimit(Resource::As);
    setrlimit(Resource::As, Rlimit { current: Some(ADDRESS_BYTES_MAX), maximum: old.maximum })
        .unwrap();
    for target in TARGETS {
        let inputs = corpus(target);
        assert!(!inputs.is_empty(), "{} has no corpus", target.name);
        let begun = Instant::now();
        feed(target, b"", "nothing");
        for (path, input) in &inputs {
            feed(target, input, &path.display().to_string());
            let mut random = Mutation::new(input.len() as u64);
            for number in 0..DAMAGED {
                let other = &inputs[random.below(inputs.len())].1;
                let damaged = random.of(input, other);
                feed(target, &damaged, &format!("damage {number} to {}", path.display()));
            }
        }
        println!("{}: {} inputs, {:.1?}", target.name, inputs.len(), begun.elapsed());
    }
}
