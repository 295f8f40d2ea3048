//! Damages the inputs of a corpus for a while, and feeds them to its target. For machines without
//! libFuzzer; on a panic the input is printed and kept, an abort leaves it in the file named.
//!
//!     cargo run --release -p pomona-hostile --example mutate -- TARGET SECONDS [SEED]

use std::panic::catch_unwind;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use pomona_hostile::mutation::Mutation;
use pomona_hostile::{TARGETS, run};

/// An input that takes longer is reported.
const SLOW: Duration = Duration::from_secs(3);

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().collect();
    let number = |at: usize| args.get(at).and_then(|text| text.parse::<u64>().ok());
    let (Some(name), Some(seconds)) = (args.get(1), number(2)) else {
        let names: Vec<_> = TARGETS.iter().map(|target| target.name).collect();
        eprintln!("usage: mutate TARGET SECONDS [SEED]; targets: {}", names.join(" "));
        return ExitCode::FAILURE;
    };
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus").join(name);
    let files = std::fs::read_dir(&folder).into_iter().flatten().flatten();
    let seeds: Vec<Vec<u8>> = files.flat_map(|file| std::fs::read(file.path())).collect();
    if seeds.is_empty() {
        eprintln!("{} has no inputs", folder.display());
        return ExitCode::FAILURE;
    }
    let last = std::env::temp_dir().join(format!("{name}.last"));
    let mut random = Mutation::new(number(3).unwrap_or(1));
    let (begun, mut count, mut bad) = (Instant::now(), 0u64, 0u64);
    while begun.elapsed() < Duration::from_secs(seconds) {
        let (one, other) = (random.below(seeds.len()), random.below(seeds.len()));
        let input = random.of(&seeds[one], &seeds[other]);
        // Kept so that an abort leaves its cause behind.
        std::fs::write(&last, &input).expect("a test machine has room for a small file");
        let start = Instant::now();
        let fine = catch_unwind(|| run(name, &input)).is_ok();
        if !fine || start.elapsed() > SLOW {
            bad += 1;
            let kept = std::env::temp_dir().join(format!("{name}.bad.{bad}"));
            std::fs::write(&kept, &input).expect("a test machine has room for a small file");
            println!("{name}: {:?}, see {}", start.elapsed(), kept.display());
        }
        count += 1;
    }
    println!("{name}: {count} inputs in {seconds} s, {bad} bad");
    if bad == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
