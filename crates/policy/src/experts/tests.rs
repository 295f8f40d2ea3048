//! Properties of placements, over random loads.

use super::*;

/// A generator of its own (Knuth's constants), so that a case is its number.
struct Dice(u64);

impl Dice {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) % n
    }
}

/// Each once, as a division places them.
fn plain(experts: usize, ranks: usize) -> Vec<Vec<usize>> {
    (0..ranks)
        .flat_map(|rank| {
            let len = experts * (rank + 1) / ranks - experts * rank / ranks;
            std::iter::repeat_n(vec![rank], len)
        })
        .collect()
}

/// Loads as routers make them: a few experts get much, some nothing.
fn loads(experts: usize, dice: &mut Dice) -> Vec<u64> {
    let most = [1, 2, 10, 1000, 1_000_000][dice.below(5) as usize];
    let skewed = |dice: &mut Dice| dice.below(most) * dice.below(most) / dice.below(most).max(1);
    (0..experts).map(|_| skewed(dice)).collect()
}

fn places(holders: &[Vec<usize>], ranks: usize) -> Vec<usize> {
    let mut places = vec![0; ranks];
    holders.iter().flatten().for_each(|rank| places[*rank] += 1);
    places
}

#[test]
fn every_expert_is_somewhere_on_ranks_that_have_equally_many() {
    for case in 0..3000 {
        let mut dice = Dice(case);
        let ranks = 1 + dice.below(8) as usize;
        let experts = ranks + dice.below(40) as usize;
        let copies = dice.below((experts * (ranks - 1) + 3) as u64) as usize;
        let (loads, plain) = (loads(experts, &mut dice), plain(experts, ranks));
        // What is asked for, though it may be chosen against.
        let packed = Packing::new(&loads, ranks, copies).holders();
        let asked = experts + copies.min(experts * (ranks - 1));
        let counts = places(&packed, ranks);
        assert_eq!(counts.iter().sum::<usize>(), asked, "case {case}");
        assert!(counts.iter().max().unwrap() - counts.iter().min().unwrap() <= 1, "case {case}");
        let chosen = place(&plain, &loads, ranks, copies);
        for holders in [&packed, &chosen] {
            assert_eq!(holders.len(), experts);
            for holders in holders {
                let ascending = holders.windows(2).all(|pair| pair[0] < pair[1]);
                assert!(!holders.is_empty() && ascending, "case {case}: {holders:?}");
                assert!(holders.iter().all(|rank| *rank < ranks));
            }
        }
        // Never worse than without copies, nor than where nothing is known; and again the same.
        let of = |holders: &[Vec<usize>]| balance(holders, &loads, ranks);
        assert!(of(&chosen) <= of(&plain) && of(&chosen) <= of(&place(&plain, &loads, ranks, 0)));
        assert_eq!(chosen, place(&plain, &loads, ranks, copies));
    }
}

/// The best balance of all ways to have each expert somewhere, in so many places.
fn best(loads: &[u64], ranks: usize, places_left: usize, holders: &mut Vec<Vec<usize>>) -> f64 {
    let left = loads.len() - holders.len();
    if left == 0 {
        let counts = places(holders, ranks);
        let even = counts.iter().max().unwrap() - counts.iter().min().unwrap() <= 1;
        let fits = places_left == 0 && even;
        return if fits { balance(holders, loads, ranks) } else { f64::INFINITY };
    }
    let mut found = f64::INFINITY;
    for set in 1u32..1 << ranks {
        let count = set.count_ones() as usize;
        if count + left - 1 <= places_left {
            holders.push((0..ranks).filter(|rank| set >> rank & 1 == 1).collect());
            found = found.min(best(loads, ranks, places_left - count, holders));
            holders.pop();
        }
    }
    found
}

#[test]
fn the_busiest_rank_has_at_most_a_third_more_than_by_the_best_of_all_placements() {
    let mut worst: f64 = 1.0;
    for case in 0..300 {
        let mut dice = Dice(case);
        let ranks = 2 + dice.below(2) as usize;
        let experts = ranks + dice.below(3) as usize;
        let copies = dice.below(4).min((experts * (ranks - 1)) as u64) as usize;
        let loads = loads(experts, &mut dice);
        let found = balance(&place(&plain(experts, ranks), &loads, ranks, copies), &loads, ranks);
        let best = best(&loads, ranks, experts + copies, &mut Vec::new());
        worst = worst.max(found / best);
        assert!(found <= best * 4.0 / 3.0 + 1e-9, "case {case}, {loads:?}: {found}, not {best}");
    }
    assert!(worst > 1.0, "the search is worth its name");
}

#[test]
fn copies_take_turns_where_nothing_is_known() {
    let plain = plain(8, 4);
    assert_eq!(place(&plain, &[0; 8], 4, 0), plain);
    let found = place(&plain, &[0; 8], 4, 4);
    let copies: Vec<usize> = found.iter().map(Vec::len).collect();
    assert_eq!(copies, [2, 2, 2, 2, 1, 1, 1, 1]);
    assert_eq!((places(&found, 4), balance(&found, &[7; 8], 4)), (vec![3; 4], 1.0));
}

#[test]
fn a_hot_expert_is_everywhere() {
    let plain = plain(8, 4);
    let loads = [700, 100, 100, 100, 100, 100, 100, 100];
    assert_eq!(balance(&plain, &loads, 4), 800.0 * 4.0 / 1400.0);
    let found = place(&plain, &loads, 4, 4);
    assert_eq!(found[0], [0, 1, 2, 3]);
    assert!(balance(&found, &loads, 4) < 1.1, "{found:?}");
}
