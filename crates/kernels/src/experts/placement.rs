//! Experts that are divided over ranks. Every rank knows every token and its experts; each computes
//! the pairs that are its own, and then each gets its own columns of all pairs' results.

use std::ops::Range;

/// Stands for the expert of a pair that another rank computes.
pub(crate) const ELSEWHERE: u32 = u32::MAX;

/// Which ranks have which experts: every one is somewhere, and one that is much in demand may be in
/// several places.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Placement {
    /// By expert; none is empty.
    holders: Vec<Vec<usize>>,
}

impl Placement {
    /// Of each expert, the ranks that have it. `None` if one is nowhere.
    pub fn new(holders: Vec<Vec<usize>>) -> Option<Placement> {
        let somewhere = holders.iter().all(|ranks| !ranks.is_empty());
        somewhere.then_some(Placement { holders })
    }

    /// How many experts there are.
    pub fn experts(&self) -> usize {
        self.holders.len()
    }

    /// The experts that a rank has, in order: their places in this list are what it calls them.
    pub fn here(&self, rank: usize) -> impl Iterator<Item = usize> + '_ {
        let holders = self.holders.iter().enumerate();
        holders.filter(move |(_, ranks)| ranks.contains(&rank)).map(|(expert, _)| expert)
    }

    /// Who computes a token's pair with an expert: of several that have it, tokens take turns.
    fn rank_of(&self, expert: usize, token: usize) -> usize {
        let holders = &self.holders[expert];
        holders[token % holders.len()]
    }

    /// The ranks of all pairs, in their order; `ids: [tokens, k]` are below the number of experts.
    fn ranks<'a>(&'a self, ids: &'a [u32], k: usize) -> impl Iterator<Item = usize> + 'a {
        ids.iter().enumerate().map(move |(pair, id)| self.rank_of(*id as usize, pair / k))
    }

    /// Replaces each expert by the rank's own number for it where the pair is the rank's.
    pub(crate) fn own(&self, ids: &[u32], k: usize, rank: usize, own: &mut [u32]) {
        let mut numbers = vec![ELSEWHERE; self.experts()];
        (0u32..).zip(self.here(rank)).for_each(|(number, expert)| numbers[expert] = number);
        for ((own, id), of) in own.iter_mut().zip(ids).zip(self.ranks(ids, k)) {
            *own = if of == rank { numbers[*id as usize] } else { ELSEWHERE };
        }
    }
}

/// What one rank sends and gets when pairs' results are exchanged.
pub(crate) struct Exchange<'a> {
    pub(crate) placement: &'a Placement,
    /// `[tokens, k]`.
    pub(crate) ids: &'a [u32],
    pub(crate) k: usize,
    /// Columns that each rank gets.
    pub(crate) columns: &'a [Range<usize>],
    pub(crate) rank: usize,
}

impl Exchange<'_> {
    /// Puts together what each rank gets of this one's pairs, `results: [pairs, width]`. Returns
    /// how many numbers go to each rank, and come from each.
    pub(crate) fn pack(
        &self,
        results: &[f32],
        width: usize,
        out: &mut Vec<f32>,
    ) -> [Vec<usize>; 2] {
        out.clear();
        let mut pairs = vec![0; self.columns.len()];
        self.placement.ranks(self.ids, self.k).for_each(|rank| pairs[rank] += 1);
        for columns in self.columns {
            let own = self.placement.ranks(self.ids, self.k).zip(results.chunks_exact(width));
            for (_, row) in own.filter(|(rank, _)| *rank == self.rank) {
                out.extend_from_slice(&row[columns.clone()]);
            }
        }
        let own_width = self.columns[self.rank].len();
        let sent = self.columns.iter().map(|columns| columns.len() * pairs[self.rank]).collect();
        [sent, pairs.into_iter().map(|count| count * own_width).collect()]
    }

    /// Puts what came, from rank 0 first, in the order of pairs: `own: [pairs, own columns]`.
    pub(crate) fn unpack(&self, came: &[f32], received: &[usize], own: &mut [f32]) {
        let width = self.columns[self.rank].len();
        let mut next: Vec<usize> = received
            .iter()
            .scan(0, |start, count| {
                *start += count;
                Some(*start - count)
            })
            .collect();
        let ranks = self.placement.ranks(self.ids, self.k);
        for (row, rank) in own.chunks_exact_mut(width).zip(ranks) {
            row.copy_from_slice(&came[next[rank]..][..width]);
            next[rank] += width;
        }
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
            placement.own(&ids, 2, rank, &mut own);
            own
        });
        let no = ELSEWHERE;
        assert_eq!(first, [0, 1, no, no, no, 1, no, 0]);
        assert_eq!(second, [no, no, 0, 1, 1, no, 0, no]);
        assert_eq!(Placement::new(vec![vec![0], vec![]]), None);
    }

    #[test]
    fn each_rank_gets_its_columns_of_all_pairs() {
        let placement = placement();
        let ids = [0, 1, 1, 2, 2, 1];
        let columns = [0..2, 2..3];
        // Pair p, column c is 10 p + c, where it was computed; elsewhere it is not a number.
        let exchange =
            |rank| Exchange { placement: &placement, ids: &ids, k: 2, columns: &columns, rank };
        let packed = [0, 1].map(|rank| {
            let ranks: Vec<usize> = placement.ranks(&ids, 2).collect();
            let of = |pair: usize| if ranks[pair] == rank { pair as f32 } else { f32::NAN };
            let results: Vec<f32> = (0..18).map(|i| 10.0 * of(i / 3) + (i % 3) as f32).collect();
            let mut out = Vec::new();
            let [sent, received] = exchange(rank).pack(&results, 3, &mut out);
            (out, sent, received)
        });
        for rank in [0, 1] {
            let received = &packed[rank].2;
            let came: Vec<f32> = (0..2)
                .flat_map(|from| {
                    let (out, sent, _) = &packed[from];
                    assert_eq!(sent[rank], received[from]);
                    let start: usize = sent[..rank].iter().sum();
                    out[start..start + sent[rank]].to_vec()
                })
                .collect();
            let width = columns[rank].len();
            let mut own = vec![0.0; 6 * width];
            exchange(rank).unpack(&came, received, &mut own);
            for (i, value) in own.iter().enumerate() {
                let (pair, column) = (i / width, columns[rank].start + i % width);
                assert_eq!(*value, (10 * pair + column) as f32);
            }
        }
    }
}
