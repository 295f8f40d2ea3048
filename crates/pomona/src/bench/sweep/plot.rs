//! A sweep as an SVG picture: a small plot for each series, with axes and spread, cliffs in red.

use std::fmt::Write;

use super::{Series, Sweep};

/// Plots side by side.
const ACROSS: usize = 2;
/// Size of a plot with its labels.
const WIDTH: f64 = 430.0;
const HEIGHT: f64 = 250.0;
/// The part of it between the axes.
const LEFT: f64 = 62.0;
const RIGHT: f64 = 416.0;
const TOP: f64 = 34.0;
const BOTTOM: f64 = 196.0;
/// Room for the title above all plots.
const TITLE: f64 = 30.0;
/// Lines across.
const STEPS: u32 = 4;

/// Draws.
pub(super) fn svg(sweep: &Sweep, title: &str) -> String {
    let mut out = String::new();
    draw(sweep, title, &mut out).expect("writing to a String does not fail");
    out
}

fn draw(sweep: &Sweep, title: &str, out: &mut String) -> std::fmt::Result {
    let width = WIDTH * ACROSS as f64;
    let height = TITLE + HEIGHT * sweep.series.len().div_ceil(ACROSS) as f64;
    writeln!(
        out,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" \
         font-family=\"sans-serif\" font-size=\"11\" fill=\"#222\">"
    )?;
    writeln!(out, "<rect width=\"{width}\" height=\"{height}\" fill=\"#fff\"/>")?;
    let middle = width / 2.0;
    text(out, (middle, 20.0), "middle", "font-size=\"14\"", title)?;
    for (i, series) in sweep.series.iter().enumerate() {
        let (x, y) = ((i % ACROSS) as f64 * WIDTH, TITLE + (i / ACROSS) as f64 * HEIGHT);
        writeln!(out, "<g transform=\"translate({x} {y})\">")?;
        plot(series, out)?;
        writeln!(out, "</g>")?;
    }
    writeln!(out, "</svg>")
}

fn plot(series: &Series, out: &mut String) -> std::fmt::Result {
    let top = round_up(series.largest());
    let y = |rate: f64| BOTTOM - (BOTTOM - TOP) * rate / top;
    let step = (RIGHT - LEFT) / series.points.len().max(1) as f64;
    let x = |i: usize| LEFT + step * (i as f64 + 0.5);
    let heading = format!("{}, tokens/s", series.name);
    text(out, (LEFT, TOP - 14.0), "start", "font-weight=\"bold\"", &heading)?;
    for i in 0..=STEPS {
        let rate = top * f64::from(i) / f64::from(STEPS);
        let at = y(rate);
        let grey = if i == 0 { "#222" } else { "#ddd" };
        line(out, [(LEFT, at), (RIGHT, at)], grey, 1)?;
        text(out, (LEFT - 6.0, at + 4.0), "end", "", &number(rate))?;
    }
    line(out, [(LEFT, TOP), (LEFT, BOTTOM)], "#222", 1)?;
    for (i, point) in series.points.iter().enumerate() {
        let rates = &point.tokens_per_s;
        text(out, (x(i), BOTTOM + 16.0), "middle", "", &point.at)?;
        line(out, [(x(i), y(rates.min)), (x(i), y(rates.max))], "#89a", 3)?;
        writeln!(
            out,
            "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"3\" fill=\"#246\"/>",
            x(i),
            y(rates.median)
        )?;
    }
    let medians = series.points.iter().map(|point| y(point.tokens_per_s.median));
    let places: Vec<(f64, f64)> = medians.enumerate().map(|(i, y)| (x(i), y)).collect();
    for (pair, fall) in places.windows(2).zip(series.falls()) {
        let is_cliff = fall.factor > fall.fall_max;
        let (colour, width) = if is_cliff { ("#c00", 3) } else { ("#246", 1) };
        line(out, [pair[0], pair[1]], colour, width)?;
    }
    text(out, ((LEFT + RIGHT) / 2.0, BOTTOM + 34.0), "middle", "", series.axis)
}

fn line(
    out: &mut String,
    [(x1, y1), (x2, y2)]: [(f64, f64); 2],
    colour: &str,
    width: u32,
) -> std::fmt::Result {
    writeln!(
        out,
        "<path d=\"M{x1:.1} {y1:.1}L{x2:.1} {y2:.1}\" stroke=\"{colour}\" \
         stroke-width=\"{width}\"/>"
    )
}

fn text(
    out: &mut String,
    (x, y): (f64, f64),
    anchor: &str,
    style: &str,
    words: &str,
) -> std::fmt::Result {
    let words = words.replace('&', "&amp;").replace('<', "&lt;");
    writeln!(out, "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" {style}>{words}</text>")
}

/// The next number that the lines across divide into round ones.
fn round_up(largest: f64) -> f64 {
    if largest <= 0.0 {
        return 1.0;
    }
    let power = 10f64.powf(largest.log10().floor());
    let factors = [1.0, 1.2, 1.6, 2.0, 2.4, 3.2, 4.0, 6.0, 8.0, 10.0];
    let enough = factors.into_iter().find(|factor| factor * power >= largest);
    enough.unwrap_or(10.0) * power
}

fn number(value: f64) -> String {
    if value == value.round() { format!("{value:.0}") } else { format!("{value:.2}") }
}

#[cfg(test)]
mod tests {
    use super::super::{Point, Spread};
    use super::*;

    #[test]
    fn a_picture_has_every_point_and_marks_the_cliff() {
        let rates = [("1", 100.0), ("2", 90.0), ("4", 30.0)];
        let point =
            |(at, rate): (&str, f64)| Point { at: at.into(), tokens_per_s: Spread::of(&[rate]) };
        let points = rates.map(point).to_vec();
        let series = Series { name: "a", axis: "b", fall_max: 2.0, points };
        let picture = Sweep::of(vec![series.clone(), series]).svg("x < y & z");
        assert_eq!(picture.matches("<circle").count(), 6, "{picture}");
        assert_eq!(picture.matches("#c00").count(), 2, "{picture}");
        assert!(picture.contains("x &lt; y &amp; z") && picture.ends_with("</svg>\n"));
        assert_eq!(picture.matches("<g ").count(), picture.matches("</g>").count());
    }

    #[test]
    fn axes_end_at_round_numbers() {
        for (largest, top) in [(0.0, 1.0), (95.0, 100.0), (101.0, 120.0), (0.3, 0.32)] {
            assert!((round_up(largest) - top).abs() < 1e-9, "{largest}");
        }
    }
}
