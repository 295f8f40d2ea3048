//! Which ranks get which experts of a layer, by how many tokens each expert got so far. Experts
//! that are much in demand get copies, and ranks as much to do as each other, as far as it goes.
//!
//! Copies go to the expert with most tokens for each that it has; then the heaviest goes first to
//! the rank that has least to do (longest processing time first: Graham, "Bounds on Multiprocessing
//! Timing Anomalies", 1969), all ranks having equally many; then experts change places for as long
//! as the busiest rank gains. Copies of an expert are taken to share its tokens evenly.

mod counted;

use std::cmp::{Ordering, Reverse};

pub use counted::{Counted, CountedError};

/// Most exchanges for each place.
const EXCHANGES: usize = 4;

/// By expert of a layer, the ranks that have it, in order. `plain` has them once each; `copies` are
/// those beyond, at most one on each rank. Fewer are made, or none, where the busiest of `ranks`
/// has less to do so, and `plain` it is where nothing is better.
pub fn place(plain: &[Vec<usize>], loads: &[u64], ranks: usize, copies: usize) -> Vec<Vec<usize>> {
    let packed = |copies| Packing::new(loads, ranks, copies).holders();
    let halves = std::iter::successors(Some(copies), |copies| Some(copies / 2));
    let with_copies = halves.take_while(|copies| *copies > 0).map(packed);
    let candidates = with_copies.chain([plain.to_vec(), packed(0)]);
    // Of equals the first.
    let busiest = |holders: &Vec<Vec<usize>>| balance(holders, loads, ranks);
    let best = candidates.min_by(|a, b| busiest(a).total_cmp(&busiest(b)));
    best.unwrap_or_else(|| plain.to_vec())
}

/// What the busiest rank has to do, over the mean of all ranks: 1 at best.
pub fn balance(holders: &[Vec<usize>], loads: &[u64], ranks: usize) -> f64 {
    let weights = weights(loads);
    let mut work = vec![0.0; ranks];
    for (holders, weight) in holders.iter().zip(&weights) {
        holders.iter().for_each(|rank| work[*rank] += weight / holders.len() as f64);
    }
    let mean = weights.iter().sum::<f64>() / ranks as f64;
    work.into_iter().fold(0.0, f64::max) / mean
}

/// Where nothing was counted, all experts are alike.
fn weights(loads: &[u64]) -> Vec<f64> {
    match loads.iter().any(|load| *load > 0) {
        true => loads.iter().map(|load| *load as f64).collect(),
        false => vec![1.0; loads.len()],
    }
}

/// Experts on their way to ranks.
struct Packing {
    /// Of one copy of each expert.
    weights: Vec<f64>,
    /// By rank, the experts that it has.
    here: Vec<Vec<usize>>,
    work: Vec<f64>,
    /// Places in all.
    places: usize,
}

impl Packing {
    fn new(loads: &[u64], ranks: usize, copies: usize) -> Packing {
        let mut weights = weights(loads);
        let counts = counts(&weights, ranks, copies);
        weights.iter_mut().zip(&counts).for_each(|(weight, count)| *weight /= *count as f64);
        let (here, work) = (vec![Vec::new(); ranks], vec![0.0; ranks]);
        let places = counts.iter().sum();
        let mut packing = Packing { weights, here, work, places };
        let mut order: Vec<usize> = (0..loads.len()).collect();
        order.sort_by(|a, b| packing.weights[*b].total_cmp(&packing.weights[*a]));
        for expert in order {
            (0..counts[expert]).for_each(|_| packing.add(expert));
        }
        packing.even_out();
        packing
    }

    /// Whether a rank may get one more: all get equally many, some of them one more at the end.
    fn has_room(&self, rank: usize) -> bool {
        let ranks = self.here.len();
        let (each, more) = (self.places / ranks, self.places % ranks);
        let fuller = self.here.iter().filter(|here| here.len() > each).count();
        let len = self.here[rank].len();
        len < each || (len == each && fuller < more)
    }

    fn lacks(&self, rank: usize, expert: usize) -> bool {
        !self.here[rank].contains(&expert)
    }

    /// Puts a copy where there is least to do. If only ranks have room that have the expert
    /// already, another expert makes room elsewhere.
    fn add(&mut self, expert: usize) {
        let open: Vec<usize> = (0..self.here.len()).filter(|rank| self.has_room(*rank)).collect();
        let lacking = open.iter().copied().filter(|rank| self.lacks(*rank, expert));
        let idlest = lacking.min_by(|a, b| {
            let (a, b) = (*a, *b);
            self.work[a].total_cmp(&self.work[b]).then(self.here[a].len().cmp(&self.here[b].len()))
        });
        if let Some(rank) = idlest {
            self.put(rank, expert);
        } else if let Some((from, to, other)) = self.way_out(&open, expert) {
            self.take(from, other);
            self.put(to, other);
            self.put(from, expert);
        }
    }

    /// From which rank, to which of those with room, which expert moves best, so that `expert` can
    /// take its place. There is one: a full rank without the expert has more others than fit on a
    /// rank that has it and room.
    fn way_out(&self, open: &[usize], expert: usize) -> Option<(usize, usize, usize)> {
        let mut best = None;
        let mut least = f64::INFINITY;
        for from in (0..self.here.len()).filter(|rank| self.lacks(*rank, expert)) {
            for to in open {
                for other in self.here[from].iter().filter(|other| self.lacks(*to, **other)) {
                    let (weight, moved) = (self.weights[expert], self.weights[*other]);
                    let after = (self.work[from] + weight - moved).max(self.work[*to] + moved);
                    if after < least {
                        (least, best) = (after, Some((from, *to, *other)));
                    }
                }
            }
        }
        best
    }

    fn put(&mut self, rank: usize, expert: usize) {
        self.here[rank].push(expert);
        self.work[rank] += self.weights[expert];
    }

    fn take(&mut self, rank: usize, expert: usize) {
        self.here[rank].retain(|other| *other != expert);
        self.work[rank] -= self.weights[expert];
    }

    /// Exchanges experts of the busiest rank for others while that helps.
    fn even_out(&mut self) {
        for _ in 0..EXCHANGES * self.places {
            let ranks = 0..self.here.len();
            let busiest = ranks.clone().max_by(|a, b| self.work[*a].total_cmp(&self.work[*b]));
            let Some(busiest) = busiest else { return };
            let mut best = None;
            let mut least = self.work[busiest];
            for other in ranks.filter(|rank| *rank != busiest) {
                for mine in self.here[busiest].iter().filter(|e| self.lacks(other, **e)) {
                    for theirs in self.here[other].iter().filter(|e| self.lacks(busiest, **e)) {
                        let gain = self.weights[*mine] - self.weights[*theirs];
                        let after = (self.work[busiest] - gain).max(self.work[other] + gain);
                        // Rounding is no gain.
                        if after < least * (1.0 - 1e-9) {
                            (least, best) = (after, Some((other, *mine, *theirs)));
                        }
                    }
                }
            }
            let Some((other, mine, theirs)) = best else { return };
            self.take(busiest, mine);
            self.take(other, theirs);
            self.put(busiest, theirs);
            self.put(other, mine);
        }
    }

    /// By expert.
    fn holders(&self) -> Vec<Vec<usize>> {
        let of = |expert| (0..self.here.len()).filter(move |rank| !self.lacks(*rank, expert));
        (0..self.weights.len()).map(|expert| of(expert).collect()).collect()
    }
}

/// How often each expert is there: each copy goes where most tokens come to one, of equals to the
/// one that has fewest, then to the first.
fn counts(weights: &[f64], ranks: usize, copies: usize) -> Vec<usize> {
    let mut counts = vec![1; weights.len()];
    for _ in 0..copies {
        let heavier = |a: &usize, b: &usize| -> Ordering {
            let each = |expert: usize| weights[expert] / counts[expert] as f64;
            let last = |expert: usize| Reverse((counts[expert], expert));
            each(*a).total_cmp(&each(*b)).then(last(*a).cmp(&last(*b)))
        };
        let open = (0..weights.len()).filter(|expert| counts[*expert] < ranks);
        let Some(expert) = open.max_by(heavier) else { break };
        counts[expert] += 1;
    }
    counts
}

#[cfg(test)]
mod tests;
