//! What the machine itself adds: servers that know neither HTTP nor JSON, and write a fixed event
//! for each token.

use std::io::Write;
use std::net::SocketAddr;
use std::sync::Arc;

use pomona_types::{
    Finish, Replica, Request, RequestId, Sampling, TenantId, TokenOutput, TokenSink,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

/// As long as the gateway's event of a token, in its chunk of HTTP.
const EVENT: &[u8] = &{
    let mut event = [b'x'; 240];
    event[238] = b'\n';
    event[239] = b'\n';
    event
};

/// How a token gets to its socket.
#[derive(Clone, Copy)]
pub enum Way {
    /// Through a channel to a task for each connection.
    Tasks,
    /// At once, by the replica's own thread.
    Direct,
}

/// Serves on the runtime that calls it.
pub async fn serve(listener: TcpListener, replica: Arc<dyn Replica>, way: Way) {
    while let Ok((socket, _)) = listener.accept().await {
        tokio::spawn(answer(socket, replica.clone(), way));
    }
}

/// Where a bare server listens.
pub async fn listen() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

async fn answer(mut socket: TcpStream, replica: Arc<dyn Replica>, way: Way) {
    socket.set_nodelay(true).unwrap();
    let mut request = Vec::new();
    let body = loop {
        socket.read_buf(&mut request).await.unwrap();
        let text = std::str::from_utf8(&request).unwrap();
        if let Some((_, body)) = text.split_once("\r\n\r\n")
            && let Ok(body) = serde_json::from_str::<serde_json::Value>(body)
        {
            break body;
        }
    };
    let seed = body["seed"].as_u64();
    // The first event says no more than that the answer begins.
    socket.write_all(EVENT).await.unwrap();
    match way {
        Way::Tasks => {
            let (sink, tokens) = unbounded_channel();
            submit(replica.as_ref(), seed, Box::new(Sent(sink)));
            pass_on(socket, tokens).await;
        }
        Way::Direct => {
            let socket = socket.into_std().unwrap();
            submit(replica.as_ref(), seed, Box::new(Written(socket)));
        }
    }
}

async fn pass_on(mut socket: TcpStream, mut tokens: UnboundedReceiver<()>) {
    while tokens.recv().await.is_some() {
        socket.write_all(EVENT).await.unwrap();
    }
    // As many events as the gateway ends with.
    socket.write_all(&EVENT.repeat(2)).await.unwrap();
}

fn submit(replica: &dyn Replica, seed: Option<u64>, sink: Box<dyn TokenSink>) {
    let request = Request {
        id: RequestId(0),
        tenant: TenantId(0),
        class: Default::default(),
        priority: 0,
        prompt: [0].into(),
        sampling: Sampling { seed, ..Sampling::default() },
    };
    replica.submit(request, sink).unwrap();
}

struct Sent(UnboundedSender<()>);

impl TokenSink for Sent {
    fn token(&mut self, _: TokenOutput) {
        self.0.send(()).unwrap();
    }

    fn finish(&mut self, _: Finish) {}
}

/// The socket does not block, and always has room: a client here reads.
struct Written(std::net::TcpStream);

impl TokenSink for Written {
    fn token(&mut self, _: TokenOutput) {
        self.0.write_all(EVENT).unwrap();
    }

    fn finish(&mut self, _: Finish) {
        self.0.write_all(&EVENT.repeat(2)).unwrap();
    }
}
