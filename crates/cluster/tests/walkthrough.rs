//! A tour of the crate: two replicas as one, of which each may die and live on.

use std::sync::{Arc, Mutex};

use pomona_cluster::{Life, Replicas, Revived};
use pomona_types::{
    Finish, FinishReason, Load, Micros, Refusal, Replica, ReplicaInfo, Request, RequestId,
    Sampling, TenantId, TokenOutput, TokenSink,
};

/// Answers every request at once, with the length of its prompt.
struct Echo(ReplicaInfo);

impl Replica for Echo {
    fn info(&self) -> &ReplicaInfo {
        &self.0
    }
    fn submit(&self, request: Request, mut sink: Box<dyn TokenSink>) -> Result<(), Refusal> {
        sink.token(TokenOutput { token: request.prompt.len() as u32, logprobs: None });
        let (reason, queued) = (FinishReason::Length, Micros(0));
        sink.finish(Finish { reason, message: None, cached_tokens: 0, queued, preemptions: 0 });
        Ok(())
    }
    fn cancel(&self, _: RequestId) {}
    fn load(&self) -> Load {
        Load::default()
    }
}

/// What such a replica lives by: nothing.
struct Simple(Arc<Echo>);

impl Life for Simple {
    fn replica(&self) -> Arc<dyn Replica> {
        self.0.clone()
    }
}

fn life() -> Box<dyn Life> {
    Box::new(Simple(Arc::new(Echo(ReplicaInfo {
        model: "echo".into(),
        max_model_len: 100,
        vocab_size: 100,
        eos_token_ids: [0].into(),
        kv_tokens: 100,
    }))))
}

struct Heard(Arc<Mutex<Vec<u32>>>);

impl TokenSink for Heard {
    fn token(&mut self, output: TokenOutput) {
        self.0.lock().expect("nobody panicked").push(output.token);
    }
    fn finish(&mut self, _: Finish) {}
}

#[test]
fn two_replicas_that_live_on_are_one() {
    let lives = [(); 2]
        .map(|()| Revived::new(life(), Box::new(|| Ok(life()))).expect("the system has threads"));
    let all = lives.iter().map(Revived::replica).collect();
    let one = Replicas::new(all).expect("there are two");
    let heard = Arc::new(Mutex::new(Vec::new()));
    for len in 1..=4 {
        let request = Request {
            id: RequestId(len),
            tenant: TenantId(0),
            class: Default::default(),
            priority: 0,
            prompt: vec![1; len as usize].into(),
            sampling: Sampling::default(),
        };
        one.submit(request, Box::new(Heard(heard.clone()))).expect("they take everything");
    }
    assert_eq!(*heard.lock().expect("nobody panicked"), [1, 2, 3, 4]);
    assert_eq!(one.load().down, None);
}
