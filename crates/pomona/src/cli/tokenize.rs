//! `pomona tokenize`: the tokens of a text, as the model sees them.

use std::io::{Read, Write, stdin, stdout};

use anyhow::{Context, Result, bail};
use clap::Args;
use serde_json::json;

use crate::compose;

/// Most bytes of a text.
const TEXT_BYTES_MAX: u64 = 64 << 20;

/// Flags of `tokenize`.
#[derive(Args, Debug)]
pub struct TokenizeArgs {
    /// A catalogue name, a GGUF file, a checkpoint folder, or org/repo[:FILE]
    model: String,
    /// The text; `-` reads standard input
    text: String,
    /// Leave out the tokens that the model wants around a text
    #[arg(long)]
    no_special: bool,
    /// Print a JSON list of ids
    #[arg(long, conflicts_with = "count")]
    json: bool,
    /// Print only how many there are
    #[arg(long)]
    count: bool,
}

/// Runs the verb.
pub fn run(args: &TokenizeArgs) -> Result<()> {
    let text = match args.text.as_str() {
        "-" => {
            let mut text = String::new();
            let read = stdin().take(TEXT_BYTES_MAX + 1).read_to_string(&mut text);
            if read.context("cannot read standard input")? as u64 > TEXT_BYTES_MAX {
                bail!("the text on standard input is longer than {TEXT_BYTES_MAX} bytes");
            }
            text
        }
        text => text.to_owned(),
    };
    let (_, checkpoint) = compose::open(&args.model)?;
    let tokenizer = compose::tokenizer(&checkpoint)?;
    let ids = tokenizer.encode(&text, !args.no_special)?;
    let mut out = stdout().lock();
    if args.json {
        writeln!(out, "{}", json!(ids))?;
    } else if args.count {
        writeln!(out, "{}", ids.len())?;
    } else {
        for id in ids {
            writeln!(out, "{id:>7}  {}", tokenizer.token_text(id))?;
        }
    }
    Ok(())
}
