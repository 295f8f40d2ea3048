//! Random operations against a model of what each block's memory would hold: every row of every
//! plan must find, through its tables, exactly the keys of its own tokens.

use std::collections::{BTreeMap, VecDeque};

use pomona_types::{
    FinishReason, LayerKind, Micros, QosClass, Refusal, Request, RequestId, Sampling, TenantId,
    TokenId,
};

use super::*;

const BLOCK: u32 = pomona_types::BLOCK_TOKENS;

/// SplitMix64.
struct Dice(u64);

impl Dice {
    fn below(&mut self, n: u32) -> u32 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % u64::from(n)) as u32
    }
}

/// A request as the outside knows it.
struct Truth {
    tenant: TenantId,
    tokens: Vec<TokenId>,
    prompt_len: usize,
    max_tokens: u32,
    aborted: bool,
}

/// The scheduler, what it should do, and the memory it manages.
struct World {
    state: State,
    config: Config,
    /// By block, offset: the group and prefix digest whose key lies there.
    memory: Vec<[(usize, u64); BLOCK as usize]>,
    alive: BTreeMap<RequestId, Truth>,
    dice: Dice,
    next_id: u64,
    now: Micros,
    events: u64,
    /// Steps that are computed and not committed.
    flights: VecDeque<(StepPlan, StepResult)>,
    landed: Vec<StepPlan>,
    /// By slot and group, as plans have told them.
    tables: Vec<Vec<Vec<u32>>>,
}

/// Digests of all prefixes of `tokens`.
fn digests(tenant: TenantId, tokens: &[TokenId]) -> Vec<u64> {
    let mut digest = tenant.0 ^ 0x1234_5678;
    let mut next = |token: &TokenId| {
        digest = (digest ^ u64::from(*token)).wrapping_mul(0x0100_0000_01b3).rotate_left(23);
        digest
    };
    tokens.iter().map(&mut next).collect()
}

fn config(dice: &mut Dice) -> Config {
    let groups = match dice.below(4) {
        0 => vec![LayerKind::Full],
        1 => vec![LayerKind::Full, LayerKind::Sliding { window: 1 + dice.below(60) }],
        2 => vec![LayerKind::Sliding { window: 20 }],
        _ => vec![
            LayerKind::Full,
            LayerKind::Sliding { window: 33 },
            LayerKind::Sliding { window: 33 },
        ],
    };
    let seqs = 1 + dice.below(12);
    // Over several ranks, sequences are to have several splits.
    let context = [1, 1, 2, 3][dice.below(4) as usize];
    let longer = if context > 1 { 4 } else { 1 };
    Config {
        max_num_seqs: seqs,
        max_num_batched_tokens: seqs + dice.below(80),
        steps_in_flight: [1, 1, 2, 3][dice.below(4) as usize],
        max_model_len: longer * (40 + dice.below(200)),
        blocks: longer * (10 + dice.below(80)),
        context,
        groups,
        prefix_caching: dice.below(4) > 0,
        ordering: [Ordering::Fcfs, Ordering::Priority, Ordering::Fair][dice.below(3) as usize],
        step_target: (dice.below(2) == 0).then(|| Micros(u64::from(dice.below(100)))),
        max_waiting: 1 + dice.below(30),
        eos_token_ids: vec![0],
        speculation: speculation(dice),
    }
}

/// None in every other world.
fn speculation(dice: &mut Dice) -> Option<Speculation> {
    let method = match dice.below(6) {
        0 => Method::DraftModel,
        1 => Method::Lookup(Lookup { min: 1, max: 3, drafts_per_token: f32::INFINITY }),
        2 => Method::Lookup(Lookup { min: 1, max: 24, drafts_per_token: 1.0 }),
        _ => return None,
    };
    let num_speculative_tokens = 1 + dice.below(40);
    // Mostly so cheap that every request gets them.
    let free_tokens = [Speculation::FREE_TOKENS, 1e6, 1e6][dice.below(3) as usize];
    Some(Speculation { method, num_speculative_tokens, free_tokens, draft_cost: 0.0 })
}

impl World {
    fn new(seed: u64) -> World {
        let mut dice = Dice(seed);
        let config = config(&mut dice);
        // A hash of four values makes collisions the rule.
        let mask = if dice.below(2) == 0 { 3 } else { u64::MAX };
        let tables = vec![vec![vec![]; config.groups.len()]; config.max_num_seqs as usize];
        World {
            state: State::with_hash_mask(config.clone(), mask).unwrap(),
            memory: vec![[(usize::MAX, 0); BLOCK as usize]; config.blocks as usize],
            config,
            alive: BTreeMap::new(),
            dice,
            next_id: 1,
            now: Micros(0),
            events: 0,
            flights: VecDeque::new(),
            landed: Vec::new(),
            tables,
        }
    }

    fn submit(&mut self) {
        self.events += 1;
        let dice = &mut self.dice;
        let family = dice.below(3);
        let len = 1 + dice.below(if self.config.context > 1 { 800 } else { 120 });
        // Prompts of a family agree up to a random point.
        let fork = dice.below(len + 1);
        let token = |i: u32, dice: &mut Dice| {
            if i < fork { 1 + (i * 7 + family) % 5 } else { 1 + dice.below(3) }
        };
        let prompt: Vec<TokenId> = (0..len).map(|i| token(i, dice)).collect();
        let max_tokens = 1 + dice.below(40);
        let request = Request {
            id: RequestId(self.next_id),
            tenant: TenantId(u64::from(dice.below(2))),
            class: [QosClass::Interactive, QosClass::Standard, QosClass::Batch]
                [dice.below(3) as usize],
            priority: dice.below(3) as i32,
            prompt: prompt.clone().into(),
            sampling: Sampling {
                max_tokens,
                prompt_logprobs: (dice.below(8) == 0).then_some(0),
                ..Sampling::default()
            },
        };
        let (id, tenant) = (request.id, request.tenant);
        match self.state.submit(self.now, request) {
            Ok(()) => {
                let prompt_len = prompt.len();
                let truth =
                    Truth { tenant, tokens: prompt, prompt_len, max_tokens, aborted: false };
                self.alive.insert(id, truth);
            }
            Err(Refusal::Overloaded { waiting, .. }) => {
                // Preempted requests wait too, beyond the bound for new ones.
                assert!(waiting >= self.config.max_waiting);
            }
            Err(Refusal::Invalid(_)) => {
                let total = (len + max_tokens).min(self.config.max_model_len);
                let fits = self.config.blocks_for(total) <= self.config.blocks_usable();
                assert!(len >= self.config.max_model_len || !fits, "refused without a reason");
            }
            Err(other) => panic!("{other}"),
        }
        self.next_id += 1;
    }

    fn abort(&mut self) {
        self.events += 1;
        let id = RequestId(1 + u64::from(self.dice.below(self.next_id as u32)));
        self.state.abort(self.now, id);
        if let Some(truth) = self.alive.get_mut(&id) {
            truth.aborted = true;
        }
    }

    /// Plans and "computes", or commits the oldest step; sometimes aborts in between.
    fn step(&mut self) -> bool {
        self.now = Micros(self.now.0 + 1_000 + u64::from(self.dice.below(200_000)));
        let mut effects = Effects::default();
        let room = self.flights.len() < self.config.steps_in_flight as usize;
        let mut planned = false;
        if room && (self.flights.is_empty() || self.dice.below(4) > 0) {
            let mut plan = self.landed.pop().unwrap_or_default();
            planned = self.state.plan(self.now, &mut plan);
            if planned {
                self.events += plan.rows.len() as u64;
                let flying = |id| self.flights.iter().flat_map(|f| &f.0.rows).any(|r| r.id == id);
                assert!(plan.rows.iter().all(|row| !flying(row.id)), "in two steps at a time");
                assert!(!plan.preempted.iter().any(|id| flying(*id)), "preempted in a step");
                self.write_drafts(&mut plan);
                let result = self.compute(&plan);
                self.flights.push_back((plan, result));
                if self.dice.below(5) == 0 {
                    self.abort();
                }
            } else {
                self.state.drain_aborted(&mut effects);
                self.landed.push(plan);
            }
        }
        let all = self.flights.len() == self.config.steps_in_flight as usize;
        if (all || !planned)
            && let Some((plan, result)) = self.flights.pop_front()
        {
            self.state.commit(self.now, &plan, &result, &mut effects);
            self.landed.push(plan);
            planned = true;
        }
        self.apply(&effects);
        if self.events.is_multiple_of(16) {
            self.state.check();
        }
        planned
    }

    /// What an executor does with the block tables of a plan.
    fn learn_tables(&mut self, plan: &StepPlan) {
        let mut start = 0;
        for row in &plan.rows {
            assert_eq!(row.first, row.known == 0);
            assert_eq!(row.table_len, (row.computed + row.count).div_ceil(BLOCK));
            if row.table_len > row.known {
                assert_eq!(row.added as usize, start);
            }
            for table in &mut self.tables[row.slot as usize] {
                // Blocks of wrong drafts stand there until now.
                assert!(row.first || table.len() >= row.known as usize);
                table.truncate(row.known as usize);
                let added = (row.table_len - row.known) as usize;
                table.extend_from_slice(&plan.blocks[start..start + added]);
                start += added;
            }
        }
        assert_eq!(start, plan.blocks.len());
    }

    /// What a draft model does.
    fn write_drafts(&mut self, plan: &mut StepPlan) {
        let method = self.config.speculation.as_ref().map(|s| &s.method);
        if method != Some(&Method::DraftModel) {
            return;
        }
        let mut end = 0;
        for row in &plan.rows {
            end += row.count as usize;
            plan.tokens[end - row.drafts as usize..end].fill_with(|| self.dice.below(4));
        }
    }

    /// A token that is the draft in one of two cases.
    fn sample(&mut self, draft: Option<&TokenId>) -> TokenId {
        match draft {
            Some(draft) if self.dice.below(2) == 0 => *draft,
            _ => self.dice.below(30),
        }
    }

    fn compute(&mut self, plan: &StepPlan) -> StepResult {
        let count: u32 = plan.rows.iter().map(|r| r.count).sum();
        assert!(count <= self.config.max_num_batched_tokens);
        assert_eq!(count as usize, plan.tokens.len());
        assert!(plan.rows.len() <= self.config.max_num_seqs as usize);
        self.learn_tables(plan);
        let mut result = StepResult::default();
        let mut first = 0;
        // All writes of a step happen before its reads, as in a layer.
        for (at, row) in plan.rows.iter().enumerate() {
            let truth = &self.alive[&row.id];
            let end = (row.computed + row.count) as usize;
            let known = &truth.tokens[row.computed as usize..end - row.drafts as usize];
            let (planned, drafts) =
                plan.tokens[first..first + row.count as usize].split_at(known.len());
            assert_eq!(known, planned);
            assert_eq!(row.sample, end - drafts.len() == truth.tokens.len());
            assert!(drafts.is_empty() || row.sample);
            let room = truth.max_tokens as usize + truth.prompt_len - truth.tokens.len();
            assert!(drafts.len() < room, "drafts beyond the request's end");
            first += row.count as usize;
            let digests = digests(truth.tenant, &[&truth.tokens, drafts].concat());
            for group in 0..self.config.groups.len() {
                let table = &self.tables[row.slot as usize][group];
                for position in row.computed as usize..end {
                    let block = table[position / BLOCK as usize];
                    assert_ne!(block, NO_BLOCK);
                    self.memory[block as usize][position % BLOCK as usize] =
                        (group, digests[position]);
                }
            }
            let mut drafts = drafts.iter();
            let mut goes_on = row.sample;
            while goes_on {
                let draft = drafts.next();
                let token = self.sample(draft);
                result.sampled.push(Sampled { row: at as u32, token });
                goes_on = draft == Some(&token);
            }
        }
        first = 0;
        for row in &plan.rows {
            let truth = &self.alive[&row.id];
            first += row.count as usize;
            let drafts = &plan.tokens[first - row.drafts as usize..first];
            let digests = digests(truth.tenant, &[&truth.tokens, drafts].concat());
            for (group, kind) in self.config.groups.iter().enumerate() {
                let seen = match kind {
                    LayerKind::Full => 0,
                    LayerKind::Sliding { window } => (row.computed + 1).saturating_sub(*window),
                };
                let table = &self.tables[row.slot as usize][group];
                for position in seen as usize..(row.computed + row.count) as usize {
                    let block = table[position / BLOCK as usize] as usize;
                    assert_eq!(
                        self.memory[block][position % BLOCK as usize],
                        (group, digests[position]),
                        "{} position {position} group {group}: foreign or missing KV",
                        row.id
                    );
                }
            }
        }
        result
    }

    fn apply(&mut self, effects: &Effects) {
        for effect in &effects.list {
            match effect {
                Effect::Token { id, token } => {
                    let truth = self.alive.get_mut(id).expect("tokens come before the end");
                    assert!(!truth.aborted, "a token after an abort");
                    truth.tokens.push(*token);
                }
                Effect::Finished { id, reason, .. } => {
                    let truth = self.alive.remove(id).expect("one end per request");
                    let produced = (truth.tokens.len() - truth.prompt_len) as u32;
                    match reason {
                        FinishReason::Abort => assert!(truth.aborted),
                        FinishReason::Stop(token) => {
                            assert_eq!((*token, truth.tokens.last()), (0, Some(&0)));
                        }
                        FinishReason::Length => assert!(
                            produced == truth.max_tokens
                                || truth.tokens.len() as u32 == self.config.max_model_len
                        ),
                        FinishReason::Error => panic!("the scheduler never fails a request"),
                    }
                }
            }
        }
    }
}

/// One world from start to quiet: its events, and how many drafts it accepted.
fn run(seed: u64, events: u64) -> (u64, u64) {
    let mut world = World::new(seed);
    while world.events < events {
        match world.dice.below(10) {
            0..=3 => world.submit(),
            4 => world.abort(),
            _ => {
                world.step();
            }
        }
    }
    let bound = world.events + 1_000_000;
    while world.step() || !world.alive.is_empty() {
        assert!(world.events < bound, "seed {seed}: requests that never end");
    }
    world.state.check();
    assert_eq!(world.state.stats().blocks_used, 0);
    (world.events, world.state.stats().accepted_tokens)
}

#[test]
fn random_operations_never_mix_up_memory() {
    let wanted = std::env::var("POMONA_SCHEDULER_EVENTS").ok().and_then(|v| v.parse().ok());
    let wanted: u64 = wanted.unwrap_or(1_000_000);
    let (mut events, mut accepted, mut seed) = (0, 0, 0);
    while events < wanted {
        let world = run(seed, 5_000);
        (events, accepted) = (events + world.0, accepted + world.1);
        seed += 1;
    }
    assert!(accepted > events / 100, "drafts are hardly tried");
    eprintln!("{events} events in {seed} worlds, {accepted} drafts accepted");
}

fn small(blocks: u32, ordering: Ordering) -> State {
    State::new(small_config(blocks, ordering)).unwrap()
}

fn small_config(blocks: u32, ordering: Ordering) -> Config {
    Config {
        max_num_seqs: 4,
        max_num_batched_tokens: 64,
        steps_in_flight: 1,
        max_model_len: 256,
        blocks,
        context: 1,
        groups: vec![LayerKind::Full],
        prefix_caching: true,
        ordering,
        step_target: None,
        max_waiting: 8,
        eos_token_ids: vec![0],
        speculation: None,
    }
}

fn request(id: u64, prompt: u32, max_tokens: u32) -> Request {
    Request {
        id: RequestId(id),
        tenant: TenantId(0),
        class: QosClass::Standard,
        priority: 0,
        prompt: (1..=prompt).collect(),
        sampling: Sampling { max_tokens, ..Sampling::default() },
    }
}

/// Runs a step in which every sample is token 9; returns the effects.
fn step(state: &mut State, plan: &mut StepPlan, now: u64) -> Effects {
    let mut effects = Effects::default();
    if state.plan(Micros(now), plan) {
        let sampled = (0u32..).zip(&plan.rows).filter(|(_, r)| r.sample);
        let sampled = sampled.map(|(row, _)| Sampled { row, token: 9 }).collect();
        state.commit(Micros(now), plan, &StepResult { sampled }, &mut effects);
    }
    effects
}

#[test]
fn a_long_prompt_is_computed_in_chunks() {
    let mut state = small(32, Ordering::Fcfs);
    let mut plan = StepPlan::default();
    state.submit(Micros(0), request(1, 150, 1)).unwrap();
    let mut counts = Vec::new();
    while !step(&mut state, &mut plan, 1).list.iter().any(|e| matches!(e, Effect::Finished { .. }))
    {
        counts.push((plan.rows[0].count, plan.rows[0].sample));
    }
    assert_eq!(counts, [(64, false), (64, false)]);
    assert_eq!((plan.rows[0].count, plan.rows[0].sample), (22, true));
}

#[test]
fn a_prompt_comes_in_smaller_chunks_while_somebody_decodes() {
    let config = Config {
        max_num_batched_tokens: 128,
        prefix_caching: false,
        step_target: Some(Micros(1_000)),
        ..small_config(64, Ordering::Fcfs)
    };
    let mut state = State::new(config).unwrap();
    let mut plan = StepPlan::default();
    let mut now = 0;
    // A millisecond for each token.
    let mut step = |state: &mut State, plan: &mut StepPlan| {
        assert!(state.plan(Micros(now), plan));
        now += 1_000 * plan.tokens.len() as u64;
        let sampled = (0u32..).zip(&plan.rows).filter(|(_, r)| r.sample);
        let sampled = sampled.map(|(row, _)| Sampled { row, token: 9 }).collect();
        state.commit(Micros(now), plan, &StepResult { sampled }, &mut Effects::default());
        plan.rows.iter().map(|row| row.count).collect::<Vec<_>>()
    };
    state.submit(Micros(0), request(1, 150, 3)).unwrap();
    assert_eq!(step(&mut state, &mut plan), [128], "nobody waits for a token");
    assert_eq!(step(&mut state, &mut plan), [22]);
    state.submit(Micros(0), request(2, 150, 1)).unwrap();
    assert_eq!(step(&mut state, &mut plan), [1, 64], "the least that pays");
    assert_eq!(step(&mut state, &mut plan), [1, 64]);
    assert_eq!(step(&mut state, &mut plan), [22], "the first has ended");
}

#[test]
fn drafts_that_were_right_come_out_in_one_step_and_the_others_leave_nothing_behind() {
    let check = |max_tokens: u32, drafts: &[TokenId], samples: &[TokenId], blocks: u32| {
        let lookup = Lookup { min: 2, max: 4, drafts_per_token: f32::INFINITY };
        let speculation = Speculation {
            method: Method::Lookup(lookup),
            num_speculative_tokens: 4,
            free_tokens: 1e6,
            draft_cost: 0.0,
        };
        let config = small_config(32, Ordering::Fcfs);
        let mut state = State::new(Config { speculation: Some(speculation), ..config }).unwrap();
        let mut plan = StepPlan::default();
        let prompt = (1..=10).chain(1..=5).collect();
        state.submit(Micros(0), Request { prompt, ..request(1, 1, max_tokens) }).unwrap();
        let mut commit = |samples: &[TokenId]| {
            assert!(state.plan(Micros(1), &mut plan));
            let sampled = samples.iter().map(|token| Sampled { row: 0, token: *token }).collect();
            let mut effects = Effects::default();
            state.commit(Micros(1), &plan, &StepResult { sampled }, &mut effects);
            (plan.tokens.clone(), effects.list.len(), state.stats().blocks_used)
        };
        commit(&[6]);
        let (tokens, effects, used) = commit(samples);
        assert_eq!(tokens[1..], *drafts);
        assert_eq!((effects, used), (samples.len(), blocks));
        let (_, effects, _) = commit(&[0]);
        assert_eq!(effects, 2, "a token and the end");
    };
    // 15 tokens are computed; five more reach into a second block.
    check(40, &[7, 8, 9, 10], &[11], 1);
    check(40, &[7, 8, 9, 10], &[7, 8, 11], 2);
    check(40, &[7, 8, 9, 10], &[7, 8, 9, 10, 11], 2);
    check(4, &[7, 8], &[7, 11], 2);
}

#[test]
fn a_second_request_reuses_the_full_blocks_of_the_first() {
    let mut state = small(32, Ordering::Fcfs);
    let mut plan = StepPlan::default();
    state.submit(Micros(0), request(1, 48, 1)).unwrap();
    step(&mut state, &mut plan, 1);
    state.submit(Micros(0), request(2, 48, 1)).unwrap();
    let effects = step(&mut state, &mut plan, 1);
    // 48 tokens are 3 full blocks; the last is computed anew, since a token must be.
    assert_eq!(plan.rows[0].computed, 32);
    let hit = |e: &Effect| matches!(e, Effect::Finished { cached_tokens: 32, .. });
    assert!(effects.list.iter().any(hit), "{effects:?}");
    let mut other = request(3, 48, 1);
    other.tenant = TenantId(1);
    state.submit(Micros(0), other).unwrap();
    step(&mut state, &mut plan, 1);
    assert_eq!(plan.rows[0].computed, 0, "another tenant's prefix stays its own");
}

#[test]
fn the_least_urgent_class_is_preempted_first() {
    let mut state = small(8, Ordering::Fcfs);
    let mut plan = StepPlan::default();
    let batch = Request { class: QosClass::Batch, ..request(1, 60, 60) };
    let urgent = Request { class: QosClass::Interactive, ..request(2, 50, 70) };
    state.submit(Micros(0), batch).unwrap();
    step(&mut state, &mut plan, 1);
    state.submit(Micros(0), urgent).unwrap();
    let mut ends = Vec::new();
    let mut preempted = Vec::new();
    for now in 2..400 {
        for effect in step(&mut state, &mut plan, now).list {
            if let Effect::Finished { id, reason, .. } = effect {
                assert_eq!(reason, FinishReason::Length);
                ends.push(id.0);
            }
        }
        preempted.extend(plan.preempted.drain(..).map(|id| id.0));
    }
    assert_eq!(ends, [2, 1]);
    assert!(!preempted.is_empty() && preempted.iter().all(|id| *id == 1), "{preempted:?}");
}

#[test]
fn an_abort_frees_blocks_at_once_outside_a_step_and_at_the_commit_inside() {
    let mut state = small(32, Ordering::Fcfs);
    let mut plan = StepPlan::default();
    state.submit(Micros(0), request(1, 40, 9)).unwrap();
    step(&mut state, &mut plan, 1);
    assert_eq!(state.stats().blocks_used, 3);
    state.abort(Micros(1), RequestId(1));
    assert_eq!(state.stats().blocks_used, 0);
    let mut effects = Effects::default();
    state.drain_aborted(&mut effects);
    assert_eq!(effects.list.len(), 1);

    state.submit(Micros(0), request(2, 40, 9)).unwrap();
    assert!(state.plan(Micros(2), &mut plan));
    state.abort(Micros(2), RequestId(2));
    assert_eq!(state.stats().blocks_used, 3);
    let sampled = vec![Sampled { row: 0, token: 9 }];
    let mut effects = Effects::default();
    state.commit(Micros(2), &plan, &StepResult { sampled }, &mut effects);
    assert_eq!(state.stats().blocks_used, 0);
    let aborted =
        matches!(effects.list[..], [Effect::Finished { reason: FinishReason::Abort, .. }]);
    assert!(aborted, "{effects:?}");
}

#[test]
fn what_can_never_fit_is_refused_and_says_why() {
    let mut state = small(8, Ordering::Fcfs);
    let refusal = |state: &mut State, request: Request| match state.submit(Micros(0), request) {
        Err(Refusal::Invalid(why)) => why,
        other => panic!("{other:?}"),
    };
    assert!(refusal(&mut state, request(1, 0, 1)).contains("empty"));
    assert!(refusal(&mut state, request(1, 256, 1)).contains("256 tokens"));
    assert!(refusal(&mut state, request(1, 100, 100)).contains("13 blocks"));
    assert!(refusal(&mut state, request(1, 10, 0)).contains("max_tokens"));
    for id in 0..8 {
        state.submit(Micros(0), request(id, 10, 1)).unwrap();
    }
    let refused = state.submit(Micros(0), request(9, 10, 1));
    assert!(matches!(refused, Err(Refusal::Overloaded { waiting: 8, .. })));
}

#[test]
fn fair_ordering_admits_the_tenant_that_got_least() {
    let mut state = small(64, Ordering::Fair);
    let mut plan = StepPlan::default();
    for id in 0..5 {
        state.submit(Micros(0), request(id, 100, 1)).unwrap();
    }
    let other = Request { tenant: TenantId(7), ..request(9, 10, 1) };
    state.submit(Micros(0), other).unwrap();
    step(&mut state, &mut plan, 1);
    step(&mut state, &mut plan, 2);
    let order: Vec<u64> = plan.rows.iter().map(|r| r.id.0).collect();
    assert_eq!(order[..2], [0, 9], "tenant 7 goes before the rest of tenant 0");
}
