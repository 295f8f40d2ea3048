//! Experts against the dense products that define them, and routing against plain arithmetic.

use std::sync::Arc;

use pomona_device::{DType, HostDevice, Pool, View};

use crate::linear::tests::{Dice, random_weights};
use crate::parcels::Parcels;
use crate::{
    Activation, CpuOps, Expert, Experts, Format, Isa, LinearPart, Matrix, Ops, Pairs, Placement,
    RouteWeights, Routes, StoredRows, WeightSource, Write,
};

const HIDDEN: usize = 256;
const FFN: usize = 512;
const EXPERTS: usize = 5;
const K: usize = 2;

fn floats(ops: &CpuOps, shape: &[usize], values: &[f32]) -> View {
    let view = ops.device().alloc_view(DType::F32, shape).unwrap();
    let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_ne_bytes()).collect();
    ops.device().upload(&bytes, &view).unwrap();
    view
}

fn integers(ops: &CpuOps, shape: &[usize], values: &[u32]) -> View {
    let view = ops.device().alloc_view(DType::U32, shape).unwrap();
    let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_ne_bytes()).collect();
    ops.device().upload(&bytes, &view).unwrap();
    view
}

fn words(ops: &CpuOps, view: &View) -> Vec<[u8; 4]> {
    let mut bytes = vec![0; view.bytes()];
    ops.device().download(view, &mut bytes).unwrap();
    bytes.as_chunks::<4>().0.to_vec()
}

fn read_floats(ops: &CpuOps, view: &View) -> Vec<f32> {
    words(ops, view).into_iter().map(f32::from_ne_bytes).collect()
}

fn read_integers(ops: &CpuOps, view: &View) -> Vec<u32> {
    words(ops, view).into_iter().map(u32::from_ne_bytes).collect()
}

fn random(count: usize, dice: &mut Dice) -> Vec<f32> {
    (0..count).map(|_| dice.real()).collect()
}

fn matrix(ops: &CpuOps, format: Format, rows: usize, cols: usize, dice: &mut Dice) -> Matrix {
    let bytes = Arc::new(random_weights(format, rows, cols, dice));
    let row_bytes = format.row_bytes(cols).unwrap();
    let content = Arc::new(StoredRows { bytes, offset: 0, row_bytes });
    ops.matrix(&WeightSource { name: String::new(), format, rows, cols, content }).unwrap()
}

/// A layer's experts, some tokens, and who chose whom.
struct Scene {
    ops: CpuOps,
    experts: Vec<Expert>,
    x: Vec<f32>,
    ids: Vec<u32>,
}

impl Scene {
    /// The last expert gets no token.
    fn new(isa: Isa, threads: usize, format: Format, tokens: usize) -> Scene {
        let ops = CpuOps::new(Arc::new(HostDevice::new()), Pool::new(threads), isa);
        let mut dice = Dice(7);
        let experts = (0..EXPERTS).map(|_| Expert {
            gate: matrix(&ops, format, FFN, HIDDEN, &mut dice),
            up: matrix(&ops, format, FFN, HIDDEN, &mut dice),
            down: matrix(&ops, format, HIDDEN, FFN, &mut dice),
        });
        let experts = experts.collect();
        let x = random(tokens * HIDDEN, &mut dice);
        let first = (0..tokens).map(|_| dice.next() as u32 % (EXPERTS as u32 - 1));
        let ids = first.flat_map(|id| [id, (id + 1) % (EXPERTS as u32 - 1)]).collect();
        Scene { ops, experts, x, ids }
    }

    fn tokens(&self) -> usize {
        self.x.len() / HIDDEN
    }

    /// What experts `first..` of these make of all pairs; rows of others hold `before`.
    fn run(&self, first: usize, here: &[Expert], before: f32) -> Vec<f32> {
        let (ops, tokens) = (&self.ops, self.tokens());
        let x = floats(ops, &[tokens, HIDDEN], &self.x);
        let own: Vec<u32> = self.ids.iter().map(|id| id.wrapping_sub(first as u32)).collect();
        let ids = integers(ops, &[tokens, K], &own);
        let out = floats(ops, &[tokens, K, HIDDEN], &vec![before; tokens * K * HIDDEN]);
        let memory = || ops.device().alloc_view(DType::F32, &[tokens * K, FFN]).unwrap();
        let (gate, up) = (memory(), memory());
        let activation = Activation::Silu;
        let experts = Experts { here, activation, between: [&gate, &up] };
        ops.experts(&x, &ids, &experts, &out).unwrap();
        read_floats(ops, &out)
    }

    /// The same pair by pair, with the operations of a dense layer.
    fn define(&self) -> Vec<f32> {
        let ops = &self.ops;
        let product = |x: &View, weight: &Matrix| {
            let out = ops.device().alloc_view(DType::F32, &[1, weight.rows]).unwrap();
            ops.linear(x, &[LinearPart { weight, bias: None, out: &out }], Write::Set).unwrap();
            out
        };
        let pair = |(pair, id): (usize, &u32)| {
            let expert = &self.experts[*id as usize];
            let x = floats(ops, &[1, HIDDEN], &self.x[pair / K * HIDDEN..][..HIDDEN]);
            let (gate, up) = (product(&x, &expert.gate), product(&x, &expert.up));
            ops.glu(&gate, &up, Activation::Silu, &gate).unwrap();
            read_floats(ops, &product(&gate, &expert.down))
        };
        self.ids.iter().enumerate().flat_map(pair).collect()
    }
}

#[test]
fn experts_give_the_bits_of_dense_products_whatever_the_batch() {
    for format in [Format::F32, Format::BF16, Format::Q4_K, Format::Q6_K, Format::Int8G64] {
        for isa in Isa::available() {
            for (tokens, threads) in [(1, 1), (3, 2), (40, 3)] {
                let scene = Scene::new(isa, threads, format, tokens);
                let found = scene.run(0, &scene.experts, f32::NAN);
                assert!(found == scene.define(), "{format:?} {isa:?} {tokens} tokens");
            }
        }
    }
}

#[test]
fn a_part_of_the_experts_leaves_the_pairs_of_others() {
    let scene = Scene::new(Isa::detect(), 2, Format::Q8_0, 9);
    let whole = scene.run(0, &scene.experts, 0.0);
    for cut in 0..=EXPERTS {
        let (low, high) = scene.experts.split_at(cut);
        let parts = [scene.run(0, low, 7.0), scene.run(cut, high, 7.0)];
        for (pair, id) in scene.ids.iter().enumerate() {
            let row = pair * HIDDEN..(pair + 1) * HIDDEN;
            let (own, other) = if (*id as usize) < cut { (0, 1) } else { (1, 0) };
            assert_eq!(parts[own][row.clone()], whole[row.clone()], "pair {pair}, cut at {cut}");
            assert!(parts[other][row].iter().all(|v| *v == 7.0), "pair {pair}, cut at {cut}");
        }
    }
}

#[test]
fn experts_that_no_token_chose_are_not_read() {
    let mut scene = Scene::new(Isa::detect(), 2, Format::F32, 4);
    let whole = scene.run(0, &scene.experts, 0.0);
    // What is no matrix of this backend is refused when it is touched.
    let foreign = Arc::new(());
    scene.experts[EXPERTS - 1].down.storage = foreign.clone();
    assert_eq!(scene.run(0, &scene.experts, 0.0), whole);
    scene.ids[3] = EXPERTS as u32 - 1;
    let (x, ids) =
        (floats(&scene.ops, &[4, HIDDEN], &scene.x), integers(&scene.ops, &[4, K], &scene.ids));
    let memory = |width| scene.ops.device().alloc_view(DType::F32, &[4 * K, width]).unwrap();
    let (gate, up, out) = (memory(FFN), memory(FFN), memory(HIDDEN));
    let experts =
        Experts { here: &scene.experts, activation: Activation::Silu, between: [&gate, &up] };
    assert!(scene.ops.experts(&x, &ids, &experts, &out).is_err());
}

/// Experts and weights of each token, and loads.
fn route(isa: Isa, logits: &[f32], k: usize, of: RouteWeights) -> (Vec<u32>, Vec<f32>, Vec<u32>) {
    let ops = CpuOps::new(Arc::new(HostDevice::new()), Pool::new(1), isa);
    let tokens = logits.len() / EXPERTS;
    let logits = floats(&ops, &[tokens, EXPERTS], logits);
    let (ids, weights) = (
        integers(&ops, &[tokens, k], &vec![0; tokens * k]),
        floats(&ops, &[tokens, k], &vec![0.0; tokens * k]),
    );
    let loads = integers(&ops, &[EXPERTS], &[u32::MAX, 0, 1, 2, 3]);
    let routes = Routes { ids: &ids, weights: &weights, loads: &loads };
    ops.route(&logits, of, &routes).unwrap();
    (read_integers(&ops, &ids), read_floats(&ops, &weights), read_integers(&ops, &loads))
}

#[test]
fn routes_are_those_of_a_softmax() {
    let mut dice = Dice(3);
    let logits: Vec<f32> = random(33 * EXPERTS, &mut dice).iter().map(|v| v * 6.0).collect();
    for k in 1..=EXPERTS {
        for of in [RouteWeights::All, RouteWeights::Chosen] {
            let found = route(Isa::Reference, &logits, k, of);
            for isa in Isa::available() {
                assert_eq!(route(isa, &logits, k, of), found, "{isa:?}");
            }
            let (ids, weights, loads) = found;
            for (token, logits) in logits.chunks_exact(EXPERTS).enumerate() {
                let mut order: Vec<usize> = (0..EXPERTS).collect();
                order.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]));
                let exponential = |i: &usize| f64::from(logits[*i]).exp();
                let among = if of == RouteWeights::All { EXPERTS } else { k };
                let total: f64 = order[..among].iter().map(exponential).sum();
                for (place, expert) in order[..k].iter().enumerate() {
                    assert_eq!(ids[token * k + place] as usize, *expert);
                    let weight = exponential(expert) / total;
                    let found = f64::from(weights[token * k + place]);
                    assert!((found - weight).abs() < 1e-6 * weight, "{found} for {weight}");
                }
            }
            for (expert, load) in loads.into_iter().enumerate() {
                let chosen = ids.iter().filter(|id| **id as usize == expert).count() as u32;
                assert_eq!(load, chosen.wrapping_add(expert as u32).wrapping_sub(1));
            }
        }
    }
}

#[test]
fn equal_logits_go_to_the_lower_index_and_strange_ones_are_not_hidden() {
    for isa in Isa::available() {
        let chosen = |logits: [f32; EXPERTS], k| route(isa, &logits, k, RouteWeights::Chosen);
        assert_eq!(chosen([1.0, 3.0, 3.0, 1.0, 3.0], 4).0, [1, 2, 4, 0]);
        assert_eq!(chosen([0.0, -0.0, 0.0, 0.0, 0.0], 3).0, [0, 1, 2]);
        assert_eq!(
            chosen([f32::NEG_INFINITY, 0.0, f32::NEG_INFINITY, 0.0, 0.0], 4).0,
            [1, 3, 4, 0]
        );
        for strange in [f32::NAN, f32::INFINITY] {
            for all in [[0.0, 1.0, strange, 2.0, 0.5], [strange; EXPERTS]] {
                let (ids, weights, _) = chosen(all, 3);
                assert!(ids.iter().all(|id| (*id as usize) < EXPERTS), "{ids:?}");
                assert!(weights.iter().any(|weight| weight.is_nan()), "{all:?}: {weights:?}");
            }
        }
    }
}

#[test]
fn weighted_rows_are_added_up_in_order() {
    let mut dice = Dice(5);
    for (tokens, k, width) in [(1, 1, 7), (3, 2, 33), (70, 8, 600)] {
        let (x, weights) = (random(tokens * k * width, &mut dice), random(tokens * k, &mut dice));
        let before = random(tokens * width, &mut dice);
        let expected: Vec<f32> = (0..tokens * width)
            .map(|at| {
                let (token, column) = (at / width, at % width);
                let term = |sum: f32, i: usize| {
                    let pair = token * k + i;
                    weights[pair].mul_add(x[pair * width + column], sum)
                };
                (0..k).fold(0.0, term)
            })
            .collect();
        for (isa, threads) in Isa::available().into_iter().zip([1, 2, 3, 1]) {
            let ops = CpuOps::new(Arc::new(HostDevice::new()), Pool::new(threads), isa);
            let x = floats(&ops, &[tokens, k, width], &x);
            let weights = floats(&ops, &[tokens, k], &weights);
            let out = floats(&ops, &[tokens, width], &before);
            ops.combine(&x, &weights, Write::Add, &out).unwrap();
            let sums = before.iter().zip(&expected).map(|(before, sum)| before + sum);
            assert!(read_floats(&ops, &out).into_iter().eq(sums), "{isa:?}");
            ops.combine(&x, &weights, Write::Set, &out).unwrap();
            assert_eq!(read_floats(&ops, &out), expected, "{isa:?}");
        }
    }
}

#[test]
fn ranks_with_parts_of_the_pairs_add_up_what_one_with_all_would() {
    let mut dice = Dice(9);
    let all: Vec<u32> = (0..37 * K).map(|_| dice.next() as u32 % EXPERTS as u32).collect();
    divide_pairs(&all);
    // One token, with both of its experts on one rank, and on two.
    divide_pairs(&[0, 4]);
    divide_pairs(&[1, 0]);
}

/// Lets ranks add up pairs with these experts, and compares.
fn divide_pairs(ids: &[u32]) {
    let (tokens, width, columns) = (ids.len() / K, 48, [0..11, 11..12, 12..48]);
    let mut dice = Dice(10);
    let x = random(tokens * K * width, &mut dice);
    let weights = random(tokens * K, &mut dice);
    let before = random(tokens * width, &mut dice);
    // The last rank has no expert.
    let holders = [vec![0], vec![1], vec![0, 1], vec![0, 1], vec![0]];
    let placement = Placement::new(holders.to_vec()).unwrap();
    let (of, _) = placement.assign(ids);
    let ops = |threads| CpuOps::new(Arc::new(HostDevice::new()), Pool::new(threads), Isa::detect());
    let alone = {
        let ops = ops(1);
        let out = floats(&ops, &[tokens, width], &before);
        let (x, weights) =
            (floats(&ops, &[tokens, K, width], &x), floats(&ops, &[tokens, K], &weights));
        ops.combine(&x, &weights, Write::Add, &out).unwrap();
        read_floats(&ops, &out)
    };
    let run = |group: Parcels| {
        let (ops, rank) = (ops(group.rank + 1), group.rank);
        let own = |values: &[f32]| -> Vec<f32> {
            values.chunks(width).flat_map(|row| row[columns[rank].clone()].to_vec()).collect()
        };
        let here = |(pair, row): (usize, &[f32])| match of[pair] == rank {
            true => row.to_vec(),
            false => vec![f32::NAN; width],
        };
        let results: Vec<f32> = x.chunks(width).enumerate().flat_map(here).collect();
        let results = floats(&ops, &[tokens, K, width], &results);
        let (ids, weights) =
            (integers(&ops, &[tokens, K], ids), floats(&ops, &[tokens, K], &weights));
        let (placement, columns) = (&placement, &columns);
        let pairs = Pairs { ids: &ids, weights: &weights, placement, columns };
        let out = floats(&ops, &[tokens, columns[rank].len()], &own(&before));
        ops.combine_divided(&group, &pairs, &results, Write::Add, &out).unwrap();
        assert_eq!(read_floats(&ops, &out), own(&alone), "rank {rank}");
        let short = out.rows(0, tokens - 1);
        let refused = ops.combine_divided(&group, &pairs, &results, Write::Set, &short);
        assert!(refused.is_err());
    };
    std::thread::scope(|scope| {
        for group in Parcels::group(columns.len()) {
            scope.spawn(|| run(group));
        }
    });
}

#[test]
fn shapes_that_do_not_fit_are_refused() {
    let scene = Scene::new(Isa::detect(), 1, Format::F32, 2);
    let ops = &scene.ops;
    let x = floats(ops, &[2, HIDDEN], &scene.x);
    let ids = integers(ops, &[2, K], &scene.ids);
    let memory = |rows, width| ops.device().alloc_view(DType::F32, &[rows, width]).unwrap();
    let (gate, up, short) = (memory(2 * K, FFN), memory(2 * K, FFN), memory(K, FFN));
    let out = memory(2 * K, HIDDEN);
    let run = |between: [&View; 2], out: &View| {
        let activation = Activation::Silu;
        let experts = Experts { here: &scene.experts, activation, between };
        ops.experts(&x, &ids, &experts, out)
    };
    assert!(run([&gate, &up], &out).is_ok());
    assert!(run([&gate, &short], &out).is_err());
    assert!(run([&gate, &gate], &out).is_err());
    assert!(run([&gate, &up], &x).is_err());
    let (logits, weights) = (memory(2, EXPERTS), memory(2, K));
    let loads = integers(ops, &[EXPERTS], &[0; EXPERTS]);
    let routes = Routes { ids: &ids, weights: &weights, loads: &loads };
    assert!(ops.route(&logits, RouteWeights::All, &routes).is_ok());
    assert!(ops.route(&memory(2, K - 1), RouteWeights::All, &routes).is_err());
    assert!(ops.combine(&out, &weights, Write::Set, &short).is_err());
}
