//! `pomona serve`: a model behind OpenAI's API, with a chat page.

use std::io::{Write, stdout};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Args;
use pomona_gateway::Config;
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::args::{EngineArgs, ModelName};
use crate::compose;
use crate::local::{self, READY_PREFIX};
use crate::models::progress::human_bytes;

/// Shown by `--help`.
pub const EXAMPLES: &str = "\
Examples:
  pomona serve smollm2
  pomona serve ./model.gguf --served-model-name helper --api-key secret --host 0.0.0.0
  pomona serve org/repo:Q4_K_M --max-model-len 8K --max-num-seqs 16

Then open the address in a browser, or:
  curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{\"model\": \"smollm2\", \"messages\": [{\"role\": \"user\", \"content\": \"Hello\"}]}'

Ctrl-C (or SIGTERM) lets running answers finish; a second one ends at once.";

/// Exit status after a second signal, as shells report an interrupt.
const INTERRUPTED: i32 = 130;
/// Longest chat template file.
const TEMPLATE_BYTES_MAX: u64 = 1 << 20;

/// Flags of `serve`.
#[derive(Args, Debug)]
pub struct ServeArgs {
    #[command(flatten)]
    model: ModelName,
    #[command(flatten)]
    http: HttpArgs,
    #[command(flatten)]
    engine: EngineArgs,
}

#[derive(Args, Debug)]
#[command(next_help_heading = "Server")]
struct HttpArgs {
    /// Address to listen on; 0.0.0.0 for all of this machine's
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1")]
    host: String,
    /// Port to listen on; 0 takes a free one
    #[arg(long, value_name = "PORT", default_value_t = 8000)]
    port: u16,
    /// Names under which clients know the model [default: as it was named here]
    #[arg(long, value_name = "NAME", num_args = 1..)]
    served_model_name: Vec<String>,
    /// A key that opens the API; may be given several times [default: none, everyone may come in]
    #[arg(long, value_name = "KEY", env = "POMONA_API_KEY", hide_env_values = true)]
    api_key: Vec<String>,
    /// A web origin whose pages may call the API; may be given several times
    #[arg(long = "allowed-origin", value_name = "ORIGIN")]
    allowed_origins: Vec<String>,
    /// Write no line to the log for each request
    #[arg(long, alias = "disable-uvicorn-access-log")]
    disable_access_log: bool,
    /// A file with a Jinja chat template, in place of the model's own
    #[arg(long, value_name = "FILE")]
    chat_template: Option<PathBuf>,
    /// Seconds that running answers may take after the first signal
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    drain_timeout: u64,
}

/// Runs the verb.
pub fn run(args: &ServeArgs) -> Result<()> {
    let begun = Instant::now();
    let model = args.model.require("serve")?;
    // First what fails fastest: a taken port is known before a download.
    let listener = local::bind(&args.http.host, args.http.port)?;
    let address = listener.local_addr()?;
    let template = args.http.chat_template.as_ref().map(read_template).transpose()?;
    if args.http.api_key.iter().any(|key| key.trim().is_empty()) {
        bail!("--api-key is empty: write a key, or leave the flag out to let everyone in");
    }
    let prepared = compose::prepare(model, &args.engine)?;
    let (fit, spec) = (prepared.fit, prepared.checkpoint.spec().clone());
    tracing::info!(
        model = prepared.resolved.name,
        path = %prepared.resolved.path.display(),
        origin = prepared.resolved.origin,
        architecture = spec.architecture,
        weights = human_bytes(fit.weight_bytes),
        kv = human_bytes(fit.kv_bytes),
        max_model_len = fit.max_model_len,
        max_num_seqs = args.engine.max_num_seqs,
        threads = compose::threads(&args.engine),
        "loading"
    );
    let loaded = prepared.load_with_template(template.as_deref())?;
    let mut names = args.http.served_model_name.clone();
    if names.is_empty() {
        names.push(model.to_owned());
    }
    let config = Config {
        api_keys: args.http.api_key.clone(),
        allowed_origins: args.http.allowed_origins.clone(),
        drain_timeout: Duration::from_secs(args.http.drain_timeout),
        access_log: !args.http.disable_access_log,
        writer_begins: pomona_device::ask_for_short_turns,
        ..Config::default()
    };
    let url = browsable(address);
    announce(&url, &names[0], loaded.template.is_some(), begun.elapsed());
    let served = loaded.served(names);
    tokio::runtime::Runtime::new()?.block_on(async {
        let signals = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
        local::serve(listener, served, config, first_signal(signals)).await
    })?;
    loaded.stop();
    tracing::info!("stopped");
    Ok(())
}

/// Resolves at the first signal; from then on another one ends the process.
async fn first_signal((mut interrupt, mut terminate): (Signal, Signal)) {
    either(&mut interrupt, &mut terminate).await;
    tracing::info!("another signal ends at once");
    tokio::spawn(async move {
        either(&mut interrupt, &mut terminate).await;
        std::process::exit(INTERRUPTED);
    });
}

async fn either(interrupt: &mut Signal, terminate: &mut Signal) {
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
}

fn read_template(path: &PathBuf) -> Result<String> {
    let read = || -> std::io::Result<String> {
        let bytes = std::fs::metadata(path)?.len();
        if bytes > TEMPLATE_BYTES_MAX {
            return Err(std::io::ErrorKind::FileTooLarge.into());
        }
        std::fs::read_to_string(path)
    };
    read().with_context(|| format!("cannot read the chat template {}", path.display()))
}

/// An address that a browser on this machine can open.
fn browsable(address: std::net::SocketAddr) -> String {
    let host = match address.ip() {
        ip if ip.is_unspecified() => "127.0.0.1".to_owned(),
        std::net::IpAddr::V6(ip) => format!("[{ip}]"),
        ip => ip.to_string(),
    };
    format!("http://{host}:{}", address.port())
}

/// The lines that say how to go on. On standard output; the first is for programs too.
fn announce(url: &str, model: &str, chats: bool, took: Duration) {
    let (path, input) = match chats {
        true => {
            ("chat/completions", "\"messages\": [{\"role\": \"user\", \"content\": \"Hello\"}]")
        }
        false => ("completions", "\"prompt\": \"Once upon a time\", \"max_tokens\": 50"),
    };
    let mut out = stdout().lock();
    // Nobody may be reading; that is no reason not to serve.
    let _ = writeln!(
        out,
        "{READY_PREFIX}{url} after {:.2} s: open it in a browser to chat, or\n  \
         curl {url}/v1/{path} -H 'Content-Type: application/json' \\\n    \
         -d '{{\"model\": \"{model}\", {input}}}'",
        took.as_secs_f64(),
    );
    let _ = out.flush();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_can_be_opened() {
        for (address, url) in [
            ("127.0.0.1:8000", "http://127.0.0.1:8000"),
            ("0.0.0.0:1", "http://127.0.0.1:1"),
            ("[::]:1", "http://127.0.0.1:1"),
            ("[::1]:1", "http://[::1]:1"),
        ] {
            assert_eq!(browsable(address.parse().unwrap()), url);
        }
    }
}
