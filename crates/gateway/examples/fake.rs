//! The gateway over a replica without a model, for working on the API and on the chat page:
//! `cargo run -p pomona-gateway --example fake -- 127.0.0.1:8000 [STEP_MS [API_KEY]]`.

#[allow(dead_code, clippy::unwrap_used, reason = "shared with the tests")]
#[path = "../tests/fake/mod.rs"]
mod fake;

use std::time::Duration;

use pomona_gateway::{Config, SamplingDefaults, ServedModel};
use pomona_types::{Request, TokenId};

/// What the replica says over and over.
const ANSWER: &str = "Here is a *short* answer with **some** markup.\n\n\
    ## A list\n\n- one, with `code`\n- two <b>tags</b> & ampersands\n- three 🍎 apples\n\n\
    ```rust\nfn main() {\n    println!(\"Hello, <world>!\");\n}\n```\n\n\
    1. first\n2. second\n\nAnd that is all for now. ";

/// Greedy requests get the text; others get letters drawn from their seed.
fn script(request: &Request) -> Vec<TokenId> {
    let length = request.sampling.max_tokens.min(600) as usize;
    if request.sampling.temperature == 0.0 || request.sampling.seed.is_none() {
        let text = fake::tokenizer().encode(ANSWER, false).unwrap_or_default();
        return text.into_iter().cycle().take(length).chain([fake::END]).collect();
    }
    let mut state = request.sampling.seed.unwrap_or(0) ^ 0x9e37_79b9_7f4a_7c15;
    let letter = |_| {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        u32::from(b'a') + (state >> 33) as u32 % 26
    };
    (0..length).map(letter).chain([fake::END]).collect()
}

#[tokio::main]
async fn main() -> std::io::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let address = arguments.next().unwrap_or_else(|| "127.0.0.1:8000".to_owned());
    let step_ms = arguments.next().and_then(|text| text.parse().ok()).unwrap_or(10);
    let config = Config { api_keys: arguments.collect(), ..Config::default() };
    let model = ServedModel {
        names: vec!["fake".to_owned(), "also-fake".to_owned()],
        replica: fake::FakeReplica::new(Duration::from_millis(step_ms), Box::new(script)),
        tokenizer: fake::tokenizer(),
        template: Some(fake::chat_template()),
        defaults: SamplingDefaults::default(),
    };
    let listener = tokio::net::TcpListener::bind(&address).await?;
    println!("http://{}", listener.local_addr()?);
    let stop = async {
        // Without a handler there is no way to be told to stop, which is not the end of the world.
        let _ = tokio::signal::ctrl_c().await;
    };
    pomona_gateway::serve(pomona_gateway::router(config, vec![model]), listener, stop).await
}
