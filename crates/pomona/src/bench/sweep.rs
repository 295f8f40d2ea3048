//! Series of measurements that look for cliffs: does the rate fall all of a sudden as prompts get
//! longer, batches larger, threads more, or lengths unequal? The engine alone, without HTTP.

mod plot;

use std::fmt::{self, Display, Formatter};

use anyhow::Result;
use clap::ValueEnum;
use pomona_types::{BLOCK_TOKENS, Replica};
use serde::Serialize;

use super::engine::{Runs, decode_rate, fitting, prefill_rate};
use super::prompts::Numbers;
use super::stats::Spread;
use crate::compose::Loaded;
use crate::generate::{Generated, Pending};

/// Lengths of prompts, as far as the model allows.
const CONTEXTS: [u32; 7] = [128, 256, 512, 1024, 2048, 4096, 8192];
/// Tokens whose decoding is timed after each.
const DECODED: u32 = 32;
/// Most requests that decode together.
pub const BATCH_MAX: u32 = 256;
/// Tokens of a batch: few from many requests, more from few.
const BATCH_TOKENS: u32 = 1024;
/// Tokens of the prompt that is read with each number of threads.
const THREADS_PROMPT: u32 = 256;
/// Requests of the mix.
const MIXED: usize = 100;
/// Lengths in it, each as likely as its double.
const MIXED_PROMPTS: (u32, u32) = (8, 256);
const MIXED_OUTPUTS: (u32, u32) = (4, 16);

/// A fall by more than this from one length to its double is a cliff: the weights' work for a token
/// stays the same and attention's doubles, so no more than half the rate can go for good reasons.
const FALL_BY_LENGTH: f64 = 2.0;
/// A larger batch must not be slower; this much is noise.
const FALL_BY_BATCH: f64 = 1.1;
/// Nor must more threads, even without cores for them, or lengths that differ, be by much.
const FALL_BY_LAYOUT: f64 = 1.25;

/// What is varied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Case {
    /// The length of a prompt: prefill, and decode after it
    Context,
    /// How many requests decode together
    Batch,
    /// Threads, up to twice the cores
    Threads,
    /// 100 requests at once, of equal lengths and of mixed ones
    Mixed,
}

/// What was found.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Sweep {
    /// One for each kind of variation.
    pub series: Vec<Series>,
    /// Neighbouring points with more of a fall than there is a reason for.
    pub cliffs: Vec<Fall>,
    /// The fall that comes closest to a cliff, or goes furthest beyond one.
    pub worst: Option<Fall>,
}

/// Rates along one axis.
#[derive(Clone, Debug, Serialize)]
pub struct Series {
    /// What was measured, in tokens/s.
    pub name: &'static str,
    /// What was varied.
    pub axis: &'static str,
    /// A neighbour that is slower by more than this factor is a cliff.
    pub fall_max: f64,
    /// In order.
    pub points: Vec<Point>,
}

/// One setting.
#[derive(Clone, Debug, Serialize)]
pub struct Point {
    /// The setting: a number, or a word.
    pub at: String,
    /// The rate there.
    pub tokens_per_s: Spread,
}

/// From one point to its neighbour.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Fall {
    /// The series' name.
    pub series: &'static str,
    /// The setting before.
    pub from: String,
    /// The setting behind.
    pub to: String,
    /// The rate before over the rate behind; less than 1 is a rise.
    pub factor: f64,
    /// What would be a cliff.
    pub fall_max: f64,
}

impl Sweep {
    /// Looks for cliffs.
    fn of(series: Vec<Series>) -> Sweep {
        let falls: Vec<Fall> = series.iter().flat_map(Series::falls).collect();
        let badness = |fall: &Fall| fall.factor / fall.fall_max;
        let worst = falls.iter().max_by(|a, b| badness(a).total_cmp(&badness(b))).cloned();
        let cliffs = falls.into_iter().filter(|fall| badness(fall) > 1.0).collect();
        Sweep { series, cliffs, worst }
    }

    /// A plot of all series, as SVG.
    pub fn svg(&self, title: &str) -> String {
        plot::svg(self, title)
    }
}

impl Series {
    fn falls(&self) -> impl Iterator<Item = Fall> {
        self.points.windows(2).map(|pair| Fall {
            series: self.name,
            from: pair[0].at.clone(),
            to: pair[1].at.clone(),
            factor: pair[0].tokens_per_s.median
                / pair[1].tokens_per_s.median.max(f64::MIN_POSITIVE),
            fall_max: self.fall_max,
        })
    }

    fn largest(&self) -> f64 {
        self.points.iter().map(|point| point.tokens_per_s.max).fold(0.0, f64::max)
    }
}

impl Display for Fall {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Fall { series, from, to, factor, fall_max } = self;
        write!(f, "{series}, from {from} to {to}: {factor:.2} times slower (cliff: {fall_max:.2})")
    }
}

impl Display for Sweep {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        const WIDTH: f64 = 40.0;
        for series in &self.series {
            let Series { name, axis, fall_max, points } = series;
            writeln!(f, "\n{name}, tokens/s by {axis} (cliff: {fall_max:.2} times slower)")?;
            for Point { at, tokens_per_s: t } in points {
                let range = format!("({:.1} to {:.1})", t.min, t.max);
                let bar = bar(WIDTH * t.median / series.largest().max(f64::MIN_POSITIVE));
                writeln!(f, "{at:>8} {:>9.1} {range:>20}  {bar}", t.median)?;
            }
        }
        writeln!(f)?;
        self.cliffs.iter().try_for_each(|cliff| writeln!(f, "CLIFF    {cliff}"))?;
        match &self.worst {
            Some(worst) => writeln!(f, "worst    {worst}"),
            None => writeln!(f, "worst    there was nothing to compare"),
        }
    }
}

/// A bar of so many characters, to an eighth.
fn bar(length: f64) -> String {
    const PARTS: [&str; 8] = ["", "▏", "▎", "▍", "▌", "▋", "▊", "▉"];
    let eighths = (length * 8.0).round().max(0.0) as usize;
    "█".repeat(eighths / 8) + PARTS[eighths % 8]
}

/// What to vary, how often, and on what.
pub struct Options<'a> {
    /// What is varied.
    pub cases: &'a [Case],
    /// Rounds; each measures every point once.
    pub repeats: usize,
    /// Numbers of threads.
    pub threads: &'a [u16],
    /// Starts an engine, with so many threads or with its default.
    pub load: &'a dyn Fn(Option<u16>) -> Result<Loaded>,
}

/// Measures.
pub fn measure(options: &Options<'_>) -> Result<Sweep> {
    let wanted = |case| options.cases.contains(&case);
    let mut rates = Rates::default();
    let one = [Case::Context, Case::Batch, Case::Mixed].into_iter().any(wanted);
    let loaded = if one { Some((options.load)(None)?) } else { None };
    let replica = loaded.as_ref().map(|loaded| loaded.replica.clone());
    // One for all rounds: prompts of a second one would be those of the first, and cached.
    let mut bench = replica.as_ref().map(|replica| Bench::new(replica.as_ref())).transpose()?;
    for _ in 0..options.repeats {
        if let Some(bench) = &mut bench {
            bench.round(options.cases, &mut rates)?;
        }
        if wanted(Case::Threads) {
            for threads in options.threads {
                let loaded = (options.load)(Some(*threads))?;
                let replica = loaded.replica.clone();
                Bench::new(replica.as_ref())?.threads(*threads, &mut rates)?;
                drop(replica);
                loaded.stop();
            }
        }
    }
    drop(replica);
    if let Some(loaded) = loaded {
        loaded.stop();
    }
    Ok(Sweep::of(rates.series()))
}

/// Name, axis and limit of a series.
type Head = (&'static str, &'static str, f64);

const PREFILL: Head = ("prefill", "tokens of the prompt", FALL_BY_LENGTH);
const DECODE: Head = ("decode", "tokens before", FALL_BY_LENGTH);
const BATCH: Head = ("decode together", "requests", FALL_BY_BATCH);
const THREADS_PREFILL: Head = ("prefill of 256", "threads", FALL_BY_LAYOUT);
const THREADS_DECODE: Head = ("decode of 32", "threads", FALL_BY_LAYOUT);
const MIX: Head = ("100 requests at once, in and out", "their lengths", FALL_BY_LAYOUT);

/// A setting, and the rates that its rounds brought.
type Measured = (String, Vec<f64>);

/// Rates of all rounds.
#[derive(Default)]
struct Rates(Vec<(Head, Vec<Measured>)>);

impl Rates {
    fn add(&mut self, head: Head, at: impl Display, rate: f64) {
        let series = find_or_push(&mut self.0, head);
        find_or_push(series, at.to_string()).push(rate);
    }

    fn series(self) -> Vec<Series> {
        let point = |(at, rates): Measured| Point { at, tokens_per_s: Spread::of(&rates) };
        let series = |((name, axis, fall_max), points): (Head, Vec<Measured>)| Series {
            name,
            axis,
            fall_max,
            points: points.into_iter().map(point).collect(),
        };
        self.0.into_iter().map(series).collect()
    }
}

/// The value of a key; a new one at the end where there is none.
fn find_or_push<K: PartialEq, V: Default>(list: &mut Vec<(K, V)>, key: K) -> &mut V {
    let at = list.iter().position(|(other, _)| *other == key).unwrap_or_else(|| {
        list.push((key, V::default()));
        list.len() - 1
    });
    &mut list[at].1
}

/// One engine at work.
struct Bench<'a> {
    replica: &'a dyn Replica,
    runs: Runs<'a>,
}

impl<'a> Bench<'a> {
    fn new(replica: &'a dyn Replica) -> Result<Bench<'a>> {
        let mut runs = Runs::new(replica);
        // Once without looking, so that weights are in memory and the pool is awake.
        runs.once(16, 8)?;
        Ok(Bench { replica, runs })
    }

    /// Every wanted point of one engine, once.
    fn round(&mut self, cases: &[Case], rates: &mut Rates) -> Result<()> {
        if cases.contains(&Case::Context) {
            self.contexts(rates)?;
        }
        if cases.contains(&Case::Batch) {
            self.batches(rates)?;
        }
        if cases.contains(&Case::Mixed) {
            self.mixed(rates)?;
        }
        Ok(())
    }

    fn contexts(&mut self, rates: &mut Rates) -> Result<()> {
        for tokens in fitting(&CONTEXTS, self.replica.info().max_model_len) {
            let run = self.runs.once(tokens, DECODED + 1)?;
            rates.add(PREFILL, tokens, prefill_rate(tokens, &run)?);
            rates.add(DECODE, tokens, decode_rate(&run));
        }
        Ok(())
    }

    fn batches(&mut self, rates: &mut Rates) -> Result<()> {
        let sizes = (0..=BATCH_MAX.ilog2()).map(|n| 1 << n);
        for size in sizes {
            let each = (BATCH_TOKENS / size).clamp(4, 32);
            let room = (each + 1).next_multiple_of(BLOCK_TOKENS) * size;
            if room > self.replica.info().kv_tokens {
                break;
            }
            // A prompt of one token: all begin to decode in one step, or nearly.
            let runs = self.together(&vec![(1, each + 1); size as usize])?;
            rates.add(BATCH, size, runs.iter().map(decode_rate).sum());
        }
        Ok(())
    }

    fn threads(&mut self, threads: u16, rates: &mut Rates) -> Result<()> {
        let run = self.runs.once(THREADS_PROMPT, DECODED + 1)?;
        rates.add(THREADS_PREFILL, threads, prefill_rate(THREADS_PROMPT, &run)?);
        rates.add(THREADS_DECODE, threads, decode_rate(&run));
        Ok(())
    }

    fn mixed(&mut self, rates: &mut Rates) -> Result<()> {
        let (mixed, equal) = mixed_lengths(self.replica.info().max_model_len);
        for (name, lengths) in [("equal", equal), ("mixed", mixed)] {
            let tokens: u32 = lengths.iter().map(|(prompt, output)| prompt + output).sum();
            let runs = self.together(&lengths)?;
            let begun = runs.iter().map(|run| run.submitted).min();
            let ended = runs.iter().filter_map(|run| run.times.last()).max();
            let seconds = begun.zip(ended).map_or(0.0, |(b, e)| (*e - b).as_secs_f64());
            rates.add(MIX, name, f64::from(tokens) / seconds.max(f64::MIN_POSITIVE));
        }
        Ok(())
    }

    /// Requests at once.
    fn together(&mut self, lengths: &[Lengths]) -> Result<Vec<Generated>> {
        let pending: Result<Vec<Pending>> =
            lengths.iter().map(|(prompt, output)| self.runs.submit(*prompt, *output)).collect();
        pending?.into_iter().map(Pending::wait).collect()
    }
}

/// Tokens of a prompt and of its answer.
type Lengths = (u32, u32);

/// Lengths of prompts and answers that differ, and as many equal ones of the same sums, nearly.
fn mixed_lengths(max_model_len: u32) -> (Vec<Lengths>, Vec<Lengths>) {
    let mut numbers = Numbers::new(1);
    let mut between = |(low, high): (u32, u32)| {
        let doublings = f64::from(high / low).log2() * numbers.below(1001) as f64 / 1000.0;
        (f64::from(low) * doublings.exp2()) as u32
    };
    let longest = max_model_len.saturating_sub(MIXED_OUTPUTS.1).max(1);
    let mixed: Vec<Lengths> =
        (0..MIXED).map(|_| (between(MIXED_PROMPTS).min(longest), between(MIXED_OUTPUTS))).collect();
    let mean =
        |part: fn(&Lengths) -> u32| mixed.iter().map(part).sum::<u32>().div_ceil(MIXED as u32);
    let equal = (mean(|(prompt, _)| *prompt), mean(|(_, output)| *output));
    (mixed, vec![equal; MIXED])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn series(points: &[(&str, f64)], fall_max: f64) -> Series {
        let point = |(at, rate): &(&str, f64)| Point {
            at: (*at).to_owned(),
            tokens_per_s: Spread::of(&[*rate]),
        };
        let points = points.iter().map(point).collect();
        Series { name: "decode <&>", axis: "tokens", fall_max, points }
    }

    #[test]
    fn a_fall_beyond_the_limit_is_a_cliff_and_the_worst_is_named() {
        let smooth = series(&[("1", 100.0), ("2", 60.0), ("4", 40.0)], 2.0);
        let steep = series(&[("1", 100.0), ("2", 120.0), ("4", 80.0)], 1.25);
        let sweep = Sweep::of(vec![smooth.clone(), steep]);
        let cliff = &sweep.cliffs[..];
        assert!(matches!(cliff, [fall] if fall.from == "2" && fall.to == "4"), "{cliff:?}");
        assert_eq!((sweep.worst.as_ref(), cliff[0].factor), (cliff.first(), 1.5));
        let sweep = Sweep::of(vec![smooth]);
        assert!(sweep.cliffs.is_empty() && sweep.worst.unwrap().to == "2");
    }

    #[test]
    fn the_table_has_a_bar_for_each_point() {
        let sweep = Sweep::of(vec![series(&[("1", 100.0), ("2", 20.0)], 2.0)]);
        let table = sweep.to_string();
        assert!(table.contains(&"█".repeat(40)) && table.contains(&"█".repeat(8)), "{table}");
        assert!(table.contains("CLIFF    decode <&>, from 1 to 2: 5.00 times"), "{table}");
        assert_eq!(bar(1.5), "█▌");
    }

    #[test]
    fn rounds_meet_in_their_point() {
        let mut rates = Rates::default();
        for rate in [1.0, 3.0] {
            rates.add(BATCH, 8, rate);
            rates.add(BATCH, 16, 2.0 * rate);
        }
        let series = rates.series();
        let medians: Vec<f64> = series[0].points.iter().map(|p| p.tokens_per_s.median).collect();
        assert_eq!((series.len(), medians), (1, vec![2.0, 4.0]));
    }

    #[test]
    fn a_mix_has_all_lengths_and_fits_the_model() {
        let (mixed, equal) = mixed_lengths(8192);
        let shortest = mixed.iter().map(|(prompt, _)| *prompt).min().unwrap();
        let longest = mixed.iter().map(|(prompt, _)| *prompt).max().unwrap();
        assert!((8..12).contains(&shortest) && (200..=256).contains(&longest));
        let sum = |list: &[(u32, u32)]| list.iter().map(|(a, b)| a + b).sum::<u32>();
        assert!(sum(&equal).abs_diff(sum(&mixed)) <= 2 * MIXED as u32);
        assert!(mixed_lengths(64).0.iter().all(|(prompt, output)| prompt + output <= 64));
    }
}
