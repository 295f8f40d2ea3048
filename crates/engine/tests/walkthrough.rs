//! A tour of the crate: start an engine on a tiny model, ask it, stop it.
#![allow(clippy::unwrap_used)]

mod support;

use std::sync::mpsc;

use pomona_types::{
    Finish, FinishReason, Refusal, Request, RequestId, Sampling, TenantId, TokenId, TokenOutput,
    TokenSink,
};
use support::tiny_engine;

/// Passes tokens and the end on to the test.
struct Sink(mpsc::Sender<Result<TokenId, Finish>>);

impl TokenSink for Sink {
    fn token(&mut self, output: TokenOutput) {
        let _ = self.0.send(Ok(output.token));
    }
    fn finish(&mut self, finish: Finish) {
        let _ = self.0.send(Err(finish));
    }
}

/// The same, which holds the engine until somebody takes what is sent.
struct Held(mpsc::SyncSender<Result<TokenId, Finish>>);

impl TokenSink for Held {
    fn token(&mut self, output: TokenOutput) {
        let _ = self.0.send(Ok(output.token));
    }
    fn finish(&mut self, finish: Finish) {
        let _ = self.0.send(Err(finish));
    }
}

fn request(id: u64, prompt: &[TokenId], max_tokens: u32) -> Request {
    Request {
        id: RequestId(id),
        tenant: TenantId(0),
        class: Default::default(),
        priority: 0,
        prompt: prompt.into(),
        sampling: Sampling { max_tokens, ignore_eos: true, ..Sampling::default() },
    }
}

#[test]
fn an_engine_answers_refuses_cancels_and_stops() {
    let engine = tiny_engine(true, true, |model| model);
    let replica = engine.replica();

    // Tokens arrive one by one, then the end, once.
    let (send, receive) = mpsc::channel();
    replica.submit(request(1, &[5, 6, 7], 4), Box::new(Sink(send.clone()))).unwrap();
    let answer: Vec<_> = receive.iter().take(5).collect();
    assert!(answer[..4].iter().all(Result::is_ok));
    assert!(matches!(&answer[4], Err(Finish { reason: FinishReason::Length, .. })));

    // What can never run is refused at once.
    let refused = replica.submit(request(2, &[9_999], 4), Box::new(Sink(send)));
    assert!(matches!(refused, Err(Refusal::Invalid(why)) if why.contains("9999")));

    // A cancelled request ends, and holds nothing. Its first token waits to be taken, so that it
    // cannot end by itself before.
    let (held, receive) = mpsc::sync_channel(0);
    replica.submit(request(3, &[5], 100), Box::new(Held(held))).unwrap();
    replica.cancel(RequestId(3));
    let end = receive.iter().find_map(Result::err).unwrap();
    assert_eq!(end.reason, FinishReason::Abort);
    assert_eq!(replica.load().blocks_used, 0);
    engine.stop();
    assert!(replica.load().down.is_some());
}
