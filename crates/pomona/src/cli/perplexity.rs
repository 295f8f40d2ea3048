//! `pomona perplexity`: how well a model predicts a text, computed as llama.cpp's
//! `llama-perplexity` computes it, so that the numbers can be put side by side.

use std::fs::File;
use std::io::{Read, Write, stdout};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::Args;
use pomona_types::{Replica, Sampling, TokenId};
use serde_json::json;

use super::args::{EngineArgs, parse_tokens};
use crate::bench::stats::Likelihood;
use crate::compose;
use crate::generate::generate;
use crate::models::progress::say;

/// Shown by `--help`.
pub const ABOUT: &str = "\
Measures how well a model predicts a text: perplexity, the exponential of the mean negative
log-probability of its tokens. Lower is better.

Computed as llama.cpp's llama-perplexity does without a stride: the whole text becomes tokens (with
the beginning-of-text token if the model wants one), which are cut into chunks of --context tokens;
what is left at the end is dropped. Each chunk is evaluated by itself; its first token is replaced
by the beginning-of-text token if the model wants one. Of each chunk only the second half counts:
the tokens at positions context/2 + 1 to context - 1, each of which has seen half a chunk or more.";

/// Most bytes of a text.
const TEXT_BYTES_MAX: u64 = 256 << 20;

/// Flags of `perplexity`.
#[derive(Args, Debug)]
pub struct PerplexityArgs {
    /// A catalogue name, a GGUF file, a checkpoint folder, or org/repo[:FILE]
    model: String,
    /// The text, UTF-8
    file: PathBuf,
    /// Tokens of a chunk
    #[arg(long, value_name = "TOKENS", default_value = "512", value_parser = parse_tokens)]
    context: u32,
    /// Stop after so many chunks
    #[arg(long, value_name = "N")]
    chunks: Option<usize>,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    engine: EngineArgs,
}

/// Runs the verb.
pub fn run(args: &PerplexityArgs) -> Result<()> {
    if args.context < 4 {
        bail!("--context {} is too short: write at least 4", args.context);
    }
    if args.engine.max_model_len.is_some() {
        bail!("--max-model-len: chunks are as long as --context says: leave the flag out");
    }
    if let Some(flag) = args.engine.drafts().first() {
        bail!("{flag}: drafts are for answers, of which there are none: leave the flag out");
    }
    let text = read(&args.file)?;
    let mut engine_args = args.engine.measured();
    // Room for a chunk and the one token that every request generates; one chunk at a time.
    engine_args.max_model_len = Some(args.context + 1);
    engine_args.max_num_seqs = 1;
    let loaded = compose::prepare(&args.model, &engine_args)?.load()?;
    let tokens = loaded.tokenizer.encode(&text, true)?;
    let first = loaded.tokenizer.prefix().first().copied();
    let replica = loaded.replica.clone();
    let mut tally = Likelihood::default();
    let chunks = tokens.len() / args.context as usize;
    if chunks == 0 {
        bail!(
            "{} has {} tokens, fewer than one chunk of {}: give a longer text or a smaller \
             --context",
            args.file.display(),
            tokens.len(),
            args.context
        );
    }
    let chunks = args.chunks.unwrap_or(chunks).min(chunks);
    for (index, chunk) in tokens.chunks_exact(args.context as usize).take(chunks).enumerate() {
        let mut chunk = chunk.to_vec();
        if let Some(first) = first {
            chunk[0] = first;
        }
        score(replica.as_ref(), index as u64 + 1, chunk, &mut tally)?;
        if index % 10 == 9 || index + 1 == chunks {
            say(&format!("{} of {chunks} chunks: {:.4}", index + 1, tally.perplexity()));
        }
    }
    let mut out = stdout();
    let (perplexity, error) = (tally.perplexity(), tally.standard_error());
    if args.json {
        let found = json!({
            "perplexity": perplexity, "standard_error": error, "tokens": tally.count(),
            "chunks": chunks, "context": args.context,
        });
        writeln!(out, "{found}")?;
    } else {
        writeln!(out, "perplexity {perplexity:.4} ± {error:.4} over {} tokens", tally.count())?;
    }
    Ok(())
}

/// A text's file.
pub fn read(path: &Path) -> Result<String> {
    let mut text = String::new();
    let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    let read = file.take(TEXT_BYTES_MAX + 1).read_to_string(&mut text);
    if read.with_context(|| format!("cannot read {} as UTF-8", path.display()))? as u64
        > TEXT_BYTES_MAX
    {
        bail!("{} is longer than {TEXT_BYTES_MAX} bytes", path.display());
    }
    Ok(text)
}

/// Adds the second half of a chunk.
fn score(
    replica: &dyn Replica,
    id: u64,
    chunk: Vec<TokenId>,
    tally: &mut Likelihood,
) -> Result<()> {
    let length = chunk.len();
    let sampling = Sampling {
        temperature: 0.0,
        max_tokens: 1,
        ignore_eos: true,
        prompt_logprobs: Some(0),
        ..Sampling::default()
    };
    let generated = generate(replica, id, chunk, sampling)?;
    if generated.prompt_logprobs.len() != length {
        bail!("the engine gave {} of {length} log-probabilities", generated.prompt_logprobs.len());
    }
    for logprob in generated.prompt_logprobs.iter().skip(length / 2 + 1).flatten() {
        tally.add(-f64::from(logprob.logprob));
    }
    Ok(())
}
