//! What was measured, for people.

use std::io::{self, Write};

use pomona_policy::cost::{Algorithm, Operation};

use super::check::{Choice, Compared, ERROR_MAX, LOSS_MAX, Verdict};
use super::{Figure, Record, Run, Wire};
use crate::models::progress::human_bytes;

/// Most failures that are named, of each kind.
const NAMED_MAX: usize = 8;

/// Writes a record.
pub fn print(out: &mut impl Write, record: &Record) -> io::Result<()> {
    writeln!(out, "machine  {}, {} cores", record.cpu, record.cores)?;
    for run in &record.runs {
        print_run(out, run)?;
    }
    for verdict in &record.verdicts {
        print_verdict(out, verdict)?;
    }
    writeln!(out, "\n{}", record.neighbours.words())
}

fn print_run(out: &mut impl Write, run: &Run) -> io::Result<()> {
    let setting = run.job.setting();
    let provider = run.job.provider.as_ref().map(|name| format!(" ({name})"));
    let limit = if run.job.wire == Wire::Shm { "copy" } else { "socket" };
    writeln!(
        out,
        "\n{} ranks over {}{}: medians in us, and where eight in ten of the calls lie",
        setting.ranks,
        setting.transport.name(),
        provider.unwrap_or_default(),
    )?;
    write!(out, "all-reduce")?;
    for algorithm in Algorithm::ALL {
        write!(out, "{:>23}", algorithm.name())?;
    }
    writeln!(out, "  of {limit}")?;
    for bytes in &run.job.sizes {
        let sums = Algorithm::ALL.map(|one| run.figure(Operation::AllReduce(one), *bytes));
        row(out, *bytes, &sums)?;
        let best = sums.iter().flatten().min_by(|a, b| a.us.p50.total_cmp(&b.us.p50));
        writeln!(out, "{}", share(best.copied()))?;
    }
    let others = [Operation::AllGather, Operation::Broadcast, Operation::SendReceive];
    write!(out, "other calls")?;
    for (index, operation) in others.iter().enumerate() {
        let width = if index == 0 { 22 } else { 23 };
        write!(out, "{:>width$}", operation.name())?;
    }
    writeln!(out, "  of {limit} {limit:>10}")?;
    for bytes in &run.job.sizes {
        let figures = others.map(|operation| run.figure(operation, *bytes));
        row(out, *bytes, &figures)?;
        let limit = run.limits.iter().find(|limit| limit.bytes == *bytes);
        let limit = limit.map_or(String::new(), |limit| time(limit.micros));
        writeln!(out, "{} {limit:>10}", share(figures[2]))?;
    }
    match run.figure(Operation::Barrier, 0) {
        Some(figure) => writeln!(out, "barrier   {:>23}", spread(figure)),
        None => Ok(()),
    }
}

fn row(out: &mut impl Write, bytes: usize, figures: &[Option<&Figure>]) -> io::Result<()> {
    write!(out, "{:>10}", human_bytes(bytes as u64))?;
    for figure in figures {
        write!(out, "{:>23}", figure.map_or(String::new(), spread))?;
    }
    Ok(())
}

fn spread(figure: &Figure) -> String {
    let us = figure.us;
    format!("{} ({} to {})", time(us.p50), time(us.p10), time(us.p90))
}

/// Three digits that count.
fn time(micros: f64) -> String {
    match micros {
        ..0.1 => format!("{micros:.3}"),
        ..10.0 => format!("{micros:.2}"),
        ..100.0 => format!("{micros:.1}"),
        _ => format!("{micros:.0}"),
    }
}

fn share(figure: Option<&Figure>) -> String {
    let share = figure.and_then(|figure| figure.of_limit);
    format!("{:>7}", share.map_or(String::new(), |share| format!("{:.0} %", share * 100.0)))
}

fn call(operation: Operation, bytes: usize) -> String {
    match operation {
        Operation::Barrier => operation.to_string(),
        _ => format!("{operation}, {}", human_bytes(bytes as u64)),
    }
}

fn print_verdict(out: &mut impl Write, verdict: &Verdict) -> io::Result<()> {
    let setting = verdict.setting;
    writeln!(out, "\n{} ranks over {}, predicted:", setting.ranks, setting.transport.name())?;
    let mut errors: Vec<f64> = verdict.calls.iter().map(Compared::error).collect();
    errors.sort_by(f64::total_cmp);
    let within = errors.iter().filter(|error| **error <= ERROR_MAX).count();
    writeln!(
        out,
        "  {within} of {} calls within {:.0} %; the middle one is {:.0} % off, the last {:.0} %",
        errors.len(),
        ERROR_MAX * 100.0,
        errors.get(errors.len() / 2).unwrap_or(&0.0) * 100.0,
        errors.last().unwrap_or(&0.0) * 100.0,
    )?;
    let operations = Operation::all().filter_map(|one| Some((one, verdict.middle_error(one)?)));
    let middle = operations.map(|(one, error)| format!("{one} {:.0} %", error * 100.0));
    writeln!(out, "  the middle ones of each: {}", middle.collect::<Vec<_>>().join(", "))?;
    for Compared { operation, bytes, predicted, measured } in verdict.wrong().take(NAMED_MAX) {
        let (predicted, measured) = (time(*predicted), time(*measured));
        let what = call(*operation, *bytes);
        writeln!(out, "    {what}: {predicted} us predicted, {measured} us measured")?;
    }
    let losses = || verdict.choices.iter().map(|choice| choice.loss);
    writeln!(
        out,
        "  {} of {} choices within {LOSS_MAX} times the best; the worst took {:.2} times as long",
        losses().filter(|loss| *loss <= LOSS_MAX).count(),
        verdict.choices.len(),
        losses().fold(1.0, f64::max),
    )?;
    for Choice { bytes, chosen, best, loss } in verdict.bad().take(NAMED_MAX) {
        let (chosen, best) = (call(*chosen, *bytes), call(*best, *bytes));
        writeln!(out, "    {chosen} took {loss:.2} times as long as {best}")?;
    }
    Ok(())
}
