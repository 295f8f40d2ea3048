//! Prometheus' text format ("Exposition formats", version 0.0.4).

use std::fmt::{Display, Write};

use super::histogram::Histogram;

/// The text under construction.
#[derive(Default)]
pub(crate) struct Exposition {
    text: String,
}

/// Whose number: label names with values.
pub(crate) type Labels<'a> = &'a [(&'a str, &'a str)];

impl Exposition {
    /// Begins a metric; its samples follow.
    pub(crate) fn metric(&mut self, name: &str, kind: &str, help: &str) {
        self.line(format_args!("# HELP {name} {help}"));
        self.line(format_args!("# TYPE {name} {kind}"));
    }

    /// One number.
    pub(crate) fn sample(&mut self, name: &str, labels: Labels<'_>, value: impl Display) {
        // Some models have thousands: nothing is made here but the text.
        self.text.push_str(name);
        self.text.push('{');
        render(labels, &mut self.text);
        self.line(format_args!("}} {value}"));
    }

    /// All the numbers of a histogram.
    pub(crate) fn histogram(&mut self, name: &str, labels: Labels<'_>, histogram: &Histogram) {
        let mut of = String::new();
        render(labels, &mut of);
        let (below, total, sum) = histogram.snapshot();
        for (bound, count) in below {
            self.line(format_args!("{name}_bucket{{{of},le=\"{bound:?}\"}} {count}"));
        }
        self.line(format_args!("{name}_bucket{{{of},le=\"+Inf\"}} {total}"));
        self.line(format_args!("{name}_sum{{{of}}} {sum}"));
        self.line(format_args!("{name}_count{{{of}}} {total}"));
    }

    /// The whole text.
    pub(crate) fn finish(self) -> String {
        self.text
    }

    fn line(&mut self, line: std::fmt::Arguments<'_>) {
        writeln!(self.text, "{line}").expect("a String takes every write");
    }
}

fn render(labels: Labels<'_>, text: &mut String) {
    for (index, (name, value)) in labels.iter().enumerate() {
        text.push_str(if index == 0 { "" } else { "," });
        text.push_str(name);
        text.push_str("=\"");
        for letter in value.chars() {
            match letter {
                '\\' => text.push_str(r"\\"),
                '"' => text.push_str(r#"\""#),
                '\n' => text.push_str(r"\n"),
                letter => text.push(letter),
            }
        }
        text.push('"');
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_escaped() {
        let mut text = Exposition::default();
        text.sample("m", &[("model_name", "a\"b\\c\nd")], 1);
        assert_eq!(text.finish(), "m{model_name=\"a\\\"b\\\\c\\nd\"} 1\n");
    }

    #[test]
    fn a_histogram_ends_with_infinity_sum_and_count() {
        let histogram = Histogram::new(&[0.5]);
        histogram.observe(2.0);
        let mut text = Exposition::default();
        text.histogram("h", &[("a", "b")], &histogram);
        let want = "h_bucket{a=\"b\",le=\"0.5\"} 0\nh_bucket{a=\"b\",le=\"+Inf\"} 1\n\
                    h_sum{a=\"b\"} 2\nh_count{a=\"b\"} 1\n";
        assert_eq!(text.finish(), want);
    }
}
