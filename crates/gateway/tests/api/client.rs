//! A small HTTP client, and a server to talk to.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper::{HeaderMap, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use pomona_gateway::{Config, SamplingDefaults, ServedModel};
use serde_json::Value;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::fake::{self, FakeReplica};

/// Longer than anything takes that works.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// A gateway on a port of its own.
pub struct Server {
    pub address: SocketAddr,
    pub replica: Arc<FakeReplica>,
    stop: Option<oneshot::Sender<()>>,
    serving: Option<JoinHandle<std::io::Result<()>>>,
}

/// An answer, read to its end.
#[derive(Debug)]
pub struct Reply {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: String,
}

/// An answer that is still coming. Dropping it closes the connection.
pub struct Opened {
    pub response: Response<Incoming>,
    connection: JoinHandle<()>,
}

impl Server {
    /// With the default configuration.
    pub async fn new(replica: Arc<FakeReplica>) -> Server {
        Server::with(Config::default(), replica).await
    }

    /// With this configuration.
    pub async fn with(config: Config, replica: Arc<FakeReplica>) -> Server {
        let model = ServedModel {
            names: vec!["words".to_owned(), "org/words".to_owned()],
            replica: replica.clone(),
            tokenizer: fake::tokenizer(),
            template: Some(fake::chat_template()),
            defaults: SamplingDefaults { top_k: Some(40), ..SamplingDefaults::default() },
        };
        Server::of(config, replica, model).await
    }

    /// With this model.
    pub async fn of(config: Config, replica: Arc<FakeReplica>, model: ServedModel) -> Server {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (stop, stopped) = oneshot::channel::<()>();
        let gateway = pomona_gateway::router(config, vec![model]);
        let shutdown = async {
            let _ = stopped.await;
        };
        let serving = Some(tokio::spawn(pomona_gateway::serve(gateway, listener, shutdown)));
        Server { address, replica, stop: Some(stop), serving }
    }

    /// Begins the shutdown; the handle ends with it.
    pub fn shut_down(&mut self) -> JoinHandle<std::io::Result<()>> {
        drop(self.stop.take());
        self.serving.take().unwrap()
    }

    pub async fn get(&self, path: &str) -> Reply {
        self.open("GET", path, &[], "").await.read().await
    }

    pub async fn post(&self, path: &str, body: &Value) -> Reply {
        self.post_text(path, &body.to_string()).await
    }

    pub async fn post_text(&self, path: &str, body: &str) -> Reply {
        self.open("POST", path, &[], body).await.read().await
    }

    pub async fn open(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &str,
    ) -> Opened {
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "localhost")
            .header("content-type", "application/json");
        for (name, value) in headers {
            request.headers_mut().unwrap().insert(
                hyper::header::HeaderName::from_bytes(name.as_bytes()).unwrap(),
                value.parse().unwrap(),
            );
        }
        let request = request.body(Full::new(Bytes::from(body.to_owned()))).unwrap();
        let socket = TcpStream::connect(self.address).await.unwrap();
        let (mut sender, connection) = http1::handshake(TokioIo::new(socket)).await.unwrap();
        let connection = tokio::spawn(async move {
            let _ = connection.await;
        });
        let response = tokio::time::timeout(PATIENCE, sender.send_request(request));
        Opened { response: response.await.expect("an answer in time").unwrap(), connection }
    }

    /// Waits until nothing runs in the replica.
    pub async fn settled(&self) {
        use pomona_types::Replica;
        let idle = |load: pomona_types::Load| load.running + load.waiting == 0;
        wait_for("the replica to be idle", || idle(self.replica.load())).await;
        assert_eq!(self.replica.load().blocks_used, 0);
    }
}

/// Looks again and again.
pub async fn wait_for(what: &str, mut condition: impl FnMut() -> bool) {
    let looking = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    assert!(tokio::time::timeout(PATIENCE, looking).await.is_ok(), "waited in vain for {what}");
}

impl Opened {
    /// The next piece of the body.
    pub async fn piece(&mut self) -> Option<String> {
        let frame = tokio::time::timeout(PATIENCE, self.response.frame());
        let frame = frame.await.expect("a piece in time")?.ok()?;
        Some(String::from_utf8(frame.into_data().ok()?.to_vec()).unwrap())
    }

    /// Everything.
    pub async fn read(mut self) -> Reply {
        let mut body = String::new();
        while let Some(piece) = self.piece().await {
            body.push_str(&piece);
        }
        let (status, headers) = (self.response.status(), self.response.headers().clone());
        Reply { status, headers, body }
    }
}

impl Drop for Opened {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

impl Reply {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|_| panic!("no JSON: {self:?}"))
    }

    /// The answer, which must be a success.
    pub fn ok(&self) -> Value {
        assert_eq!(self.status, 200, "{}", self.body);
        self.json()
    }

    /// The error's message; the answer must have this status and OpenAI's shape.
    pub fn error(&self, status: u16) -> String {
        assert_eq!(self.status, status, "{}", self.body);
        let error = &self.json()["error"];
        for field in ["message", "type", "param", "code"] {
            assert!(error.get(field).is_some(), "no {field} in {}", self.body);
        }
        error["message"].as_str().unwrap().to_owned()
    }

    /// The events of a stream, which must end with `[DONE]`.
    pub fn events(&self) -> Vec<Value> {
        assert_eq!(self.status, 200, "{}", self.body);
        let mut lines: Vec<&str> =
            self.body.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
        assert_eq!(lines.pop(), Some("[DONE]"), "{}", self.body);
        lines.into_iter().map(|line| serde_json::from_str(line).unwrap()).collect()
    }
}
