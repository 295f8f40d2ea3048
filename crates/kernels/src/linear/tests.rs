//! Every tier against plain arithmetic on dequantised weights, and against each other bit by bit.

use pomona_device::Pool;

use super::{
    ActivationBits, Job, LinearPath, Out, Part, Rows, Workspace, can_divide, divided, linear,
    packed,
};
use crate::formats::dequantize_row;
use crate::parcels::Parcels;
use crate::{Format, Isa, Write};

/// SplitMix64.
pub(crate) struct Dice(pub(crate) u64);

impl Dice {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in -1..1.
    pub(crate) fn real(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }
}

/// Random bytes of a format whose scales are sane numbers.
pub(crate) fn random_weights(format: Format, rows: usize, cols: usize, dice: &mut Dice) -> Vec<u8> {
    let bytes = rows * format.row_bytes(cols).unwrap();
    let mut data: Vec<u8> = (0..bytes).map(|_| dice.next() as u8).collect();
    let half = |dice: &mut Dice| half::f16::from_f32(dice.real() * 0.01).to_le_bytes();
    let halves: &[usize] = match format {
        Format::F32 => {
            for word in data.as_chunks_mut::<4>().0 {
                *word = dice.real().to_le_bytes();
            }
            &[]
        }
        Format::BF16 => {
            for word in data.as_chunks_mut::<2>().0 {
                *word = half::bf16::from_f32(dice.real()).to_le_bytes();
            }
            &[]
        }
        Format::F16 => &[0],
        Format::Q4_0 | Format::Q5_0 | Format::Q8_0 => &[0],
        Format::Q4_1 | Format::Q5_1 | Format::Q4_K | Format::Q5_K => &[0, 2],
        Format::Q6_K => &[208],
        _ => &[0],
    };
    for block in data.chunks_exact_mut(format.block_bytes()) {
        for at in halves {
            block[*at..at + 2].copy_from_slice(&half(dice));
        }
    }
    data
}

/// Packs rows as stored.
fn pack_rows(format: Format, weight: &[u8], cols: usize) -> Vec<u8> {
    let row_bytes = format.row_bytes(cols).unwrap();
    let mut bytes = vec![];
    for rows in weight.chunks(16 * row_bytes) {
        let mut group = vec![0; packed::group_bytes(format, cols)];
        packed::pack(format, rows, cols, &mut group);
        bytes.extend(group);
    }
    bytes
}

/// The machine's tiers.
#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
pub(crate) fn tiers() -> Vec<Isa> {
    Isa::available()
}

/// The machine's tiers, and the tile tier anywhere: what the machine lacks is emulated.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
pub(crate) fn tiers() -> Vec<Isa> {
    let mut tiers = Isa::available();
    if tiers.last() == Some(&Isa::Avx512) {
        super::amx::emulator::install();
        tiers.push(Isa::Amx);
    }
    tiers
}

/// Whether a tier's results are those of the reference.
fn same_bits(isa: Isa, format: Format, bits: ActivationBits) -> bool {
    LinearPath::of(isa, format, bits) != LinearPath::Bf16Tiles
}

const BITS: [ActivationBits; 2] = [ActivationBits::Eight, ActivationBits::Sixteen];

fn one_job(tokens: usize, parts: Vec<Part<'_>>) -> Job<'_> {
    Job { tokens, inputs: Rows::From(0), outputs: Rows::From(0), parts }
}

fn run(
    (isa, bits): (Isa, ActivationBits),
    threads: usize,
    format: Format,
    weight: &[u8],
    x: &[f32],
    cols: usize,
) -> Vec<f32> {
    let rows = weight.len() / format.row_bytes(cols).unwrap();
    let weight = &pack_rows(format, weight, cols);
    let mut out = vec![0.0; x.len() / cols * rows];
    let parts = vec![Part { format, weight, rows, bias: None, out: Out::new(&mut out) }];
    let how = (Write::Set, bits, &mut Workspace::default());
    linear(&Pool::new(threads), isa, (x, cols), &[one_job(x.len() / cols, parts)], how);
    out
}

#[test]
fn every_tier_and_format_is_close_to_exact_arithmetic_and_equal_to_the_reference() {
    let mut dice = Dice(1);
    for format in Format::ALL {
        for (rows, cols, tokens) in
            [(1, 256, 1), (3, 512, 2), (17, 256, 3), (5, 768, 5), (100, 256, 17), (7, 256, 9)]
        {
            // Formats with smaller blocks also take an odd number of them.
            let odd = (32..256).contains(&format.block_len());
            let cols = if odd { cols + format.block_len() } else { cols };
            let cols = if format.block_len() == 1 { cols + 7 } else { cols };
            let weight = random_weights(format, rows, cols, &mut dice);
            let x: Vec<f32> = (0..tokens * cols).map(|_| dice.real()).collect();
            for bits in BITS {
                every_tier_is_right(format, bits, (&weight, &x), (rows, cols));
            }
        }
    }
}

fn every_tier_is_right(
    format: Format,
    bits: ActivationBits,
    (weight, x): (&[u8], &[f32]),
    (rows, cols): (usize, usize),
) {
    let reference = run((Isa::Reference, bits), 1, format, weight, x, cols);
    let mut row = vec![0.0; cols];
    let bound = match (format.block_len(), bits) {
        // bf16 has eight bits, the first of which is always 1.
        (1, ActivationBits::Eight) if format == Format::BF16 => 1.0 / 256.0,
        (1, _) => 2e-6,
        (_, ActivationBits::Eight) => 5e-3,
        (_, ActivationBits::Sixteen) => 1e-4,
    };
    for r in 0..rows {
        let row_bytes = weight.len() / rows;
        dequantize_row(format, &weight[r * row_bytes..][..row_bytes], &mut row);
        for (t, x) in x.chunks_exact(cols).enumerate() {
            let products = row.iter().zip(x).map(|(a, b)| f64::from(*a) * f64::from(*b));
            let (sum, size) = products.fold((0.0, 0.0), |(s, n), p| (s + p, n + p.abs()));
            let error = (f64::from(reference[t * rows + r]) - sum).abs();
            assert!(error <= bound * size, "{format:?} {bits:?} {rows}x{cols}: {error} of {size}");
        }
    }
    for isa in tiers() {
        for threads in [1, 3] {
            let found = run((isa, bits), threads, format, weight, x, cols);
            if same_bits(isa, format, bits) {
                assert_eq!(found, reference, "{format:?} {bits:?} {isa:?}, {threads} threads");
                continue;
            }
            for (found, expected) in found.iter().zip(&reference) {
                assert!((found - expected).abs() < 1e-4, "{isa:?}: {found} {expected}");
            }
        }
    }
}

#[test]
fn edges_of_groups_and_tiles_give_the_bits_of_the_reference() {
    let mut dice = Dice(8);
    let (most, cols) = (100, 256);
    for format in Format::ALL {
        let weight = random_weights(format, most, cols, &mut dice);
        let x: Vec<f32> = (0..33 * cols).map(|_| dice.real()).collect();
        let row_bytes = format.row_bytes(cols).unwrap();
        for bits in BITS {
            // A product is its row's and its token's alone: one call is right for all others.
            let all = run((Isa::Reference, bits), 1, format, &weight, &x, cols);
            for isa in tiers().into_iter().filter(|isa| same_bits(*isa, format, bits)) {
                for tokens in [1, 2, 3, 4, 5, 8, 9, 16, 17, 32, 33] {
                    for rows in [15, 16, 17, 48, 49, 64, 65, 80, most] {
                        let (weight, x) = (&weight[..rows * row_bytes], &x[..tokens * cols]);
                        let found = run((isa, bits), 1, format, weight, x, cols);
                        for (found, all) in found.chunks_exact(rows).zip(all.chunks_exact(most)) {
                            let case = (format, bits, isa, tokens, rows);
                            assert_eq!(found, &all[..rows], "{case:?}");
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn a_token_does_not_depend_on_its_neighbours() {
    let mut dice = Dice(2);
    for format in Format::ALL {
        let (rows, cols, tokens) = (40, 512, 21);
        let weight = random_weights(format, rows, cols, &mut dice);
        let x: Vec<f32> = (0..tokens * cols).map(|_| dice.real()).collect();
        for how in tiers().into_iter().flat_map(|isa| BITS.map(|bits| (isa, bits))) {
            let together = run(how, 2, format, &weight, &x, cols);
            for t in 0..tokens {
                let alone = run(how, 1, format, &weight, &x[t * cols..][..cols], cols);
                assert_eq!(alone, together[t * rows..][..rows], "{format:?} {how:?} token {t}");
            }
        }
    }
}

#[test]
fn many_tokens_that_meet_some_blocks_at_a_time_give_the_bits_of_the_reference() {
    let mut dice = Dice(11);
    let (rows, tokens) = (50, 75);
    for format in Format::ALL.into_iter().filter(|format| !format.is_dense()) {
        // Of the shorter blocks nine, so that one is left over.
        let cols = if format.block_len() > 32 { 512 } else { 288 };
        let weight = random_weights(format, rows, cols, &mut dice);
        let x: Vec<f32> = (0..tokens * cols).map(|_| dice.real()).collect();
        for bits in BITS {
            let expected = run((Isa::Reference, bits), 1, format, &weight, &x, cols);
            for isa in tiers() {
                let found = run((isa, bits), 2, format, &weight, &x, cols);
                assert_eq!(found, expected, "{format:?} {bits:?} {isa:?}");
            }
        }
    }
}

#[test]
fn numbers_that_are_not_finite_reach_the_result_on_every_tier() {
    let mut dice = Dice(4);
    for format in Format::ALL {
        let cols = 256;
        let weight = random_weights(format, 2, cols, &mut dice);
        for strange in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = vec![1.0; 2 * cols];
            (x[40], x[80]) = (strange, f32::MIN_POSITIVE / 4.0);
            for (isa, bits) in tiers().into_iter().flat_map(|isa| BITS.map(|bits| (isa, bits))) {
                let out = run((isa, bits), 2, format, &weight, &x, cols);
                assert!(out[..2].iter().all(|v| !v.is_finite()), "{format:?} {isa:?} {out:?}");
                assert!(out[2..].iter().all(|v| v.is_finite()), "the other token is untouched");
            }
        }
        let all_ones = vec![0xff; 2 * format.row_bytes(cols).unwrap()];
        for isa in tiers() {
            let out = run((isa, ActivationBits::Sixteen), 2, format, &all_ones, &[1.0; 256], cols);
            assert!(out.iter().all(|v| v.is_nan()), "{format:?} {isa:?} {out:?}");
        }
    }
}

#[test]
fn columns_that_ranks_quantise_for_each_other_give_the_bits_of_whole_rows() {
    let mut dice = Dice(7);
    let (rows, cols) = (40, 512);
    for (tokens, widths) in [(16, vec![256, 256]), (33, vec![32, 352, 128]), (48, vec![512])] {
        let x: Vec<f32> = (0..tokens * cols).map(|_| dice.real()).collect();
        for format in Format::ALL.into_iter().filter(|format| !format.is_dense()) {
            assert!(can_divide(tokens, &widths, [format].into_iter()));
            let weight = random_weights(format, rows, cols, &mut dice);
            for bits in BITS {
                let whole = run((Isa::detect(), bits), 2, format, &weight, &x, cols);
                std::thread::scope(|scope| {
                    for group in Parcels::group(widths.len()) {
                        let (widths, x, weight, whole) = (&widths, &x, &weight, &whole);
                        scope.spawn(move || {
                            let first = widths[..group.rank].iter().sum::<usize>();
                            let own = x.chunks_exact(cols);
                            let own = own.flat_map(|row| &row[first..][..widths[group.rank]]);
                            let (own, mut out): (Vec<f32>, _) = (own.copied().collect(), vec![0.0]);
                            out.resize(tokens * rows, 0.0);
                            let (packed, to) =
                                (&pack_rows(format, weight, cols), Out::new(&mut out));
                            let part = Part { format, weight: packed, rows, bias: None, out: to };
                            let means =
                                (&Pool::new(1 + group.rank % 2), Isa::detect(), &group as _);
                            let how = (Write::Set, bits, &mut Workspace::default());
                            let job = one_job(tokens, vec![part]);
                            divided(means, (&own, widths), &job, how).unwrap();
                            assert_eq!(&out, whole, "{format:?} {bits:?} {widths:?}");
                        });
                    }
                });
            }
        }
    }
    let quantised = || [Format::Q4_0].into_iter();
    assert!(!can_divide(16, &[48, 16], quantised()), "a block of two ranks");
    assert!(!can_divide(16, &[32, 32], [Format::Q4_0, Format::F32].into_iter()));
}

#[test]
fn several_parts_share_a_join_and_bias_and_addition_apply_once() {
    let mut dice = Dice(3);
    // Few tokens; panels that are full and that are not; more tokens than stay in a cache.
    for (tokens, rows, cols) in [(2, 20, 64), (17, 48, 64), (17, 100, 64), (203, 48, 2048)] {
        let formats = [Format::Q8_0, Format::Q8_0, Format::F32];
        let weights = formats.map(|format| random_weights(format, rows, cols, &mut dice));
        let x: Vec<f32> = (0..tokens * cols).map(|_| dice.real()).collect();
        let bias: Vec<f32> = (0..rows).map(|i| i as f32).collect();
        for isa in tiers() {
            let how = (isa, ActivationBits::Sixteen);
            let run_alone = |i: usize| run(how, 1, formats[i], &weights[i], &x, cols);
            let packed = [0, 1, 2].map(|i| pack_rows(formats[i], &weights[i], cols));
            let mut outs = [1.0, 2.0, 3.0].map(|before| vec![before; tokens * rows]);
            let biases = [None, Some(&bias[..]), Some(&bias[..])];
            let parts = outs.iter_mut().enumerate().map(|(i, out)| Part {
                format: formats[i],
                weight: &packed[i],
                rows,
                bias: biases[i],
                out: Out::new(out),
            });
            let jobs = [one_job(tokens, parts.collect())];
            let how = (Write::Add, ActivationBits::Sixteen, &mut Workspace::default());
            linear(&Pool::new(3), isa, (&x, cols), &jobs, how);
            for (i, out) in outs.iter().enumerate() {
                let value = |(at, alone): (usize, &f32)| match biases[i] {
                    Some(bias) => (i + 1) as f32 + (alone + bias[at % rows]),
                    None => (i + 1) as f32 + alone,
                };
                let expected: Vec<f32> = run_alone(i).iter().enumerate().map(value).collect();
                assert_eq!(*out, expected, "{isa:?}, part {i}, {tokens} tokens, {rows} rows");
            }
        }
    }
}

#[test]
fn tokens_of_several_jobs_get_what_they_get_alone() {
    let mut dice = Dice(6);
    let (rows, cols, tokens) = (40, 512, 50);
    let all: Vec<u32> = (0..tokens as u32).map(|i| i * 7 % tokens as u32).collect();
    // Jobs of all sizes, none among them; each takes rows as they are listed, and puts them back
    // in reverse.
    let cuts = [0, 1, 3, 3, 20, 50];
    for format in [Format::F32, Format::BF16, Format::Q4_K, Format::Q6_K, Format::Int4G32] {
        let x: Vec<f32> = (0..tokens * cols).map(|_| dice.real()).collect();
        let weights: Vec<Vec<u8>> =
            cuts[1..].iter().map(|_| random_weights(format, rows, cols, &mut dice)).collect();
        let packed: Vec<Vec<u8>> =
            weights.iter().map(|weight| pack_rows(format, weight, cols)).collect();
        let back: Vec<u32> = all.iter().map(|row| tokens as u32 - 1 - row).collect();
        for how in tiers().into_iter().flat_map(|isa| BITS.map(|bits| (isa, bits))) {
            let mut out = vec![f32::NAN; tokens * rows];
            let shared = Out::new(&mut out);
            let mut jobs = Vec::new();
            for (cut, weight) in cuts.windows(2).zip(&packed) {
                let (inputs, outputs) = (&all[cut[0]..cut[1]], &back[cut[0]..cut[1]]);
                // SAFETY: no row is listed twice.
                let out = unsafe { shared.share() };
                let parts = vec![Part { format, weight, rows, bias: None, out }];
                let (inputs, outputs) = (Rows::Listed(inputs), Rows::Listed(outputs));
                jobs.push(Job { tokens: cut[1] - cut[0], inputs, outputs, parts });
            }
            let (isa, bits) = how;
            let workspace = (Write::Set, bits, &mut Workspace::default());
            linear(&Pool::new(3), isa, (&x, cols), &jobs, workspace);
            for (cut, weight) in cuts.windows(2).zip(&weights) {
                for i in cut[0]..cut[1] {
                    let x = &x[all[i] as usize * cols..][..cols];
                    let alone = run(how, 1, format, weight, x, cols);
                    let found = &out[back[i] as usize * rows..][..rows];
                    assert_eq!(found, alone, "{format:?} {how:?} token {i}");
                }
            }
        }
    }
}
