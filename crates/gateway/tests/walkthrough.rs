//! A tour of the gateway: give it a model, put it on a socket, talk to it, shut it down.

#[allow(dead_code, clippy::unwrap_used, reason = "the tour needs little of it")]
mod fake;

use std::time::Duration;

use bytes::Bytes;
use pomona_gateway::{Config, SamplingDefaults, ServedModel};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

#[tokio::test]
async fn a_model_is_served_and_the_server_ends() -> std::io::Result<()> {
    // Whoever continues sequences is behind the trait `Replica`; the gateway knows no more. This
    // one has no model and always says the same.
    let replica = fake::FakeReplica::saying("Hello, you!", Duration::from_millis(1));

    // What the gateway needs beside it: names, the tokenizer, and the chat template if there is
    // one. The defaults are what the model's authors recommend.
    let model = ServedModel {
        names: vec!["hello".to_owned()],
        replica,
        tokenizer: fake::tokenizer(),
        template: Some(fake::chat_template()),
        defaults: SamplingDefaults { temperature: Some(0.7), ..SamplingDefaults::default() },
    };

    // Limits and times have defaults; keys are off until some are given.
    let config = Config { drain_timeout: Duration::from_secs(5), ..Config::default() };
    let gateway = pomona_gateway::router(config, vec![model]);

    // It can be asked without a socket.
    let (status, body) = gateway.call("GET", "/v1/models", Bytes::new()).await;
    assert_eq!(status, 200);
    assert!(String::from_utf8_lossy(&body).contains(r#""id":"hello""#));

    // The caller brings the socket and says when it is over. The server then drains.
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let server = tokio::spawn(pomona_gateway::serve(gateway, listener, async {
        let _ = stopped.await;
    }));

    // Anything that speaks OpenAI's API can talk to it now; HTTP by hand will do.
    let body = r#"{"messages": [{"role": "user", "content": "Hi"}]}"#;
    let request = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\
         content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    let mut socket = TcpStream::connect(address).await?;
    socket.write_all(request.as_bytes()).await?;
    let mut answer = String::new();
    socket.read_to_string(&mut answer).await?;
    assert!(answer.starts_with("HTTP/1.1 200 OK"), "{answer}");
    assert!(answer.contains(r#""content":"Hello, you!""#), "{answer}");

    // `serve` returns when nothing runs any more and the last connection is closed.
    drop(stop);
    server.await?
}
