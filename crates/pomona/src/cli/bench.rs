//! `pomona bench`: how fast a model runs here, or at any server, and how fast it could.

mod kernel;
mod sweep;

use std::io::{Write, stdout};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};
use pomona_types::BLOCK_TOKENS;

use super::args::{EngineArgs, ModelName, parse_tokens};
use crate::bench::load::{Level, Round, Shape, Target};
use crate::bench::others::{Busy, Neighbours, Watch};
use crate::bench::quality::Quality;
use crate::bench::report::{Drafts, Facts, Limits, Machine, Memory, Peer, Report, Served, Versus};
use crate::bench::served::Server;
use crate::bench::startup::{Start, Startup};
use crate::bench::stats::Spread;
use crate::bench::{engine, machine, quality};
use crate::compose;
use crate::http::Client;
use crate::memory;
use crate::models::progress::say;

/// Shown by `--help`.
pub const EXAMPLES: &str = "\
Examples:
  pomona bench smollm2                            engine, server under load, memory, start
  pomona bench smollm2 --json smollm2.json        the same, and a record of it
  pomona bench kernel smollm2                     each kind of matrix against the machine's limits
  pomona bench serve smollm2 --peer http://127.0.0.1:8080   beside another server, in turns
  pomona bench startup smollm2                    how soon is the first token there
  pomona bench sweep smollm2 --svg smollm2.svg    longer, larger, more threads: is there a cliff
  pomona bench smollm2 --no-server --n-prompt 512,8192   the engine alone, at two lengths
  pomona bench --url http://127.0.0.1:8080        another server, under the same load
  pomona bench smollm2 --url http://127.0.0.1:8080   the same, with shares of this machine's limits
  pomona bench ./model --quantization int8 --quality   what 8 bits cost in predictions

Without --url the server is a child process of this binary on a free port. Shares of the machine's
limits count the bytes and operations that the work needs at least: weights and KV read once for
each step, two operations for each weight and token.

Where processes that have no part in it take more than 5 % of the cores' time meanwhile, the figures
are shown and written, but are no result: the exit code is 75, and `neighbours.busy` of the JSON is
true. A server at --url or --peer on this machine has a part.";

/// What `LoadArgs` are called, for what has no load.
const OF_LOADS: [&str; 5] =
    ["clients", "requests_per_client", "input_tokens", "output_tokens", "shared_prefix"];

/// Flags of `bench`.
#[derive(Args, Debug)]
#[command(args_conflicts_with_subcommands = true)]
pub struct BenchArgs {
    #[command(subcommand)]
    verb: Option<Verb>,
    #[command(flatten)]
    all: AllArgs,
}

/// One kind of measurement.
#[derive(Subcommand, Debug)]
enum Verb {
    /// Each kind of matrix of a model by itself, against the machine's limits
    Kernel(Box<kernel::KernelArgs>),
    /// A server under load, perhaps beside another one
    Serve(Box<ServeArgs>),
    /// Starts: the first one of a model, which packs its weights, and later ones
    Startup(Box<StartupArgs>),
    /// Look for cliffs: longer prompts, larger batches, more threads, mixed lengths
    Sweep(Box<sweep::SweepArgs>),
}

/// Flags of `bench` without a verb.
#[derive(Args, Debug)]
struct AllArgs {
    #[command(flatten)]
    serve: ServeArgs,
    #[command(flatten)]
    quality: QualityArgs,
    /// Leave out the measurements of the engine alone
    #[arg(long)]
    no_engine: bool,
    /// Leave out the server: measure the engine alone
    #[arg(long, conflicts_with_all = ["no_engine", "url", "peer"],
          conflicts_with_all = OF_LOADS)]
    no_server: bool,
    /// As `bench startup`
    #[arg(long, conflicts_with_all = ["no_engine", "no_server", "url", "peer"],
          conflicts_with_all = OF_LOADS)]
    startup: bool,
    /// Prompts that the engine alone is timed with; its decoding is timed after each
    #[arg(long, value_name = "TOKENS,...", value_delimiter = ',', default_value = "512",
          value_parser = parse_tokens, conflicts_with_all = ["no_engine", "startup", "url"])]
    n_prompt: Vec<u32>,
}

/// Flags of `bench serve`.
#[derive(Args, Clone, Debug)]
struct ServeArgs {
    #[command(flatten)]
    model: ModelName,
    #[command(flatten)]
    target: TargetArgs,
    #[command(flatten)]
    load: LoadArgs,
    #[command(flatten)]
    outcome: Outcome,
    #[command(flatten)]
    engine: EngineArgs,
}

/// Flags of `bench startup`.
#[derive(Args, Debug)]
struct StartupArgs {
    #[command(flatten)]
    model: ModelName,
    #[command(flatten)]
    outcome: Outcome,
    #[command(flatten)]
    engine: EngineArgs,
}

/// How often to measure, and where findings go.
#[derive(Args, Clone, Debug)]
struct Outcome {
    /// Repetitions; medians are shown, with the smallest and largest
    #[arg(long, value_name = "N", default_value_t = 3,
          value_parser = clap::value_parser!(u8).range(1..))]
    repeats: u8,
    /// Write the findings to this file as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

impl From<ServeArgs> for AllArgs {
    fn from(serve: ServeArgs) -> AllArgs {
        AllArgs {
            serve,
            quality: QualityArgs { quality: None, reference: None },
            no_engine: true,
            no_server: false,
            startup: false,
            n_prompt: Vec::new(),
        }
    }
}

/// Other servers than our own.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Other servers")]
struct TargetArgs {
    /// Drive the OpenAI-compatible server at this address
    #[arg(long, value_name = "URL")]
    url: Option<String>,
    /// The model's name at that server [default: its first]
    #[arg(long, alias = "served-model", value_name = "NAME", requires = "url")]
    served_model_name: Option<String>,
    /// Key for that server
    #[arg(
        long,
        value_name = "KEY",
        requires = "url",
        env = "POMONA_API_KEY",
        hide_env_values = true
    )]
    api_key: Option<String>,
    /// Put the same load on this OpenAI-compatible server too, in turns, and compare
    #[arg(long, value_name = "URL")]
    peer: Option<String>,
    /// The model's name at the peer [default: its first]
    #[arg(long, value_name = "NAME", requires = "peer")]
    peer_model: Option<String>,
}

/// Predictions in place of speed.
#[derive(Args, Debug)]
#[command(next_help_heading = "Quality")]
struct QualityArgs {
    /// Measure how well the model predicts a text instead of its speed: perplexity and, with
    /// --reference or --quantization, how far its predictions lie from those of the reference or
    /// the unquantised model [default text: a chapter of Darwin's that is built in]
    #[arg(long, value_name = "TEXT_FILE", num_args = 0..=1,
          conflicts_with_all = ["url", "peer", "no_engine", "no_server", "startup", "n_prompt",
                                "repeats"],
          conflicts_with_all = OF_LOADS)]
    quality: Option<Option<PathBuf>>,
    /// A model to compare with, of the same vocabulary
    #[arg(long, value_name = "MODEL", requires = "quality")]
    reference: Option<String>,
}

/// What the load looks like.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Load")]
struct LoadArgs {
    /// Numbers of concurrent clients
    #[arg(long, value_name = "N,N,...", value_delimiter = ',', default_value = "1,8,32",
          value_parser = clap::value_parser!(u16).range(1..=4096))]
    clients: Vec<u16>,
    /// Requests of each client and repetition
    #[arg(long, value_name = "N", default_value_t = 2,
          value_parser = clap::value_parser!(u16).range(1..))]
    requests_per_client: u16,
    /// Tokens of each prompt
    #[arg(long, value_name = "TOKENS", default_value = "256", value_parser = parse_tokens)]
    input_tokens: u32,
    /// Tokens of each answer
    #[arg(long, value_name = "TOKENS", default_value = "64", value_parser = parse_tokens)]
    output_tokens: u32,
    /// Let prompts share their first three quarters
    #[arg(long)]
    shared_prefix: bool,
}

/// What the model at hand costs, and its KV reads by length.
struct Costs {
    facts: Facts,
    kv_read: Box<dyn Fn(f64) -> f64>,
}

/// Runs the verb.
pub fn run(args: &BenchArgs) -> Result<()> {
    match &args.verb {
        None if args.all.startup => {
            let ServeArgs { model, outcome, engine, .. } = &args.all.serve;
            run_startup(model, outcome, engine)
        }
        None => run_all(&args.all),
        Some(Verb::Kernel(args)) => kernel::run(args),
        Some(Verb::Serve(args)) => run_all(&AllArgs::from(ServeArgs::clone(args))),
        Some(Verb::Startup(args)) => run_startup(&args.model, &args.outcome, &args.engine),
        Some(Verb::Sweep(args)) => sweep::run(args),
    }
}

fn run_all(args: &AllArgs) -> Result<()> {
    refuse_what_does_nothing(args)?;
    let Some(server) =
        args.serve.target.url.clone().or(args.serve.model.get().map(|_| "this binary".into()))
    else {
        bail!("name a model, such as `pomona bench smollm2`, or give --url");
    };
    let urls: Vec<&str> = [&args.serve.target.url, &args.serve.target.peer]
        .into_iter()
        .flatten()
        .map(|url| url.as_str())
        .collect();
    let watch = Watch::start(&urls);
    let mut report = report(&args.serve.engine, server);
    if let Some(text) = &args.quality.quality {
        report.quality = Some(predictions(args, text.as_deref(), &mut report)?);
        // Nobody else on the machine changes what a model predicts.
        return show(&args.serve.outcome, &report);
    }
    let costs = match args.serve.model.get() {
        Some(model) => Some(at_hand(args, model, &mut report)?),
        None => None,
    };
    let runtime = tokio::runtime::Runtime::new()?;
    match (&args.serve.target.url, args.serve.model.get()) {
        (Some(url), _) => drive(args, &runtime, url, &mut report, costs.as_ref())?,
        (None, Some(_)) if args.no_server => {}
        (None, Some(model)) => own_server(args, &runtime, model, &mut report, costs.as_ref())?,
        (None, None) => {}
    }
    report.model = costs.map(|costs| costs.facts);
    finish(&args.serve.outcome, report, &watch)
}

/// Refuses flags of the engine where what is measured does not depend on them, or another server is
/// measured that was not given them.
fn refuse_what_does_nothing(args: &AllArgs) -> Result<()> {
    let ServeArgs { target, engine, model, .. } = &args.serve;
    if args.quality.quality.is_some() {
        return on_one_rank(
            engine,
            "bench --quality reads logits from one rank, and neither ranks nor drafts change them",
        );
    }
    if target.url.is_some() {
        return on_one_rank(engine, "the server at --url has its own ranks and drafts");
    }
    match model.get() {
        Some(_) if !args.no_server => on_this_machine(engine, "bench"),
        _ => Ok(()),
    }
}

/// Refuses flags of ranks and drafts, for the reason that is given.
fn on_one_rank(engine: &EngineArgs, why: &str) -> Result<()> {
    match engine.ranks_and_drafts().first() {
        Some(flag) => bail!("{flag}: {why}: leave the flag out"),
        None => Ok(()),
    }
}

/// Refuses nodes to what starts servers itself, which are not told of any.
fn on_this_machine(engine: &EngineArgs, verb: &str) -> Result<()> {
    if engine.nodes.node_listen.is_some() {
        bail!(
            "--node-listen: {verb} starts servers of this machine: start `pomona serve` with the \
             flag and measure that by `pomona bench --url`"
        );
    }
    Ok(())
}

fn run_startup(model: &ModelName, outcome: &Outcome, engine: &EngineArgs) -> Result<()> {
    let name = model.require("bench startup")?;
    on_this_machine(engine, "bench startup")?;
    let watch = Watch::start(&[]);
    let mut report = report(engine, "this binary".to_owned());
    let facts = compose::prepare(name, engine)?.facts();
    report.startup = starts(name, outcome, engine, facts.weight_bytes)?;
    report.model = Some(facts);
    finish(outcome, report, &watch)
}

/// A report of this machine, measured now by as many threads as ranks have together.
fn report(engine: &EngineArgs, server: String) -> Report {
    say("measuring the machine");
    Report::new(machine::measure(compose::threads_of_ranks(engine)), server)
}

/// Says what was found, and how busy the machine was meanwhile.
///
/// # Errors
/// [`Busy`] where it counts for nothing.
fn finish(outcome: &Outcome, mut report: Report, watch: &Watch) -> Result<()> {
    report.neighbours = watch.look();
    if !report.engine.is_empty() || !report.served.is_empty() {
        // A virtual machine's cores are not always as fast: a limit is the most that was seen.
        report.machine_again(&machine::measure(report.machine.threads));
    }
    show(outcome, &report)?;
    match report.neighbours {
        Neighbours { others_share: Some(share), busy: true } => Err(Busy(share).into()),
        _ => Ok(()),
    }
}

fn show(outcome: &Outcome, report: &Report) -> Result<()> {
    if let Some(path) = &outcome.json {
        let text = serde_json::to_string_pretty(report)? + "\n";
        std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    write!(stdout(), "{}", report.table())?;
    Ok(())
}

/// Reads a text with the model, and with what it is to be compared with.
fn predictions(args: &AllArgs, text: Option<&Path>, report: &mut Report) -> Result<Quality> {
    let name = args.serve.model.require("bench")?;
    let (text_name, text) = match text {
        Some(path) => (path.display().to_string(), super::perplexity::read(path)?),
        None => ("the built-in text".to_owned(), quality::TEXT.to_owned()),
    };
    let prepared = compose::prepare(name, &args.serve.engine)?;
    report.model = Some(prepared.facts());
    let unquantised = args.serve.engine.quantization.map(|_| name);
    let reference = args.quality.reference.as_deref().or(unquantised);
    let mut as_stored = args.serve.engine.clone();
    as_stored.quantization = None;
    let reference = reference.map(|name| compose::prepare(name, &as_stored)).transpose()?;
    quality::measure((&text_name, &text), &prepared, reference.as_ref())
}

/// Reads what the model costs; measures the engine alone unless another server is meant.
fn at_hand(args: &AllArgs, model: &str, report: &mut Report) -> Result<Costs> {
    let prepared = compose::prepare(model, &args.serve.engine.measured())?;
    let spec = prepared.checkpoint.spec().clone();
    let row_bytes = prepared.kv_row_bytes();
    let facts = prepared.facts();
    let kv_read: Box<dyn Fn(f64) -> f64> =
        Box::new(move |tokens| memory::kv_read_bytes(&spec, row_bytes, tokens));
    if args.serve.target.url.is_none() && !args.no_engine {
        say("measuring the engine");
        let loaded = prepared.load()?;
        let replica = loaded.replica.clone();
        let repeats = usize::from(args.serve.outcome.repeats);
        let options = engine::Options { prompts: &args.n_prompt, repeats };
        report.engine =
            engine::measure(replica.as_ref(), &report.machine, &facts, &kv_read, &options)?;
        let load = replica.load();
        report.drafts = args
            .serve
            .engine
            .drafting()
            .map(|_| Drafts { drafted: load.draft_tokens, accepted: load.accepted_tokens });
        drop(replica);
        loaded.stop();
    }
    Ok(Costs { facts, kv_read })
}

/// Times starts, with packed weights in a folder of their own beside the usual ones.
fn starts(
    model: &str,
    outcome: &Outcome,
    engine: &EngineArgs,
    weight_bytes: u64,
) -> Result<Vec<Start>> {
    let path = compose::open(model)?.0.path;
    let mut engine = engine.measured();
    let cache = engine.weight_cache.set_apart(&format!("bench-{}", std::process::id()))?;
    let startup = Startup {
        model,
        path: &path,
        flags: engine.to_server_flags(),
        cache,
        weight_bytes,
        repeats: usize::from(outcome.repeats),
    };
    say("starting the server");
    startup.measure(&tokio::runtime::Runtime::new()?)
}

/// Starts a server for timing its start, then one for the load.
fn own_server(
    args: &AllArgs,
    runtime: &tokio::runtime::Runtime,
    model: &str,
    report: &mut Report,
    costs: Option<&Costs>,
) -> Result<()> {
    say("starting the server");
    let flags = args.serve.engine.measured().to_server_flags();
    let mut starts = Vec::new();
    for _ in 1..args.serve.outcome.repeats {
        let server = Server::start(model, &flags)?;
        starts.push(server.ready.as_secs_f64());
        server.stop()?;
    }
    let server = Server::start(model, &flags)?;
    starts.push(server.ready.as_secs_f64());
    report.ready_s = Some(Spread::of(&starts));
    drive(args, runtime, &server.url, report, costs)?;
    report.memory = server.resident_peak().zip(costs).map(|(resident_peak, costs)| {
        let kv_touched_max = kv_touched_max(args, &report.served, &costs.facts);
        let accounted = costs.facts.weight_bytes.saturating_add(kv_touched_max);
        let beside_weights_and_kv = resident_peak as i64 - accounted as i64;
        Memory { resident_peak, kv_touched_max, beside_weights_and_kv }
    });
    server.stop()
}

/// KV bytes that the tokens of the load fill, each request up to the end of its last block.
fn kv_touched_max(args: &AllArgs, served: &[Served], facts: &Facts) -> u64 {
    let tokens: f64 = served
        .iter()
        .map(|Served { level, .. }| {
            let requests = level.requests * usize::from(args.serve.outcome.repeats);
            let each = level.input_tokens_mean + level.output_tokens_mean;
            requests as f64 * (each + f64::from(BLOCK_TOKENS))
        })
        .sum();
    facts.kv_bytes.min((tokens * facts.kv_token_bytes as f64) as u64)
}

/// All levels of load on a server, and on its peer in turns with it.
fn drive(
    args: &AllArgs,
    runtime: &tokio::runtime::Runtime,
    url: &str,
    report: &mut Report,
    costs: Option<&Costs>,
) -> Result<()> {
    // The key is that of the server at --url.
    let key = args.serve.target.url.as_ref().and(args.serve.target.api_key.as_deref());
    let repeats = usize::from(args.serve.outcome.repeats);
    runtime.block_on(async {
        let name = args.serve.target.served_model_name.as_deref();
        let server = target(&args.serve.load, Client::new(url, key)?, name).await?;
        let peer = match &args.serve.target.peer {
            Some(url) => {
                let (client, name) =
                    (Client::new(url, None)?, args.serve.target.peer_model.as_deref());
                Some((url, target(&args.serve.load, client, name).await?))
            }
            None => None,
        };
        let (mut levels, mut beside) = (Vec::new(), Vec::new());
        for clients in args.serve.load.clients.iter().map(|n| usize::from(*n)) {
            say(&format!("measuring {clients} clients"));
            let requests = clients * usize::from(args.serve.load.requests_per_client);
            let peer = peer.as_ref().map(|(_, peer)| peer);
            let both = in_turns(&server, peer, (clients, requests), repeats).await;
            levels.push(Level::of(clients, requests, both.0)?);
            beside.extend(both.1);
        }
        report.served = with_limits(levels, &report.machine, costs);
        report.peer = match peer {
            Some((url, _)) => {
                let served = beside.into_iter().collect::<Result<_>>()?;
                Some(Peer { url: url.clone(), served })
            }
            None => None,
        };
        Ok(())
    })
}

/// A server that has been asked how it counts.
async fn target(load: &LoadArgs, client: Client, model: Option<&str>) -> Result<Arc<Target>> {
    let model = match model {
        Some(name) => name.to_owned(),
        None => client.first_model().await?,
    };
    let LoadArgs { input_tokens, output_tokens, shared_prefix, .. } = *load;
    let shape = Shape { model, input_tokens, output_tokens, shared_prefix };
    Ok(Arc::new(Target::probe(client, shape).await?))
}

/// Repetitions of one level on a server, and on its peer; another one begins each time.
async fn in_turns(
    server: &Arc<Target>,
    peer: Option<&Arc<Target>>,
    (clients, requests): (usize, usize),
    repeats: usize,
) -> (Vec<Round>, Option<Result<Versus>>) {
    let (mut own, mut others) = (Vec::new(), Vec::new());
    for turn in 0..repeats {
        match peer {
            None => own.push(server.round(clients, requests, turn).await),
            Some(peer) if turn % 2 == 0 => {
                own.push(server.round(clients, requests, turn).await);
                others.push(peer.round(clients, requests, turn).await);
            }
            Some(peer) => {
                others.push(peer.round(clients, requests, turn).await);
                own.push(server.round(clients, requests, turn).await);
            }
        }
    }
    let ratio = |figure: fn(&Round) -> f64| {
        let pairs = own.iter().zip(&others);
        Spread::of(&pairs.map(|(own, other)| figure(own) / figure(other)).collect::<Vec<f64>>())
    };
    let (output_ratio, ttft_ratio) = (ratio(|r| r.output_tokens_per_s), ratio(Round::ttft_ms));
    let versus = peer.map(|_| {
        let level = Level::of(clients, requests, others).context("the peer failed")?;
        Ok(Versus { level, output_ratio, ttft_ratio })
    });
    (own, versus)
}

fn with_limits(levels: Vec<Level>, machine: &Machine, costs: Option<&Costs>) -> Vec<Served> {
    let limits = |level: &Level, costs: &Costs| -> Limits {
        let Costs { facts, kv_read } = costs;
        let output = level.output_tokens_per_s.median;
        let all = level.total_tokens_per_s.median;
        // At best every step serves all clients, so weights are read once for so many tokens.
        let mean_length = level.input_tokens_mean + level.output_tokens_mean / 2.0;
        let clients = level.clients as f64;
        let bytes = facts.bytes_of_step(clients) / clients + kv_read(mean_length);
        let operations =
            2.0 * (facts.layer_weights as f64 * all + facts.output_weights as f64 * output);
        machine.limits(bytes * output / 1e9, operations / 1e9)
    };
    levels
        .into_iter()
        .map(|level| Served { limits: costs.map(|costs| limits(&level, costs)), level })
        .collect()
}
