//! Project chores. `cargo xtask ci` is everything that CI runs; `cargo xtask tidy` is the part of
//! it that is ours: the rules of the house that no compiler knows.
#![forbid(unsafe_code)]

mod ci;
mod tidy;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Result, bail};

const USAGE: &str = "\
cargo xtask ci                 everything: checks, tests, and the real binary from end to end
cargo xtask ci --fast          without models and end-to-end tests
cargo xtask ci --release       with the release binary from end to end, not that of the tests
cargo xtask ci --stage NAME    one stage, with what it needs (may be given several times)
cargo xtask ci --list          the stages
cargo xtask tidy               the rules of the house: layers, purity, limits, names";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &[String]) -> Result<()> {
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["ci", rest @ ..] => ci::run(&root(), &ci::Choice::parse(rest)?),
        ["tidy"] => tidy::run(&root()),
        [] | ["help" | "--help" | "-h"] => {
            println!("{USAGE}");
            Ok(())
        }
        _ => bail!("there is no `cargo xtask {}`; there are:\n{USAGE}", args.join(" ")),
    }
}

/// The repository's root, where this program was built.
fn root() -> PathBuf {
    let xtask = Path::new(env!("CARGO_MANIFEST_DIR"));
    xtask.parent().expect("xtask lies in the repository").to_path_buf()
}
