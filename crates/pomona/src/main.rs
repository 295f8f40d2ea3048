//! The Pomona command: reads the command line, composes the parts that the other crates are, and
//! prints. Has no logic of serving of its own.
#![forbid(unsafe_code)]

mod bench;
mod calibration;
mod cli;
mod compose;
mod crew;
mod generate;
mod http;
mod local;
mod memory;
mod models;

use std::process::ExitCode;

/// What shells report for a program that wrote to a pipe that nobody reads (128 + SIGPIPE).
const NOBODY_READS: u8 = 141;
/// For a measurement that counts for nothing, as others were at work: try again later
/// (sysexits(3), EX_TEMPFAIL).
const BUSY: u8 = 75;

fn main() -> ExitCode {
    let cli = cli::Cli::from_command_line();
    cli.start_logging();
    match cli.run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if is_closed_output(&error) => ExitCode::from(NOBODY_READS),
        Err(error) => {
            models::progress::say(&format!("error: {error:#}"));
            if error.is::<bench::others::Busy>() { ExitCode::from(BUSY) } else { ExitCode::FAILURE }
        }
    }
}

/// Whether the error is that of a write to standard output, which `head` and the like close when
/// they have enough. Errors of files and connections have a context.
fn is_closed_output(error: &anyhow::Error) -> bool {
    let io = error.downcast_ref::<std::io::Error>();
    error.chain().count() == 1 && io.is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe)
}
