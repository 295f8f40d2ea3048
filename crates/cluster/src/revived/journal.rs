//! What a replica was asked and has answered so far, to be asked again.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pomona_types::{
    Finish, FinishReason, Micros, Refusal, Replica, Request, RequestId, TokenLogprobs, TokenOutput,
    TokenSink,
};

/// Times that a request is submitted: one that brings the replica down each time must end.
const TRIES_MAX: u32 = 3;

/// Requests that have not ended.
#[derive(Default)]
pub(super) struct Journal {
    entries: Mutex<Entries>,
}

#[derive(Default)]
struct Entries {
    by_id: BTreeMap<RequestId, Entry>,
    /// Failures are final from now on.
    closed: bool,
}

struct Entry {
    request: Request,
    sink: Box<dyn TokenSink>,
    /// Tokens that the sink was told.
    told: usize,
    prompt_told: bool,
    tries: u32,
    /// Whether the replica has it now.
    submitted: bool,
    /// Its end is awaited, whichever.
    cancelled: bool,
}

/// Writes down what one submission brings.
struct Scribe {
    journal: Arc<Journal>,
    id: RequestId,
    /// Of which try: what comes of an earlier one is not heard.
    tries: u32,
    /// Tokens that were told before.
    skip: usize,
}

impl Journal {
    fn entries(&self) -> MutexGuard<'_, Entries> {
        // What is behind it stays whole, whoever panicked.
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn len(&self) -> usize {
        self.entries().by_id.len()
    }

    /// Writes a request down and submits it.
    pub(super) fn submit(
        self: &Arc<Self>,
        replica: &dyn Replica,
        request: Request,
        sink: Box<dyn TokenSink>,
    ) -> Result<(), Refusal> {
        let id = request.id;
        self.write(request, sink, true)?;
        match self.hand_over(replica, id) {
            // It went down a moment ago: the request waits for the next one.
            Err(Refusal::Unavailable(_)) | Ok(()) => Ok(()),
            Err(refusal) => {
                self.entries().by_id.remove(&id);
                Err(refusal)
            }
        }
    }

    /// Writes a request down, for a replica to come.
    pub(super) fn wait(&self, request: Request, sink: Box<dyn TokenSink>) -> Result<(), Refusal> {
        self.write(request, sink, false)
    }

    /// `submitted`: who writes will hand it over, and nobody else.
    fn write(
        &self,
        request: Request,
        sink: Box<dyn TokenSink>,
        submitted: bool,
    ) -> Result<(), Refusal> {
        let (id, mut entries) = (request.id, self.entries());
        if entries.by_id.contains_key(&id) {
            return Err(Refusal::Invalid(format!("{id} is in use")));
        }
        if entries.closed {
            return Err(Refusal::Unavailable("it is being stopped".to_owned()));
        }
        let (told, tries, prompt_told, cancelled) = (0, 0, false, false);
        let entry = Entry { request, sink, told, prompt_told, tries, submitted, cancelled };
        entries.by_id.insert(id, entry);
        Ok(())
    }

    /// Gives a request that is marked as submitted to the replica.
    fn hand_over(self: &Arc<Self>, replica: &dyn Replica, id: RequestId) -> Result<(), Refusal> {
        let (request, scribe) = {
            let mut entries = self.entries();
            let Some(entry) = entries.by_id.get_mut(&id) else { return Ok(()) };
            entry.tries += 1;
            let (tries, skip) = (entry.tries, entry.told);
            (entry.request.clone(), Scribe { journal: self.clone(), id, tries, skip })
        };
        let tries = scribe.tries;
        let outcome = replica.submit(request, Box::new(scribe));
        let mut entries = self.entries();
        let entry = entries.by_id.get_mut(&id).filter(|entry| entry.tries == tries);
        let Some(entry) = entry else { return outcome };
        if outcome.is_err() {
            entry.submitted = false;
            entry.tries -= 1;
        } else if entry.cancelled {
            // While it was handed over.
            drop(entries);
            replica.cancel(id);
        }
        outcome
    }

    /// Submits everything that waits to a replica. Returns how much that is. What it has no room
    /// for waits on.
    pub(super) fn replay(self: &Arc<Self>, replica: &dyn Replica) -> usize {
        let waiting: Vec<RequestId> = {
            let mut entries = self.entries();
            let waiting = entries.by_id.iter_mut().filter(|(_, entry)| !entry.submitted);
            let take = |(id, entry): (&RequestId, &mut Entry)| {
                entry.submitted = true;
                *id
            };
            waiting.map(take).collect()
        };
        for id in &waiting {
            if let Err(Refusal::Invalid(why)) = self.hand_over(replica, *id) {
                self.fail(*id, &why);
            }
        }
        waiting.len()
    }

    /// Forgets a request if no replica has it, and does not submit it again otherwise.
    pub(super) fn cancel(&self, id: RequestId) {
        let mut entries = self.entries();
        let Some(entry) = entries.by_id.get_mut(&id) else { return };
        entry.cancelled = true;
        if !entry.submitted
            && let Some(mut entry) = entries.by_id.remove(&id)
        {
            drop(entries);
            entry.sink.finish(end(FinishReason::Abort, None));
        }
    }

    fn fail(&self, id: RequestId, why: &str) {
        let entry = self.entries().by_id.remove(&id);
        if let Some(mut entry) = entry {
            entry.sink.finish(end(FinishReason::Error, Some(why.to_owned())));
        }
    }

    /// Gives up what waits.
    pub(super) fn fail_waiting(&self, why: &str) {
        let waiting: Vec<RequestId> = {
            let entries = self.entries();
            let waiting = entries.by_id.iter().filter(|(_, entry)| !entry.submitted);
            waiting.map(|(id, _)| *id).collect()
        };
        waiting.into_iter().for_each(|id| self.fail(id, why));
    }

    /// Nothing is submitted again from now on.
    pub(super) fn close(&self, why: &str) {
        self.entries().closed = true;
        self.fail_waiting(why);
    }
}

fn end(reason: FinishReason, message: Option<String>) -> Finish {
    Finish { reason, message, cached_tokens: 0, queued: Micros(0), preemptions: 0 }
}

impl Scribe {
    fn with(&self, tell: impl FnOnce(&mut Entry)) {
        let mut entries = self.journal.entries();
        let entry = entries.by_id.get_mut(&self.id);
        if let Some(entry) = entry.filter(|entry| entry.tries == self.tries) {
            tell(entry);
        }
    }
}

impl TokenSink for Scribe {
    fn prompt_logprobs(&mut self, logprobs: Vec<Option<TokenLogprobs>>) {
        self.with(|entry| {
            if !std::mem::replace(&mut entry.prompt_told, true) {
                entry.sink.prompt_logprobs(logprobs);
            }
        });
    }

    fn token(&mut self, output: TokenOutput) {
        if self.skip > 0 {
            self.skip -= 1;
            return;
        }
        self.with(|entry| {
            entry.told += 1;
            entry.sink.token(output);
        });
    }

    /// Failures are not told: the request waits for the next replica.
    fn finish(&mut self, finish: Finish) {
        let mut entries = self.journal.entries();
        let closed = entries.closed;
        let entry = entries.by_id.get_mut(&self.id).filter(|entry| entry.tries == self.tries);
        let Some(entry) = entry else { return };
        let again = !closed && !entry.cancelled && entry.tries < TRIES_MAX;
        if finish.reason == FinishReason::Error && again {
            entry.submitted = false;
            return;
        }
        let entry = entries.by_id.remove(&self.id);
        drop(entries);
        if let Some(mut entry) = entry {
            entry.sink.finish(finish);
        }
    }
}
