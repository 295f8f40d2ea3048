//! Products, attention and joins against the limits that this machine shows in the same run.
//!
//!     cargo bench -p pomona-kernels -- [linear|experts|attention|join|FORMAT...] [8-bits]
//!         [int8-kv] [avx2] [HEADS/KV/DIM...] [TOKENS...]
//!
//! Prints medians of several rounds. Shares: of the measured read bandwidth (weights or KV read
//! once) and of the measured peak of int8 (integer formats), bf16 (BF16 with `8-bits`) or f32.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::time::Instant;

use pomona_device::{DType, Device, HostDevice, Pool, Probe, View};
use pomona_kernels::{
    Activation, ActivationBits, Attention, CpuOps, Expert, Experts, Format, HeadGroups, Isa,
    KvLayer, LinearPart, Matrix, Ops, Span, StoredRows, WeightSource, Write, kv_row_bytes, limits,
};

const ROUNDS: usize = 15;
/// How long a round lasts at least.
const ROUND_S: f64 = 0.02;

fn main() {
    let mut words: Vec<String> = std::env::args().skip(1).filter(|w| !w.starts_with('-')).collect();
    let all = words.len();
    words.retain(|word| word != "8-bits");
    let bits = match words.len() < all {
        true => ActivationBits::Eight,
        false => ActivationBits::Sixteen,
    };
    let all = words.len();
    words.retain(|word| word != "int8-kv");
    let kv = if words.len() < all { DType::I8 } else { DType::F16 };
    let all = words.len();
    words.retain(|word| word != "avx2");
    let isa = if words.len() < all { Isa::Avx2 } else { Isa::detect() };
    let mut counts: Vec<usize> = words.iter().filter_map(|word| word.parse().ok()).collect();
    if counts.is_empty() {
        counts = vec![1, 8, 512];
    }
    words.retain(|word| word.parse::<usize>().is_err());
    let (heads, mut words): (Vec<_>, Vec<_>) = words.into_iter().partition(|w| w.contains('/'));
    if !heads.is_empty() {
        words.push("attention".to_owned());
    }
    let wanted = |what: &str| words.is_empty() || words.iter().any(|word| word == what);
    let formats: Vec<Format> = Format::ALL
        .into_iter()
        .filter(|format| wanted("linear") || wanted(&format!("{format:?}")))
        .collect();
    let threads = Pool::default_threads();
    let pool = Pool::new(threads);
    let limits = limits(&pool);
    drop(pool);
    let ops = CpuOps::new(Arc::new(HostDevice::new()), Pool::new(threads), isa)
        .with_activation_bits(bits);
    println!(
        "{threads} threads, {}: reads {:.1} GB/s, {:.0} GFLOP/s in f32, {:.0} in bf16, {:.0} GOP/s \
         in int8",
        ops.isa().name(),
        limits.read_bytes_per_s / 1e9,
        limits.f32_ops_per_s / 1e9,
        limits.bf16_ops_per_s / 1e9,
        limits.int8_ops_per_s / 1e9
    );
    if wanted("join") {
        join(threads);
    }
    if !formats.is_empty() {
        linear(&ops, &limits, &formats, &counts);
    }
    if wanted("experts") {
        experts(&ops, &limits);
    }
    if wanted("attention") {
        attention(&ops, &limits, kv, &heads);
    }
}

/// Seconds of one call: the median, and the fastest round, which neighbours disturbed least.
fn time(mut call: impl FnMut()) -> (f64, f64) {
    call();
    let begun = Instant::now();
    call();
    let calls = (ROUND_S / begun.elapsed().as_secs_f64()).ceil().max(1.0) as usize;
    let mut rounds: Vec<f64> = (0..ROUNDS)
        .map(|_| {
            let begun = Instant::now();
            (0..calls).for_each(|_| call());
            begun.elapsed().as_secs_f64() / calls as f64
        })
        .collect();
    rounds.sort_by(f64::total_cmp);
    (rounds[ROUNDS / 2], rounds[0])
}

fn join(threads: usize) {
    let pool = Pool::new(threads);
    let (seconds, _) = time(|| (0..1000).for_each(|_| pool.run(&|_| {})));
    println!("\njoin of {threads} workers: {:.0} ns", seconds * 1e6);
}

fn linear(ops: &CpuOps, limits: &Probe, formats: &[Format], counts: &[usize]) {
    const SHAPES: [(usize, usize); 3] = [(1536, 576), (4096, 2048), (2048, 8192)];
    println!("\nlinear     rows x cols  tokens      us    GB/s  of read    GOP/s  of peak    best");
    for &format in formats {
        for (rows, cols) in SHAPES {
            let cols = cols.next_multiple_of(format.block_len());
            // Enough matrices that a cache does not hold them all.
            let bytes = format.row_bytes(cols).unwrap() * rows;
            let matrices: Vec<Matrix> =
                (0..(256 << 20) / bytes).map(|i| matrix(ops, format, (rows, cols), i)).collect();
            for &tokens in counts {
                let device = ops.device().as_ref();
                let x = random(device, &[tokens, cols]);
                let out = device.alloc_view(DType::F32, &[tokens, rows]).unwrap();
                let mut turn = 0;
                let (seconds, best) = time(|| {
                    let weight = &matrices[turn % matrices.len()];
                    turn += 1;
                    let part = LinearPart { weight, bias: None, out: &out };
                    ops.linear(&x, &[part], Write::Set).unwrap();
                });
                let gops = 2.0 * (rows * cols * tokens) as f64 / seconds / 1e9;
                let peak = match ops.linear_path(format) {
                    path if path.is_bfloat() => limits.bf16_ops_per_s,
                    path if path.is_integer() => limits.int8_ops_per_s,
                    _ => limits.f32_ops_per_s,
                };
                let (name, us) = (format!("{format:?}"), seconds * 1e6);
                let rate = bytes as f64 / seconds;
                let share = 100.0 * rate / limits.read_bytes_per_s;
                print!("{name:<8} {rows:>6} x {cols:<6} {tokens:>5} {us:>8.1}");
                print!(" {:>7.1} {share:>6.0} %", rate / 1e9);
                let share = 100.0 * gops * 1e9 / peak;
                println!(" {gops:>8.1} {share:>6.0} % {:>6.0} %", share * seconds / best);
            }
        }
    }
}

/// Sixteen experts of width 1,024, two for each token, beside a dense layer of twice that width:
/// as many operations for each token.
fn experts(ops: &CpuOps, limits: &Probe) {
    const WIDTH: usize = 1024;
    const EXPERTS: usize = 16;
    const K: usize = 2;
    println!("\nexperts    tokens  chosen      us    GB/s  of read    GOP/s  dense us   ratio");
    for format in [Format::Q8_0, Format::Q4_K] {
        let layer = |seed: usize, ffn: usize| Expert {
            gate: matrix(ops, format, (ffn, WIDTH), seed),
            up: matrix(ops, format, (ffn, WIDTH), seed + 1),
            down: matrix(ops, format, (WIDTH, ffn), seed + 2),
        };
        // Layers enough that a cache does not hold them.
        let layers: Vec<Vec<Expert>> =
            (0..8).map(|_| (0..EXPERTS).map(|i| layer(i, WIDTH)).collect()).collect();
        let dense: Vec<Expert> = (0..64).map(|i| layer(i, K * WIDTH)).collect();
        for tokens in [1, 8, 64, 512] {
            let device = ops.device().as_ref();
            let x = random(device, &[tokens, WIDTH]);
            let chosen: Vec<u32> = numbers(3)
                .take(tokens)
                .flat_map(|n| [n % 16, (n + 1 + n / 16 % 15) % 16])
                .collect();
            let active = (0..16).filter(|expert| chosen.contains(expert)).count();
            let ids = device.alloc_view(DType::U32, &[tokens, K]).unwrap();
            let bytes: Vec<u8> = chosen.iter().flat_map(|id| id.to_ne_bytes()).collect();
            device.upload(&bytes, &ids).unwrap();
            let view = |rows, width| device.alloc_view(DType::F32, &[rows, width]).unwrap();
            let (gate, up) = (view(tokens * K, WIDTH), view(tokens * K, WIDTH));
            let (out, activation) = (view(tokens * K, WIDTH), Activation::Silu);
            let mut turn = 0;
            let (seconds, _) = time(|| {
                let here = &layers[turn % layers.len()];
                turn += 1;
                let experts = Experts { here, activation, between: [&gate, &up] };
                ops.experts(&x, &ids, &experts, &out).unwrap();
            });
            let (gate, up, out) =
                (view(tokens, K * WIDTH), view(tokens, K * WIDTH), view(tokens, WIDTH));
            let (twin, _) = time(|| {
                let Expert { gate: of_gate, up: of_up, down } = &dense[turn % dense.len()];
                turn += 1;
                let part = |weight, out| LinearPart { weight, bias: None, out };
                let wide = [part(of_gate, &gate), part(of_up, &up)];
                ops.linear(&x, &wide, Write::Set).unwrap();
                ops.glu(&gate, &up, activation, &gate).unwrap();
                ops.linear(&gate, &[part(down, &out)], Write::Set).unwrap();
            });
            let bytes = 3 * active * WIDTH * format.row_bytes(WIDTH).unwrap();
            let rate = bytes as f64 / seconds;
            let gops = 6.0 * (tokens * K * WIDTH * WIDTH) as f64 / seconds / 1e9;
            print!("{:<10} {tokens:>6} {active:>7}", format!("{format:?}"));
            print!(" {:>8.1} {:>7.1}", seconds * 1e6, rate / 1e9);
            print!(" {:>6.0} % {gops:>8.1}", 100.0 * rate / limits.read_bytes_per_s);
            println!(" {:>9.1} {:>7.2}", twin * 1e6, seconds / twin);
        }
    }
}

fn attention(ops: &CpuOps, limits: &Probe, dtype: DType, wanted: &[String]) {
    const HEADS: [(usize, usize, usize); 4] = [(9, 3, 64), (32, 8, 64), (32, 8, 128), (4, 1, 256)];
    // Sequences, rows of each, positions that the last row sees.
    const CASES: [(usize, usize, usize); 5] =
        [(1, 1, 512), (1, 1, 8192), (32, 1, 288), (1, 512, 512), (1, 512, 4096)];
    let known = HEADS.map(|(heads, kv_heads, dim)| format!("{heads}/{kv_heads}/{dim}"));
    let unknown = wanted.iter().find(|shape| !known.contains(shape));
    assert_eq!(unknown, None, "HEADS/KV/DIM is one of {known:?}");
    print!("\nattention heads/kv/dim   batch   rows   seen       us    GB/s  of read");
    println!("  GFLOP/s   of f32    best");
    for ((heads, kv_heads, dim), shape) in HEADS.into_iter().zip(&known) {
        if !wanted.is_empty() && !wanted.contains(shape) {
            continue;
        }
        for (batch, rows, seen) in CASES {
            let device = ops.device().as_ref();
            let (blocks, row) = (seen / 16, kv_row_bytes(dtype, dim) / dtype.bytes());
            let bytes = 2 * batch * seen * kv_heads * kv_row_bytes(dtype, dim);
            // Enough layers that a cache does not hold them all, as in a model.
            let shape = [batch * blocks, kv_heads, 16, row];
            let cache = |_| {
                let view = device.alloc_view(dtype, &shape).unwrap();
                // As the upper byte of any floating-point number: small.
                let numbers = numbers(bytes).map(|n| n as u8 & 0x3b | 0x20);
                let content: Vec<u8> = numbers.take(view.elements() * dtype.bytes()).collect();
                device.upload(&content, &view).unwrap();
                view
            };
            let layers: Vec<KvLayer> = (0..((256 << 20) / bytes).clamp(1, 64))
                .map(|_| [0, 1].map(cache))
                .map(|[k, v]| KvLayer { k, v })
                .collect();
            let q = random(device, &[batch * rows, heads, dim]);
            let out = device.alloc_view(DType::F32, &[batch * rows, heads, dim]).unwrap();
            let tables: Vec<u32> = (0..(batch * blocks) as u32).collect();
            let start = (seen - rows) as u32;
            let span = |at: usize| Span {
                first_row: (at * rows) as u32,
                rows: rows as u32,
                start,
                table: (at * blocks) as u32,
                table_len: blocks as u32,
            };
            let spans: Vec<Span> = (0..batch).map(span).collect();
            let groups = HeadGroups { size: heads / kv_heads, skipped: 0 };
            let (tables, spans) = (&tables, &spans);
            let how = Attention { spans, tables, scale: 0.125, window: None, heads: groups };
            let mut turn = 0;
            let (seconds, best) = time(|| {
                turn += 1;
                ops.attention(&q, &layers[turn % layers.len()], &how, &out).unwrap();
            });
            let pairs = (batch * rows) as f64 * (start as f64 + (rows as f64 + 1.0) / 2.0);
            let flops = 4.0 * pairs * (heads * dim) as f64;
            let (us, rate, flops) = (seconds * 1e6, bytes as f64 / seconds, flops / seconds);
            let share = 100.0 * rate / limits.read_bytes_per_s;
            print!(
                "          {heads:>5}/{kv_heads}/{dim:<5} {batch:>6} {rows:>6} {seen:>6} {us:>8.1}"
            );
            print!(" {:>7.1} {share:>6.0} %", rate / 1e9);
            let share = 100.0 * flops / limits.f32_ops_per_s;
            let best = share * seconds / best;
            println!(" {:>8.1} {share:>6.0} % {best:>6.0} %", flops / 1e9);
        }
    }
}

fn numbers(seed: usize) -> impl Iterator<Item = u32> {
    let mut state = seed as u32 ^ 0x9e37_79b9;
    std::iter::repeat_with(move || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state >> 8
    })
}

/// A matrix of random integers; 16-bit scales are made small numbers.
fn matrix(ops: &CpuOps, format: Format, (rows, cols): (usize, usize), seed: usize) -> Matrix {
    let bytes = rows * format.row_bytes(cols).unwrap();
    // As the upper byte of any floating-point number: finite and not subnormal.
    let data: Vec<u8> = numbers(seed).map(|n| n as u8 & 0x3b | 0x20).take(bytes).collect();
    let row_bytes = format.row_bytes(cols).unwrap();
    let content = Arc::new(StoredRows { bytes: Arc::new(data), offset: 0, row_bytes });
    let source = WeightSource { name: String::new(), format, rows, cols, content };
    ops.matrix(&source).unwrap()
}

fn random(device: &dyn Device, shape: &[usize]) -> View {
    let view = device.alloc_view(DType::F32, shape).unwrap();
    let values = numbers(7).map(|n| n as f32 / (1 << 23) as f32 - 1.0).take(view.elements());
    let bytes: Vec<u8> = values.flat_map(f32::to_ne_bytes).collect();
    device.upload(&bytes, &view).unwrap();
    view
}
