//! A client's request at work: one replica request per prompt and choice, their tokens coming
//! through one channel. Dropping it cancels whatever still runs, so that a client who hangs up
//! frees its blocks at once, however it hung up.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use pomona_types::{
    Finish, FinishReason, Micros, QosClass, Request, RequestId, Sampling, TenantId, TokenId,
    TokenLogprobs, TokenOutput, TokenSink,
};
use tokio::sync::mpsc::error::TryRecvError;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::{OwnedSemaphorePermit, watch};

use crate::choice::{Choice, Delta, End, TextRules};
use crate::error::ApiError;
use crate::gateway::{Model, Phase, Shared};
use crate::metrics::Meter;
use crate::sse::Stream;

/// What to generate.
pub(crate) struct Job {
    pub(crate) tenant: TenantId,
    /// Each with the most tokens to produce after it.
    pub(crate) prompts: Vec<(Arc<[TokenId]>, u32)>,
    /// Choices per prompt. Choice `i` of each uses the request's seed plus `i`.
    pub(crate) n: u32,
    pub(crate) sampling: Sampling,
    pub(crate) priority: i32,
    pub(crate) rules: TextRules,
}

/// A job under way.
pub(crate) struct Generation {
    model: Arc<Model>,
    running: Vec<Running>,
    /// Bounded by what it carries: a sequence sends at most `max_tokens` answers and an end.
    answers: UnboundedReceiver<(usize, Answer)>,
    open: usize,
    prompt_tokens: u64,
    n: usize,
    phase: watch::Receiver<Phase>,
    _permit: OwnedSemaphorePermit,
}

struct Running {
    id: RequestId,
    choice: Choice,
    stopped: Arc<AtomicBool>,
    cached_tokens: u32,
    over: bool,
}

/// What a sink sends.
enum Answer {
    PromptLogprobs(Vec<Option<TokenLogprobs>>),
    Token(TokenOutput),
    Finish(Finish),
}

/// What happened to a choice.
pub(crate) enum Event {
    /// The prompt's log-probabilities, before its first token.
    Prompt { index: usize, logprobs: Vec<Option<TokenLogprobs>> },
    /// Some text, perhaps none.
    Delta { index: usize, delta: Delta },
    /// The last text and how it ended.
    End { index: usize, delta: Delta, end: End },
}

/// Tokens so far.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Counts {
    pub(crate) prompt: u64,
    pub(crate) completion: u64,
    pub(crate) cached: u64,
}

impl Generation {
    /// Submits everything, or nothing. If a stream shows it, that is told of whatever comes.
    pub(crate) fn start(
        shared: &Shared,
        model: Arc<Model>,
        job: Job,
        stream: Option<&Arc<Stream>>,
    ) -> Result<Generation, ApiError> {
        let permit = shared.admit()?;
        let (sender, answers) = unbounded_channel();
        let listener = Listener { answers: sender, stream: stream.cloned() };
        let n = job.n as usize;
        let mut generation = Generation {
            running: Vec::with_capacity(job.prompts.len() * n),
            answers,
            open: 0,
            prompt_tokens: job.prompts.iter().map(|(prompt, _)| prompt.len() as u64).sum(),
            n,
            phase: shared.phase.subscribe(),
            _permit: permit,
            model,
        };
        for (prompt, max_tokens) in &job.prompts {
            generation.model.metrics.asked(job.n, *max_tokens);
            for choice in 0..job.n {
                let mut sampling = Sampling { max_tokens: *max_tokens, ..job.sampling.clone() };
                sampling.seed = sampling.seed.map(|seed| seed.wrapping_add(u64::from(choice)));
                let request = Request {
                    id: shared.request_id(),
                    tenant: job.tenant,
                    class: QosClass::Standard,
                    priority: job.priority,
                    prompt: prompt.clone(),
                    sampling,
                };
                generation.submit(request, &job.rules, &listener)?;
            }
        }
        Ok(generation)
    }

    fn submit(
        &mut self,
        request: Request,
        rules: &TextRules,
        listener: &Listener,
    ) -> Result<(), ApiError> {
        let served = &self.model.served;
        let info = served.replica.info();
        let tokenizer = served.tokenizer.clone();
        let choice = Choice::new(tokenizer, info, &request.sampling, rules.clone());
        let stopped = Arc::new(AtomicBool::new(false));
        let prompt_tokens = u32::try_from(request.prompt.len()).unwrap_or(u32::MAX);
        let sink = Sink {
            index: self.running.len(),
            listener: listener.clone(),
            meter: Meter::start(self.model.clone(), prompt_tokens, stopped.clone()),
            finished: false,
        };
        let id = request.id;
        served.replica.submit(request, Box::new(sink))?;
        self.running.push(Running { id, choice, stopped, cached_tokens: 0, over: false });
        self.open += 1;
        Ok(())
    }

    /// The number of its first sequence, unique in this process.
    pub(crate) fn number(&self) -> u64 {
        self.running.first().map_or(0, |running| running.id.0)
    }

    /// The next event; `None` when every choice has ended. Waiting may be given up at any time.
    pub(crate) async fn next(&mut self) -> Option<Result<Event, ApiError>> {
        if self.is_over() {
            return None;
        }
        let answer = tokio::select! {
            biased;
            answer = self.answers.recv() => answer,
            _ = self.phase.wait_for(|phase| *phase == Phase::Closing) => {
                return Some(Err(Generation::cancelled()));
            }
        };
        Some(match answer {
            Some((index, answer)) => self.take(index, answer),
            None => Err(Generation::lost()),
        })
    }

    /// An event that has come already.
    pub(crate) fn ready(&mut self) -> Option<Result<Event, ApiError>> {
        match self.answers.try_recv() {
            Ok((index, answer)) => Some(self.take(index, answer)),
            Err(TryRecvError::Empty) => None,
            Err(TryRecvError::Disconnected) => Some(Err(Generation::lost())),
        }
    }

    /// Whether every choice has ended.
    pub(crate) fn is_over(&self) -> bool {
        self.open == 0
    }

    /// Ready when the server cancels what runs.
    pub(crate) fn closing(&self) -> impl Future<Output = ()> + Send + use<> {
        let mut phase = self.phase.clone();
        async move {
            // The sender lives as long as the server.
            let _ = phase.wait_for(|phase| *phase == Phase::Closing).await;
        }
    }

    /// What a client hears then.
    pub(crate) fn cancelled() -> ApiError {
        let message = "the server is shutting down and cancelled the request";
        ApiError::Unavailable(message.to_owned())
    }

    /// Sinks say goodbye even when dropped, so this cannot happen while choices are open.
    fn lost() -> ApiError {
        ApiError::Internal("the engine lost the request".to_owned())
    }

    /// Tokens so far. A prompt counts once, however many choices continue it.
    pub(crate) fn counts(&self) -> Counts {
        let first_choices = self.running.iter().step_by(self.n.max(1));
        Counts {
            prompt: self.prompt_tokens,
            completion: self.running.iter().map(|r| u64::from(r.choice.tokens())).sum(),
            cached: first_choices.map(|r| u64::from(r.cached_tokens)).sum(),
        }
    }

    fn take(&mut self, index: usize, answer: Answer) -> Result<Event, ApiError> {
        let running = &mut self.running[index];
        match answer {
            Answer::PromptLogprobs(logprobs) => Ok(Event::Prompt { index, logprobs }),
            Answer::Token(output) => {
                let delta = running.choice.token(output);
                if running.choice.stopped() && !running.stopped.swap(true, Ordering::Relaxed) {
                    self.model.served.replica.cancel(running.id);
                }
                Ok(Event::Delta { index, delta })
            }
            Answer::Finish(finish) => {
                running.over = true;
                self.open -= 1;
                running.cached_tokens = finish.cached_tokens;
                let (delta, end) = running.choice.end(finish)?;
                Ok(Event::End { index, delta, end })
            }
        }
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        for running in self.running.iter().filter(|running| !running.over) {
            self.model.served.replica.cancel(running.id);
        }
    }
}

/// Whom a request's sinks tell.
#[derive(Clone)]
struct Listener {
    answers: UnboundedSender<(usize, Answer)>,
    stream: Option<Arc<Stream>>,
}

/// The replica's end of the channel. Sending never waits; when nobody listens any more, it does
/// nothing.
struct Sink {
    index: usize,
    listener: Listener,
    meter: Meter,
    finished: bool,
}

impl Sink {
    fn send(&self, answer: Answer) {
        // A client who hung up is no error; the generation's drop has cancelled the request.
        let _ = self.listener.answers.send((self.index, answer));
        if let Some(stream) = &self.listener.stream {
            stream.told();
        }
    }
}

impl TokenSink for Sink {
    fn prompt_logprobs(&mut self, logprobs: Vec<Option<TokenLogprobs>>) {
        self.send(Answer::PromptLogprobs(logprobs));
    }

    fn token(&mut self, output: TokenOutput) {
        self.meter.token();
        self.send(Answer::Token(output));
    }

    fn finish(&mut self, finish: Finish) {
        if !std::mem::replace(&mut self.finished, true) {
            self.meter.finish(&finish);
            self.send(Answer::Finish(finish));
        }
    }
}

impl Drop for Sink {
    /// A replica that forgets a request (its thread panicked) must not leave the client waiting.
    fn drop(&mut self) {
        if !self.finished {
            self.send(Answer::Finish(Finish {
                reason: FinishReason::Error,
                message: Some("the engine stopped before the request was finished".to_owned()),
                cached_tokens: 0,
                queued: Micros(0),
                preemptions: 0,
            }));
        }
    }
}
