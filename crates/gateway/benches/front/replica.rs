//! Replicas without a model: one answers while it is asked, one at a pace, and notes when.

use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use pomona_types::{
    ExpertLoads, Finish, FinishReason, Load, Micros, Refusal, Replica, ReplicaInfo, Request,
    RequestId, TokenId, TokenOutput, TokenSink,
};

use crate::{Clock, model};

/// What every token says: text of its own, so that each makes an event.
const WORD: &str = "a";

fn info() -> ReplicaInfo {
    ReplicaInfo {
        model: model::NAME.into(),
        max_model_len: 4096,
        vocab_size: model::tokenizer().vocab_size() as u32,
        eos_token_ids: Arc::new([]),
        kv_tokens: 1 << 20,
    }
}

fn word() -> TokenId {
    model::tokenizer().token_id(WORD).unwrap()
}

fn end(sink: &mut dyn TokenSink) {
    sink.finish(Finish {
        reason: FinishReason::Length,
        message: None,
        cached_tokens: 0,
        queued: Micros(0),
        preemptions: 0,
    });
}

struct NullReplica {
    info: ReplicaInfo,
    answer: Vec<TokenId>,
    experts: Option<Arc<ExpertLoads>>,
}

/// Answers each request with so many tokens before `submit` returns.
pub fn null(tokens: usize) -> Arc<dyn Replica> {
    Arc::new(NullReplica { info: info(), answer: vec![word(); tokens], experts: None })
}

/// Answers with nothing, and has counted tokens of so many experts in each of so many layers.
pub fn of_experts(layers: usize, experts: usize) -> Arc<dyn Replica> {
    let tokens = (0..layers).map(|layer| vec![123_456_789 + layer as u64; experts]).collect();
    let experts = Some(Arc::new(ExpertLoads { tokens, ..ExpertLoads::default() }));
    Arc::new(NullReplica { info: info(), answer: Vec::new(), experts })
}

impl Replica for NullReplica {
    fn info(&self) -> &ReplicaInfo {
        &self.info
    }

    fn submit(&self, _: Request, mut sink: Box<dyn TokenSink>) -> Result<(), Refusal> {
        for token in &self.answer {
            sink.token(TokenOutput { token: *token, logprobs: None });
        }
        end(sink.as_mut());
        Ok(())
    }

    fn cancel(&self, _: RequestId) {}

    fn load(&self) -> Load {
        Load::default()
    }

    fn experts(&self) -> Option<Arc<ExpertLoads>> {
        self.experts.clone()
    }
}

/// How tokens are spread over an interval.
#[derive(Clone, Copy)]
pub enum Pace {
    /// All streams get theirs at its beginning, as from a step of an engine.
    Together,
    /// One stream after the other, evenly.
    Apart,
}

impl Pace {
    /// What it is asked for by.
    pub fn word(self) -> &'static str {
        match self {
            Pace::Together => "together",
            Pace::Apart => "apart",
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Pace::Together => "all at once",
            Pace::Apart => "evenly spread",
        }
    }
}

/// Collects its streams first. A request's seed is the number of its stream.
pub struct PacedReplica {
    info: ReplicaInfo,
    streams: usize,
    tokens: usize,
    word: TokenId,
    clock: Clock,
    sinks: Mutex<Vec<(usize, Box<dyn TokenSink>)>>,
    came: Condvar,
}

impl PacedReplica {
    pub fn new(streams: usize, tokens: usize) -> Arc<PacedReplica> {
        Arc::new(PacedReplica {
            info: info(),
            streams,
            tokens,
            word: word(),
            clock: Clock(Instant::now()),
            sinks: Mutex::new(Vec::new()),
            came: Condvar::new(),
        })
    }

    pub fn clock(&self) -> Clock {
        self.clock
    }

    /// Waits until all streams have come.
    pub fn await_all(&self) {
        let sinks = self.sinks.lock().unwrap();
        drop(self.came.wait_while(sinks, |sinks| sinks.len() < self.streams).unwrap());
    }

    /// Gives every stream its tokens; when, by stream and token.
    pub fn run(&self, pace: Pace, interval: Duration) -> Vec<Vec<u64>> {
        let mut sinks = std::mem::take(&mut *self.sinks.lock().unwrap());
        sinks.sort_by_key(|(stream, _)| *stream);
        let mut told = vec![Vec::with_capacity(self.tokens); self.streams];
        let begun = Instant::now();
        for step in 0..self.tokens as u32 {
            for (at, (stream, sink)) in (0u32..).zip(&mut sinks) {
                let lag = match pace {
                    Pace::Together => Duration::ZERO,
                    Pace::Apart => interval * at / self.streams as u32,
                };
                std::thread::sleep((interval * step + lag).saturating_sub(begun.elapsed()));
                told[*stream].push(self.clock.now());
                sink.token(TokenOutput { token: self.word, logprobs: None });
            }
        }
        sinks.iter_mut().for_each(|(_, sink)| end(sink.as_mut()));
        told
    }
}

impl Replica for PacedReplica {
    fn info(&self) -> &ReplicaInfo {
        &self.info
    }

    fn submit(&self, request: Request, sink: Box<dyn TokenSink>) -> Result<(), Refusal> {
        let stream = request.sampling.seed.unwrap() as usize;
        self.sinks.lock().unwrap().push((stream, sink));
        self.came.notify_all();
        Ok(())
    }

    fn cancel(&self, _: RequestId) {}

    fn load(&self) -> Load {
        Load::default()
    }
}
