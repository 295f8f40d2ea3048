//! What a draw costs one thread, by how it is restricted, over 49,152 logits: a steep row, as after
//! most tokens, and a flat one.
//!
//!     cargo bench -p pomona-engine
//!
//! Medians of many draws, each from logits that were copied anew, as those of a step are.

use std::hint::black_box;
use std::time::Instant;

use pomona_engine::sampling::{Sampler, uniform};
use pomona_types::Sampling;

const VOCABULARY: u64 = 49_152;
const DRAWS: u64 = 401;

fn main() {
    // The sum of uniform numbers is about normal. Bits of entropy: about 9 and 15.
    let row = |scale: f32| -> Vec<f32> {
        let normal = |i: u64| (0..12).map(|j| uniform(i, j) as f32).sum::<f32>() - 6.0;
        (0..VOCABULARY).map(|i| normal(i) * scale).collect()
    };
    let default = Sampling::default;
    let ways = [
        ("greedy", Sampling { temperature: 0.0, ..default() }),
        ("temperature 1", default()),
        ("top-p 0.95", Sampling { top_p: 0.95, ..default() }),
        ("top-p 0.5", Sampling { top_p: 0.5, ..default() }),
        ("top-k 40", Sampling { top_k: 40, ..default() }),
        ("top-k 40, top-p 0.95", Sampling { top_k: 40, top_p: 0.95, ..default() }),
        ("min-p 0.05", Sampling { min_p: 0.05, ..default() }),
    ];
    println!("us a draw              steep    flat");
    let rows = [row(3.0), row(1.0)];
    for (name, sampling) in ways {
        let [steep, flat] = rows.each_ref().map(|logits| median_us(logits, &sampling));
        println!("{name:<20} {steep:>7.1} {flat:>7.1}");
    }
}

fn median_us(logits: &[f32], sampling: &Sampling) -> f64 {
    let mut candidates = Vec::new();
    let mut copy = logits.to_vec();
    let mut times: Vec<f64> = (0..DRAWS)
        .map(|seed| {
            copy.copy_from_slice(logits);
            let sampler = Sampler::new(sampling.clone(), seed, &[], &[]);
            let begun = Instant::now();
            black_box(sampler.sample(black_box(&mut copy), &mut candidates));
            begun.elapsed().as_secs_f64() * 1e6
        })
        .collect();
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}
