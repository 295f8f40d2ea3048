//! Speculation on tiny models: every kind of request gets the tokens that it gets without, and
//! drafts are kept when they are right.
#![allow(clippy::unwrap_used)]

mod support;

use std::sync::mpsc;

use pomona_engine::sampling::uniform;
use pomona_engine::{Engine, EngineConfig, EngineError, Method, Speculation};
use pomona_types::{
    Finish, FinishReason, Load, Request, RequestId, Sampling, TenantId, TokenId, TokenLogprobs,
    TokenOutput, TokenSink,
};
use support::{eager, ngram, ops, ops_on, suffix, tiny_config, tiny_model};

/// What one request produced.
#[derive(Clone, Debug, Default, PartialEq)]
struct Answer {
    prompt: Vec<Option<TokenLogprobs>>,
    tokens: Vec<TokenOutput>,
    reason: Option<FinishReason>,
}

struct Collector(Answer, mpsc::Sender<(u64, Answer)>, u64);

impl TokenSink for Collector {
    fn prompt_logprobs(&mut self, logprobs: Vec<Option<TokenLogprobs>>) {
        self.0.prompt = logprobs;
    }
    fn token(&mut self, output: TokenOutput) {
        self.0.tokens.push(output);
    }
    fn finish(&mut self, finish: Finish) {
        self.0.reason = Some(finish.reason);
        self.1.send((self.2, self.0.clone())).unwrap();
    }
}

/// An engine on `llama`, with the draft model of that name.
fn engine(config: EngineConfig, draft: Option<&str>) -> Result<Engine, EngineError> {
    let ops = ops();
    Engine::start(config, tiny_model("llama", &ops), draft.map(|d| tiny_model(d, &ops)), ops)
}

/// All answers, in order, and what was counted.
fn run(engine: &Engine, samplings: &[Sampling]) -> (Vec<Answer>, Load) {
    let (done, answers) = mpsc::channel();
    for (id, sampling) in (0u64..).zip(samplings) {
        // Prompts repeat themselves, and begin alike.
        let prompt = (0..20 + id as TokenId % 17).map(|i| 5 + i % (7 + id as TokenId % 3));
        let request = Request {
            id: RequestId(id),
            tenant: TenantId(0),
            class: Default::default(),
            priority: 0,
            prompt: prompt.collect(),
            sampling: sampling.clone(),
        };
        let sink = Collector(Answer::default(), done.clone(), id);
        engine.replica().submit(request, Box::new(sink)).unwrap();
    }
    drop(done);
    let mut found: Vec<(u64, Answer)> = answers.iter().collect();
    found.sort_by_key(|(id, _)| *id);
    assert_eq!(found.len(), samplings.len(), "every request ends");
    let load = engine.replica().load();
    assert_eq!((load.running, load.waiting, load.blocks_used), (0, 0, 0));
    (found.into_iter().map(|(_, answer)| answer).collect(), load)
}

/// Requests that use everything that shapes or ends an answer.
fn samplings() -> Vec<Sampling> {
    let one = |index: u64| {
        let mut draws = 0;
        let mut below = |n: u64| {
            draws += 1;
            (uniform(index, draws) * n as f64) as u64
        };
        Sampling {
            temperature: [0.0, 0.02, 0.1, 1.0][below(4) as usize],
            top_k: [0, 3][below(2) as usize],
            top_p: [1.0, 0.9][below(2) as usize],
            repetition_penalty: [1.0, 1.0, 1.02][below(3) as usize],
            frequency_penalty: [0.0, 0.0, 0.01][below(3) as usize],
            logit_bias: [vec![], vec![(9, 0.05), (200, 0.02)]][below(2) as usize].clone(),
            seed: Some(index),
            max_tokens: 1 + below(60) as u32,
            min_tokens: [0, 9][below(2) as usize],
            stop_token_ids: (0..below(12) as TokenId).map(|i| i * 23).collect(),
            logprobs: (below(3) == 0).then_some(2),
            prompt_logprobs: (below(6) == 0).then_some(1),
            ..Sampling::default()
        }
    };
    (0..48).map(one).collect()
}

#[test]
fn threads_change_no_token() {
    let samplings = samplings();
    let (alone, _) = run(&engine(tiny_config(true, true), None).unwrap(), &samplings);
    for threads in [2, 5] {
        for speculation in [None, Some(eager(ngram(), 4))] {
            let ops = ops_on(threads);
            let config = EngineConfig { speculation, ..tiny_config(true, true) };
            let engine = Engine::start(config, tiny_model("llama", &ops), None, ops).unwrap();
            let (answers, _) = run(&engine, &samplings);
            assert_eq!(answers, alone, "{threads} threads");
        }
    }
}

#[test]
fn speculation_changes_no_token() {
    let samplings = samplings();
    let (alone, _) = run(&engine(tiny_config(false, true), None).unwrap(), &samplings);
    let stopped = alone.iter().filter(|a| matches!(a.reason, Some(FinishReason::Stop(_))));
    assert!((5..40).contains(&stopped.count()), "some stop, some go on");
    let methods = [
        (ngram(), None),
        (suffix(), None),
        (Method::DraftModel, Some("llama")),
        (Method::DraftModel, Some("gemma3")),
    ];
    for (method, draft) in methods {
        // The smaller pool preempts.
        for (drafts, caching, kv_blocks) in [(1, true, 32), (4, true, 12), (9, false, 32)] {
            let speculation = Some(eager(method.clone(), drafts));
            let config = EngineConfig { kv_blocks, speculation, ..tiny_config(caching, true) };
            let (answers, load) = run(&engine(config, draft).unwrap(), &samplings);
            for (index, (answer, alone)) in answers.iter().zip(&alone).enumerate() {
                assert_eq!(answer, alone, "request {index}, {method:?}, {drafts} drafts");
            }
            let (tried, right) = (load.draft_tokens, load.accepted_tokens);
            assert!(tried > 100, "{method:?}: {tried} drafts");
            assert!((6..tried).contains(&right), "{method:?}: {right} of {tried} were right");
        }
    }
}

#[test]
fn a_model_that_drafts_for_itself_is_always_right_when_greedy() {
    let greedy = Sampling { temperature: 0.0, max_tokens: 40, ..Sampling::default() };
    for prefix_caching in [false, true] {
        let speculation = Some(eager(Method::DraftModel, 4));
        let config = EngineConfig { speculation, ..tiny_config(prefix_caching, false) };
        let engine = engine(config, Some("llama")).unwrap();
        let (answers, load) = run(&engine, std::slice::from_ref(&greedy));
        assert_eq!(answers[0].tokens.len(), 40);
        assert_eq!(load.accepted_tokens, load.draft_tokens);
        // Five tokens a step after the first one; three drafts serve for the last four tokens.
        assert_eq!((load.drafts, load.draft_tokens), (8, 7 * 4 + 3));
        // Among others there is not always room for as many.
        let (_, load) = run(&engine, &[(); 9].map(|_| greedy.clone()));
        assert_eq!(load.accepted_tokens, load.draft_tokens);
    }
}

#[test]
fn drafts_stop_where_they_do_not_pay() {
    let hot = Sampling { temperature: 50.0, max_tokens: 60, seed: Some(1), ..Sampling::default() };
    let speculation = Speculation { free_tokens: 4.0, ..eager(ngram(), 4) };
    let config = EngineConfig { speculation: Some(speculation), ..tiny_config(true, false) };
    let engine = engine(config, None).unwrap();
    let (_, alone) = run(&engine, std::slice::from_ref(&hot));
    assert!(alone.draft_tokens < 20, "{} drafts of noise", alone.draft_tokens);
}

#[test]
fn a_draft_model_that_does_not_fit_is_refused() {
    let start = |draft| {
        let speculation = Some(eager(Method::DraftModel, 4));
        engine(EngineConfig { speculation, ..tiny_config(true, true) }, draft)
    };
    let refusal = start(None).err().unwrap().to_string();
    assert!(refusal.contains("needs one"), "{refusal}");
    assert!(start(Some("gemma3")).is_ok());
    let ops = ops();
    let speculation = Some(eager(Method::DraftModel, 4));
    let config = EngineConfig { speculation, ..tiny_config(true, true) };
    // Mistral forgets what is behind its window; llama looks there.
    let (model, draft) = (tiny_model("mistral", &ops), tiny_model("llama", &ops));
    let refusal = Engine::start(config, model, Some(draft), ops).err().unwrap().to_string();
    assert!(refusal.contains("further back"), "{refusal}");
}
