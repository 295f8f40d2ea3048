//! Cancelling while the engine computes: the test holds a step in the middle of its forward, so
//! that what happens meanwhile does not depend on time.
#![allow(clippy::unwrap_used)]

mod support;

use std::ops::Range;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use pomona_device::View;
use pomona_engine::Engine;
use pomona_kernels::{Batch, Ops};
use pomona_models::{KvCache, Model, ModelError, ModelPart};
use pomona_types::{
    Finish, FinishReason, ModelSpec, Request, RequestId, Sampling, TenantId, TokenOutput, TokenSink,
};
use support::tiny_engine;

/// How long an end may take before the test gives up; steps of the model take microseconds.
const PATIENCE: Duration = Duration::from_secs(20);

/// A model whose forwards say that they began and wait for leave to go on.
struct Held {
    model: Box<dyn Model>,
    begun: mpsc::Sender<()>,
    go: mpsc::Receiver<()>,
}

impl Model for Held {
    fn spec(&self) -> &ModelSpec {
        self.model.spec()
    }

    fn part(&self) -> &ModelPart {
        self.model.part()
    }

    fn outputs(&mut self, ops: &dyn Ops, count: usize) -> Result<(), ModelError> {
        self.model.outputs(ops, count)
    }

    fn forward(&mut self, ops: &dyn Ops, batch: &Batch, kv: &KvCache) -> Result<(), ModelError> {
        let _ = self.begun.send(());
        // An error means that the test is over and holds nothing any more.
        let _ = self.go.recv();
        self.model.forward(ops, batch, kv)
    }

    fn logits(
        &mut self,
        ops: &dyn Ops,
        outputs: Range<usize>,
        logits: &View,
    ) -> Result<(), ModelError> {
        self.model.logits(ops, outputs, logits)
    }
}

/// Passes the end on to the test.
struct Ends(mpsc::Sender<Finish>);

impl TokenSink for Ends {
    fn token(&mut self, _: TokenOutput) {}
    fn finish(&mut self, finish: Finish) {
        let _ = self.0.send(finish);
    }
}

/// An engine whose steps are held, with the ends of the gate: told of each step, and its leave.
fn held_engine() -> (Engine, mpsc::Receiver<()>, mpsc::Sender<()>) {
    let ((begun, steps), (leave, go)) = (mpsc::channel(), mpsc::channel());
    let engine = tiny_engine(false, false, |model| Box::new(Held { model, begun, go }));
    (engine, steps, leave)
}

/// Submits a request of one step and returns where its end arrives.
fn submit(engine: &Engine, id: u64) -> mpsc::Receiver<Finish> {
    let (send, ends) = mpsc::channel();
    let request = Request {
        id: RequestId(id),
        tenant: TenantId(0),
        class: Default::default(),
        priority: 0,
        prompt: [5, 6, 7].into(),
        sampling: Sampling { max_tokens: 1, ..Sampling::default() },
    };
    engine.replica().submit(request, Box::new(Ends(send))).unwrap();
    ends
}

#[test]
fn a_request_that_comes_and_is_cancelled_within_one_step_is_told_its_end() {
    let (engine, steps, leave) = held_engine();
    let first = submit(&engine, 1);
    steps.recv_timeout(PATIENCE).unwrap();

    let second = submit(&engine, 2);
    engine.replica().cancel(RequestId(2));
    leave.send(()).unwrap();

    let end = second.recv_timeout(PATIENCE).expect("the cancelled request is told its end");
    assert_eq!(end.reason, FinishReason::Abort);
    let after = second.recv_timeout(PATIENCE);
    assert_eq!(after, Err(RecvTimeoutError::Disconnected), "the end is told once");
    assert_eq!(first.recv_timeout(PATIENCE).unwrap().reason, FinishReason::Length);
    let load = engine.replica().load();
    assert_eq!((load.running, load.waiting, load.blocks_used), (0, 0, 0));
}

#[test]
fn a_request_that_is_cancelled_in_its_own_step_gets_no_token_of_it() {
    let (engine, steps, leave) = held_engine();
    let request = submit(&engine, 1);
    steps.recv_timeout(PATIENCE).unwrap();
    engine.replica().cancel(RequestId(1));
    leave.send(()).unwrap();
    let end = request.recv_timeout(PATIENCE).unwrap();
    assert_eq!(end.reason, FinishReason::Abort, "not the end that its token would have brought");
    let load = engine.replica().load();
    assert_eq!((load.running, load.waiting, load.blocks_used), (0, 0, 0));
}
