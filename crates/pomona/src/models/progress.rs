//! Progress of a long transfer: a bar on a terminal, a line now and then elsewhere. Goes to
//! standard error, so that standard output stays clean.

use std::io::{IsTerminal, Write, stderr};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Time between two lines when there is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// Shows how many of a known or unknown number of bytes are there. Gone from the terminal when
/// dropped.
pub struct Progress {
    label: String,
    total: Option<u64>,
    bar: Option<ProgressBar>,
    started: Instant,
    last_line: Instant,
    first: Option<u64>,
    now: u64,
}

impl Progress {
    /// Begins; `label` says what is under way.
    pub fn new(label: &str, total: Option<u64>) -> Progress {
        let bar = stderr().is_terminal().then(|| bar(label, total));
        let now = Instant::now();
        let label = label.to_owned();
        Progress { label, total, bar, started: now, last_line: now, first: None, now: 0 }
    }

    /// `done` bytes are there, counting what an earlier attempt left.
    pub fn set(&mut self, done: u64) {
        let first = *self.first.get_or_insert_with(|| {
            match (&self.bar, self.total) {
                (Some(bar), _) => {
                    bar.set_position(done);
                    bar.reset_eta();
                }
                (None, Some(total)) => say(&format!("{}: {}", self.label, human_bytes(total))),
                (None, None) => say(&self.label),
            }
            done
        });
        self.now = done;
        if let Some(bar) = &self.bar {
            bar.set_position(done);
        } else if self.last_line.elapsed() >= LINE_EVERY {
            self.last_line = Instant::now();
            let rate = (done - first.min(done)) as f64 / self.started.elapsed().as_secs_f64();
            let share = self.total.filter(|t| *t > 0).map_or(String::new(), |total| {
                format!(" of {} ({} %)", human_bytes(total), done * 100 / total)
            });
            let rate = human_bytes(rate as u64);
            say(&format!("{}: {}{share}, {rate}/s", self.label, human_bytes(done)));
        }
    }

    /// Bytes there at the last [`Progress::set`].
    pub fn position(&self) -> u64 {
        self.now
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

fn bar(label: &str, total: Option<u64>) -> ProgressBar {
    let template = match total {
        Some(_) => {
            "{msg} {wide_bar:.green/dim} {binary_bytes} / {binary_total_bytes}, \
             {binary_bytes_per_sec}, {eta} left"
        }
        None => "{spinner} {msg} {binary_bytes}, {binary_bytes_per_sec}",
    };
    let style = ProgressStyle::with_template(template)
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .progress_chars("━╸─");
    let bar = ProgressBar::with_draw_target(total, ProgressDrawTarget::stderr());
    bar.set_style(style);
    bar.set_message(label.to_owned());
    bar
}

/// Writes a line to standard error; a closed one is not a reason to stop.
pub fn say(line: &str) {
    let _ = writeln!(stderr(), "{line}");
}

/// `1536` as `1.5 KiB`.
pub fn human_bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    match unit {
        0 => format!("{bytes} B"),
        _ if value < 10.0 => format!("{value:.1} {}", UNITS[unit]),
        _ => format!("{value:.0} {}", UNITS[unit]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_readable() {
        for (bytes, text) in
            [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (98_362_432, "94 MiB")]
        {
            assert_eq!(human_bytes(bytes), text);
        }
    }
}
