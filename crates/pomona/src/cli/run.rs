//! `pomona run`: one prompt, one answer, on standard output.

use std::io::{Read, Write, stdin, stdout};

use anyhow::{Context, Result, bail};
use clap::Args;
use serde_json::json;

use super::args::EngineArgs;
use super::conversation::{Conversation, SamplingArgs};
use crate::local::LocalServer;
use crate::models::progress::say;

/// Most bytes of a prompt from standard input.
const PROMPT_BYTES_MAX: u64 = 16 << 20;

/// Flags of `run`.
#[derive(Args, Debug)]
pub struct RunArgs {
    /// A catalogue name (smollm2, gemma3-270m), a GGUF file, a checkpoint folder, or
    /// org/repo[:FILE]
    model: String,
    /// The prompt; `-` reads standard input
    prompt: String,
    /// Continue the text as it is, without the chat template
    #[arg(long)]
    raw: bool,
    /// The system prompt
    #[arg(long, value_name = "TEXT", conflicts_with = "raw")]
    system: Option<String>,
    /// Print the number of tokens and the speed afterwards, on standard error
    #[arg(long)]
    stats: bool,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    engine: EngineArgs,
}

/// Runs the verb.
pub fn run(args: &RunArgs) -> Result<()> {
    let prompt = match args.prompt.as_str() {
        "-" => {
            let mut text = String::new();
            let read = stdin().take(PROMPT_BYTES_MAX + 1).read_to_string(&mut text);
            let bytes = read.context("cannot read the prompt from standard input")?;
            if bytes as u64 > PROMPT_BYTES_MAX {
                bail!("the prompt on standard input is longer than {PROMPT_BYTES_MAX} bytes");
            }
            text
        }
        text => text.to_owned(),
    };
    if prompt.is_empty() {
        bail!("the prompt is empty: write one, or - to read standard input");
    }
    let runtime = tokio::runtime::Runtime::new()?;
    let server = LocalServer::start(&args.model, &args.engine, &runtime)?;
    let chats = server.has_chat_template() && !args.raw;
    let conversation = Conversation {
        client: server.client()?,
        model: server.name().to_owned(),
        sampling: args.sampling.clone(),
        seed: Some(args.engine.seed),
    };
    let answer = if chats {
        let system = args.system.iter().map(|text| json!({"role": "system", "content": text}));
        let user = json!({"role": "user", "content": prompt});
        let messages: Vec<_> = system.chain([user]).collect();
        runtime.block_on(conversation.chat(&messages))
    } else {
        runtime.block_on(conversation.complete(&prompt))
    };
    server.stop(&runtime);
    let answer = answer?;
    writeln!(stdout())?;
    if args.stats {
        say(&answer.summary());
    }
    Ok(())
}
