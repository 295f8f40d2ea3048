//! Where a request goes: to the replica that is likely to be done with it first. A replica has to
//! work off what it was given, and then what it does not remember of the prompt.
//!
//! What a replica remembers is a hint, kept here: the hashes of the blocks of the prompts that it
//! was given, the newest of them. A wrong hint costs time, never an answer.

use std::collections::{BTreeMap, VecDeque};

use pomona_types::{BLOCK_TOKENS, TenantId, TokenId};

/// Most blocks of prompts that are remembered, over all replicas: some 6 MB.
const BLOCKS_MAX: usize = 1 << 17;
/// What a token to come costs, in tokens of a prompt: it takes a step, in which a prompt's tokens
/// go many at a time.
const OUTPUT_COST: u64 = 8;

/// A decision, to be given back when the request is over.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Route {
    /// Which replica.
    pub replica: usize,
    /// Tokens of the prompt that it is thought to remember.
    pub remembered: u32,
    /// What the request was reckoned at.
    work: u64,
}

/// What is known of the replicas.
#[derive(Clone, Debug)]
pub struct Router {
    /// Work that each was given and has not finished.
    work: Vec<u64>,
    /// For each remembered block, by the hash of all tokens up to its end: who has it.
    blocks: BTreeMap<u64, Vec<usize>>,
    /// The oldest first.
    order: VecDeque<u64>,
    /// Who was chosen last: of equals, the next one is.
    last: usize,
}

impl Router {
    /// Of so many replicas, at least one.
    pub fn new(replicas: usize) -> Router {
        Router {
            work: vec![0; replicas.max(1)],
            blocks: BTreeMap::new(),
            order: VecDeque::new(),
            last: replicas.saturating_sub(1),
        }
    }

    /// Chooses among the replicas for which `open` holds, if there is one, and takes note.
    pub fn route(
        &mut self,
        tenant: TenantId,
        prompt: &[TokenId],
        max_tokens: u32,
        open: impl Fn(usize) -> bool,
    ) -> Option<Route> {
        let hashes = hashes(tenant, prompt);
        let replicas = self.work.len();
        let route = |replica: usize| {
            let has = |hash: &&u64| self.blocks.get(hash).is_some_and(|b| b.contains(&replica));
            let blocks = hashes.iter().take_while(has).count() as u32;
            let remembered = blocks * BLOCK_TOKENS;
            let new = (prompt.len() as u64).saturating_sub(u64::from(remembered));
            Route { replica, remembered, work: new + OUTPUT_COST * u64::from(max_tokens) }
        };
        // From the one after the last, so that equals take turns.
        let candidates = (1..=replicas).map(|n| (self.last + n) % replicas).filter(|r| open(*r));
        let route = candidates.map(route).min_by_key(|r| self.work[r.replica] + r.work)?;
        self.last = route.replica;
        self.work[route.replica] += route.work;
        for hash in hashes {
            self.remember(hash, route.replica);
        }
        Some(route)
    }

    /// The request is over, or was not taken.
    pub fn done(&mut self, route: Route) {
        self.work[route.replica] -= route.work;
    }

    fn remember(&mut self, hash: u64, replica: usize) {
        let owners = self.blocks.entry(hash).or_insert_with(|| {
            self.order.push_back(hash);
            Vec::new()
        });
        if !owners.contains(&replica) {
            owners.push(replica);
        }
        if self.order.len() > BLOCKS_MAX
            && let Some(oldest) = self.order.pop_front()
        {
            self.blocks.remove(&oldest);
        }
    }
}

/// For each full block of a prompt, a hash of all tokens up to its end (FNV-1a, 64 bits, with
/// a last round of mixing by multiplication).
fn hashes(tenant: TenantId, prompt: &[TokenId]) -> Vec<u64> {
    const PRIME: u64 = 0x0000_0100_0000_01b3;
    let mut hash = 0xcbf2_9ce4_8422_2325 ^ tenant.0.wrapping_mul(PRIME);
    let blocks = prompt.chunks_exact(BLOCK_TOKENS as usize);
    let chain = blocks.map(|block| {
        for token in block {
            hash = (hash ^ u64::from(*token)).wrapping_mul(PRIME);
        }
        hash ^ (hash >> 32)
    });
    chain.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TENANT: TenantId = TenantId(1);

    fn prompt(family: u32, len: u32) -> Vec<TokenId> {
        (0..len).map(|i| family * 1_000 + i).collect()
    }

    fn route(router: &mut Router, prompt: &[TokenId]) -> Route {
        router.route(TENANT, prompt, 10, |_| true).expect("all are open")
    }

    #[test]
    fn equal_work_is_spread_evenly() {
        let mut router = Router::new(3);
        let chosen: Vec<usize> =
            (0..6).map(|family| route(&mut router, &prompt(family, 100)).replica).collect();
        assert_eq!(chosen, [0, 1, 2, 0, 1, 2]);
    }

    #[test]
    fn a_prompt_goes_where_its_beginning_is_known() {
        let mut router = Router::new(3);
        let first = route(&mut router, &prompt(1, 100));
        router.done(first);
        let again = route(&mut router, &prompt(1, 130));
        assert_eq!((again.replica, again.remembered), (first.replica, 96));
        // Of another tenant, nothing is known.
        let other = router.route(TenantId(2), &prompt(1, 100), 10, |_| true).expect("open");
        assert_eq!(other.remembered, 0);
        assert_ne!(other.replica, first.replica);
    }

    #[test]
    fn a_known_beginning_does_not_outweigh_a_long_queue() {
        let mut router = Router::new(2);
        let taken = route(&mut router, &prompt(1, 1_000));
        router.done(taken);
        let first = taken.replica;
        let at_first = |router: &mut Router| route(router, &prompt(1, 1_000)).replica == first;
        // A prompt of 1,000 tokens is worth some requests of 88, not any number of them.
        let streak = (0..40).take_while(|_| at_first(&mut router)).count();
        assert!((1..20).contains(&streak), "{streak}");
    }

    #[test]
    fn closed_replicas_are_passed_by() {
        let mut router = Router::new(2);
        for _ in 0..3 {
            let route = router.route(TENANT, &prompt(1, 20), 1, |replica| replica == 1);
            assert_eq!(route.map(|r| r.replica), Some(1));
        }
        assert_eq!(router.route(TENANT, &[1], 1, |_| false), None);
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let mut router = Router::new(2);
        for family in 0..200 {
            let long: Vec<TokenId> = (0..16 * 1_000).map(|i| family * 16_000 + i).collect();
            let taken = route(&mut router, &long);
            router.done(taken);
        }
        assert_eq!((router.blocks.len(), router.order.len()), (BLOCKS_MAX, BLOCKS_MAX));
        assert_eq!(router.work, [0, 0]);
    }
}
