//! What a measurement found, as JSON and as a table. The structs are the JSON; fields are only
//! added, never renamed, so that records stay comparable.

use std::fmt::Write;

use serde::Serialize;

use super::kernels::Kernel;
use super::load::Level;
use super::others::Neighbours;
use super::quality::Quality;
use super::startup::Start;
use super::stats::Spread;
use super::sweep::Sweep;
use crate::models::progress::human_bytes;

/// Everything that a run of `pomona bench` found.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Version of the client that measured.
    pub pomona: String,
    /// The machine and its limits.
    pub machine: Machine,
    /// The model, where its file is at hand.
    pub model: Option<Facts>,
    /// Speed of the engine alone, one request at a time.
    pub engine: Vec<Speed>,
    /// What speculation did there.
    pub drafts: Option<Drafts>,
    /// Whose server answered: `this binary` or an address.
    pub server: String,
    /// From the start of the server's process to its ready line.
    pub ready_s: Option<Spread>,
    /// Memory of the server's process.
    pub memory: Option<Memory>,
    /// Starts, where they were asked for.
    pub startup: Vec<Start>,
    /// Served load by number of clients.
    pub served: Vec<Served>,
    /// How well the model predicts a text.
    pub quality: Option<Quality>,
    /// Kinds of matrices by themselves.
    pub kernels: Vec<Kernel>,
    /// Another server under the same load, in turns.
    pub peer: Option<Peer>,
    /// Series over lengths, batches, threads and mixes.
    pub sweep: Option<Sweep>,
    /// Whether the machine had time.
    pub neighbours: Neighbours,
}

/// Another server, measured in turns with the first.
#[derive(Clone, Debug, Serialize)]
pub struct Peer {
    /// Its address.
    pub url: String,
    /// By number of clients.
    pub served: Vec<Versus>,
}

/// What clients saw of the other server, and the first one's rates over its. A ratio is taken in
/// each repetition.
#[derive(Clone, Debug, Serialize)]
pub struct Versus {
    /// What clients saw.
    #[serde(flatten)]
    pub level: Level,
    /// Of generated tokens per second: more than 1 is for the first server.
    pub output_ratio: Spread,
    /// Of the times to the first token: less than 1 is for the first server.
    pub ttft_ratio: Spread,
}

/// What the machine can do at most, measured now.
#[derive(Clone, Debug, Serialize)]
pub struct Machine {
    /// The processor's name.
    pub cpu: String,
    /// Threads that measured and that the engine uses.
    pub threads: usize,
    /// Instruction tier of the kernels.
    pub isa: String,
    /// Memory read by all threads together, GB/s.
    pub read_gb_per_s: f64,
    /// f32 multiply-adds of all threads, two operations each, GFLOP/s.
    pub f32_gflop_per_s: f64,
    /// bf16 multiply-adds, likewise; 0 without an instruction.
    pub bf16_gflop_per_s: f64,
    /// 8-bit integer multiply-adds, two operations each, GOP/s.
    pub int8_gop_per_s: f64,
}

/// What a model costs: bytes and operations.
#[derive(Clone, Debug, Serialize)]
pub struct Facts {
    /// As named.
    pub name: String,
    /// `llama`, `gemma3`, ...
    pub architecture: String,
    /// Bytes of all weights.
    pub weight_bytes: u64,
    /// Bytes of weights that a decode step of one token reads.
    pub step_bytes: u64,
    /// Bytes of all experts; none where there are no experts.
    pub expert_bytes: u64,
    /// Which part of the experts a token meets.
    pub expert_share: f64,
    /// Weights of the layers that a token meets: two operations for each.
    pub layer_weights: u64,
    /// Weights of the output matrix: two operations for each sampled token.
    pub output_weights: u64,
    /// Bytes of KV memory reserved.
    pub kv_bytes: u64,
    /// KV bytes written for each token.
    pub kv_token_bytes: u64,
}

impl Facts {
    /// Bytes of weights that a step of so many tokens reads. Of experts, those that some token is
    /// expected to meet where all are chosen equally often.
    pub fn bytes_of_step(&self, tokens: f64) -> f64 {
        let missed = |tokens: f64| (1.0 - self.expert_share).powf(tokens);
        let more = missed(1.0) - missed(tokens);
        self.step_bytes as f64 + self.expert_bytes as f64 * more
    }
}

/// A rate against the machine's limits.
#[derive(Clone, Debug, Serialize)]
pub struct Speed {
    /// What was done.
    pub what: String,
    /// Tokens per second.
    pub tokens_per_s: Spread,
    /// How that compares.
    pub limits: Limits,
}

/// Bytes and operations of a rate, and the share of the machine's peak that they are.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Limits {
    /// Bytes of weights and KV that must be read, GB/s.
    pub gb_per_s: f64,
    /// Operations that must be done, GFLOP/s.
    pub gflop_per_s: f64,
    /// Share of the measured read bandwidth.
    pub of_bandwidth: f64,
    /// Share of the measured f32 peak.
    pub of_f32_peak: f64,
    /// Share of the measured bf16 peak.
    pub of_bf16_peak: f64,
    /// Share of the measured 8-bit peak.
    pub of_int8_peak: f64,
}

/// Drafts of speculative decoding.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Drafts {
    /// Tokens drafted.
    pub drafted: u64,
    /// Those that were right.
    pub accepted: u64,
}

/// A level of load with its limits.
#[derive(Clone, Debug, Serialize)]
pub struct Served {
    /// What clients saw.
    #[serde(flatten)]
    pub level: Level,
    /// Where the model's costs are known.
    pub limits: Option<Limits>,
}

/// Memory of a server's process after the load, bytes.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Memory {
    /// Resident at most.
    pub resident_peak: u64,
    /// KV that the load can have touched at most: all of it, or what its tokens filled.
    pub kv_touched_max: u64,
    /// Resident beside weights and that KV; negative when not all of those were touched.
    pub beside_weights_and_kv: i64,
}

impl Machine {
    /// The better of two measurements of one machine, figure by figure.
    pub fn or_better(&self, other: &Machine) -> Machine {
        Machine {
            read_gb_per_s: self.read_gb_per_s.max(other.read_gb_per_s),
            f32_gflop_per_s: self.f32_gflop_per_s.max(other.f32_gflop_per_s),
            bf16_gflop_per_s: self.bf16_gflop_per_s.max(other.bf16_gflop_per_s),
            int8_gop_per_s: self.int8_gop_per_s.max(other.int8_gop_per_s),
            ..self.clone()
        }
    }

    /// The shares that `gb_per_s` and `gflop_per_s` are.
    pub fn limits(&self, gb_per_s: f64, gflop_per_s: f64) -> Limits {
        let share = |value: f64, peak: f64| if peak > 0.0 { value / peak } else { 0.0 };
        Limits {
            gb_per_s,
            gflop_per_s,
            of_bandwidth: share(gb_per_s, self.read_gb_per_s),
            of_f32_peak: share(gflop_per_s, self.f32_gflop_per_s),
            of_bf16_peak: share(gflop_per_s, self.bf16_gflop_per_s),
            of_int8_peak: share(gflop_per_s, self.int8_gop_per_s),
        }
    }
}

impl Report {
    /// Takes a later measurement of the machine into account: limits are the most that was seen.
    pub fn machine_again(&mut self, later: &Machine) {
        self.machine = self.machine.or_better(later);
        let rows = self.engine.iter_mut().map(|row| &mut row.limits);
        for limits in rows.chain(self.served.iter_mut().filter_map(|row| row.limits.as_mut())) {
            *limits = self.machine.limits(limits.gb_per_s, limits.gflop_per_s);
        }
    }

    /// A report of a machine, with nothing in it yet.
    pub fn new(machine: Machine, server: String) -> Report {
        Report {
            pomona: env!("CARGO_PKG_VERSION").to_owned(),
            machine,
            model: None,
            engine: Vec::new(),
            drafts: None,
            server,
            ready_s: None,
            memory: None,
            startup: Vec::new(),
            served: Vec::new(),
            quality: None,
            kernels: Vec::new(),
            peer: None,
            sweep: None,
            neighbours: Neighbours::default(),
        }
    }

    /// The table.
    pub fn table(&self) -> String {
        let mut out = String::new();
        self.write(&mut out).expect("writing to a String does not fail");
        out
    }

    fn write(&self, out: &mut String) -> std::fmt::Result {
        let m = &self.machine;
        writeln!(out, "machine  {}, {} threads, {} kernels", m.cpu, m.threads, m.isa)?;
        writeln!(
            out,
            "         reads {:.1} GB/s, multiplies {:.0} GFLOP/s in f32, {:.0} in bf16, {:.0} \
             GOP/s in int8",
            m.read_gb_per_s, m.f32_gflop_per_s, m.bf16_gflop_per_s, m.int8_gop_per_s
        )?;
        if let Some(model) = &self.model {
            let million = (model.layer_weights + model.output_weights) as f64 / 1e6;
            writeln!(
                out,
                "model    {} ({}, {million:.0} M weights used, {}); a token of KV is {}",
                model.name,
                model.architecture,
                human_bytes(model.weight_bytes),
                human_bytes(model.kv_token_bytes)
            )?;
        }
        writeln!(out, "server   {}", self.server)?;
        if self.quality.is_none() {
            writeln!(out, "{}", self.neighbours.words())?;
        }
        if let Some(ready) = &self.ready_s {
            writeln!(
                out,
                "ready    after {:.2} s ({:.2} to {:.2})",
                ready.median, ready.min, ready.max
            )?;
        }
        self.write_memory(out)?;
        if !self.startup.is_empty() {
            self.write_startup(out)?;
        }
        if !self.engine.is_empty() {
            self.write_engine(out)?;
        }
        if !self.served.is_empty() {
            self.write_served(out)?;
        }
        if let Some(peer) = &self.peer {
            write_peer(peer, out)?;
        }
        if !self.kernels.is_empty() {
            self.write_kernels(out)?;
        }
        if let Some(sweep) = &self.sweep {
            write!(out, "{sweep}")?;
        }
        self.write_quality(out)
    }

    fn write_kernels(&self, out: &mut String) -> std::fmt::Result {
        writeln!(
            out,
            "\nmatrices  tokens        us      (min to max)     GB/s  of peak    GOP/s  of peak"
        )?;
        for kernel in &self.kernels {
            let Kernel { tensors, count, format, rows, cols, path, speeds } = kernel;
            writeln!(out, "{count} of {format}, {rows} x {cols}: {}; {path}", tensors.join(", "))?;
            for speed in speeds {
                let us = &speed.us;
                writeln!(
                    out,
                    "{:>16} {:>9.1} {:>17} {:>8.1} {:>7.0}% {:>8.0} {:>7.0}%",
                    speed.tokens,
                    us.median,
                    format!("({:.1} to {:.1})", us.min, us.max),
                    speed.gb_per_s,
                    speed.of_bandwidth * 100.0,
                    speed.gop_per_s,
                    speed.of_peak * 100.0,
                )?;
            }
        }
        Ok(())
    }

    fn write_quality(&self, out: &mut String) -> std::fmt::Result {
        let Some(quality) = &self.quality else { return Ok(()) };
        let Quality { text, context, tokens, perplexity, standard_error, reference } = quality;
        writeln!(out, "\nquality on {text}, {tokens} tokens in contexts of {context}")?;
        writeln!(out, "perplexity         {perplexity:.4} ± {standard_error:.4}")?;
        let Some(reference) = reference else { return Ok(()) };
        writeln!(out, "  reference        {:.4} ({})", reference.perplexity, reference.model)?;
        writeln!(
            out,
            "KL divergence      {:.2e} in the mean, {:.2e} at most",
            reference.kl_mean, reference.kl_max
        )?;
        writeln!(out, "top-1 agreement    {:.2} %", reference.top1_agreement * 100.0)
    }

    fn write_memory(&self, out: &mut String) -> std::fmt::Result {
        let (Some(memory), Some(model)) = (&self.memory, &self.model) else { return Ok(()) };
        let beside = memory.beside_weights_and_kv;
        let sign = if beside < 0 { "-" } else { "" };
        writeln!(
            out,
            "memory   {} resident at most: weights {}, KV up to {} (of {} reserved), beside them \
             {sign}{}",
            human_bytes(memory.resident_peak),
            human_bytes(model.weight_bytes),
            human_bytes(memory.kv_touched_max),
            human_bytes(model.kv_bytes),
            human_bytes(beside.unsigned_abs()),
        )
    }

    fn write_startup(&self, out: &mut String) -> std::fmt::Result {
        writeln!(
            out,
            "\nstart, ms        plain read  listening    ready     (min to max)  first token     \
             (min to max)  peak memory  beside weights"
        )?;
        for row in &self.startup {
            let range = |t: &Spread| format!("({:.0} to {:.0})", t.min, t.max);
            let sign = if row.beside_weights < 0.0 { "-" } else { "" };
            writeln!(
                out,
                "{:<16} {:>10} {:>10.0} {:>8.0} {:>16} {:>12.0} {:>16} {:>12} {:>15}",
                row.what,
                row.read_ms.as_ref().map_or("-".to_owned(), |ms| format!("{:.0}", ms.median)),
                row.listening_ms.median,
                row.ready_ms.median,
                range(&row.ready_ms),
                row.first_token_ms.median,
                range(&row.first_token_ms),
                human_bytes(row.resident_peak as u64),
                format!("{sign}{}", human_bytes(row.beside_weights.abs() as u64)),
            )?;
        }
        Ok(())
    }

    fn write_engine(&self, out: &mut String) -> std::fmt::Result {
        writeln!(
            out,
            "\none request       tokens/s      (min to max)     GB/s  of peak   GFLOP/s  \
             of f32  of bf16  of int8"
        )?;
        for row in &self.engine {
            let (t, l) = (&row.tokens_per_s, &row.limits);
            writeln!(
                out,
                "{:<16} {:>9.1} {:>17} {:>8.1} {:>7.0}% {:>9.1} {:>6.0}% {:>7.0}% {:>7.0}%",
                row.what,
                t.median,
                format!("({:.1} to {:.1})", t.min, t.max),
                l.gb_per_s,
                l.of_bandwidth * 100.0,
                l.gflop_per_s,
                l.of_f32_peak * 100.0,
                l.of_bf16_peak * 100.0,
                l.of_int8_peak * 100.0,
            )?;
        }
        if let Some(Drafts { drafted, accepted }) = self.drafts {
            let share = 100.0 * accepted as f64 / drafted.max(1) as f64;
            writeln!(out, "drafts           {accepted} of {drafted} accepted ({share:.0}%)")?;
        }
        Ok(())
    }

    fn write_served(&self, out: &mut String) -> std::fmt::Result {
        let first = &self.served[0].level;
        writeln!(
            out,
            "\nserved over HTTP: about {:.0} tokens in, {:.0} out; times in ms",
            first.input_tokens_mean, first.output_tokens_mean
        )?;
        writeln!(
            out,
            "clients  out tok/s     (min to max)  all tok/s   TTFT p50      p99  token p50      \
             p99  of GB/s  of f32  of bf16  of int8  failed"
        )?;
        for row in &self.served {
            let (level, limits) = (&row.level, row.limits);
            let t = &level.output_tokens_per_s;
            let share = |f: fn(&Limits) -> f64| match &limits {
                Some(limits) => format!("{:.0}%", f(limits) * 100.0),
                None => "-".to_owned(),
            };
            writeln!(
                out,
                "{:>7} {:>10.1} {:>16} {:>10.1} {:>10.1} {:>8.1} {:>10.1} {:>8.1} {:>8} {:>7} \
                 {:>8} {:>8} {:>7}",
                level.clients,
                t.median,
                format!("({:.1} to {:.1})", t.min, t.max),
                level.total_tokens_per_s.median,
                level.ttft_ms.p50,
                level.ttft_ms.p99,
                level.inter_token_ms.p50,
                level.inter_token_ms.p99,
                share(|l| l.of_bandwidth),
                share(|l| l.of_f32_peak),
                share(|l| l.of_bf16_peak),
                share(|l| l.of_int8_peak),
                level.failed,
            )?;
            if let Some(why) = &level.first_failure {
                writeln!(out, "         a request failed: {why}")?;
            }
        }
        Ok(())
    }
}

fn write_peer(peer: &Peer, out: &mut String) -> std::fmt::Result {
    writeln!(out, "\nbeside {}, in turns", peer.url)?;
    writeln!(
        out,
        "clients  its tok/s     (min to max)   TTFT p50  tok/s ratio     (min to max)  \
         TTFT ratio     (min to max)  failed"
    )?;
    for row in &peer.served {
        let range =
            |s: &Spread, digits: usize| format!("({:.digits$} to {:.digits$})", s.min, s.max);
        let (t, output, ttft) =
            (&row.level.output_tokens_per_s, &row.output_ratio, &row.ttft_ratio);
        writeln!(
            out,
            "{:>7} {:>10.1} {:>16} {:>10.1} {:>12.2} {:>16} {:>11.2} {:>16} {:>7}",
            row.level.clients,
            t.median,
            range(t, 1),
            row.level.ttft_ms.p50,
            output.median,
            range(output, 2),
            ttft.median,
            range(ttft, 2),
            row.level.failed,
        )?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::quality::Comparison;
    use super::*;

    fn machine() -> Machine {
        Machine {
            cpu: "a processor".into(),
            threads: 2,
            isa: "avx2".into(),
            read_gb_per_s: 20.0,
            f32_gflop_per_s: 100.0,
            bf16_gflop_per_s: 200.0,
            int8_gop_per_s: 400.0,
        }
    }

    #[test]
    fn shares_are_of_the_measured_peaks() {
        let limits = machine().limits(10.0, 50.0);
        assert_eq!((limits.of_bandwidth, limits.of_f32_peak), (0.5, 0.5));
        assert_eq!((limits.of_bf16_peak, limits.of_int8_peak), (0.25, 0.125));
    }

    #[test]
    fn shares_are_of_the_most_that_was_seen() {
        let mut report = Report::new(machine(), String::new());
        let tokens_per_s = Spread::of(&[1.0]);
        let limits = machine().limits(10.0, 50.0);
        report.engine.push(Speed { what: "decode".into(), tokens_per_s, limits });
        report.machine_again(&Machine { f32_gflop_per_s: 200.0, read_gb_per_s: 1.0, ..machine() });
        let limits = report.engine[0].limits;
        assert_eq!((limits.of_bandwidth, limits.of_f32_peak), (0.5, 0.25));
    }

    #[test]
    fn a_step_of_more_tokens_reads_more_experts() {
        // Ten bytes for all tokens, and four experts of two bytes, of which each token meets one.
        let facts = Facts {
            name: String::new(),
            architecture: String::new(),
            weight_bytes: 18,
            step_bytes: 12,
            expert_bytes: 8,
            expert_share: 0.25,
            layer_weights: 0,
            output_weights: 0,
            kv_bytes: 0,
            kv_token_bytes: 0,
        };
        assert_eq!(facts.bytes_of_step(1.0), 12.0);
        // A quarter by the first, a quarter of the rest by the second.
        assert_eq!(facts.bytes_of_step(2.0), 10.0 + 8.0 * (0.25 + 0.75 * 0.25));
        assert!((facts.bytes_of_step(1e3) - 18.0).abs() < 1e-9);
        let dense = Facts { expert_bytes: 0, expert_share: 1.0, ..facts };
        assert_eq!(dense.bytes_of_step(1e3), 12.0);
    }

    #[test]
    fn a_machine_that_measured_nothing_gives_no_shares() {
        let none = Machine { read_gb_per_s: 0.0, ..machine() };
        assert_eq!(none.limits(10.0, 50.0).of_bandwidth, 0.0);
    }

    #[test]
    fn the_table_has_a_line_for_each_row() {
        let report = Report {
            engine: vec![Speed {
                what: "decode".into(),
                tokens_per_s: Spread::of(&[50.0]),
                limits: machine().limits(10.0, 50.0),
            }],
            drafts: Some(Drafts { drafted: 8, accepted: 6 }),
            served: vec![Served { level: Level::default(), limits: None }],
            peer: Some(Peer {
                url: "http://peer".into(),
                served: vec![Versus {
                    level: Level::default(),
                    output_ratio: Spread::of(&[1.5, 2.5, 2.0]),
                    ttft_ratio: Spread::of(&[0.5]),
                }],
            }),
            quality: Some(Quality {
                text: "a text".into(),
                context: 512,
                tokens: 255,
                perplexity: 12.0,
                standard_error: 0.5,
                reference: Some(Comparison {
                    model: "itself".into(),
                    perplexity: 11.0,
                    kl_mean: 0.01,
                    kl_max: 0.1,
                    top1_agreement: 0.9,
                }),
            }),
            ..Report::new(machine(), "http://h".into())
        };
        let table = report.table();
        assert_eq!(table.lines().count(), 21, "{table}");
        assert!(!table.contains("others"), "they do not change quality: {table}");
        assert!(table.contains("2.00   (1.50 to 2.50)"), "{table}");
        assert!(table.contains("6 of 8 accepted (75%)"), "{table}");
        assert!(table.contains("90.00 %") && table.contains("1.00e-2 in the mean"), "{table}");
        assert!(table.contains("decode") && table.contains("50%"), "{table}");
    }
}
