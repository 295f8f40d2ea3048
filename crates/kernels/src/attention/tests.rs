//! Attention against its definition in f64, and against itself under other cuts.

use half::f16;
use pomona_device::Pool;
use pomona_types::Collective;

use super::integers::quantised_bytes;
use super::write::BlockMut;
use super::*;
use crate::Span;
use crate::isa::{Kernel, Tier};
use crate::linear::ActivationBits;
use crate::linear::tests::{Dice, tiers};
use crate::parcels::Parcels;

/// A sequence of `len` positions in shuffled blocks, all keys and values random.
struct Scene {
    heads: usize,
    kv_heads: usize,
    groups: HeadGroups,
    head_dim: usize,
    window: Option<u32>,
    table: Vec<u32>,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
}

impl Scene {
    fn new(len: usize, (heads, kv_heads, head_dim): (usize, usize, usize)) -> Scene {
        let mut dice = Dice(len as u64);
        let blocks = len.div_ceil(BLOCK);
        let mut random = |n: usize| -> Vec<f32> { (0..n).map(|_| dice.real() * 2.0).collect() };
        let size = (blocks + 3) * kv_heads * BLOCK * head_dim;
        let table = (0..blocks as u32).map(|b| (b * 7 + 3) % (blocks as u32 + 3)).collect();
        let (q, k, v) = (random(len * heads * head_dim), random(size), random(size));
        let groups = HeadGroups { size: heads / kv_heads, skipped: 0 };
        Scene { heads, kv_heads, groups, head_dim, window: None, table, q, k, v }
    }

    fn problem<'a>(&'a self, q: &'a [f32], spans: &'a [Span]) -> Problem<'a> {
        Problem {
            q,
            layer: Layer::Numbers([Cache::F32(&self.k), Cache::F32(&self.v)]),
            heads: self.heads,
            kv_heads: self.kv_heads,
            groups: self.groups,
            head_dim: self.head_dim,
            scale: 0.3,
            window: self.window,
            tables: &self.table,
            spans,
        }
    }

    /// Rows `start..start + rows` of the sequence as one span.
    fn run(&self, isa: Isa, threads: usize, start: usize, rows: usize) -> Vec<f32> {
        self.run_in(&mut Workspace::default(), isa, threads, start..start + rows)
    }

    /// The same in memory that was used before.
    fn run_in(
        &self,
        work: &mut Workspace,
        isa: Isa,
        threads: usize,
        rows: Range<usize>,
    ) -> Vec<f32> {
        let (start, rows) = (rows.start, rows.len());
        let width = self.heads * self.head_dim;
        let span = Span {
            first_row: 0,
            rows: rows as u32,
            start: start as u32,
            table: 0,
            table_len: self.table.len() as u32,
        };
        let q = &self.q[start * width..][..rows * width];
        let mut out = vec![0.0; q.len()];
        let spans = [span];
        let problem = self.problem(q, &spans);
        attention(&Pool::new(threads), isa, &problem, work, &mut out);
        out
    }

    /// Some of its query heads, with the KV heads that they read.
    fn of_heads(&self, heads: Range<usize>) -> Scene {
        let size = self.groups.size;
        let kv = heads.start / size..heads.end.div_ceil(size);
        let part = |x: &[f32], all: usize, some: &Range<usize>, width: usize| -> Vec<f32> {
            let rows = x.chunks_exact(all * width);
            rows.flat_map(|row| &row[some.start * width..some.end * width]).copied().collect()
        };
        let block = BLOCK * self.head_dim;
        Scene {
            heads: heads.len(),
            kv_heads: kv.len(),
            groups: HeadGroups { size, skipped: heads.start % size },
            head_dim: self.head_dim,
            window: self.window,
            table: self.table.clone(),
            q: part(&self.q, self.heads, &heads, self.head_dim),
            k: part(&self.k, self.kv_heads, &kv, block),
            v: part(&self.v, self.kv_heads, &kv, block),
        }
    }

    fn key(&self, position: usize, head: usize, i: usize) -> f64 {
        let block = self.table[position / BLOCK] as usize * self.kv_heads + head;
        self.k[(block * self.head_dim + i) * BLOCK + position % BLOCK].into()
    }

    fn value(&self, position: usize, head: usize, i: usize) -> f64 {
        let block = self.table[position / BLOCK] as usize * self.kv_heads + head;
        self.v[(block * BLOCK + position % BLOCK) * self.head_dim + i].into()
    }

    /// The definition, for one row and head.
    fn defined(&self, position: usize, head: usize) -> Vec<f64> {
        let kv = head / (self.heads / self.kv_heads);
        let q = &self.q[(position * self.heads + head) * self.head_dim..][..self.head_dim];
        let first = self.window.map_or(0, |w| (position + 1).saturating_sub(w as usize));
        let score = |p: usize| -> f64 {
            let dot: f64 = (0..self.head_dim).map(|i| f64::from(q[i]) * self.key(p, kv, i)).sum();
            dot * 0.3
        };
        let scores: Vec<f64> = (first..=position).map(score).collect();
        let max = scores.iter().copied().fold(f64::MIN, f64::max);
        let weights: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
        let sum: f64 = weights.iter().sum();
        let value = |i: usize| {
            let terms = weights.iter().enumerate().map(|(n, w)| w * self.value(first + n, kv, i));
            terms.sum::<f64>() / sum
        };
        (0..self.head_dim).map(value).collect()
    }
}

#[test]
fn every_tier_agrees_with_the_definition() {
    for shape in [(4, 2, 16), (3, 1, 20), (2, 2, 64), (9, 3, 8), (5, 1, 48), (8, 1, 80)] {
        for window in [None, Some(1), Some(17), Some(300)] {
            let scene = Scene { window, ..Scene::new(530, shape) };
            for isa in Isa::available() {
                for (start, rows) in [(0, 1), (0, 40), (15, 2), (250, 30), (529, 1)] {
                    let found = scene.run(isa, 2, start, rows);
                    let heads = found.chunks_exact(shape.2).enumerate();
                    for (i, head) in heads.step_by(7) {
                        let expected = scene.defined(start + i / shape.0, i % shape.0);
                        for (f, e) in head.iter().zip(expected) {
                            assert!(
                                (f64::from(*f) - e).abs() < 1e-5,
                                "{shape:?} {window:?} {isa:?}"
                            );
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn what_came_before_scores_far_above_it_keeps_its_weight() {
    for head_dim in [64, 24] {
        // A query's first number times a key's. Every other run has one score that is 12 above all
        // of those before, which together weigh 4e-4 of it.
        let mut scene = Scene::new(530, (4, 1, head_dim));
        scene.q.chunks_exact_mut(head_dim).for_each(|q| q.fill(0.0));
        scene.q.iter_mut().step_by(head_dim).for_each(|q| *q = 1.0);
        for (block, place) in scene.table.iter().enumerate() {
            let keys = &mut scene.k[*place as usize * BLOCK * head_dim..][..BLOCK * head_dim];
            for (i, key) in keys[..BLOCK].iter_mut().enumerate() {
                let (run, at) = ((block * BLOCK + i) / POSITIONS, (block * BLOCK + i) % POSITIONS);
                let step = 12.0 * run.div_ceil(2) as f32;
                *key = if run % 2 == 0 || at == 5 { step } else { step - 60.0 } / 0.3;
            }
        }
        let (start, rows, width) = (400, 130, 4 * head_dim);
        let expected = scene.run(Isa::Reference, 1, start, rows);
        for (i, head) in expected.chunks_exact(head_dim).enumerate().step_by(7) {
            for (found, defined) in head.iter().zip(scene.defined(start + i / 4, i % 4)) {
                let error = (f64::from(*found) - defined).abs();
                assert!(error < 2e-5, "{head_dim}, pair {i}: {found}, not {defined}");
            }
        }
        for isa in Isa::available() {
            assert!(scene.run(isa, 2, start, rows) == expected, "{isa:?} {head_dim}");
            let last = scene.run(isa, 2, start + rows - 1, 1);
            assert!(last == expected[(rows - 1) * width..], "{isa:?} {head_dim}: alone");
        }
    }
}

#[test]
fn results_are_the_same_bits_however_the_work_is_cut() {
    let shape = (6, 2, 32);
    let scene = Scene { window: Some(290), ..Scene::new(700, shape) };
    let whole = scene.run(Isa::Reference, 1, 0, 700);
    let width = shape.0 * shape.2;
    for isa in Isa::available() {
        for (threads, chunk) in [(1, 1), (2, 1), (3, 1), (2, 33), (4, 256)] {
            for start in (0..700).step_by(chunk).step_by(if chunk == 1 { 97 } else { 1 }) {
                let rows = chunk.min(700 - start);
                let found = scene.run(isa, threads, start, rows);
                assert_eq!(found, whole[start * width..][..rows * width], "{isa:?} {start}+{rows}");
            }
        }
    }
}

#[test]
fn what_another_sequence_left_in_memory_cannot_reach_a_row() {
    for shape in [(4, 2, 64), (3, 1, 24)] {
        let mut other = Scene::new(600, shape);
        other.v.fill(f32::NAN);
        // Rows near a split's end see nothing of the next one, later ones nothing of theirs.
        let scene = Scene { window: Some(40), ..Scene::new(600, shape) };
        for isa in Isa::available() {
            for (threads, rows) in [(1, 200..560), (2, 200..560), (1, 250..270), (1, 511..512)] {
                let mut work = Workspace::default();
                let lost = other.run_in(&mut work, isa, threads, 0..600);
                assert!(lost.iter().all(|x| x.is_nan()));
                let found = scene.run_in(&mut work, isa, threads, rows.clone());
                let fresh = scene.run(isa, threads, rows.start, rows.len());
                assert!(found == fresh, "{shape:?} {isa:?} {threads} {rows:?}");
            }
        }
    }
}

#[test]
fn what_a_row_does_not_see_cannot_reach_it() {
    let (len, poisoned) = (200, 71..200);
    for shape in [(3, 3, 20), (8, 2, 32)] {
        for window in [None, Some(40)] {
            let clean = Scene { window, ..Scene::new(len, shape) };
            let mut scene = Scene { window, ..Scene::new(len, shape) };
            let (kv_heads, d) = (shape.1, shape.2);
            for position in poisoned.clone() {
                let block = scene.table[position / BLOCK] as usize * kv_heads;
                for head in block..block + kv_heads {
                    for i in 0..d {
                        scene.k[(head * d + i) * BLOCK + position % BLOCK] = f32::NAN;
                        let value = (head * BLOCK + position % BLOCK) * d + i;
                        scene.v[value] = [f32::NAN, f32::INFINITY][i % 2];
                    }
                }
            }
            let before = poisoned.start * shape.0 * d;
            for isa in Isa::available() {
                let found = scene.run(isa, 1, 0, len);
                assert_eq!(found[..before], clean.run(isa, 1, 0, len)[..before], "{isa:?}");
                assert!(found[before..].iter().all(|x| x.is_nan()), "{isa:?}: hidden");
            }
        }
    }
}

#[test]
fn several_sequences_share_a_call() {
    let shape = (4, 2, 16);
    let scene = Scene::new(100, shape);
    let width = 64;
    let alone = [scene.run(Isa::detect(), 1, 40, 3), scene.run(Isa::detect(), 1, 99, 1)];
    let span = |first_row, rows, start| Span { first_row, rows, start, table: 0, table_len: 7 };
    let spans = [span(1, 3, 40), span(4, 1, 99)];
    let mut q = vec![0.0; 6 * width];
    q[width..4 * width].copy_from_slice(&scene.q[40 * width..43 * width]);
    q[4 * width..5 * width].copy_from_slice(&scene.q[99 * width..]);
    let mut out = vec![7.0; 6 * width];
    let problem = scene.problem(&q, &spans);
    attention(&Pool::new(2), Isa::detect(), &problem, &mut Workspace::default(), &mut out);
    assert_eq!(out[width..4 * width], alone[0]);
    assert_eq!(out[4 * width..5 * width], alone[1]);
    assert!(out[..width].iter().chain(&out[5 * width..]).all(|v| *v == 7.0), "rows outside spans");
}

#[test]
fn half_precision_caches_are_the_rounded_numbers() {
    let scene = Scene::new(64, (2, 1, 16));
    let to16 = |x: &[f32]| x.iter().map(|v| f16::from_f32(*v).to_bits()).collect::<Vec<_>>();
    let round = |x: &[f32]| x.iter().map(|v| f16::from_f32(*v).to_f32()).collect::<Vec<_>>();
    let (k16, v16) = (to16(&scene.k), to16(&scene.v));
    let rounded = Scene { k: round(&scene.k), v: round(&scene.v), ..Scene::new(64, (2, 1, 16)) };
    let expected = rounded.run(Isa::detect(), 1, 0, 64);
    let spans = [Span { first_row: 0, rows: 64, start: 0, table: 0, table_len: 4 }];
    let mut problem = scene.problem(&scene.q, &spans);
    problem.layer = Layer::Numbers([Cache::F16(&k16), Cache::F16(&v16)]);
    let mut out = vec![0.0; scene.q.len()];
    attention(&Pool::new(1), Isa::detect(), &problem, &mut Workspace::default(), &mut out);
    assert_eq!(out, expected);
}

/// Stores a row in a block, as a key or as a value.
struct Store<'a>(BlockMut<'a>, &'a [f32], usize, bool);

impl Store<'_> {
    fn store(self) {
        Isa::detect().run(self);
    }
}

impl Kernel for Store<'_> {
    #[inline(always)]
    fn run<T: Tier>(self, t: T) {
        let Store(block, row, position, is_key) = self;
        if is_key { block.key(t, row, position) } else { block.value(t, row, position) }
    }
}

/// A scene's keys and values as integers, and the scene that they stand for.
fn quantised(scene: &Scene) -> ([Vec<u8>; 2], Scene) {
    let d = scene.head_dim;
    let (mut k, mut v) = (scene.k.clone(), scene.v.clone());
    let mut bytes = [0, 1].map(|_| vec![0; scene.k.len() / d * quantised_bytes(d)]);
    // The definition: a scale for each position, integers up to 127.
    let rounded = |row: &[f32]| -> Vec<f32> {
        let largest = row.iter().fold(0.0f32, |most, v| most.max(v.abs()));
        let integer = |v: &f32| (v * (127.0 / largest)).round_ties_even();
        row.iter().map(|v| integer(v) * (largest / 127.0)).collect()
    };
    for row in 0..scene.k.len() / d {
        let (block, offset) = (row / BLOCK, row % BLOCK);
        let place = |i| (block * d + i) * BLOCK + offset;
        let key: Vec<f32> = (0..d).map(|i| scene.k[place(i)]).collect();
        let value = &scene.v[row * d..][..d];
        let size = BLOCK * quantised_bytes(d);
        let [k8, v8] = bytes.each_mut().map(|x| BlockMut::I8(&mut x[block * size..][..size]));
        Store(k8, &key, offset, true).store();
        Store(v8, value, offset, false).store();
        v[row * d..][..d].copy_from_slice(&rounded(value));
        rounded(&key).iter().enumerate().for_each(|(i, key)| k[place(i)] = *key);
    }
    let rounded = Scene { k, v, table: scene.table.clone(), q: scene.q.clone(), ..*scene };
    (bytes, rounded)
}

/// Attention over integers: all rows of a scene at once.
fn in_integers(scene: &Scene, bytes: &[Vec<u8>; 2], isa: Isa, bits: ActivationBits) -> Vec<f32> {
    let rows = scene.q.len() / (scene.heads * scene.head_dim);
    let table_len = scene.table.len() as u32;
    let spans = [Span { first_row: 0, rows: rows as u32, start: 0, table: 0, table_len }];
    let layer = Layer::Integers([&bytes[0], &bytes[1]], bits);
    let problem = Problem { layer, ..scene.problem(&scene.q, &spans) };
    let mut out = vec![0.0; scene.q.len()];
    attention(&Pool::new(2), isa, &problem, &mut Workspace::default(), &mut out);
    out
}

#[test]
fn integers_are_as_exact_as_their_bits_on_every_tier() {
    for shape in [(2, 1, 16), (3, 1, 20), (4, 2, 64), (2, 1, 80), (2, 1, 128), (1, 1, 256)] {
        for window in [None, Some(70)] {
            let scene = Scene { window, ..Scene::new(330, shape) };
            let (bytes, rounded) = quantised(&scene);
            for (bits, most) in [(ActivationBits::Eight, 0.1), (ActivationBits::Sixteen, 3e-4)] {
                let expected = in_integers(&scene, &bytes, Isa::Reference, bits);
                for (i, head) in expected.chunks_exact(shape.2).enumerate().step_by(11) {
                    let defined = rounded.defined(i / shape.0, i % shape.0);
                    for (found, defined) in head.iter().zip(defined) {
                        let error = (f64::from(*found) - defined).abs();
                        assert!(error < most, "{shape:?} {bits:?}, pair {i}: {found}, {defined}");
                    }
                }
                for isa in tiers() {
                    let found = in_integers(&scene, &bytes, isa, bits);
                    assert_eq!(found, expected, "{isa:?} {shape:?} {bits:?}");
                }
            }
        }
    }
}

#[test]
fn what_is_not_finite_reaches_those_who_see_it_alone() {
    const AT: usize = 37;
    for (shape, cause) in [((2, 1, 64), f32::NAN), ((3, 3, 20), f32::INFINITY)] {
        let (heads, kv_heads, d) = shape;
        for (is_key, window) in [(true, None), (false, None), (false, Some(40))] {
            let scene = Scene { window, ..Scene::new(100, shape) };
            let (mut bytes, _) = quantised(&scene);
            let clean = in_integers(&scene, &bytes, Isa::detect(), ActivationBits::Eight);
            let size = BLOCK * quantised_bytes(d);
            for head in 0..kv_heads {
                let block = scene.table[AT / BLOCK] as usize * kv_heads + head;
                let block = &mut bytes[usize::from(!is_key)][block * size..][..size];
                Store(BlockMut::I8(block), &vec![cause; d], AT % BLOCK, is_key).store();
            }
            for isa in tiers() {
                let found = in_integers(&scene, &bytes, isa, ActivationBits::Eight);
                let rows = found.chunks_exact(heads * d).zip(clean.chunks_exact(heads * d));
                for (row, (found, clean)) in rows.enumerate() {
                    if (AT..AT + window.unwrap_or(100) as usize).contains(&row) {
                        assert!(found.iter().all(|x| x.is_nan()), "{isa:?}, row {row}: hidden");
                    } else {
                        assert_eq!(found, clean, "{isa:?}, row {row}");
                    }
                }
            }
        }
    }
}

#[test]
fn a_part_of_the_heads_gives_its_part_of_the_result() {
    let (len, d) = (300, 8);
    let scene = Scene::new(len, (9, 3, d));
    for isa in Isa::available() {
        let whole = scene.run(isa, 2, 200, 100);
        // Cut within groups, so that the KV head there is read on both sides.
        for cuts in [vec![0, 5, 9], vec![0, 1, 2, 8, 9], vec![0, 3, 9]] {
            for cut in cuts.windows(2) {
                let heads = cut[0]..cut[1];
                let part = scene.of_heads(heads.clone()).run(isa, 1, 200, 100);
                let rows =
                    whole.chunks_exact(9 * d).map(|row| &row[heads.start * d..heads.end * d]);
                assert!(rows.flatten().eq(&part), "{isa:?}: heads {heads:?}");
            }
        }
    }
}

/// Blocks that no rank may read, where a split is another's.
const FOREIGN: u32 = u32::MAX;

#[test]
fn ranks_that_share_a_cache_find_the_bits_of_one() {
    let (heads, d) = (6, 8);
    let len = 1500;
    // A chunk of a prompt, and a token far behind it.
    let places = [(640, 300), (1499, 1)];
    for (cuts, origins) in [
        (vec![0, 2, 6], [0, 1]),
        (vec![0, 1, 5, 6], [2, 1]),
        (vec![0, 1, 2, 2, 3, 4, 6, 6], [3, 6]),
    ] {
        let ranks = cuts.len() - 1;
        for window in [None, Some(5), Some(700)] {
            let scene = Scene { window, ..Scene::new(len, (heads, 2, d)) };
            let own: Vec<Range<usize>> = cuts.windows(2).map(|cut| cut[0]..cut[1]).collect();
            let width = heads * d;
            let (mut q, mut spans, mut expected) = (vec![], vec![], vec![]);
            let blocks = scene.table.len();
            for (at, (start, rows)) in places.into_iter().enumerate() {
                q.extend_from_slice(&scene.q[start * width..][..rows * width]);
                expected.extend(scene.run(Isa::Reference, 1, start, rows));
                let [first_row, table] = [spans.len() * places[0].1, at * blocks].map(|n| n as u32);
                let (rows, start) = (rows as u32, start as u32);
                spans.push(Span { first_row, rows, start, table, table_len: blocks as u32 });
            }
            std::thread::scope(|scope| {
                for group in Parcels::group(ranks) {
                    let (scene, own, q, spans, expected) = (&scene, &own, &q, &spans, &expected);
                    scope.spawn(move || {
                        let rank = group.rank;
                        let shares = Shares { rank, heads: own, origins: &origins };
                        let entry = |span, i: usize| match shares.has(span, i) {
                            true => scene.table[i],
                            false => FOREIGN,
                        };
                        let tables: Vec<u32> =
                            (0..2 * blocks).map(|i| entry(i / blocks, i % blocks)).collect();
                        let problem = Problem { tables: &tables, ..scene.problem(q, spans) };
                        let own = own[rank].clone();
                        let mut out = vec![0.0; q.len() / heads * own.len()];
                        let member: &dyn Collective = &group;
                        let means = (&Pool::new(1 + rank % 2), Isa::detect(), member);
                        let mut memory = (Workspace::default(), Default::default());
                        let memory = (&mut memory.0, &mut memory.1);
                        shared_attention(means, &problem, &shares, memory, &mut out).unwrap();
                        let own = own.start * d..own.end * d;
                        let rows = expected.chunks_exact(width).map(|row| &row[own.clone()]);
                        assert!(rows.flatten().eq(&out), "{window:?}: {rank} of {ranks}");
                    });
                }
            });
        }
    }
}

#[test]
fn a_row_alone_takes_keys_as_they_are_stored_and_finds_the_same_bits() {
    const LEN: usize = 150;
    for ((group, dim), window) in [(1, 64), (2, 64), (3, 128), (4, 64), (5, 64), (2, 48)]
        .into_iter()
        .flat_map(|shape| [None, Some(37)].map(|window| (shape, window)))
    {
        let mut scene = Scene::new(LEN, (2 * group, 2, dim));
        scene.window = window;
        let rows = scene.k.len() / dim;
        let (mut k16, mut v16) = (vec![0; scene.k.len()], vec![0; scene.v.len()]);
        let (mut kb, mut vb) = (k16.clone(), v16.clone());
        let (mut k8, mut v8) = [0, 1].map(|_| vec![0; rows * quantised_bytes(dim)]).into();
        for row in 0..rows {
            let (block, offset) = (row / BLOCK, row % BLOCK);
            let (size, small) = (BLOCK * dim, BLOCK * quantised_bytes(dim));
            for (x, [half, bfloat], byte, is_key) in [
                (&scene.k, [&mut k16, &mut kb], &mut k8, true),
                (&scene.v, [&mut v16, &mut vb], &mut v8, false),
            ] {
                let x = &x[row * dim..][..dim];
                let at = block * size..(block + 1) * size;
                Store(BlockMut::F16(&mut half[at.clone()]), x, offset, is_key).store();
                Store(BlockMut::BF16(&mut bfloat[at]), x, offset, is_key).store();
                let at = block * small..(block + 1) * small;
                Store(BlockMut::I8(&mut byte[at]), x, offset, is_key).store();
            }
        }
        let layers = [
            Layer::Numbers([Cache::F16(&k16), Cache::F16(&v16)]),
            Layer::Numbers([Cache::BF16(&kb), Cache::BF16(&vb)]),
            Layer::Integers([&k8, &v8], ActivationBits::Eight),
            Layer::Integers([&k8, &v8], ActivationBits::Sixteen),
        ];
        for layer in layers {
            let table_len = scene.table.len() as u32;
            let run = |isa: Isa, spans: &[Span]| {
                let problem = Problem { layer, ..scene.problem(&scene.q, spans) };
                let mut out = vec![0.0; scene.q.len()];
                attention(&Pool::new(2), isa, &problem, &mut Workspace::default(), &mut out);
                out
            };
            let span = |at, rows| Span { first_row: at, rows, start: at, table: 0, table_len };
            let together = run(Isa::Reference, &[span(0, LEN as u32)]);
            assert!(together.iter().all(|v| v.is_finite()));
            for isa in tiers() {
                let alone: Vec<Span> = (0..LEN as u32).map(|at| span(at, 1)).collect();
                assert_eq!(run(isa, &alone), together, "{isa:?}, {group} heads of {dim}");
            }
        }
    }
}
