//! A server within this process: the engine and the gateway on a port, until told to end. `serve`
//! is one; `chat` and `run` start one on a free port behind a random key, so that they go the very
//! way that clients go.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::io::ErrorKind;
use std::net::{SocketAddr, TcpListener, ToSocketAddrs};

use anyhow::{Context, Result, anyhow};
use pomona_gateway::{Config, ServedModel};
use tokio::runtime::Runtime;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::cli::EngineArgs;
use crate::compose::{self, Loaded};
use crate::http::Client;

/// How the line begins that `serve` prints when it is ready; the address follows.
pub const READY_PREFIX: &str = "ready at ";

/// A model behind a private port.
pub struct LocalServer {
    loaded: Loaded,
    name: String,
    url: String,
    key: String,
    stop: oneshot::Sender<()>,
    task: JoinHandle<Result<()>>,
}

impl LocalServer {
    /// Loads a model and serves it to this process alone.
    pub fn start(model: &str, args: &EngineArgs, runtime: &Runtime) -> Result<LocalServer> {
        let loaded = compose::prepare(model, args)?.load()?;
        let listener = bind("127.0.0.1", 0)?;
        let url = format!("http://{}", listener.local_addr()?);
        let key = random_key();
        let api_keys = vec![key.clone()];
        // Its only client is this process; lines would stand in the middle of answers.
        let writer_begins = pomona_device::ask_for_short_turns;
        let config = Config { api_keys, access_log: false, writer_begins, ..Config::default() };
        let served = loaded.served(vec![model.to_owned()]);
        let (stop, stopped) = oneshot::channel();
        let task = runtime.spawn(serve(listener, served, config, async move {
            // A dropped sender ends it as well.
            let _ = stopped.await;
        }));
        Ok(LocalServer { loaded, name: model.to_owned(), url, key, stop, task })
    }

    /// A client of it.
    pub fn client(&self) -> Result<Client> {
        Client::new(&self.url, Some(&self.key))
    }

    /// The model's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether the model can chat.
    pub fn has_chat_template(&self) -> bool {
        self.loaded.template.is_some()
    }

    /// Ends it.
    pub fn stop(self, runtime: &Runtime) {
        // It may have ended by itself; there is nothing to be told then.
        let _ = self.stop.send(());
        match runtime.block_on(self.task) {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!("the server ended badly: {error:#}"),
            Err(error) => tracing::warn!("the server ended badly: {error}"),
        }
        self.loaded.stop();
    }
}

/// A key that nobody guesses: 128 bits from the random state that the system seeds.
fn random_key() -> String {
    let draw = || RandomState::new().build_hasher().finish();
    format!("{:016x}{:016x}", draw(), draw())
}

/// Opens a port.
///
/// # Errors
/// When it is taken or forbidden; says what to do.
pub fn bind(host: &str, port: u16) -> Result<TcpListener> {
    let addresses: Vec<SocketAddr> = (host, port)
        .to_socket_addrs()
        .with_context(|| {
            format!("--host {host} is no address: write one of this machine, 127.0.0.1 or 0.0.0.0")
        })?
        .collect();
    let listener = TcpListener::bind(addresses.as_slice()).map_err(|error| {
        let advice = match error.kind() {
            ErrorKind::AddrInUse => {
                "another program listens there: stop it, or choose another port with --port \
                 (0 takes a free one)"
            }
            ErrorKind::PermissionDenied => {
                "ports below 1024 are reserved: choose a higher one with --port"
            }
            ErrorKind::AddrNotAvailable => {
                "this machine has no such address: choose another --host, such as 127.0.0.1 or \
                 0.0.0.0"
            }
            _ => "choose another --host or --port",
        };
        anyhow!(error).context(format!("cannot listen on {host}:{port}: {advice}"))
    })?;
    listener.set_nonblocking(true).context("cannot prepare the port")?;
    Ok(listener)
}

/// Serves until `shutdown` resolves and what runs is done.
pub async fn serve(
    listener: TcpListener,
    model: ServedModel,
    config: Config,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> Result<()> {
    let listener = tokio::net::TcpListener::from_std(listener)?;
    let gateway = pomona_gateway::router(config, vec![model]);
    pomona_gateway::serve(gateway, listener, shutdown).await.context("the server's port failed")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_taken_port_says_how_to_go_on() {
        let taken = bind("127.0.0.1", 0).unwrap();
        let port = taken.local_addr().unwrap().port();
        let text = format!("{:#}", bind("127.0.0.1", port).unwrap_err());
        assert!(text.contains("another program listens") && text.contains("--port"), "{text}");
    }

    #[test]
    fn a_host_that_is_not_ours_says_which_are() {
        let text = format!("{:#}", bind("192.0.2.1", 0).unwrap_err());
        assert!(text.contains("no such address"), "{text}");
    }

    #[test]
    fn keys_differ() {
        assert_ne!(random_key(), random_key());
        assert_eq!(random_key().len(), 32);
    }
}
