//! The command line: one file for each verb, and the flags that they share.

mod args;
mod bench;
mod cache;
mod chat;
mod conversation;
mod experts;
mod fabric;
mod inspect;
mod node;
mod perplexity;
mod pull;
mod rank;
mod run;
mod serve;
mod speculative;
mod strangers;
mod tokenize;

pub use args::{EngineArgs, NodeTransport, Policy};

use std::io::{IsTerminal, stderr};

use anyhow::Result;
use clap::{ArgAction, Parser, Subcommand};
use tracing_subscriber::EnvFilter;

const ABOUT: &str = "Serves language models on this machine, behind OpenAI's API.";

const EXAMPLES: &str = "\
Examples:
  pomona serve smollm2                     fetch a small model, serve it on port 8000
  pomona serve ./model.gguf --port 9000    serve a GGUF file
  pomona serve org/repo:Q4_K_M             serve a quantisation of a repository on the hub
  pomona chat smollm2                      chat in the terminal
  pomona run smollm2 'Why is the sky blue?'
  pomona inspect ./model.gguf              what is in it, and what it will need
  pomona bench smollm2                     how fast is it, and how fast could it be
  pomona bench --url http://127.0.0.1:8080 the same for any other server
  pomona bench sweep smollm2               does it stay fast: longer, larger, more threads

Models are kept in POMONA_HOME (default: pomona in the user's cache folder).
`pomona VERB --help` explains each verb's flags.";

/// The whole command line.
#[derive(Parser, Debug)]
#[command(name = "pomona", version, about = ABOUT, after_help = EXAMPLES, propagate_version = true)]
pub struct Cli {
    #[command(subcommand)]
    verb: Verb,
    /// Say more; twice for details
    #[arg(short, long, global = true, action = ArgAction::Count)]
    verbose: u8,
}

#[derive(Subcommand, Debug)]
enum Verb {
    /// Serve a model over HTTP: OpenAI's API, a chat page, metrics
    #[command(after_help = serve::EXAMPLES)]
    Serve(Box<serve::ServeArgs>),
    /// Chat in the terminal
    Chat(Box<chat::ChatArgs>),
    /// Answer one prompt
    Run(Box<run::RunArgs>),
    /// Fetch models into the cache
    Pull(pull::PullArgs),
    /// Show what is kept of packed weights, or remove it
    #[command(long_about = cache::ABOUT)]
    Cache(cache::CacheArgs),
    /// Show what a model is, what it needs and what it will run on
    Inspect(Box<inspect::InspectArgs>),
    /// Measure speed, against the limits of this machine
    #[command(after_help = bench::EXAMPLES)]
    Bench(Box<bench::BenchArgs>),
    /// Show the tokens of a text
    Tokenize(tokenize::TokenizeArgs),
    /// Lend this machine to a model that another one serves
    #[command(after_help = node::EXAMPLES)]
    Node(Box<node::NodeArgs>),
    /// What ranks talk over here, and how fast
    #[command(after_help = fabric::EXAMPLES)]
    Fabric(fabric::FabricArgs),
    /// One rank of a divided model: started by the first of them
    #[command(hide = true)]
    Rank(Box<rank::RankArgs>),
    /// Measure how well a model predicts a text
    #[command(long_about = perplexity::ABOUT)]
    Perplexity(Box<perplexity::PerplexityArgs>),
}

impl Cli {
    /// The command line of this process. Ends it where there is nothing to run: after `--help`, or
    /// on a mistake, which is explained.
    pub fn from_command_line() -> Cli {
        Cli::try_parse().unwrap_or_else(|error| strangers::explained(error).exit())
    }

    /// Sends log lines to standard error. `RUST_LOG` refines what `-v` chooses.
    pub fn start_logging(&self) {
        let serves = matches!(self.verb, Verb::Serve(_));
        let level = match (self.verbose, serves) {
            (0, false) => "warn",
            (0, true) | (1, false) => "info",
            (1, true) => "debug,hyper=info",
            _ => "trace",
        };
        let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(level));
        tracing_subscriber::fmt()
            .with_env_filter(filter)
            .with_writer(stderr)
            .with_ansi(stderr().is_terminal())
            .with_target(self.verbose > 0)
            .init();
    }

    /// Does what was asked.
    pub fn run(&self) -> Result<()> {
        match &self.verb {
            Verb::Serve(args) => serve::run(args),
            Verb::Chat(args) => chat::run(args),
            Verb::Run(args) => run::run(args),
            Verb::Pull(args) => pull::run(args),
            Verb::Cache(args) => cache::run(args),
            Verb::Inspect(args) => inspect::run(args),
            Verb::Bench(args) => bench::run(args),
            Verb::Tokenize(args) => tokenize::run(args),
            Verb::Perplexity(args) => perplexity::run(args),
            Verb::Node(args) => node::run(args),
            Verb::Fabric(args) => fabric::run(args),
            Verb::Rank(args) => rank::run(args),
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_model_is_a_position_or_a_flag_but_not_both() {
        let parse = |args: &[&str]| Cli::try_parse_from([&["pomona"], args].concat());
        assert!(parse(&["serve", "smollm2"]).is_ok());
        assert!(parse(&["serve", "--model", "smollm2"]).is_ok());
        assert!(parse(&["serve", "smollm2", "--model", "smollm2"]).is_err());
        assert!(parse(&["chat", "--url", "http://h"]).is_ok());
        assert!(parse(&["chat", "smollm2", "--url", "http://h"]).is_err());
    }

    #[test]
    fn bench_has_verbs_and_works_without_one() {
        let parse = |words: &str| Cli::try_parse_from(words.split(' ')).map_err(|e| e.to_string());
        for words in [
            "pomona bench smollm2 --startup",
            "pomona bench --url http://h",
            "pomona bench kernel smollm2 --json k.json",
            "pomona bench serve smollm2 --peer http://p --clients 1,8",
            "pomona bench serve --url http://h --peer http://p --peer-model m",
            "pomona bench startup --model smollm2",
            "pomona bench sweep smollm2 --cases batch,mixed --svg s.svg --threads 1",
        ] {
            assert!(parse(words).is_ok(), "{words}: {}", parse(words).unwrap_err());
        }
        assert!(parse("pomona bench serve m --peer-model x").unwrap_err().contains("--peer"));
        assert!(parse("pomona bench smollm2 kernel").is_err());
    }

    #[test]
    fn the_flags_of_vllm_users_are_there() {
        let flags = "pomona serve m --host 0.0.0.0 --port 1 --served-model-name a b --api-key k \
             --max-model-len 4K --max-num-seqs 8 --max-num-batched-tokens 256 --dtype auto \
             --kv-cache-dtype auto --seed 1 --no-enable-prefix-caching \
             --scheduling-policy priority --disable-uvicorn-access-log \
             --speculative-config {\"method\":\"suffix\"} --enable-expert-parallel \
             --num-redundant-experts 2";
        let parsed = Cli::try_parse_from(flags.split_whitespace());
        assert!(parsed.is_ok(), "{}", parsed.err().map(|e| e.to_string()).unwrap_or_default());
    }
}
