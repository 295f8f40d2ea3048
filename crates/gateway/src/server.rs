//! Routes, connections and the end of them.

use std::future::Future;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{FromRequestParts, Request, State};
use axum::http::request::Parts;
use axum::http::{HeaderValue, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use pomona_types::TenantId;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;

use crate::config::{Config, Limits};
use crate::connection::ImpatientWriter;
use crate::door::Guarded;
use crate::error::ApiError;
use crate::gateway::{Phase, ServedModel, Shared};
use crate::sse::Way;
use crate::writers::{Queue, Writers};
use crate::{access, chat, completions, models, origins, page, probes, tokenize};

/// How long connections may take for their last bytes once no request runs any more.
const GOODBYE: Duration = Duration::from_secs(2);
/// How long to wait when the system has no file descriptor left for another connection.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// The routes with the state behind them; [`serve`] puts them on a socket.
pub struct Gateway {
    shared: Arc<Shared>,
    router: Router,
}

/// Builds the API for these models.
pub fn router(config: Config, models: Vec<ServedModel>) -> Gateway {
    let shared = Arc::new(Shared::new(config, models));
    let router = Router::new()
        .route("/v1/models", get(models::list))
        // A name may have slashes in it.
        .route("/v1/models/{*name}", get(models::retrieve))
        .route("/v1/chat/completions", post(chat::create))
        .route("/v1/completions", post(completions::create))
        .route("/tokenize", post(tokenize::tokenize))
        .route("/detokenize", post(tokenize::detokenize))
        .route("/health", get(probes::health))
        .route("/ready", get(probes::ready))
        .route("/version", get(probes::version))
        .route("/metrics", get(probes::metrics))
        .route("/", get(page::index))
        .route("/page.css", get(page::style))
        .route("/page.js", get(page::script))
        .route("/markdown.js", get(page::markdown))
        .route("/icon.svg", get(page::icon))
        .route("/favicon.ico", get(page::icon))
        .method_not_allowed_fallback(wrong_method)
        .fallback(wrong_path)
        .layer(axum::middleware::from_fn_with_state(shared.clone(), origins::allow))
        .layer(axum::middleware::from_fn_with_state(shared.clone(), count))
        .layer(axum::middleware::from_fn_with_state(shared.clone(), access::record))
        .with_state(shared.clone());
    Gateway { shared, router }
}

async fn count(State(shared): State<Arc<Shared>>, request: Request, next: Next) -> Response {
    let mut response = next.run(request).await;
    shared.responses.count(response.status().as_u16());
    if *shared.phase.borrow() != Phase::Open {
        // The client's next request belongs elsewhere. Said here rather than by closing, which
        // would cut off a request that is on its way.
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

impl Gateway {
    /// Answers one request with a JSON body without a socket: for fuzzing, and for whoever brings
    /// a transport of their own. Gives the HTTP status and the body, which for a stream is all of
    /// it.
    pub async fn call(&self, method: &str, path: &str, body: Bytes) -> (u16, Bytes) {
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::CONTENT_TYPE, "application/json")
            .body(Body::from(body));
        let response = match request {
            Ok(request) => {
                match TowerToHyperService::new(self.router.clone()).call(request).await {
                    Ok(response) => response,
                    Err(never) => match never {},
                }
            }
            Err(error) => ApiError::body(format!("no such request: {error}")).into_response(),
        };
        let status = response.status().as_u16();
        // Our own bodies do not fail.
        let body = response.into_body().collect().await.map(|body| body.to_bytes());
        (status, body.unwrap_or_default())
    }
}

/// Whoever presented a valid key.
pub(crate) struct Caller(pub(crate) TenantId);

impl FromRequestParts<Arc<Shared>> for Caller {
    type Rejection = ApiError;

    async fn from_request_parts(
        parts: &mut Parts,
        shared: &Arc<Shared>,
    ) -> Result<Caller, ApiError> {
        shared.keys.check(&parts.headers).map(Caller)
    }
}

async fn wrong_path(request: Request) -> ApiError {
    ApiError::UnknownPath { path: crate::fields::shortened(request.uri().path()) }
}

async fn wrong_method(request: Request) -> ApiError {
    ApiError::Method {
        path: crate::fields::shortened(request.uri().path()),
        method: crate::fields::shortened(request.method().as_str()),
    }
}

/// Serves until `shutdown` is ready, then drains: new requests are refused with 503 and `/ready`
/// fails, while what runs may finish within `drain_timeout`; then it is cancelled. Probes are
/// answered to the end. Returns when the last connection is closed.
///
/// Fails only if the listener does; trouble with one connection is logged.
pub async fn serve(
    gateway: Gateway,
    listener: TcpListener,
    shutdown: impl Future<Output = ()>,
) -> io::Result<()> {
    let Gateway { shared, router } = gateway;
    let limits = shared.config.limits.clone();
    let mut connections = Connections {
        listener,
        router,
        room: Arc::new(Semaphore::new(limits.connections.max(1))),
        limits,
        phase: shared.phase.subscribe(),
        tasks: JoinSet::new(),
        writers: Writers::start(shared.config.writer_begins)?,
    };
    tokio::select! {
        result = connections.accept() => return result,
        () = shutdown => {}
    }
    tracing::info!("shutting down: finishing what runs");
    shared.phase.send_replace(Phase::Draining);
    tokio::select! {
        result = connections.accept() => return result,
        () = shared.idle() => {}
        () = tokio::time::sleep(shared.config.drain_timeout) => {
            tracing::warn!("requests still ran after the drain timeout; they are cancelled");
        }
    }
    shared.phase.send_replace(Phase::Closing);
    connections.close().await;
    Ok(())
}

/// The open connections, one task each.
struct Connections {
    listener: TcpListener,
    router: Router,
    limits: Limits,
    room: Arc<Semaphore>,
    phase: watch::Receiver<Phase>,
    tasks: JoinSet<()>,
    writers: Writers,
}

impl Connections {
    /// Takes connections in for ever.
    async fn accept(&mut self) -> io::Result<()> {
        loop {
            // Reap what has ended, so that the set holds no more than the open connections.
            while self.tasks.try_join_next().is_some() {}
            let room = self.room.clone().acquire_owned().await.map_err(io::Error::other)?;
            let socket = match self.listener.accept().await {
                Ok((socket, _)) => socket,
                // Of one connection, or for want of descriptors: neither is the listener's end.
                Err(error) if is_passing(&error) => {
                    tracing::warn!(%error, "could not accept a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
                Err(error) => return Err(error),
            };
            let queue = self.writers.queue();
            let answer =
                answer(socket, self.router.clone(), queue, &self.limits, self.phase.clone());
            self.tasks.spawn(async move {
                answer.await;
                drop(room);
            });
        }
    }

    /// Lets connections finish what they are writing, then ends them.
    async fn close(mut self) {
        drop(self.listener);
        let all = async { while self.tasks.join_next().await.is_some() {} };
        if tokio::time::timeout(GOODBYE, all).await.is_err() {
            self.tasks.shutdown().await;
        }
    }
}

fn is_passing(error: &io::Error) -> bool {
    /// "Too many open files", of the process and of the system (errno(3)).
    const DESCRIPTORS: [i32; 2] = [24, 23];
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionRefused
            | io::ErrorKind::Interrupted
            | io::ErrorKind::OutOfMemory
    ) || error.raw_os_error().is_some_and(|code| DESCRIPTORS.contains(&code))
}

/// Serves one connection to its end, which the server asks for when no request runs any more.
fn answer(
    socket: TcpStream,
    router: Router,
    queue: Arc<Queue>,
    limits: &Limits,
    mut phase: watch::Receiver<Phase>,
) -> impl Future<Output = ()> + Send + 'static {
    let header_timeout = limits.header_timeout;
    let write_timeout = limits.write_timeout;
    async move {
        if let Err(error) = socket.set_nodelay(true) {
            tracing::debug!(%error, "small packets may be late");
        }
        let socket = Guarded::new(socket);
        let way = Way { door: socket.door(), queue };
        let router = TowerToHyperService::new(router);
        let routed = service_fn(move |mut request: hyper::Request<Incoming>| {
            request.extensions_mut().insert(way.clone());
            router.call(request)
        });
        let io = TokioIo::new(ImpatientWriter::new(socket, write_timeout));
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(header_timeout)
            .serve_connection(io, routed);
        let mut connection = std::pin::pin!(connection);
        let called = async {
            // The sender lives as long as the server.
            let _ = phase.wait_for(|phase| *phase == Phase::Closing).await;
        };
        let result = tokio::select! {
            result = connection.as_mut() => result,
            () = called => {
                connection.as_mut().graceful_shutdown();
                connection.as_mut().await
            }
        };
        if let Err(error) = result {
            tracing::debug!(%error, "a connection ended badly");
        }
    }
}
