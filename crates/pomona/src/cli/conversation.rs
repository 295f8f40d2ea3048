//! Asking a server for one answer and printing it as it comes. `chat` and `run` share it; the
//! server is this process or another one.

use std::io::{IsTerminal, Write, stdout};
use std::time::{Duration, Instant};

use anyhow::Result;
use clap::Args;
use serde_json::{Value, json};

use crate::http::Client;

/// How answers are drawn.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Sampling")]
pub struct SamplingArgs {
    /// 0 always takes the likeliest token [default: the server's, 1 unless it says otherwise]
    #[arg(long, value_name = "T")]
    pub temperature: Option<f64>,
    /// Only the likeliest tokens that together reach this probability
    #[arg(long, value_name = "P")]
    pub top_p: Option<f64>,
    /// Only the K likeliest tokens
    #[arg(long, value_name = "K")]
    pub top_k: Option<u32>,
    /// Only tokens at least this likely, relative to the likeliest
    #[arg(long, value_name = "P")]
    pub min_p: Option<f64>,
    /// Most tokens of an answer
    #[arg(long, value_name = "TOKENS")]
    pub max_tokens: Option<u32>,
}

impl SamplingArgs {
    /// The fields of a request that were given.
    pub fn fields(&self) -> Vec<(&'static str, Value)> {
        let all = [
            ("temperature", self.temperature.map(Value::from)),
            ("top_p", self.top_p.map(Value::from)),
            ("top_k", self.top_k.map(Value::from)),
            ("min_p", self.min_p.map(Value::from)),
            ("max_tokens", self.max_tokens.map(Value::from)),
        ];
        all.into_iter().filter_map(|(name, value)| Some((name, value?))).collect()
    }

    /// Sets one by its name in the API, as `/set temperature 0.7` does.
    pub fn set(&mut self, name: &str, value: &str) -> Result<(), String> {
        fn read<T: std::str::FromStr>(value: &str) -> Result<Option<T>, String> {
            value.parse().map(Some).map_err(|_| format!("{value:?} is not a number for this"))
        }
        match name {
            "temperature" => self.temperature = read(value)?,
            "top_p" => self.top_p = read(value)?,
            "top_k" => self.top_k = read(value)?,
            "min_p" => self.min_p = read(value)?,
            "max_tokens" => self.max_tokens = read(value)?,
            _ => {
                return Err(format!(
                    "there is no setting {name:?}: temperature, top_p, top_k, min_p, max_tokens"
                ));
            }
        }
        Ok(())
    }
}

/// A server, a model and a way to draw.
pub struct Conversation {
    /// Where.
    pub client: Client,
    /// The model's name there.
    pub model: String,
    /// How.
    pub sampling: SamplingArgs,
    /// Sent with every request, if given.
    pub seed: Option<u64>,
}

/// What came back.
#[derive(Debug)]
pub struct Answer {
    /// The text.
    pub text: String,
    /// Whether Ctrl-C ended it.
    pub stopped: bool,
    /// Whether it was cut at the most tokens allowed.
    pub cut: bool,
    /// Tokens generated; pieces received when the server reports no usage.
    pub tokens: u64,
    /// Time to the first piece.
    pub first: Duration,
    /// Time from the first piece to the last.
    pub rest: Duration,
}

impl Answer {
    /// `42 tokens, 55.1 tokens/s, first after 0.12 s`.
    pub fn summary(&self) -> String {
        let rate = self.tokens.saturating_sub(1) as f64 / self.rest.as_secs_f64().max(1e-9);
        let rate = match self.tokens {
            0 | 1 => String::new(),
            _ => format!(", {rate:.1} tokens/s"),
        };
        let cut = if self.cut { ", cut at the most tokens allowed" } else { "" };
        let stopped = if self.stopped { ", stopped" } else { "" };
        format!(
            "{} tokens{rate}, first after {:.2} s{cut}{stopped}",
            self.tokens,
            self.first.as_secs_f64()
        )
    }
}

impl Conversation {
    /// Asks for the next message of a chat and prints it as it comes. Ctrl-C ends the answer.
    pub async fn chat(&self, messages: &[Value]) -> Result<Answer> {
        let body = self.body(("messages", json!(messages)));
        self.print("/v1/chat/completions", "/choices/0/delta/content", &body).await
    }

    /// Asks for the continuation of a text.
    pub async fn complete(&self, prompt: &str) -> Result<Answer> {
        let body = self.body(("prompt", json!(prompt)));
        self.print("/v1/completions", "/choices/0/text", &body).await
    }

    fn body(&self, input: (&str, Value)) -> Value {
        let mut body = json!({
            "model": self.model,
            "stream": true,
            "stream_options": {"include_usage": true},
        });
        body[input.0] = input.1;
        for (name, value) in self.sampling.fields() {
            body[name] = value;
        }
        if let Some(seed) = self.seed {
            body["seed"] = json!(seed);
        }
        body
    }

    async fn print(&self, path: &str, piece: &str, body: &Value) -> Result<Answer> {
        let begun = Instant::now();
        let interrupt = tokio::signal::ctrl_c();
        tokio::pin!(interrupt);
        let mut answer = Answer {
            text: String::new(),
            stopped: false,
            cut: false,
            tokens: 0,
            first: Duration::ZERO,
            rest: Duration::ZERO,
        };
        let mut events = tokio::select! {
            events = self.client.stream(path, body) => events?,
            _ = &mut interrupt => { answer.stopped = true; return Ok(answer) }
        };
        let mut first: Option<Instant> = None;
        let mut pieces = 0;
        let mut usage = None;
        loop {
            let event = tokio::select! {
                event = events.next() => event?,
                // Hanging up (by dropping the stream) is how a server is told to stop.
                _ = &mut interrupt => { answer.stopped = true; None }
            };
            let Some(event) = event else { break };
            if let Some(text) = event.pointer(piece).and_then(Value::as_str)
                && !text.is_empty()
            {
                let now = Instant::now();
                let first = *first.get_or_insert(now);
                (answer.first, answer.rest) = (first - begun, now - first);
                pieces += 1;
                answer.text.push_str(text);
                print_safely(text)?;
            }
            let reason = event.pointer("/choices/0/finish_reason").and_then(Value::as_str);
            answer.cut |= reason == Some("length");
            let count = event.pointer("/usage/completion_tokens").and_then(Value::as_u64);
            usage = count.or(usage);
        }
        answer.tokens = usage.unwrap_or(pieces);
        Ok(answer)
    }
}

/// Prints text of a model. On a terminal control characters are left out: a model must not move
/// the cursor or set the window's title.
fn print_safely(text: &str) -> Result<()> {
    let mut out = stdout().lock();
    if out.is_terminal() {
        let visible = |c: &char| !c.is_control() || matches!(c, '\n' | '\t');
        let text: String = text.chars().filter(visible).collect();
        out.write_all(text.as_bytes())?;
    } else {
        out.write_all(text.as_bytes())?;
    }
    out.flush()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_set_is_sent() {
        let mut sampling = SamplingArgs::default();
        assert!(sampling.fields().is_empty());
        sampling.set("top_k", "40").unwrap();
        assert_eq!(sampling.fields(), [("top_k", json!(40))]);
        assert!(sampling.set("top_k", "many").unwrap_err().contains("not a number"));
        assert!(sampling.set("topk", "4").unwrap_err().contains("top_k"));
    }

    #[test]
    fn a_summary_counts_the_time_between_tokens() {
        let answer = Answer {
            text: String::new(),
            stopped: false,
            cut: true,
            tokens: 11,
            first: Duration::from_millis(120),
            rest: Duration::from_millis(200),
        };
        let text = "11 tokens, 50.0 tokens/s, first after 0.12 s, cut at the most tokens allowed";
        assert_eq!(answer.summary(), text);
    }
}
