//! A replica without a model: it says what it is told to, step by step, on a thread of its own, and
//! keeps the books that a real one keeps. Used by the tests and by the example `fake`.

mod tokenizer;

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use pomona_types::{
    BLOCK_TOKENS, Finish, FinishReason, Load, Micros, Refusal, Replica, ReplicaInfo, Request,
    RequestId, StepTimes, TokenId, TokenLogprobs, TokenOutput, TokenSink,
};

pub use tokenizer::{END, chat_template, tokenizer};

/// What a request is answered with, before its limits are applied.
pub type Script = Box<dyn Fn(&Request) -> Vec<TokenId> + Send>;

/// Longest sequence.
pub const MAX_MODEL_LEN: u32 = 2048;
/// Blocks of KV.
const BLOCKS: u32 = 4096;
/// Requests per step; others wait.
const RUNNING_MAX: usize = 256;

/// See the module.
pub struct FakeReplica {
    info: ReplicaInfo,
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
    wake: Condvar,
}

struct State {
    script: Script,
    step: Duration,
    active: VecDeque<Active>,
    /// Requests as they came, for tests to look at.
    seen: Vec<Request>,
    load: Load,
    last_step: Instant,
    refusal: Option<Refusal>,
    /// How many more are accepted before `refusal` is given.
    room: u32,
    frozen: bool,
    quit: bool,
}

struct Active {
    request: Request,
    sink: Box<dyn TokenSink>,
    script: VecDeque<TokenId>,
    produced: u32,
    submitted: Instant,
    started: Option<Instant>,
    cancelled: bool,
}

impl FakeReplica {
    /// Answers by `script`, a token per request every `step`.
    pub fn new(step: Duration, script: Script) -> Arc<FakeReplica> {
        let info = ReplicaInfo {
            model: "a model of words".into(),
            max_model_len: MAX_MODEL_LEN,
            vocab_size: tokenizer().vocab_size() as u32,
            eos_token_ids: Arc::new([END]),
            kv_tokens: BLOCKS * BLOCK_TOKENS,
        };
        let state = State {
            script,
            step,
            active: VecDeque::new(),
            seen: Vec::new(),
            load: Load {
                blocks_total: BLOCKS,
                // As if it had speculated before.
                drafts: 2,
                draft_tokens: 8,
                accepted_tokens: 6,
                step_times: StepTimes { sample: Micros(1_500_000), ..StepTimes::default() },
                ..Load::default()
            },
            last_step: Instant::now(),
            refusal: None,
            room: 0,
            frozen: false,
            quit: false,
        };
        let shared = Arc::new(Shared { state: Mutex::new(state), wake: Condvar::new() });
        let looping = shared.clone();
        std::thread::spawn(move || looping.run());
        Arc::new(FakeReplica { info, shared })
    }

    /// Answers every request with `text` and the end token.
    pub fn saying(text: &str, step: Duration) -> Arc<FakeReplica> {
        let mut tokens = tokenizer().encode(text, false).unwrap();
        tokens.push(END);
        FakeReplica::new(step, Box::new(move |_| tokens.clone()))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.shared.state.lock().unwrap()
    }

    /// Refuses what comes from now on.
    pub fn refuse(&self, refusal: Refusal) {
        self.refuse_after(0, refusal);
    }

    /// Refuses what comes after this many more.
    pub fn refuse_after(&self, room: u32, refusal: Refusal) {
        let mut state = self.state();
        (state.refusal, state.room) = (Some(refusal), room);
    }

    /// Stops stepping, or goes on.
    pub fn freeze(&self, frozen: bool) {
        self.state().frozen = frozen;
        self.shared.wake.notify_all();
    }

    /// Forgets all requests without a word, as a thread that panics does.
    pub fn lose_everything(&self) {
        self.state().active.clear();
    }

    /// Fails, for good.
    pub fn go_down(&self, reason: &str) {
        self.state().load.down = Some(reason.to_owned());
    }

    /// Requests as they came.
    pub fn seen(&self) -> Vec<Request> {
        self.state().seen.clone()
    }
}

impl Drop for FakeReplica {
    fn drop(&mut self) {
        self.state().quit = true;
        self.shared.wake.notify_all();
    }
}

impl Replica for FakeReplica {
    fn info(&self) -> &ReplicaInfo {
        &self.info
    }

    fn submit(&self, request: Request, sink: Box<dyn TokenSink>) -> Result<(), Refusal> {
        let mut state = self.state();
        if let Some(refusal) = state.refusal.clone() {
            state.room = state.room.checked_sub(1).ok_or(refusal)?;
        }
        if state.active.is_empty() {
            state.last_step = Instant::now();
        }
        state.seen.push(request.clone());
        let script = (state.script)(&request).into();
        let (submitted, started) = (Instant::now(), None);
        let active =
            Active { request, sink, script, produced: 0, submitted, started, cancelled: false };
        state.active.push_back(active);
        self.shared.wake.notify_all();
        Ok(())
    }

    fn cancel(&self, id: RequestId) {
        for active in self.state().active.iter_mut().filter(|active| active.request.id == id) {
            active.cancelled = true;
        }
    }

    fn load(&self) -> Load {
        let state = self.state();
        let mut load = state.load.clone();
        load.running = state.active.len().min(RUNNING_MAX) as u32;
        load.waiting = state.active.len().saturating_sub(RUNNING_MAX) as u32;
        load.blocks_used = state.active.iter().map(Active::blocks).sum();
        let stalled =
            if state.active.is_empty() { 0 } else { state.last_step.elapsed().as_micros() };
        load.stalled_for = Micros(stalled as u64);
        load
    }
}

impl Shared {
    fn run(&self) {
        let mut state = self.state.lock().unwrap();
        while !state.quit {
            if state.active.is_empty() || state.frozen {
                state = self.wake.wait(state).unwrap();
                continue;
            }
            state.step();
            let pause = state.step;
            drop(state);
            std::thread::sleep(pause);
            state = self.state.lock().unwrap();
        }
    }
}

impl State {
    fn step(&mut self) {
        let mut kept = VecDeque::with_capacity(self.active.len());
        for (index, mut active) in self.active.drain(..).enumerate() {
            if index >= RUNNING_MAX || !active.step(&mut self.load) {
                kept.push_back(active);
            }
        }
        self.active = kept;
        self.load.steps += 1;
        self.last_step = Instant::now();
    }
}

impl Active {
    fn blocks(&self) -> u32 {
        (self.request.prompt.len() as u32 + self.produced).div_ceil(BLOCK_TOKENS)
    }

    /// One token, or the end; true at the end.
    fn step(&mut self, load: &mut Load) -> bool {
        if self.cancelled {
            return self.finish(FinishReason::Abort, load);
        }
        if self.started.is_none() {
            self.started = Some(Instant::now());
            load.prefix_queries += self.request.prompt.len() as u64;
            load.prefix_hits += u64::from(self.cached());
            if let Some(top) = self.request.sampling.prompt_logprobs {
                let prompt = self.request.prompt.clone();
                let rest = prompt.iter().skip(1).map(|token| Some(logprobs(*token, top)));
                self.sink.prompt_logprobs([None].into_iter().chain(rest).collect());
            }
        }
        let sampling = &self.request.sampling;
        let early = self.produced < sampling.min_tokens;
        let mut next = self.script.pop_front().unwrap_or(END);
        if early && (next == END || sampling.stop_token_ids.contains(&next)) {
            next = u32::from(b'.');
        }
        let logprobs = sampling.logprobs.map(|top| logprobs(next, top));
        self.sink.token(TokenOutput { token: next, logprobs });
        self.produced += 1;
        load.generation_tokens += 1;
        let ends = (next == END && !sampling.ignore_eos) || sampling.stop_token_ids.contains(&next);
        let full = self.request.prompt.len() as u32 + self.produced >= MAX_MODEL_LEN;
        if ends {
            return self.finish(FinishReason::Stop(next), load);
        }
        if self.produced >= sampling.max_tokens || full {
            return self.finish(FinishReason::Length, load);
        }
        false
    }

    /// Pretends that all whole blocks but the last token's were in the cache.
    fn cached(&self) -> u32 {
        (self.request.prompt.len() as u32 - 1) / BLOCK_TOKENS * BLOCK_TOKENS
    }

    fn finish(&mut self, reason: FinishReason, load: &mut Load) -> bool {
        load.prompt_tokens += self.request.prompt.len() as u64;
        let started = self.started.unwrap_or_else(Instant::now);
        let queued = Micros((started - self.submitted).as_micros() as u64);
        let cached_tokens = self.cached();
        self.sink.finish(Finish { reason, message: None, cached_tokens, queued, preemptions: 0 });
        true
    }
}

/// The token at -0.25, its followers in the vocabulary below it.
fn logprobs(token: TokenId, top: u32) -> TokenLogprobs {
    let top = (0..top).map(|i| ((token + i) % 256, -0.25 - i as f32)).collect();
    TokenLogprobs { token, logprob: -0.25, rank: 1, top }
}
