use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use pomona_types::{Finish, FinishReason, Micros, Sampling, TenantId, TokenOutput};

use super::*;

/// Says the numbers from 0 on, as far as it lives, and goes down when told.
struct Mortal {
    info: ReplicaInfo,
    down: Arc<AtomicBool>,
    alive: Arc<AtomicU32>,
    taken: Mutex<Vec<(Request, Box<dyn TokenSink>)>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("nobody panicked")
}

impl Mortal {
    /// Answers all requests with so many tokens, and an end.
    fn answer(&self, tokens: u32, reason: FinishReason) {
        for (_, mut sink) in std::mem::take(&mut *lock(&self.taken)) {
            (0..tokens).for_each(|token| sink.token(TokenOutput { token, logprobs: None }));
            let (message, queued) = (Some("rank 1 was lost".to_owned()), Micros(0));
            sink.finish(Finish { reason, message, cached_tokens: 0, queued, preemptions: 0 });
        }
    }

    fn die(&self, after_tokens: u32) {
        self.down.store(true, Ordering::SeqCst);
        self.answer(after_tokens, FinishReason::Error);
    }
}

impl Replica for Mortal {
    fn info(&self) -> &ReplicaInfo {
        &self.info
    }
    fn submit(&self, request: Request, sink: Box<dyn TokenSink>) -> Result<(), Refusal> {
        if self.down.load(Ordering::SeqCst) {
            return Err(Refusal::Unavailable("down".to_owned()));
        }
        lock(&self.taken).push((request, sink));
        Ok(())
    }
    fn cancel(&self, id: RequestId) {
        lock(&self.taken).retain(|(request, _)| request.id != id);
    }
    fn load(&self) -> Load {
        let down = self.down.load(Ordering::SeqCst).then(|| "rank 1 was lost".to_owned());
        Load { down, steps: 5, ..Load::default() }
    }
    fn experts(&self) -> Option<Arc<ExpertLoads>> {
        Some(Arc::new(ExpertLoads { pairs: vec![3, 4], ..ExpertLoads::default() }))
    }
}

struct Only(Arc<Mortal>);

impl Life for Only {
    fn replica(&self) -> Arc<dyn Replica> {
        self.0.clone()
    }
}

impl Drop for Only {
    fn drop(&mut self) {
        self.0.alive.fetch_sub(1, Ordering::SeqCst);
    }
}

/// A place where the newest life stands, and how many tries fail before it.
#[derive(Clone, Default)]
struct World {
    newest: Arc<Mutex<Option<Arc<Mortal>>>>,
    alive: Arc<AtomicU32>,
    failures: Arc<AtomicU32>,
}

impl World {
    fn make(&self) -> Result<Box<dyn Life>, String> {
        if self.failures.load(Ordering::SeqCst) > 0 {
            self.failures.fetch_sub(1, Ordering::SeqCst);
            return Err("no memory".to_owned());
        }
        assert_eq!(self.alive.fetch_add(1, Ordering::SeqCst), 0, "two lives at a time");
        let info = ReplicaInfo {
            model: "fake".into(),
            max_model_len: 100,
            vocab_size: 10,
            eos_token_ids: [0].into(),
            kv_tokens: 100,
        };
        let (down, taken) = Default::default();
        let mortal = Arc::new(Mortal { info, down, alive: self.alive.clone(), taken });
        *lock(&self.newest) = Some(mortal.clone());
        Ok(Box::new(Only(mortal)))
    }

    fn begin(&self) -> Revived {
        let maker = self.clone();
        let first = self.make().expect("the first try does not fail");
        Revived::new(first, Box::new(move || maker.make())).expect("there are threads")
    }

    fn newest(&self) -> Arc<Mortal> {
        lock(&self.newest).clone().expect("one was made")
    }
}

/// Tokens, and the end.
#[derive(Clone, Default)]
struct Heard(Arc<Mutex<(Vec<u32>, Vec<FinishReason>)>>);

impl TokenSink for Heard {
    fn token(&mut self, output: TokenOutput) {
        lock(&self.0).0.push(output.token);
    }
    fn finish(&mut self, finish: Finish) {
        lock(&self.0).1.push(finish.reason);
    }
}

fn request(id: u64) -> Request {
    Request {
        id: RequestId(id),
        tenant: TenantId(0),
        class: Default::default(),
        priority: 0,
        prompt: vec![1, 2].into(),
        sampling: Sampling::default(),
    }
}

fn until(what: &str, holds: impl Fn() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < Duration::from_secs(20), "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn clients_hear_nothing_of_a_death_not_even_of_two() {
    let world = World::default();
    let revived = world.begin();
    let (replica, heard) = (revived.replica(), Heard::default());
    replica.submit(request(1), Box::new(heard.clone())).expect("it is up");
    for spoken in [2, 3] {
        world.failures.store(1, Ordering::SeqCst);
        let before = world.newest();
        before.die(spoken);
        assert_eq!(replica.load().down, None);
        until("another lives", || !Arc::ptr_eq(&world.newest(), &before));
        until("it has the request", || lock(&world.newest().taken).len() == 1);
    }
    world.newest().answer(5, FinishReason::Length);
    let (tokens, ends) = lock(&heard.0).clone();
    assert_eq!((tokens, ends), (vec![0, 1, 2, 3, 4], vec![FinishReason::Length]));
    assert_eq!(revived.seat.journal.len(), 0);
    assert_eq!(replica.experts().expect("each life has some").pairs, [9, 12]);
    assert_eq!(replica.load().steps, 15);
}

#[test]
fn a_request_that_always_kills_ends_with_the_failure() {
    let world = World::default();
    let revived = world.begin();
    let heard = Heard::default();
    revived.replica().submit(request(1), Box::new(heard.clone())).expect("it is up");
    let ended = || !lock(&heard.0).1.is_empty();
    let begun = Instant::now();
    while !ended() && begun.elapsed() < Duration::from_secs(20) {
        let newest = world.newest();
        if !lock(&newest.taken).is_empty() {
            newest.die(1);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(*lock(&heard.0), (vec![0], vec![FinishReason::Error]));
}

#[test]
fn what_comes_or_is_cancelled_meanwhile_is_treated_as_such() {
    let world = World::default();
    let revived = world.begin();
    let (replica, heard) = (revived.replica(), [(); 3].map(|()| Heard::default()));
    world.failures.store(1, Ordering::SeqCst);
    replica.submit(request(1), Box::new(heard[0].clone())).expect("it is up");
    world.newest().die(1);
    until("nobody lives", || world.alive.load(Ordering::SeqCst) == 0);
    replica.submit(request(2), Box::new(heard[1].clone())).expect("it waits");
    replica.submit(request(3), Box::new(heard[2].clone())).expect("it waits");
    replica.cancel(RequestId(1));
    replica.cancel(RequestId(3));
    assert_eq!(*lock(&heard[0].0), (vec![0], vec![FinishReason::Abort]));
    assert_eq!(*lock(&heard[2].0), (vec![], vec![FinishReason::Abort]));
    until("another lives", || world.alive.load(Ordering::SeqCst) == 1);
    until("it has the request", || lock(&world.newest().taken).len() == 1);
    // Stopping is final.
    drop(replica);
    let newest = world.newest();
    drop(revived);
    newest.answer(1, FinishReason::Error);
    assert_eq!(*lock(&heard[1].0), (vec![0], vec![FinishReason::Error]));
    assert_eq!(world.alive.load(Ordering::SeqCst), 0);
}
