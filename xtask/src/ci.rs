//! Everything that CI runs, in stages. A stage says what it needs; a failing stage ends the run.
//!
//! Owns order, choice and reporting. What a stage does is in `checks.rs` (without a model),
//! `models.rs` (the binary, models, tests) and `ends.rs` (end to end).

mod checks;
mod ends;
mod licences;
mod models;
mod neon;
mod readme;
mod server;
mod workshop;

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, bail};

use self::workshop::Workshop;

/// One step of the run.
struct Stage {
    name: &'static str,
    about: &'static str,
    /// Stages whose results it uses.
    needs: &'static [&'static str],
    /// Whether `--fast` leaves it out.
    slow: bool,
    run: fn(&Workshop) -> Result<()>,
}

impl Stage {
    const fn new(
        name: &'static str,
        about: &'static str,
        run: fn(&Workshop) -> Result<()>,
    ) -> Stage {
        Stage { name, about, needs: &[], slow: false, run }
    }

    /// With what the real binary takes.
    const fn slow(mut self, needs: &'static [&'static str]) -> Stage {
        self.needs = needs;
        self.slow = true;
        self
    }
}

const STAGES: &[Stage] = &[
    Stage::new("format", "rustfmt has nothing to change", checks::format),
    Stage::new("tidy", "the rules of the house", checks::tidy),
    Stage::new("licences", "licences and sources of all dependencies", licences::check),
    Stage::new("deny", "cargo-deny, where it is installed", checks::deny),
    Stage::new("clippy", "no warning in any target", checks::clippy),
    Stage::new("build", "the binary, and all tests", models::build).slow(&[]),
    Stage::new("pull", "the models that tests use", models::pull).slow(&["build"]),
    Stage::new("test", "all tests, those of the documentation too", models::test),
    Stage::new("neon", "the kernels' tests on arm64, in an emulator", neon::test).slow(&[]),
    Stage::new("openai", "the openai package, unmodified", ends::openai).slow(&["build", "pull"]),
    Stage::new("page", "the chat page in Chromium", ends::page).slow(&["build", "pull"]),
    Stage::new("readme", "the README's commands as printed", ends::readme).slow(&["build", "pull"]),
];

/// Which stages to run.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Choice {
    fast: bool,
    release: bool,
    list: bool,
    stages: Vec<String>,
}

impl Choice {
    /// Reads the words after `cargo xtask ci`.
    pub fn parse(words: &[&str]) -> Result<Choice> {
        let mut choice = Choice::default();
        let mut words = words.iter();
        while let Some(word) = words.next() {
            match *word {
                "--fast" => choice.fast = true,
                "--release" => choice.release = true,
                "--list" => choice.list = true,
                "--stage" => {
                    let name = words.next().context("--stage needs a name; see --list")?;
                    if STAGES.iter().all(|stage| stage.name != *name) {
                        bail!("there is no stage '{name}'; see `cargo xtask ci --list`");
                    }
                    choice.stages.push((*name).to_owned());
                }
                other => {
                    bail!(
                        "`cargo xtask ci` knows --fast, --release, --stage NAME and --list, not \
                         {other}"
                    )
                }
            }
        }
        Ok(choice)
    }

    /// The stages to run, in order.
    fn stages(&self) -> Vec<&'static Stage> {
        if self.stages.is_empty() {
            return STAGES.iter().filter(|stage| !(self.fast && stage.slow)).collect();
        }
        let chosen = |name: &str| self.stages.iter().any(|chosen| chosen == name);
        let needed = |name: &str| {
            STAGES.iter().any(|stage| chosen(stage.name) && stage.needs.contains(&name))
        };
        STAGES.iter().filter(|stage| chosen(stage.name) || needed(stage.name)).collect()
    }
}

/// Runs the chosen stages.
pub fn run(root: &Path, choice: &Choice) -> Result<()> {
    if choice.list {
        for stage in STAGES {
            println!("{:<9} {}", stage.name, stage.about);
        }
        return Ok(());
    }
    let shop = Workshop::new(root, choice.release);
    let begun = Instant::now();
    let mut times = Vec::new();
    for stage in choice.stages() {
        println!("\n== {}: {}", stage.name, stage.about);
        let start = Instant::now();
        let result = (stage.run)(&shop);
        let seconds = start.elapsed().as_secs_f64();
        let verdict = if result.is_ok() { "passed" } else { "FAILED" };
        println!("== {} {verdict} after {seconds:.1} s", stage.name);
        result.with_context(|| format!("stage {}", stage.name))?;
        times.push(format!("{} {seconds:.0} s", stage.name));
    }
    println!("\nci: {}", times.join(", "));
    println!("ci: all stages passed in {:.0} s", begun.elapsed().as_secs_f64());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(words: &[&str]) -> Vec<&'static str> {
        Choice::parse(words).unwrap().stages().iter().map(|stage| stage.name).collect()
    }

    #[test]
    fn a_stage_brings_what_it_needs() {
        assert_eq!(names(&["--stage", "page"]), ["build", "pull", "page"]);
        assert_eq!(names(&["--stage", "tidy", "--stage", "format"]), ["format", "tidy"]);
    }

    #[test]
    fn needs_are_transitive_and_in_order() {
        let position = |name: &str| STAGES.iter().position(|stage| stage.name == name);
        for (at, stage) in STAGES.iter().enumerate() {
            for need in stage.needs {
                let before = position(need).unwrap();
                assert!(before < at, "{} before {}", stage.name, need);
                assert!(STAGES[before].needs.iter().all(|deeper| stage.needs.contains(deeper)));
            }
        }
    }

    #[test]
    fn fast_needs_no_model() {
        assert_eq!(names(&["--fast"]), ["format", "tidy", "licences", "deny", "clippy", "test"]);
    }

    #[test]
    fn unknown_words_are_refused() {
        assert!(Choice::parse(&["--stage", "nothing"]).is_err());
        assert!(Choice::parse(&["--stage"]).is_err());
        assert!(Choice::parse(&["--quick"]).is_err());
    }
}
