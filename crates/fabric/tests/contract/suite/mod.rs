//! The checks of this target: each takes a way to make the links of an epoch, and runs a thread
//! for each rank.

mod collectives;
mod links;
mod transfers;

use std::sync::Arc;

pub use collectives::*;
pub use links::*;
pub use transfers::*;

use pomona_fabric::coll::{Comm, World};
use pomona_fabric::link::Link;
use pomona_types::GroupError;

/// Makes the links of so many ranks, with arenas of so many bytes.
pub type Make = fn(usize, usize) -> Vec<Arc<dyn Link>>;

/// All checks for each of the transports, which are functions of the type [`Make`]; where one is
/// not everywhere, another function says whether it is here.
macro_rules! contract {
    ($($transport:ident $(if $here:ident)?),+) => { $(
        mod $transport {
            fn is_here() -> bool {
                true $(&& super::$here())?
            }

            crate::suite::contract!(@ super::$transport,
                puts_arrive_before_their_notifications
                a_parked_rank_is_woken_by_a_put
                an_abort_wakes_everyone_and_its_first_cause_stays
                a_put_outside_of_the_arena_is_refused
                gathers_join_columns
                sums_are_those_in_order_of_ranks_by_every_algorithm
                parts_of_sums_are_scattered
                parts_are_exchanged
                broadcasts_have_any_length
                messages_go_from_one_to_another
                nobody_leaves_a_barrier_before_all_came
                calls_follow_each_other_in_any_order
                groups_of_one_world_do_not_meet
                plans_give_what_calls_give
                calls_allocate_nothing
                the_caller_is_told_about_lengths_that_do_not_fit
                a_rank_that_calls_something_else_is_named_on_all
                a_rank_that_waits_elsewhere_is_named_on_all
                a_rank_that_does_not_come_is_named_on_all
                every_call_fails_once_the_epoch_is_over
                a_number_arrives_behind_the_bytes_of_its_put
                bytes_are_got_without_a_call_of_their_owner
                a_closed_region_is_free_once_all_have_answered
                handles_that_are_no_good_are_refused
            );
        }
    )+ };
    (@ $make:path, $($check:ident)+) => { $(
        #[test]
        fn $check() {
            if is_here() {
                crate::suite::$check($make);
            }
        }
    )+ };
}
pub(crate) use contract;

/// Runs `body` as each of the ranks, and returns what they return.
pub fn each_rank<T: Send>(
    links: Vec<Arc<dyn Link>>,
    body: impl Fn(Arc<dyn Link>) -> T + Sync,
) -> Vec<T> {
    let body = |link: Arc<dyn Link>| {
        let _others = EndsWithPanic(link.clone());
        body(link)
    };
    std::thread::scope(|scope| {
        let ranks = links.into_iter().map(|link| scope.spawn(|| body(link)));
        let ranks: Vec<_> = ranks.collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

/// A rank whose check fails does not let the others wait.
struct EndsWithPanic(Arc<dyn Link>);

impl Drop for EndsWithPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.abort(GroupError::Ended("a rank's check has failed".into()));
        }
    }
}

/// The same with one group of all ranks, whose part of the arenas has so many bytes.
pub fn each_member<T: Send>(
    make: Make,
    ranks: usize,
    bytes: usize,
    body: impl Fn(Comm) -> T + Sync,
) -> Vec<T> {
    each_rank(make(ranks, bytes), |link| body(World::new(link).all(bytes).unwrap()))
}

/// Numbers of a rank, that show by their sums in which order they were added.
pub fn numbers(rank: usize, count: usize, salt: usize) -> Vec<f32> {
    let number = |index: usize| {
        let seed = (rank * 7919 + index * 104_729 + salt * 1_299_709) as u32;
        let noise = seed.wrapping_mul(2_654_435_761) >> 8;
        (noise as f32 / 1e6 - 8.0) * 10f32.powi((noise % 9) as i32 - 4)
    };
    (0..count).map(number).collect()
}

/// Bytes of a rank.
pub fn noise(rank: usize, count: usize, salt: usize) -> Vec<u8> {
    (0..count).map(|index| (rank * 89 + index * 31 + index / 256 * 7 + salt * 13) as u8).collect()
}

/// Sums in order of ranks.
pub fn sums(ranks: usize, count: usize, salt: usize) -> Vec<f32> {
    let mut sums = numbers(0, count, salt);
    for rank in 1..ranks {
        for (sum, number) in sums.iter_mut().zip(numbers(rank, count, salt)) {
            *sum += number;
        }
    }
    sums
}

/// The bits, which are what has to be equal.
pub fn bits(numbers: &[f32]) -> Vec<u32> {
    numbers.iter().map(|number| number.to_bits()).collect()
}
