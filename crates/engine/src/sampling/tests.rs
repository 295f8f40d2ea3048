use super::*;

fn sample(logits: &[f32], sampling: Sampling) -> TokenId {
    Sampler::new(sampling, 7, &[], &[]).sample(&mut logits.to_vec(), &mut Vec::new())
}

/// Draws with many seeds and counts the tokens.
fn histogram(logits: &[f32], sampling: &Sampling, draws: u64) -> Vec<u64> {
    let mut counts = vec![0; logits.len()];
    for seed in 0..draws {
        let sampling = Sampling { seed: Some(seed), ..sampling.clone() };
        counts[sample(logits, sampling) as usize] += 1;
    }
    counts
}

#[test]
fn greedy_takes_the_first_of_the_largest() {
    let greedy = Sampling { temperature: 0.0, ..Sampling::default() };
    assert_eq!(sample(&[0.0, 3.0, f32::NAN, 3.0], greedy.clone()), 1);
    assert_eq!(sample(&[f32::NAN; 4], greedy), 0);
}

#[test]
fn draws_follow_the_softmax() {
    let logits = [1.0f32, 0.0, -1.0, 0.5];
    let total: f32 = logits.iter().map(|l| l.exp()).sum();
    let counts = histogram(&logits, &Sampling::default(), 20_000);
    for (logit, count) in logits.iter().zip(counts) {
        let expected = f64::from(logit.exp() / total) * 20_000.0;
        // Five standard deviations of a binomial.
        assert!((count as f64 - expected).abs() < 5.0 * expected.sqrt(), "{count} for {expected}");
    }
}

#[test]
fn top_k_top_p_and_min_p_keep_the_likeliest() {
    let logits = [0.0f32, 4.0, 1.0, 3.0, 2.0];
    let kept = |sampling: Sampling| -> Vec<usize> {
        let counts = histogram(&logits, &Sampling { temperature: 5.0, ..sampling }, 2_000);
        (0..5).filter(|i| counts[*i] > 0).collect()
    };
    assert_eq!(kept(Sampling { top_k: 2, ..Sampling::default() }), [1, 3]);
    // At temperature 5 the shares are about .29 .24 .19 .16 .13.
    assert_eq!(kept(Sampling { top_p: 0.5, ..Sampling::default() }), [1, 3]);
    assert_eq!(kept(Sampling { top_p: 0.6, ..Sampling::default() }), [1, 3, 4]);
    assert_eq!(kept(Sampling { min_p: 0.6, ..Sampling::default() }), [1, 3, 4]);
    assert_eq!(kept(Sampling { top_p: 1e-9, ..Sampling::default() }), [1]);
}

#[test]
fn top_p_keeps_as_many_as_a_full_sort() {
    let logits: Vec<f32> = (0..5_000).map(|i| uniform(3, i) as f32).collect();
    let sampling = Sampling { top_p: 0.7, ..Sampling::default() };
    let kept = sorted_and_cut(&logits, &sampling);
    let floor = logits[kept[kept.len() - 1].0 as usize];
    let drawn: Vec<f32> = (0..4_000)
        .map(|seed| {
            logits[sample(&logits, Sampling { seed: Some(seed), ..sampling.clone() }) as usize]
        })
        .collect();
    let least = drawn.iter().copied().fold(f32::INFINITY, f32::min);
    // About one draw in a thousand falls between the two bounds.
    assert!((floor - 1e-6..floor + 1e-3).contains(&least), "{least}, {floor}");
}

#[test]
fn of_equal_logits_top_p_keeps_the_first() {
    let logits = [1.5f32; 1_000];
    for (top_p, kept) in [(0.5, 500), (0.0335, 34), (0.9e-3, 1), (1e-30, 1)] {
        let sampling = Sampling { top_p, ..Sampling::default() };
        let counts = histogram(&logits, &sampling, 4_000);
        assert_eq!(counts[kept..].iter().sum::<u64>(), 0, "{top_p}");
        for half in counts[..kept].chunks(kept.div_ceil(2)) {
            let expected = 4_000.0 * half.len() as f64 / kept as f64;
            let found = half.iter().sum::<u64>() as f64;
            assert!((found - expected).abs() <= 5.0 * expected.sqrt(), "{top_p}: {found}");
        }
    }
}

#[test]
fn logits_that_are_no_numbers_are_not_drawn() {
    let mut logits = vec![f32::NAN; 100];
    (logits[3], logits[70], logits[99]) = (f32::NEG_INFINITY, 1.0, 1.0);
    for top_p in [1.0, 0.9] {
        let counts = histogram(&logits, &Sampling { top_p, ..Sampling::default() }, 400);
        assert!(counts[70] > 100 && counts[99] > 100, "{counts:?}");
    }
}

/// What a full sort keeps and draws: tokens with their weights, the likeliest first.
fn sorted_and_cut(logits: &[f32], sampling: &Sampling) -> Vec<(TokenId, f64)> {
    let best = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weight = |logit: f32| (f64::from(logit - best) / f64::from(sampling.temperature)).exp();
    let mut all: Vec<(TokenId, f64)> =
        (0..).zip(logits.iter().map(|logit| weight(*logit))).collect();
    all.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    all.retain(|(_, weight)| *weight >= f64::from(sampling.min_p));
    if sampling.top_k > 0 {
        all.truncate(sampling.top_k as usize);
    }
    let mass = f64::from(sampling.top_p) * all.iter().map(|(_, weight)| weight).sum::<f64>();
    let mut sum = 0.0;
    let enough = all.iter().position(|(_, weight)| {
        sum += weight;
        sum >= mass
    });
    all.truncate(enough.map_or(all.len(), |last| last + 1));
    all
}

#[test]
fn draws_are_those_of_a_full_sort() {
    // Steep, flat, and with many that are equal; lengths beside those of the loops.
    for (len, scale, step) in [(1_000, 12.0, 0.0), (4_099, 2.0, 0.0), (777, 6.0, 0.5)] {
        let round = |x: f32| if step > 0.0 { (x / step).round() * step } else { x };
        let logits: Vec<f32> = (0..len).map(|i| round(uniform(len, i) as f32 * scale)).collect();
        for (top_k, top_p, min_p) in [
            (0, 1.0, 0.0),
            (0, 0.9, 0.0),
            (0, 0.999_999, 0.0),
            (1, 1.0, 0.0),
            (40, 1.0, 0.0),
            (40, 0.8, 0.0),
            (700, 0.95, 0.0),
            (0, 1.0, 0.05),
            (30, 0.9, 0.05),
        ] {
            let sampling =
                Sampling { temperature: 0.8, top_k, top_p, min_p, ..Sampling::default() };
            let kept = sorted_and_cut(&logits, &sampling);
            let (tokens, weights): (Vec<_>, Vec<_>) = kept.into_iter().unzip();
            let total: f64 = weights.iter().sum();
            let draws = 1_000;
            let counts = histogram(&logits, &sampling, draws);
            let drawn = counts.iter().enumerate().filter(|(_, count)| **count > 0);
            for (token, _) in drawn {
                assert!(tokens.contains(&(token as u32)), "{token} of {sampling:?}");
            }
            for (token, weight) in tokens.iter().zip(&weights).take(3) {
                let expected = weight / total * draws as f64;
                let count = counts[*token as usize] as f64;
                // Five standard deviations, and a little for the rare ones.
                let bound = 5.0 * expected.sqrt() + 5.0;
                assert!((count - expected).abs() < bound, "{count} for {expected}: {sampling:?}");
            }
        }
    }
}

#[test]
fn the_smallest_temperature_takes_the_likeliest() {
    let tiny = Sampling { temperature: f32::from_bits(1), ..Sampling::default() };
    for sampling in
        [tiny.clone(), Sampling { top_p: 0.5, ..tiny.clone() }, Sampling { top_k: 2, ..tiny }]
    {
        assert_eq!(sample(&[1.0, 3.0, 2.0], sampling), 1);
    }
}

#[test]
fn penalties_are_those_of_their_definitions() {
    let sampling = Sampling {
        repetition_penalty: 2.0,
        frequency_penalty: 0.25,
        presence_penalty: 0.5,
        ..Sampling::default()
    };
    let mut counts = TokenCounts::new(&[0, 1]);
    counts.accept(2);
    counts.accept(2);
    let mut logits = [4.0, -4.0, 4.0, 4.0];
    counts.apply(&sampling, &mut logits);
    assert_eq!(logits, [2.0, -8.0, 2.0 - 0.5 - 0.5, 4.0]);
}

#[test]
fn end_tokens_wait_for_min_tokens() {
    let sampling = Sampling {
        temperature: 0.0,
        min_tokens: 1,
        stop_token_ids: vec![2],
        logit_bias: vec![(3, -100.0), (9, 1.0)],
        ..Sampling::default()
    };
    let mut sampler = Sampler::new(sampling, 0, &[1], &[]);
    let logits = [0.0, 9.0, 8.0, 7.0];
    assert_eq!(sampler.sample(&mut logits.clone(), &mut Vec::new()), 0);
    sampler.accept(0);
    assert_eq!(sampler.sample(&mut logits.clone(), &mut Vec::new()), 1);
}

#[test]
fn the_same_seed_and_position_give_the_same_number() {
    assert_eq!(uniform(1, 2), uniform(1, 2));
    assert_ne!(uniform(1, 2), uniform(1, 3));
    assert_ne!(uniform(1, 2), uniform(2, 2));
    let mean: f64 = (0..10_000).map(|i| uniform(9, i)).sum::<f64>() / 10_000.0;
    assert!((mean - 0.5).abs() < 0.02, "{mean}");
}

#[test]
fn logprobs_sum_to_one_and_name_the_likeliest() {
    let logits = [0.0f32, 2.0, 2.0, f32::NEG_INFINITY];
    let found = token_logprobs(&logits, 0, 3, &mut Vec::new());
    assert_eq!(found.rank, 3);
    assert_eq!(found.top.iter().map(|t| t.0).collect::<Vec<_>>(), [1, 2, 0]);
    let sum: f32 = found.top.iter().map(|t| t.1.exp()).sum();
    assert!((sum - 1.0).abs() < 1e-6);
    assert_eq!(token_logprobs(&logits, 3, 0, &mut Vec::new()).logprob, -9999.0);
}
