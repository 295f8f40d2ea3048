//! A model that is divided over ranks says the same, byte for byte, as one that is not: tokens,
//! log-probabilities and all, over any number of tensor ranks, context ranks and stages.
#![allow(clippy::unwrap_used)]

mod support;

use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use pomona_engine::{Engine, EngineConfig, FollowConfig, Others, Seat, Speculation, follow};
use pomona_fabric::coll::Choices;
use pomona_fabric::link::shm::{ShmEpoch, ShmOptions};
use pomona_kernels::Ops;
use pomona_models::{Checkpoint, Division, LoadOptions, Model, Parallel, Ranks};
use pomona_types::{
    ExpertLoads, Finish, Replica, Request, RequestId, Sampling, TenantId, TokenId, TokenOutput,
    TokenSink,
};
use support::{checkpoint, eager, ngram, ops, tiny_config};

/// Bytes of a rank's arena.
const ARENA: usize = 1 << 20;

/// What one request produced.
type Answer = Vec<TokenOutput>;

struct Collector {
    answer: Answer,
    done: mpsc::Sender<(u64, Answer)>,
    id: u64,
}

impl TokenSink for Collector {
    fn token(&mut self, output: TokenOutput) {
        self.answer.push(output);
    }

    fn finish(&mut self, finish: Finish) {
        assert_eq!(finish.message, None);
        self.done.send((self.id, std::mem::take(&mut self.answer))).unwrap();
    }
}

/// More requests than run at a time, longer than a step, with and without randomness.
fn requests(vocab: u32) -> Vec<Request> {
    let request = |i: u64| {
        let len = 3 + i * 11 % 60;
        let prompt: Vec<TokenId> = (0..len).map(|t| ((t * 37 + i) as u32) % vocab).collect();
        let sampling = Sampling {
            temperature: if i.is_multiple_of(2) { 0.0 } else { 1.0 },
            seed: Some(i),
            max_tokens: 4 + i as u32 % 9,
            logprobs: Some(2),
            prompt_logprobs: (i == 5).then_some(0),
            ..Sampling::default()
        };
        Request {
            id: RequestId(i + 1),
            tenant: TenantId(0),
            class: Default::default(),
            priority: 0,
            prompt: prompt.into(),
            sampling,
        }
    };
    (0..11).map(request).collect()
}

/// Sequences of up to four splits, of which some begin alike.
fn long_requests(vocab: u32) -> Vec<Request> {
    let mut requests = requests(vocab);
    requests.truncate(5);
    let prompt = |len: u32, from: u32| {
        let prompt: Vec<TokenId> = (from..from + len).map(|t| (t * 37 + t / 50) % vocab).collect();
        prompt.into()
    };
    for (request, (len, from)) in
        requests.iter_mut().zip([(820, 0), (300, 7), (600, 0), (530, 3), (20, 0)])
    {
        (request.prompt, request.sampling.prompt_logprobs) = (prompt(len, from), None);
    }
    requests
}

fn answers(replica: &dyn Replica, requests: Vec<Request>) -> Vec<Answer> {
    let (done, finished) = mpsc::channel();
    let count = requests.len();
    for request in requests {
        let id = request.id.0;
        let sink = Collector { answer: vec![], done: done.clone(), id };
        replica.submit(request, Box::new(sink)).unwrap();
    }
    let mut found: Vec<(u64, Answer)> = finished.iter().take(count).collect();
    found.sort_by_key(|(id, _)| *id);
    found.into_iter().map(|(_, answer)| answer).collect()
}

fn load(checkpoint: &Checkpoint, ops: &dyn Ops, ranks: Ranks) -> Box<dyn Model> {
    let options = LoadOptions { max_tokens: 32, max_outputs: 32 };
    checkpoint.load_part(ops, &options, ranks, &mut |_| {}).unwrap()
}

/// Runs a model over threads, one for each rank.
fn divided(name: &str, parallel: Parallel) -> Vec<Answer> {
    let config = EngineConfig { eos_token_ids: vec![], ..tiny_config(true, false) };
    run(name, parallel, config, (requests, once))
}

/// The same with copies of some experts, and the others anywhere.
fn divided_with_copies(name: &str, parallel: Parallel) -> Vec<Answer> {
    let config = EngineConfig { eos_token_ids: vec![], ..tiny_config(true, false) };
    run(name, parallel, config, (requests, copied))
}

/// Where experts are.
type Places = fn(Division) -> Division;

fn once(division: Division) -> Division {
    division
}

fn copied(division: Division) -> Division {
    let ranks = division.hidden.len();
    let of = |layer: usize, expert: usize| {
        let mut holders = vec![(expert * 7 + layer) % ranks];
        if expert.is_multiple_of(2) {
            holders.push((holders[0] + 1) % ranks);
        }
        holders.sort_unstable();
        holders
    };
    let layers = division.experts.iter().enumerate();
    let places = layers.map(|(l, all)| (0..all.experts()).map(|e| of(l, e)).collect()).collect();
    division.with_experts(places).unwrap()
}

/// What experts have counted, once the engine has nothing to do and has told it.
fn counted(replica: &dyn Replica) -> ExpertLoads {
    let begun = Instant::now();
    loop {
        let loads = replica.experts().unwrap_or_default();
        let sums: Vec<u64> = loads.tokens.iter().map(|tokens| tokens.iter().sum()).collect();
        // The last layer may have left out rows whose logits nobody wanted.
        let told = sums.split_last().is_some_and(|(last, sums)| {
            *last > 0 && sums.iter().all(|sum| *sum == sums[0] && last <= sum)
        });
        if told {
            return (*loads).clone();
        }
        assert!(begun.elapsed() < Duration::from_secs(20), "{loads:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The same with long sequences, and memory for few of them.
fn divided_long(name: &str, parallel: Parallel, speculation: Option<Speculation>) -> Vec<Answer> {
    let tiny = tiny_config(true, false);
    let config = EngineConfig {
        eos_token_ids: vec![],
        max_model_len: 1000,
        kv_blocks: 240,
        speculation,
        ..tiny
    };
    run(name, parallel, config, (long_requests, once))
}

fn run(
    name: &str,
    parallel: Parallel,
    config: EngineConfig,
    (requests, places): (fn(u32) -> Vec<Request>, Places),
) -> Vec<Answer> {
    let checkpoint = checkpoint(name);
    let division = places(Division::new(checkpoint.spec(), parallel).unwrap());
    let epoch = ShmEpoch::create(ShmOptions::new(parallel.ranks(), ARENA)).unwrap();
    let stages = parallel.pipeline as usize;
    let follow_config = FollowConfig {
        max_num_seqs: config.max_num_seqs,
        max_num_batched_tokens: config.max_num_batched_tokens,
        kv_dtype: config.kv_dtype,
        kv_blocks: config.kv_blocks,
        stages,
    };
    std::thread::scope(|scope| {
        let (checkpoint, division, follow_config) = (&checkpoint, &division, &follow_config);
        let start = |rank| {
            let link = epoch.link(rank).unwrap();
            scope.spawn(move || {
                let Seat { world, ranks } =
                    Seat::take(Arc::new(link), division, Choices::default()).unwrap();
                let ops = ops();
                let model = load(checkpoint, ops.as_ref(), ranks);
                follow(follow_config, model, ops.as_ref(), world.as_ref())
            })
        };
        let followers: Vec<_> = (1..parallel.ranks()).map(start).collect();
        let link = Arc::new(epoch.link(0).unwrap());
        let Seat { world, ranks } = Seat::take(link, division, Choices::default()).unwrap();
        let ops = ops();
        let model = load(checkpoint, ops.as_ref(), ranks);
        let others = Others::new(world, stages);
        let engine = Engine::lead(config, model, None, ops, Some(others)).unwrap();
        let requests = requests(checkpoint.spec().vocab);
        let answers = answers(engine.replica().as_ref(), requests);
        let load = engine.replica().load();
        assert_eq!((load.running, load.blocks_used), (0, 0));
        if checkpoint.spec().experts.is_some() {
            let loads = counted(engine.replica().as_ref());
            let pairs: u64 = loads.tokens.iter().flatten().sum();
            let sharing = (parallel.tensor * parallel.context) as usize;
            if sharing > 1 {
                assert_eq!(loads.pairs.len(), parallel.ranks());
                assert_eq!(loads.pairs.iter().sum::<u64>(), pairs, "each is one rank's");
                assert!((1.0..=sharing as f64).contains(&loads.balance().unwrap()), "{loads:?}");
            } else {
                assert_eq!(loads.balance(), None);
            }
        }
        engine.stop();
        followers.into_iter().for_each(|follower| follower.join().unwrap().unwrap());
        answers
    })
}

#[test]
fn tokens_of_experts_do_not_depend_on_the_number_of_stages() {
    let alone = divided("mixtral", Parallel::default());
    assert!(divided("mixtral", Parallel { pipeline: 2, ..Parallel::default() }) == alone);
}

#[test]
fn tokens_do_not_depend_on_who_has_which_experts() {
    for name in ["mixtral", "qwen3-moe"] {
        let alone = divided(name, Parallel::default());
        for (tensor, pipeline) in [(2, 1), (3, 1), (4, 1), (2, 2)] {
            let parallel = Parallel { tensor, context: 1, pipeline };
            assert!(divided_with_copies(name, parallel) == alone, "{name} over {parallel:?}");
        }
    }
}

#[test]
fn tokens_do_not_depend_on_the_number_of_ranks() {
    for (name, most) in [
        ("llama", 4),
        ("qwen3", 4),
        ("gemma3", 4),
        ("gptq-desc-act", 2),
        ("mixtral", 4),
        ("qwen3-moe", 4),
    ] {
        let spec = checkpoint(name).spec().clone();
        let alone = divided(name, Parallel::default());
        assert!(alone.iter().all(|answer| !answer.is_empty()));
        let tensor = (2..=most.min(spec.heads)).map(|tensor| (tensor, 1));
        let pipeline = (2..=most.min(spec.layers.len() as u32)).map(|stages| (1, stages));
        for (tensor, pipeline) in tensor.chain(pipeline).chain([(2, 2)]) {
            let parallel = Parallel { tensor, context: 1, pipeline };
            assert!(divided(name, parallel) == alone, "{name} over {parallel:?}");
            eprintln!("{name}: {parallel:?}");
        }
    }
}

#[test]
fn tokens_do_not_depend_on_who_keeps_which_part_of_a_sequence() {
    for name in ["llama", "gemma3", "mistral", "mixtral"] {
        let alone = divided_long(name, Parallel::default(), None);
        for (tensor, context, pipeline) in [(1, 2, 1), (1, 3, 1), (2, 2, 1), (1, 2, 2)] {
            let parallel = Parallel { tensor, context, pipeline };
            assert!(divided_long(name, parallel, None) == alone, "{name} over {parallel:?}");
            eprintln!("{name}: {parallel:?}");
        }
    }
}

#[test]
fn drafts_change_nothing_where_several_ranks_keep_a_sequence() {
    let alone = divided_long("llama", Parallel::default(), None);
    let parallel = Parallel { context: 3, ..Parallel::default() };
    assert!(divided_long("llama", parallel, Some(eager(ngram(), 5))) == alone);
}
