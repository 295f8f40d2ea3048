//! Driving a replica in this process, without HTTP: requests in, their tokens' times out. For
//! measurements and for perplexity.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use pomona_types::{
    Finish, FinishReason, QosClass, Replica, Request, RequestId, Sampling, TenantId, TokenId,
    TokenLogprobs, TokenOutput, TokenSink,
};

/// Longest wait for the next token.
const SILENCE_TIMEOUT: Duration = Duration::from_secs(600);

/// What a request brought.
#[derive(Debug)]
pub struct Generated {
    /// When it was submitted.
    pub submitted: Instant,
    /// When each token arrived.
    pub times: Vec<Instant>,
    /// Log-probabilities of the prompt, if asked for.
    pub prompt_logprobs: Vec<Option<TokenLogprobs>>,
}

enum Said {
    Prompt(Vec<Option<TokenLogprobs>>),
    Token(Instant),
    End(Finish),
}

struct Sink(Sender<Said>);

impl TokenSink for Sink {
    fn prompt_logprobs(&mut self, logprobs: Vec<Option<TokenLogprobs>>) {
        // Nobody listens any more: the request ends by itself.
        let _ = self.0.send(Said::Prompt(logprobs));
    }

    fn token(&mut self, _output: TokenOutput) {
        let _ = self.0.send(Said::Token(Instant::now()));
    }

    fn finish(&mut self, finish: Finish) {
        let _ = self.0.send(Said::End(finish));
    }
}

/// A request that is on its way.
pub struct Pending {
    receiver: Receiver<Said>,
    submitted: Instant,
}

impl Pending {
    /// Waits for its end.
    ///
    /// # Errors
    /// When the replica fails under it or falls silent.
    pub fn wait(self) -> Result<Generated> {
        collect(&self.receiver, self.submitted)
    }
}

/// Submits a request.
///
/// # Errors
/// When the replica refuses it.
pub fn submit(
    replica: &dyn Replica,
    id: u64,
    prompt: Vec<TokenId>,
    sampling: Sampling,
) -> Result<Pending> {
    let (sender, receiver) = channel();
    let request = Request {
        id: RequestId(id),
        tenant: TenantId::default(),
        class: QosClass::default(),
        priority: 0,
        prompt: Arc::from(prompt),
        sampling,
    };
    let submitted = Instant::now();
    replica.submit(request, Box::new(Sink(sender))).context("the engine refuses")?;
    Ok(Pending { receiver, submitted })
}

/// Submits a request and waits for its end.
///
/// # Errors
/// When the replica refuses it, fails under it or falls silent.
pub fn generate(
    replica: &dyn Replica,
    id: u64,
    prompt: Vec<TokenId>,
    sampling: Sampling,
) -> Result<Generated> {
    submit(replica, id, prompt, sampling)?.wait()
}

fn collect(receiver: &Receiver<Said>, submitted: Instant) -> Result<Generated> {
    let mut generated = Generated { submitted, times: Vec::new(), prompt_logprobs: Vec::new() };
    loop {
        match receiver.recv_timeout(SILENCE_TIMEOUT) {
            Ok(Said::Prompt(logprobs)) => generated.prompt_logprobs = logprobs,
            Ok(Said::Token(at)) => generated.times.push(at),
            Ok(Said::End(finish)) if finish.reason == FinishReason::Error => {
                return Err(anyhow!(
                    "the engine failed: {}",
                    finish.message.unwrap_or_else(|| "it did not say why".to_owned())
                ));
            }
            Ok(Said::End(_)) => return Ok(generated),
            Err(RecvTimeoutError::Timeout) => bail!("the engine fell silent"),
            Err(RecvTimeoutError::Disconnected) => bail!("the engine went away"),
        }
    }
}
