//! What a step costs the scheduler: plan and commit, with all requests decoding, with requests that
//! come and go, and with drafts that are all right.
//!
//!     cargo bench -p pomona-scheduler
//!
//! Prints the median, the smallest and the 99th percentile of many steps, and how often a step
//! allocated. Ends with an error when a median is over its promise or a decode step allocates.
#![allow(clippy::unwrap_used)]

use std::process::ExitCode;
use std::time::Instant;

use pomona_scheduler::batch::{
    Config, Effects, Lookup, Method, Ordering, Sampled, Speculation, State, StepPlan, StepResult,
};
use pomona_types::{LayerKind, Micros, Request, RequestId, Sampling, TenantId};

/// Steps that are measured.
const STEPS: usize = 500;
const PROMPT_TOKENS: u32 = 256;
/// Enough that none ends by its length.
const OUTPUT_TOKENS: u32 = STEPS as u32 * 3 / 2;
/// Drafts in a row.
const DRAFTS: u32 = 4;

fn main() -> ExitCode {
    println!("running  groups   load        median us  min us  p99 us  steps that allocate");
    let mut kept = true;
    for (running, limit_us) in [(256, 20.0), (1024, f64::INFINITY), (4096, 200.0)] {
        for groups in [1, 2] {
            // The promise is about decoding with one group of layers.
            let limit_us = if groups == 1 { limit_us } else { f64::INFINITY };
            let (median, allocating) = Bench::new(running, groups, 0).decode("decode");
            kept &= median < limit_us && allocating == 0;
            Bench::new(running, groups, 0).turnover();
            let (_, allocating) = Bench::new(running, groups, DRAFTS).decode("drafts");
            kept &= allocating == 0;
        }
    }
    if kept {
        return ExitCode::SUCCESS;
    }
    println!("a promise is broken: 20 us at 256, 200 us at 4,096, no allocation");
    ExitCode::FAILURE
}

struct Bench {
    state: State,
    plan: StepPlan,
    result: StepResult,
    effects: Effects,
    running: u32,
    groups: usize,
    next: u64,
    now: u64,
}

impl Bench {
    /// All requests submitted and past their prompts, with drafts if there are to be any.
    fn new(running: u32, groups: usize, drafts: u32) -> Bench {
        let output_tokens = OUTPUT_TOKENS * (1 + drafts);
        let len = PROMPT_TOKENS + 16 + output_tokens;
        let speculation = Speculation {
            method: Method::Lookup(Lookup { min: 2, max: 4, drafts_per_token: f32::INFINITY }),
            num_speculative_tokens: DRAFTS,
            free_tokens: f32::MAX,
            draft_cost: 0.0,
        };
        let config = Config {
            max_num_seqs: running,
            max_num_batched_tokens: (running * (1 + drafts)).max(8192),
            steps_in_flight: 1,
            context: 1,
            max_model_len: len,
            blocks: running * len.div_ceil(16) * groups as u32,
            groups: [LayerKind::Full, LayerKind::Sliding { window: 512 }][..groups].to_vec(),
            prefix_caching: true,
            ordering: Ordering::Fcfs,
            step_target: Some(Micros(100_000)),
            max_waiting: running,
            eos_token_ids: vec![0],
            speculation: (drafts > 0).then_some(speculation),
        };
        let mut bench = Bench {
            state: State::new(config).unwrap(),
            plan: StepPlan::default(),
            result: StepResult::default(),
            effects: Effects::default(),
            running,
            groups,
            next: 0,
            now: 0,
        };
        for _ in 0..running {
            bench.submit(output_tokens);
        }
        while bench.state.stats().waiting > 0 {
            bench.step(|_| 1);
        }
        (0..20).for_each(|_| _ = bench.step(|_| 1));
        bench
    }

    fn submit(&mut self, max_tokens: u32) {
        self.next += 1;
        let seed = self.next as u32;
        // Lengths differ, so that blocks do not all become full in the same step.
        let len = PROMPT_TOKENS + seed % 16;
        let prompt = (0..len).map(|i| 1 + (seed.wrapping_mul(2_654_435_761) ^ i) % 50_000);
        let request = Request {
            id: RequestId(self.next),
            tenant: TenantId(0),
            class: Default::default(),
            priority: 0,
            prompt: prompt.collect(),
            sampling: Sampling { max_tokens, ..Sampling::default() },
        };
        self.state.submit(Micros(self.now), request).unwrap();
    }

    /// One step; `token` is what the model says in a row. Returns seconds and allocations.
    fn step(&mut self, token: impl Fn(u32) -> u32) -> (f64, u64) {
        self.now += 1000;
        self.effects.list.clear();
        let (mut seconds, mut allocations) = (0.0, 0);
        let mut timed = |work: &mut dyn FnMut()| {
            allocations += allocation_counter::measure(|| {
                let begun = Instant::now();
                work();
                seconds += begun.elapsed().as_secs_f64();
            })
            .count_total;
        };
        timed(&mut || assert!(self.state.plan(Micros(self.now), &mut self.plan)));
        self.result.sampled.clear();
        for (at, row) in (0u32..).zip(&self.plan.rows).filter(|(_, row)| row.sample) {
            let sampled = Sampled { row: at, token: token(at) };
            self.result.sampled.extend((0..=row.drafts).map(|_| sampled));
        }
        let Bench { state, plan, result, effects, .. } = self;
        timed(&mut || state.commit(Micros(self.now), plan, result, effects));
        (seconds, allocations)
    }

    /// All decode; returns the median in microseconds and how many steps allocated.
    fn decode(mut self, load: &str) -> (f64, usize) {
        let steps: Vec<_> = (0..STEPS).map(|_| self.step(|_| 7)).collect();
        self.report(load, &steps)
    }

    /// In each step one request ends and another comes.
    fn turnover(mut self) {
        let steps: Vec<_> = (0..STEPS)
            .map(|_| {
                self.submit(OUTPUT_TOKENS);
                self.step(|row| u32::from(row != 0))
            })
            .collect();
        self.report("turnover", &steps);
    }

    fn report(&self, load: &str, steps: &[(f64, u64)]) -> (f64, usize) {
        let mut times: Vec<f64> = steps.iter().map(|(seconds, _)| seconds * 1e6).collect();
        times.sort_by(f64::total_cmp);
        let allocating = steps.iter().filter(|(_, count)| *count > 0).count();
        let (median, p99) = (times[times.len() / 2], times[times.len() * 99 / 100]);
        println!(
            "{:>7}  {:>6}   {load:<10} {median:>10.1} {:>7.1} {p99:>7.1}  {allocating} of {}",
            self.running,
            self.groups,
            times[0],
            steps.len()
        );
        (median, allocating)
    }
}
