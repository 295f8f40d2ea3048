//! What the gateway can be told: keys, limits, times. Every limit has a default that a small
//! machine bears.

use std::time::Duration;

/// How the gateway behaves. `Config::default()` serves everyone who can reach it.
#[derive(Clone, Debug)]
pub struct Config {
    /// Keys that open the API (`Authorization: Bearer KEY`). Empty: no key is asked for. Requests
    /// of different keys never share prefix blocks.
    pub api_keys: Vec<String>,
    /// Web origins (`https://example.org`, or `*`) whose pages may call the API from a browser.
    /// The gateway's own page always may.
    pub allowed_origins: Vec<String>,
    /// Bounds on what clients can make the gateway hold.
    pub limits: Limits,
    /// How long running requests may go on after the shutdown has begun.
    pub drain_timeout: Duration,
    /// `/health` fails when requests run and no step has ended for this long.
    pub stall_after: Duration,
    /// A stream that has nothing to say sends a comment this often, so that proxies keep it open.
    pub keepalive: Duration,
    /// Write a line to the log (`tracing`, level info) for each request when it is over.
    pub access_log: bool,
    /// What each thread that writes tokens does first: the place to ask the system to run it soon,
    /// beside threads that compute.
    pub writer_begins: fn(),
}

/// Bounds, each with what happens at it.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Bytes of one request body; longer ones are refused (413).
    pub body_bytes: usize,
    /// Bytes of all bodies being read or parsed at once; more are refused (429).
    pub bodies_bytes: usize,
    /// Time for a body to arrive; slower ones are refused (408).
    pub body_timeout: Duration,
    /// Chat and completion requests at work or queued at once; more are refused (429).
    pub generations: usize,
    /// Prompts times `n` of one request; more are refused (400).
    pub choices: u32,
    /// Alternatives per token in log-probabilities; more are refused (400).
    pub logprobs: u32,
    /// Connections open at once; further ones wait to be accepted.
    pub connections: usize,
    /// Time for a request's headers to arrive, and for an idle connection to stay.
    pub header_timeout: Duration,
    /// Time that a client may let its answer wait unread before the connection is closed.
    pub write_timeout: Duration,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            api_keys: Vec::new(),
            allowed_origins: Vec::new(),
            limits: Limits::default(),
            drain_timeout: Duration::from_secs(30),
            stall_after: Duration::from_secs(60),
            keepalive: Duration::from_secs(15),
            access_log: true,
            writer_begins: || {},
        }
    }
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            body_bytes: 8 << 20,
            bodies_bytes: 128 << 20,
            body_timeout: Duration::from_secs(60),
            generations: 4096,
            choices: 128,
            logprobs: 20,
            connections: 8192,
            header_timeout: Duration::from_secs(60),
            write_timeout: Duration::from_secs(60),
        }
    }
}

/// What a model's own `generation_config.json` recommends; a request's fields come first.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SamplingDefaults {
    /// In place of 1.
    pub temperature: Option<f32>,
    /// In place of 1.
    pub top_p: Option<f32>,
    /// In place of 0 (all).
    pub top_k: Option<u32>,
    /// In place of 0.
    pub min_p: Option<f32>,
    /// In place of 1.
    pub repetition_penalty: Option<f32>,
}
