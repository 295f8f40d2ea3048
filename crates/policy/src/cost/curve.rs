//! The time of one call by the bytes that it has.

use serde::{Deserialize, Serialize};

/// Most points of a curve.
const POINTS_MAX: usize = 1024;
/// The shortest time that counts as one, microseconds: less is no call.
const MICROS_MIN: f64 = 1e-4;
/// The longest: a day.
const MICROS_MAX: f64 = 8.64e10;

/// What was measured at one size.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Point {
    /// The size.
    pub bytes: usize,
    /// The time, microseconds.
    pub micros: f64,
}

/// Times at sizes, and a latency and a cost for each byte that suit them all.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Curve {
    /// Latency, microseconds.
    alpha_us: f64,
    /// For each byte.
    beta_us: f64,
    /// At least one, in order of size.
    points: Vec<Point>,
}

impl Curve {
    /// Of points in any order; none if there is no time among them.
    pub(super) fn fit(points: impl Iterator<Item = Point>) -> Option<Curve> {
        let mut kept: Vec<Point> = Vec::new();
        for point in points.filter(|point| is_time(point.micros)) {
            match kept.binary_search_by_key(&point.bytes, |point| point.bytes) {
                Ok(at) => kept[at] = point,
                Err(at) => kept.insert(at, point),
            }
        }
        let (alpha_us, beta_us) = line(&kept)?;
        Some(Curve { alpha_us, beta_us, points: kept })
    }

    /// What was measured.
    pub fn points(&self) -> &[Point] {
        &self.points
    }

    /// The latency, microseconds, and the microseconds for each byte, of the line that suits all
    /// points.
    pub fn line(&self) -> (f64, f64) {
        (self.alpha_us, self.beta_us)
    }

    /// The time at a size: between two points that of a line through them, beyond them that of the
    /// nearest, in proportion to the line that suits all.
    pub fn at(&self, bytes: usize) -> f64 {
        let above = self.points.partition_point(|point| point.bytes < bytes);
        match (above.checked_sub(1).map(|below| self.points[below]), self.points.get(above)) {
            (_, Some(point)) if point.bytes == bytes => point.micros,
            (Some(below), Some(above)) => {
                let share = (bytes - below.bytes) as f64 / (above.bytes - below.bytes) as f64;
                below.micros + (above.micros - below.micros) * share
            }
            (Some(nearest), None) => self.beyond(nearest, bytes),
            (None, Some(nearest)) => self.beyond(*nearest, bytes),
            (None, None) => f64::INFINITY,
        }
    }

    fn beyond(&self, nearest: Point, bytes: usize) -> f64 {
        let fitted = |bytes: usize| self.alpha_us + self.beta_us * bytes as f64;
        let there = fitted(nearest.bytes);
        if there > 0.0 { nearest.micros * fitted(bytes) / there } else { nearest.micros }
    }

    /// What is wrong with one that came from outside.
    pub(super) fn fault(&self) -> Option<&'static str> {
        let points = &self.points;
        let ordered = points.windows(2).all(|pair| pair[0].bytes < pair[1].bytes);
        let positive = |number: f64| (0.0..=MICROS_MAX).contains(&number);
        if points.is_empty() || points.len() > POINTS_MAX {
            return Some("has no points, or too many");
        }
        if !ordered {
            return Some("has points that are not in order of size");
        }
        let times = points.iter().all(|point| is_time(point.micros));
        let fits = times && positive(self.alpha_us) && positive(self.beta_us);
        (!fits).then_some("has times that are none")
    }
}

fn is_time(micros: f64) -> bool {
    (MICROS_MIN..=MICROS_MAX).contains(&micros)
}

/// The line from which all points together differ least, each in proportion to its time: the small
/// ones count as much as the large. Neither number is negative, as no call takes back time.
fn line(points: &[Point]) -> Option<(f64, f64)> {
    let (mut weights, mut x, mut y, mut xx, mut xy) = (0.0, 0.0, 0.0, 0.0, 0.0);
    for point in points {
        let (bytes, weight) = (point.bytes as f64, point.micros.powi(-2));
        weights += weight;
        x += weight * bytes;
        y += weight * point.micros;
        xx += weight * bytes * bytes;
        xy += weight * bytes * point.micros;
    }
    if points.is_empty() {
        return None;
    }
    let spread = weights * xx - x * x;
    let beta = if spread > 0.0 { (weights * xy - x * y) / spread } else { 0.0 };
    let alpha = (y - beta * x) / weights;
    match (alpha >= 0.0, beta >= 0.0) {
        (true, true) => Some((alpha, beta)),
        // The better of the lines through nothing, and of those without a slope.
        (false, _) => Some((0.0, if xx > 0.0 { (xy / xx).max(0.0) } else { 0.0 })),
        (true, false) => Some((y / weights, 0.0)),
    }
}

#[cfg(test)]
impl Curve {
    /// As it may come from a file, right or wrong.
    pub(super) fn raw(points: Vec<Point>) -> Curve {
        Curve { alpha_us: 1.0, beta_us: 0.0, points }
    }
}
