//! Experts that are divided over ranks. Every rank knows every token and its experts; each computes
//! the pairs that are its own, and then each gets its own columns of all pairs' results.

use std::ops::Range;

/// Stands for the expert of a pair that another rank computes.
pub(crate) const ELSEWHERE: u32 = u32::MAX;
/// What reading an expert's weights takes, in pairs that are computed in that time.
const READING: usize = 4;
/// Fewer pairs than this are not taken from an expert's others: two ranks would unpack its weights.
const TAKEN_MIN: usize = 16;

/// Which ranks have which experts: every one is somewhere, and one that is much in demand may be in
/// several places.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Placement {
    /// By expert; none is empty, and none has a rank twice.
    holders: Vec<Vec<usize>>,
    /// One past the last of them.
    ranks: usize,
    /// Whether an expert is in several places.
    copies: bool,
}

impl Placement {
    /// Of each expert, the ranks that have it, in order. `None` if one is nowhere, or somewhere
    /// twice.
    pub fn new(holders: Vec<Vec<usize>>) -> Option<Placement> {
        let ascending = |ranks: &Vec<usize>| ranks.windows(2).all(|pair| pair[0] < pair[1]);
        let ranks = holders.iter().map(|ranks| ranks.last()).max()?? + 1;
        let copies = holders.iter().any(|ranks| ranks.len() > 1);
        let fits = holders.iter().all(|ranks| !ranks.is_empty() && ascending(ranks));
        fits.then_some(Placement { holders, ranks, copies })
    }

    /// How many experts there are.
    pub fn experts(&self) -> usize {
        self.holders.len()
    }

    /// Over how many ranks they are divided, at least.
    pub fn ranks(&self) -> usize {
        self.ranks
    }

    /// By expert, the ranks that have it, in order.
    pub fn holders(&self) -> &[Vec<usize>] {
        &self.holders
    }

    /// The experts that a rank has, in order: their places in this list are what it calls them.
    pub fn here(&self, rank: usize) -> impl Iterator<Item = usize> + '_ {
        let holders = self.holders.iter().enumerate();
        holders.filter(move |(_, ranks)| ranks.contains(&rank)).map(|(expert, _)| expert)
    }

    /// Who computes which pair, in the pairs' order, and how many each rank has; `ids` are below
    /// the number of experts. All ranks come to the same.
    pub(crate) fn assign(&self, ids: &[u32]) -> (Vec<usize>, Vec<usize>) {
        let mut shares = if self.copies { self.shares(ids) } else { Vec::new() };
        let mut counts = vec![0; self.ranks];
        let of = |id: &u32| {
            let rank = match shares.get_mut(*id as usize) {
                None => self.holders[*id as usize][0],
                Some(shares) => {
                    let share = shares.iter_mut().find(|share| share.pairs > 0);
                    let share = share.expect("shares have all pairs");
                    share.pairs -= 1;
                    share.rank
                }
            };
            counts[rank] += 1;
            rank
        };
        (ids.iter().map(of).collect(), counts)
    }

    /// By expert, how many of its pairs each of its ranks computes. What only one can do is its
    /// own. The others, the largest first, go whole to who has least to do by then, since an
    /// expert's weights are read and unpacked wherever it has a pair. What is uneven then is made
    /// up for by parts of them, of the largest first.
    fn shares(&self, ids: &[u32]) -> Vec<Vec<Share>> {
        let mut pairs = vec![0; self.experts()];
        ids.iter().for_each(|id| pairs[*id as usize] += 1);
        let mut shares: Vec<Vec<Share>> = (self.holders.iter().zip(&pairs))
            .map(|(ranks, pairs)| vec![Share { rank: ranks[0], pairs: *pairs }])
            .collect();
        let mut work = vec![0; self.ranks];
        let (mut copied, alone): (Vec<usize>, Vec<usize>) = (0..self.experts())
            .filter(|expert| pairs[*expert] > 0)
            .partition(|expert| self.holders[*expert].len() > 1);
        for expert in alone {
            work[self.holders[expert][0]] += READING + pairs[expert];
        }
        copied.sort_by_key(|expert| std::cmp::Reverse(pairs[*expert]));
        for expert in &copied {
            let rank = self.idlest(*expert, &work);
            work[rank] += READING + pairs[*expert];
            shares[*expert][0].rank = rank;
        }
        for expert in copied {
            while self.level(expert, &mut shares[expert], &mut work) {}
        }
        shares
    }

    /// Moves pairs of an expert from who has most to do of those that compute some to who has least
    /// of those that could. Returns whether there were enough to be worth it. This ends: a rank
    /// gets a share once at most, and other moves make the sum of the squares of work smaller.
    fn level(&self, expert: usize, shares: &mut Vec<Share>, work: &mut [usize]) -> bool {
        let to = self.idlest(expert, work);
        let enough = shares.iter_mut().filter(|share| share.pairs >= TAKEN_MIN);
        let Some(from) = enough.max_by_key(|share| work[share.rank]) else { return false };
        let more = work[from.rank].saturating_sub(work[to] + READING) / 2;
        let more = more.min(from.pairs);
        if more < TAKEN_MIN {
            return false;
        }
        from.pairs -= more;
        work[from.rank] -= more;
        match shares.iter_mut().find(|share| share.rank == to) {
            Some(share) => {
                share.pairs += more;
                work[to] += more;
            }
            None => {
                shares.push(Share { rank: to, pairs: more });
                work[to] += READING + more;
            }
        }
        true
    }

    /// Of the ranks that have an expert, the one with least to do, the first of equals.
    fn idlest(&self, expert: usize, work: &[usize]) -> usize {
        let holders = self.holders[expert].iter().copied();
        holders.min_by_key(|rank| work[*rank]).expect("an expert is somewhere")
    }

    /// Replaces each expert by the rank's own number for it where the pair is the rank's. Returns
    /// how many pairs each rank has.
    pub(crate) fn own(&self, ids: &[u32], rank: usize, own: &mut [u32]) -> Vec<usize> {
        let mut numbers = vec![ELSEWHERE; self.experts()];
        (0u32..).zip(self.here(rank)).for_each(|(number, expert)| numbers[expert] = number);
        let (ranks, counts) = self.assign(ids);
        for ((own, id), of) in own.iter_mut().zip(ids).zip(ranks) {
            *own = if of == rank { numbers[*id as usize] } else { ELSEWHERE };
        }
        counts
    }
}

/// A rank's part of an expert's pairs.
struct Share {
    rank: usize,
    pairs: usize,
}

/// What one rank sends and gets when pairs' results are exchanged. What is for itself stays where
/// it is.
pub(crate) struct Exchange<'a> {
    /// By pair, who computes it.
    ranks: Vec<usize>,
    /// By rank, how many pairs it computes.
    counts: Vec<usize>,
    /// Columns that each rank gets.
    columns: &'a [Range<usize>],
    rank: usize,
}

impl<'a> Exchange<'a> {
    /// Of the pairs `ids`, by one of the ranks that get `columns`.
    pub(crate) fn new(
        placement: &Placement,
        ids: &[u32],
        columns: &'a [Range<usize>],
        rank: usize,
    ) -> Exchange<'a> {
        let (ranks, mut counts) = placement.assign(ids);
        // The last ranks may have no expert.
        counts.resize(columns.len(), 0);
        Exchange { ranks, counts, columns, rank }
    }

    /// How many numbers go to each rank.
    pub(crate) fn sent(&self) -> Vec<usize> {
        let to = |(to, columns): (usize, &Range<usize>)| match to == self.rank {
            true => 0,
            false => columns.len() * self.counts[self.rank],
        };
        self.columns.iter().enumerate().map(to).collect()
    }

    /// How many come from each.
    pub(crate) fn received(&self) -> Vec<usize> {
        let own = self.columns[self.rank].len();
        let from = |(from, count): (usize, &usize)| if from == self.rank { 0 } else { own * count };
        self.counts.iter().enumerate().map(from).collect()
    }

    /// Puts together what each rank gets of this one's pairs, `results: [pairs, width]`, in the
    /// order of ranks, then of pairs.
    pub(crate) fn pack(&self, results: &[f32], width: usize, out: &mut Vec<f32>) {
        out.clear();
        let others = self.columns.iter().enumerate().filter(|(to, _)| *to != self.rank);
        for (_, columns) in others {
            let rows = self.ranks.iter().zip(results.chunks_exact(width));
            for (_, row) in rows.filter(|(rank, _)| **rank == self.rank) {
                out.extend_from_slice(&row[columns.clone()]);
            }
        }
    }

    /// The rank's columns of each pair's result: of its own pairs among `results: [pairs, width]`,
    /// of others among what came, from rank 0 first.
    pub(crate) fn rows<'b>(
        &self,
        (results, width): (&'b [f32], usize),
        came: &'b [f32],
    ) -> Vec<&'b [f32]> {
        let own = &self.columns[self.rank];
        let mut next = Vec::with_capacity(self.counts.len());
        let mut start = 0;
        for count in self.received() {
            next.push(start);
            start += count;
        }
        let row = |(rank, row): (&usize, &'b [f32])| match *rank == self.rank {
            true => &row[own.clone()],
            false => {
                let at = &mut next[*rank];
                *at += own.len();
                &came[*at - own.len()..*at]
            }
        };
        self.ranks.iter().zip(results.chunks_exact(width)).map(row).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Three experts over two ranks, of which the middle one is on both.
    fn placement() -> Placement {
        Placement::new(vec![vec![0], vec![0, 1], vec![1]]).expect("all are somewhere")
    }

    #[test]
    fn every_pair_is_computed_once() {
        let placement = placement();
        assert_eq!(placement.here(1).collect::<Vec<_>>(), [1, 2]);
        // Tokens 0 to 3 with two experts each.
        let ids = [0, 1, 1, 2, 2, 1, 1, 0];
        let [first, second] = [0, 1].map(|rank| {
            let mut own = [0; 8];
            assert_eq!(placement.own(&ids, rank, &mut own), [6, 2]);
            own
        });
        let no = ELSEWHERE;
        assert_eq!(first, [0, 1, 1, no, no, 1, 1, 0]);
        assert_eq!(second, [no, no, no, 1, 1, no, no, no]);
        for wrong in [vec![vec![0], vec![]], vec![vec![1, 1]], vec![vec![1, 0]], vec![]] {
            assert_eq!(Placement::new(wrong), None);
        }
    }

    #[test]
    fn copies_go_to_who_has_least_to_do() {
        // One token: the expert that is on both goes where the other is not.
        assert_eq!(placement().assign(&[0, 1]), (vec![0, 1], vec![1, 1]));
        assert_eq!(placement().assign(&[1, 2]), (vec![0, 1], vec![1, 1]));
        // Three pairs are the first rank's alone: all others are the second's.
        assert_eq!(placement().assign(&[1, 0, 0, 1, 1, 0, 1, 1]).1, [3, 5]);
    }

    #[test]
    fn experts_are_taken_apart_only_for_many_pairs() {
        let all = Placement::new(vec![vec![0, 1]; 4]).expect("all are somewhere");
        let pairs = |counts: [usize; 4]| -> Vec<u32> {
            (0..).zip(counts).flat_map(|(expert, count)| vec![expert; count]).collect()
        };
        // The largest first, each whole.
        let (of, counts) = all.assign(&pairs([2, 9, 8, 3]));
        assert_eq!((of[2], of[11], counts), (0, 1, vec![11, 11]));
        assert_eq!(all.assign(&pairs([20, 0, 0, 0])).1, [20, 0], "too few to be worth it");
        // Those that one rank takes from the other are as many as make both alike.
        assert_eq!(all.assign(&pairs([100, 0, 0, 0])).1, [50, 50]);
        assert_eq!(all.assign(&pairs([100, 10, 10, 0])).1, [64, 56]);
        // A share that is too small to give from does not hide another one.
        let some = [vec![5], vec![2, 5, 6], vec![0, 2], vec![0]].to_vec();
        let some = Placement::new(some).expect("all are somewhere");
        let counts = some.assign(&pairs([9, 76, 43, 270])).1;
        assert!([2, 5, 6].map(|rank| counts[rank]).iter().max() <= Some(&60), "{counts:?}");
        // Of several ranks, whatever the numbers, none has much more than its part.
        let three = Placement::new(vec![vec![0, 1, 2]; 4]).expect("all are somewhere");
        for seed in 0..200 {
            let count = |expert: usize| (seed * 7919 + expert * 104_729) % 311;
            let counts = three.assign(&pairs([0, 1, 2, 3].map(count))).1;
            let (sum, most) = (counts.iter().sum::<usize>(), counts.iter().max().expect("ranks"));
            assert!(*most <= sum / 3 + 3 * TAKEN_MIN, "{counts:?}");
        }
    }

    #[test]
    fn each_rank_gets_its_columns_of_all_pairs() {
        let placement = placement();
        let ids = [0, 1, 1, 2, 2, 1];
        let columns = [0..2, 2..3];
        // Pair p, column c is 10 p + c, where it was computed; elsewhere it is not a number.
        let exchange = |rank| Exchange::new(&placement, &ids, &columns, rank);
        let results = [0, 1].map(|rank| {
            let (ranks, _) = placement.assign(&ids);
            let of = |pair: usize| if ranks[pair] == rank { pair as f32 } else { f32::NAN };
            (0..18).map(|i| 10.0 * of(i / 3) + (i % 3) as f32).collect::<Vec<f32>>()
        });
        let packed = [0, 1].map(|rank| {
            let mut out = Vec::new();
            exchange(rank).pack(&results[rank], 3, &mut out);
            out
        });
        for (rank, other) in [(0, 1), (1, 0)] {
            let (sent, received) = (exchange(other).sent(), exchange(rank).received());
            assert_eq!((sent[rank], received[other]), (packed[other].len(), packed[other].len()));
            assert_eq!((sent[other], received[rank]), (0, 0), "nothing goes to oneself");
            let found = exchange(rank).rows((&results[rank], 3), &packed[other]);
            assert_eq!(found.len(), ids.len());
            for (pair, row) in found.into_iter().enumerate() {
                let whole = columns[rank].clone().map(|column| (10 * pair + column) as f32);
                assert_eq!(row, whole.collect::<Vec<_>>());
            }
        }
    }
}
