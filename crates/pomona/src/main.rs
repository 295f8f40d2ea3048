//! The Pomona command: reads the command line, composes the parts that the other crates are, and
//! prints. Has no logic of serving of its own.
#![forbid(unsafe_code)]

mod bench;
mod cli;
mod compose;
mod generate;
mod http;
mod local;
mod memory;
mod models;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let cli = cli::Cli::parse();
    cli.start_logging();
    match cli.run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            models::progress::say(&format!("error: {error:#}"));
            ExitCode::FAILURE
        }
    }
}
