//! The promise "same request, same tokens": a request alone, among others, with other chunk sizes,
//! thread counts, prefix hits, drafts and tiers of instructions gives the same bytes, whether
//! activations carry 16 bits or 8 and keys and values 16 or 8. Runs on SmolLM2, whose path
//! `POMONA_TEST_SMOLLM2` names; without it the test says so and passes, unless
//! `POMONA_REQUIRE=smollm2`.

#![allow(clippy::unwrap_used)]

mod support;

use std::path::Path;
use std::sync::{Arc, mpsc};

use pomona_device::{DType, HostDevice, Pool};
use pomona_engine::sampling::uniform;
use pomona_engine::{Engine, EngineConfig, Method, Speculation};
use pomona_kernels::{ActivationBits, CpuOps, Isa, Ops};
use pomona_models::{Checkpoint, LoadOptions};
use pomona_scheduler::batch::Ordering;
use pomona_types::{
    Finish, FinishReason, Micros, Request, RequestId, Sampling, TenantId, TokenId, TokenLogprobs,
    TokenOutput, TokenSink,
};
use support::{eager, ngram, suffix};

/// Requests in the pool that mixes are drawn from; each has one undisturbed twin.
const REQUESTS: u64 = 40;
/// Engines whose requests are compared with the twins, for each kind of numbers.
const ENGINES: [(Numbers, u64); 3] = [
    (Numbers { bits: ActivationBits::Sixteen, kv: DType::F16 }, 16),
    (Numbers { bits: ActivationBits::Eight, kv: DType::F16 }, 4),
    (Numbers { bits: ActivationBits::Sixteen, kv: DType::I8 }, 4),
];
/// Random mixes of requests that each of them gets.
const MIXES: u64 = 10;

/// What tokens may depend on.
#[derive(Clone, Copy, Debug)]
struct Numbers {
    bits: ActivationBits,
    kv: DType,
}

/// What one request produced.
#[derive(Clone, Debug, PartialEq)]
struct Answer {
    tokens: Vec<TokenId>,
    logprobs: Vec<Option<TokenLogprobs>>,
    reason: Option<FinishReason>,
}

struct Collector {
    answer: Answer,
    done: mpsc::Sender<(u64, Answer)>,
    id: u64,
}

impl TokenSink for Collector {
    fn token(&mut self, output: TokenOutput) {
        self.answer.tokens.push(output.token);
        self.answer.logprobs.push(output.logprobs);
    }
    fn finish(&mut self, finish: Finish) {
        self.answer.reason = Some(finish.reason);
        self.done.send((self.id, self.answer.clone())).unwrap();
    }
}

/// Deterministic choices for test `seed`.
struct Dice(u64, u64);

impl Dice {
    fn below(&mut self, n: u64) -> u64 {
        self.1 += 1;
        (uniform(self.0, self.1) * n as f64) as u64
    }
}

/// Request `index` of the pool: prompts share long prefixes, sampling differs.
fn request(index: u64) -> Request {
    let mut dice = Dice(1_000 + index, 0);
    let family = index % 4;
    let mut shared = Dice(family, 0);
    let shared_len = 16 + shared.below(40);
    let own_len = 1 + dice.below(24);
    let mut prompt: Vec<TokenId> =
        (0..shared_len).map(|_| 100 + shared.below(40_000) as TokenId).collect();
    prompt.extend((0..own_len).map(|_| 100 + dice.below(40_000) as TokenId));
    let sampling = Sampling {
        temperature: [0.0, 0.7, 1.0, 1.3][dice.below(4) as usize],
        top_k: [0, 40][dice.below(2) as usize],
        top_p: [1.0, 0.9][dice.below(2) as usize],
        frequency_penalty: [0.0, 0.3][dice.below(2) as usize],
        seed: Some(index),
        max_tokens: 1 + dice.below(8) as u32,
        ignore_eos: dice.below(2) == 0,
        logprobs: (dice.below(3) == 0).then_some(3),
        ..Sampling::default()
    };
    Request {
        id: RequestId(0),
        tenant: TenantId(0),
        class: Default::default(),
        priority: 0,
        prompt: prompt.into(),
        sampling,
    }
}

/// What may differ between two engines that must say the same.
#[derive(Debug)]
struct Setting {
    isa: Isa,
    threads: usize,
    /// Tokens a step.
    budget: u32,
    prefix_caching: bool,
    blocks: u32,
    /// The draft model, if there is one, is the model itself.
    speculation: Option<Speculation>,
}

fn engine(path: &Path, numbers: Numbers, setting: &Setting) -> Engine {
    let budget = setting.budget;
    let pool = Pool::new(setting.threads);
    let ops = CpuOps::new(Arc::new(HostDevice::new()), pool, setting.isa);
    let ops: Arc<dyn Ops> = Arc::new(ops.with_activation_bits(numbers.bits));
    let checkpoint = Checkpoint::open(path).unwrap();
    let options = LoadOptions { max_tokens: budget as usize, max_outputs: budget as usize };
    let load = || checkpoint.load(ops.as_ref(), &options, &mut |_| {}).unwrap();
    let drafts = setting.speculation.as_ref().is_some_and(|s| s.method == Method::DraftModel);
    let (model, draft) = (load(), drafts.then(load));
    let config = EngineConfig {
        name: "smollm2".into(),
        max_model_len: 512,
        max_num_seqs: 32,
        max_num_batched_tokens: budget,
        kv_dtype: numbers.kv,
        kv_blocks: setting.blocks,
        prefix_caching: setting.prefix_caching,
        ordering: Ordering::Fcfs,
        max_waiting: 64,
        step_target: Some(Micros(1_000)),
        eos_token_ids: checkpoint.eos_token_ids().to_vec(),
        seed: 0,
        speculation: setting.speculation.clone(),
    };
    Engine::start(config, model, draft, ops).unwrap()
}

/// Runs requests together and returns their answers in order.
fn run(engine: &Engine, indices: &[u64], first_id: u64) -> Vec<Answer> {
    let (done, answers) = mpsc::channel();
    for (i, index) in (0u64..).zip(indices) {
        let answer = Answer { tokens: vec![], logprobs: vec![], reason: None };
        let sink = Collector { answer, done: done.clone(), id: i };
        let request = Request { id: RequestId(first_id + i), ..request(*index) };
        engine.replica().submit(request, Box::new(sink)).unwrap();
    }
    drop(done);
    let mut found: Vec<(u64, Answer)> = answers.iter().collect();
    found.sort_by_key(|(id, _)| *id);
    assert_eq!(found.len(), indices.len(), "every request ends");
    found.into_iter().map(|(_, answer)| answer).collect()
}

fn model_path() -> Option<std::path::PathBuf> {
    let path = std::env::var_os("POMONA_TEST_SMOLLM2").map(Into::into);
    if path.is_none() {
        let required = std::env::var("POMONA_REQUIRE").is_ok_and(|r| r.contains("smollm2"));
        assert!(!required, "POMONA_TEST_SMOLLM2 must name SmolLM2's GGUF");
        eprintln!("SKIPPED: set POMONA_TEST_SMOLLM2 to SmolLM2's GGUF to run this test");
    }
    path
}

#[test]
fn tokens_do_not_depend_on_batch_chunking_threads_prefix_hits_drafts_or_tiers() {
    let Some(path) = model_path() else { return };
    for (seed, (numbers, engines)) in (0..).zip(ENGINES) {
        same_tokens(&path, numbers, seed * 1_000..seed * 1_000 + engines);
    }
}

/// Draws an engine from each seed.
fn same_tokens(path: &Path, numbers: Numbers, seeds: std::ops::Range<u64>) {
    let isa = Isa::detect();
    let alone: Vec<Answer> = {
        let (threads, budget, prefix_caching, blocks, speculation) = (1, 256, false, 256, None);
        let setting = Setting { isa, threads, budget, prefix_caching, blocks, speculation };
        let engine = engine(path, numbers, &setting);
        (0..REQUESTS).flat_map(|i| run(&engine, &[i], 1 + i)).collect()
    };
    let mut next_id = 1;
    for seed in seeds {
        let mut dice = Dice(seed, 0);
        let setting = Setting {
            // A slower tier now and then; the slowest, plain loops, would take minutes.
            isa: if seed % 4 == 1 { isa.min(Isa::Avx2) } else { isa },
            threads: 1 + dice.below(3) as usize,
            budget: [32, 33, 64, 100, 256][dice.below(5) as usize],
            prefix_caching: dice.below(4) > 0,
            // The smallest pool forces preemption and eviction.
            blocks: [40, 128, 512][dice.below(3) as usize],
            speculation: match dice.below(6) {
                0 => Some(eager(ngram(), 4)),
                1 => Some(eager(suffix(), 8)),
                2 => Some(eager(Method::DraftModel, 3)),
                _ => None,
            },
        };
        let engine = engine(path, numbers, &setting);
        for _ in 0..MIXES {
            let count = if dice.below(4) == 0 { 32 } else { 1 + dice.below(8) };
            let indices: Vec<u64> = (0..count).map(|_| dice.below(REQUESTS)).collect();
            let answers = run(&engine, &indices, next_id);
            next_id += count;
            for (index, answer) in indices.iter().zip(answers) {
                assert_eq!(
                    answer, alone[*index as usize],
                    "request {index} among {count}: seed {seed}, {numbers:?}, {setting:?}"
                );
            }
        }
        let load = engine.replica().load();
        let (right, tried) = (load.accepted_tokens, load.draft_tokens);
        eprintln!("seed {seed}: {numbers:?}, {setting:?}, {right} of {tried} drafts right");
        assert_eq!(setting.speculation.is_some(), tried > 0);
        assert_eq!((load.running, load.waiting, load.blocks_used), (0, 0, 0));
    }
}
