//! Replicas behind a router.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pomona_policy::{Route, Router};
use pomona_types::{
    ExpertLoads, Finish, Load, Refusal, Replica, ReplicaInfo, Request, RequestId, TokenLogprobs,
    TokenOutput, TokenSink,
};

/// Replicas of one model, alike in all but their place. Each request goes to one of them; which
/// one makes no difference to its answer.
pub struct Replicas {
    all: Vec<Arc<dyn Replica>>,
    desk: Arc<Mutex<Desk>>,
}

/// Who is where.
struct Desk {
    router: Router,
    routes: BTreeMap<RequestId, Route>,
}

impl Replicas {
    /// At least one; what the first says of itself holds for all. `None` if there is none.
    pub fn new(all: Vec<Arc<dyn Replica>>) -> Option<Replicas> {
        all.first()?;
        let desk = Desk { router: Router::new(all.len()), routes: BTreeMap::new() };
        Some(Replicas { all, desk: Arc::new(Mutex::new(desk)) })
    }
}

fn lock(desk: &Mutex<Desk>) -> MutexGuard<'_, Desk> {
    // What is behind it stays whole, whoever panicked.
    desk.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Passes everything on, and tells the router of the end.
struct Routed {
    /// Shared with the replicas that have refused the request.
    sink: Arc<Mutex<Box<dyn TokenSink>>>,
    desk: Arc<Mutex<Desk>>,
    id: RequestId,
}

impl Routed {
    fn sink(&self) -> MutexGuard<'_, Box<dyn TokenSink>> {
        self.sink.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl TokenSink for Routed {
    fn prompt_logprobs(&mut self, logprobs: Vec<Option<TokenLogprobs>>) {
        self.sink().prompt_logprobs(logprobs);
    }

    fn token(&mut self, output: TokenOutput) {
        self.sink().token(output);
    }

    fn finish(&mut self, finish: Finish) {
        let mut desk = lock(&self.desk);
        if let Some(route) = desk.routes.remove(&self.id) {
            desk.router.done(route);
        }
        drop(desk);
        self.sink().finish(finish);
    }
}

impl Replica for Replicas {
    fn info(&self) -> &ReplicaInfo {
        self.all[0].info()
    }

    /// Asks the replica that the router chooses; if it is full or down, the next best. Those that
    /// are being started again come last.
    fn submit(&self, request: Request, sink: Box<dyn TokenSink>) -> Result<(), Refusal> {
        let mut refused: Vec<usize> = Vec::new();
        let ready: Vec<bool> = self.all.iter().map(|one| !one.load().restarting).collect();
        let mut refusal = Refusal::Unavailable("there is no replica".to_owned());
        let sink = Arc::new(Mutex::new(sink));
        while refused.len() < self.all.len() {
            let (tenant, max_tokens) = (request.tenant, request.sampling.max_tokens);
            let mut desk = lock(&self.desk);
            let some_left = (0..ready.len()).any(|at| ready[at] && !refused.contains(&at));
            let open = |at: usize| !refused.contains(&at) && (ready[at] || !some_left);
            let Some(route) = desk.router.route(tenant, &request.prompt, max_tokens, open) else {
                break;
            };
            if desk.routes.contains_key(&request.id) {
                desk.router.done(route);
                return Err(Refusal::Invalid(format!("{} is in use", request.id)));
            }
            // Before it is asked: its answer may come at once.
            desk.routes.insert(request.id, route);
            drop(desk);
            let routed = Routed { sink: sink.clone(), desk: self.desk.clone(), id: request.id };
            match self.all[route.replica].submit(request.clone(), Box::new(routed)) {
                Ok(()) => return Ok(()),
                Err(why) => {
                    let mut desk = lock(&self.desk);
                    if let Some(route) = desk.routes.remove(&request.id) {
                        desk.router.done(route);
                    }
                    if matches!(why, Refusal::Invalid(_)) {
                        return Err(why);
                    }
                    refused.push(route.replica);
                    refusal = why;
                }
            }
        }
        Err(refusal)
    }

    fn cancel(&self, id: RequestId) {
        let route = lock(&self.desk).routes.get(&id).copied();
        if let Some(route) = route {
            self.all[route.replica].cancel(id);
        }
    }

    /// Sums; the longest stall. Down when all are.
    fn load(&self) -> Load {
        let loads = self.all.iter().map(|replica| replica.load());
        loads.reduce(Load::plus).unwrap_or_default()
    }

    /// Sums.
    fn experts(&self) -> Option<Arc<ExpertLoads>> {
        let mut all = self.all.iter().filter_map(|replica| replica.experts());
        let mut sum = all.next()?;
        all.for_each(|loads| Arc::make_mut(&mut sum).add(&loads));
        Some(sum)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

    use pomona_types::{FinishReason, Micros, Sampling, TenantId};

    use super::*;

    /// Takes requests until it is full, and ends them when told.
    struct Fake {
        info: ReplicaInfo,
        room: usize,
        taken: Mutex<Vec<(RequestId, Box<dyn TokenSink>)>>,
        cancelled: AtomicU32,
        restarting: AtomicBool,
    }

    impl Fake {
        fn new(room: usize) -> Arc<Fake> {
            let info = ReplicaInfo {
                model: "fake".into(),
                max_model_len: 100,
                vocab_size: 10,
                eos_token_ids: [0].into(),
                kv_tokens: 100,
            };
            let (taken, cancelled, restarting) = Default::default();
            Arc::new(Fake { info, room, taken, cancelled, restarting })
        }

        fn finish(&self) -> usize {
            let taken = std::mem::take(&mut *self.taken.lock().expect("nobody panicked"));
            let count = taken.len();
            for (_, mut sink) in taken {
                sink.token(TokenOutput { token: 1, logprobs: None });
                sink.finish(Finish {
                    reason: FinishReason::Length,
                    message: None,
                    cached_tokens: 0,
                    queued: Micros(0),
                    preemptions: 0,
                });
            }
            count
        }
    }

    impl Replica for Fake {
        fn info(&self) -> &ReplicaInfo {
            &self.info
        }

        fn submit(&self, request: Request, sink: Box<dyn TokenSink>) -> Result<(), Refusal> {
            let mut taken = self.taken.lock().expect("nobody panicked");
            if taken.len() == self.room {
                return Err(Refusal::Overloaded { waiting: self.room as u32, retry_after_s: 1 });
            }
            taken.push((request.id, sink));
            Ok(())
        }

        fn cancel(&self, _: RequestId) {
            self.cancelled.fetch_add(1, Ordering::Relaxed);
        }

        fn load(&self) -> Load {
            let waiting = self.taken.lock().expect("nobody panicked").len() as u32;
            let restarting = self.restarting.load(Ordering::Relaxed);
            let down = (self.room == 0).then(|| "full".to_owned());
            Load { waiting, restarting, down, ..Load::default() }
        }

        fn experts(&self) -> Option<Arc<ExpertLoads>> {
            let tokens = vec![vec![self.room as u64, 1]];
            Some(Arc::new(ExpertLoads { tokens, ..ExpertLoads::default() }))
        }
    }

    struct Counter(Arc<AtomicU32>);

    impl TokenSink for Counter {
        fn token(&mut self, _: TokenOutput) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
        fn finish(&mut self, _: Finish) {
            self.0.fetch_add(100, Ordering::Relaxed);
        }
    }

    fn request(id: u64) -> Request {
        Request {
            id: RequestId(id),
            tenant: TenantId(0),
            class: Default::default(),
            priority: 0,
            prompt: vec![id as u32; 20].into(),
            sampling: Sampling { max_tokens: 5, ..Sampling::default() },
        }
    }

    #[test]
    fn requests_are_spread_answered_and_forgotten() {
        let fakes = [Fake::new(3), Fake::new(3)];
        let all = fakes.iter().map(|f| f.clone() as Arc<dyn Replica>).collect();
        let replicas = Replicas::new(all).expect("there are two");
        let heard = Arc::new(AtomicU32::new(0));
        for id in 0..6 {
            replicas.submit(request(id), Box::new(Counter(heard.clone()))).expect("there is room");
        }
        let refusal = replicas.submit(request(9), Box::new(Counter(heard.clone())));
        assert!(matches!(refusal, Err(Refusal::Overloaded { .. })));
        let again = replicas.submit(request(1), Box::new(Counter(heard.clone())));
        assert!(matches!(again, Err(Refusal::Invalid(_))));
        assert_eq!(replicas.load().waiting, 6);
        assert_eq!(replicas.experts().expect("both have some").tokens, [[6, 2]]);
        replicas.cancel(RequestId(2));
        replicas.cancel(RequestId(77));
        let cancelled = fakes.iter().map(|f| f.cancelled.load(Ordering::Relaxed)).sum::<u32>();
        assert_eq!(cancelled, 1);
        assert_eq!(fakes.each_ref().map(|fake| fake.finish()), [3, 3]);
        assert_eq!(heard.load(Ordering::Relaxed), 6 * 101);
        assert!(lock(&replicas.desk).routes.is_empty());
    }

    #[test]
    fn a_replica_that_is_being_started_again_comes_last() {
        let fakes = [Fake::new(3), Fake::new(2)];
        let all = fakes.iter().map(|f| f.clone() as Arc<dyn Replica>).collect();
        let replicas = Replicas::new(all).expect("there are two");
        let heard = Arc::new(AtomicU32::new(0));
        fakes[0].restarting.store(true, Ordering::Relaxed);
        for id in 0..4 {
            replicas.submit(request(id), Box::new(Counter(heard.clone()))).expect("there is room");
        }
        // The other one has no room for more than two.
        assert_eq!(fakes.each_ref().map(|fake| fake.finish()), [2, 2]);
    }

    #[test]
    fn a_replica_that_is_down_is_passed_by() {
        let fakes = [Fake::new(0), Fake::new(2)];
        let all = fakes.iter().map(|f| f.clone() as Arc<dyn Replica>).collect();
        let replicas = Replicas::new(all).expect("there are two");
        let heard = Arc::new(AtomicU32::new(0));
        for id in 0..2 {
            replicas.submit(request(id), Box::new(Counter(heard.clone()))).expect("one has room");
        }
        assert_eq!(replicas.load().down, None);
        assert_eq!(fakes[1].finish(), 2);
    }
}
