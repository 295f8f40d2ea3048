//! A tour of the crate: submit, plan, commit, until a request ends.
#![allow(clippy::unwrap_used)]

use pomona_scheduler::batch::{
    Config, Effect, Effects, Ordering, Sampled, State, StepPlan, StepResult,
};
use pomona_types::{FinishReason, LayerKind, Micros, Request, RequestId, Sampling, TenantId};

#[test]
fn a_request_from_submission_to_its_end() {
    let mut state = State::new(Config {
        max_num_seqs: 4,
        max_num_batched_tokens: 32,
        steps_in_flight: 1,
        context: 1,
        max_model_len: 128,
        blocks: 16,
        groups: vec![LayerKind::Full],
        prefix_caching: true,
        ordering: Ordering::Fcfs,
        step_target: None,
        max_waiting: 16,
        eos_token_ids: vec![0],
        speculation: None,
    })
    .unwrap();
    let request = Request {
        id: RequestId(1),
        tenant: TenantId(0),
        class: Default::default(),
        priority: 0,
        prompt: (1..=40).collect(),
        sampling: Sampling { max_tokens: 10, ..Sampling::default() },
    };
    state.submit(Micros(0), request).unwrap();

    // Buffers are the caller's and are reused from step to step.
    let (mut plan, mut effects) = (StepPlan::default(), Effects::default());

    // 40 prompt tokens do not fit into a step of 32: the first step has nothing to sample.
    assert!(state.plan(Micros(1), &mut plan));
    assert_eq!((plan.rows[0].count, plan.rows[0].sample), (32, false));
    state.commit(Micros(2), &plan, &StepResult::default(), &mut effects);

    // The second computes the rest and samples; here the model ends at once.
    assert!(state.plan(Micros(3), &mut plan));
    assert_eq!((plan.rows[0].computed, plan.rows[0].count), (32, 8));
    let result = StepResult { sampled: vec![Sampled { row: 0, token: 0 }] };
    state.commit(Micros(4), &plan, &result, &mut effects);
    assert!(matches!(
        effects.list[..],
        [Effect::Token { token: 0, .. }, Effect::Finished { reason: FinishReason::Stop(0), .. }]
    ));

    // Nothing is held any more, and there is nothing to do.
    assert_eq!(state.stats().blocks_used, 0);
    assert!(!state.plan(Micros(5), &mut plan));
}
