//! How groups begin, refuse, and end.

use std::process::Command;
use std::time::{Duration, Instant};

use pomona_fabric::coll::World;
use pomona_fabric::group::local::{LocalGroup, LocalMember};
use pomona_types::{Collective, GroupError};

use super::{alone, options, spawn};

#[test]
fn children_that_never_join_are_told_after_a_while() {
    let _alone = alone();
    let mut options = options(3, 0);
    options.group.begin_limit = Duration::from_millis(300);
    let sleep = |_| {
        let mut command = Command::new("sleep");
        command.arg("60");
        command
    };
    let group = LocalGroup::spawn(&options, sleep).unwrap();
    let why = group.next_epoch().err().unwrap();
    assert!(
        matches!(&why, GroupError::Ended(why) if why.starts_with("1 of 3 ranks came")),
        "{why}"
    );
    let start = Instant::now();
    drop(group);
    assert!(start.elapsed() < Duration::from_secs(30));
}

#[test]
fn a_member_of_another_kind_is_refused() {
    let _alone = alone();
    let mut options = options(2, 0);
    options.group.identity = "another version".into();
    options.group.begin_limit = Duration::from_secs(5);
    let group = spawn(&options);
    let why = group.next_epoch().err().unwrap().to_string();
    assert!(why.contains("1 of 2 ranks"), "{why}");
}

#[test]
fn without_a_parent_there_is_nothing_to_join() {
    let refused = LocalMember::join("nobody").err().unwrap().to_string();
    assert!(refused.contains("no control connection"), "{refused}");
}

#[test]
fn a_group_that_loses_too_many_is_over() {
    let _alone = alone();
    let mut options = options(3, 0);
    options.group.ranks_min = 3;
    let group = spawn(&options);
    let link = group.next_epoch().unwrap();
    let lost = pomona_types::LostCause::Failed("for a test".into());
    link.abort(GroupError::PeerLost { rank: 2, epoch: link.epoch(), cause: lost });
    let why = group.next_epoch().err().unwrap();
    assert_eq!(why, GroupError::Ended("2 ranks are left, and 3 are needed".into()));
    // It stays so.
    assert_eq!(group.next_epoch().err(), Some(why));
}

#[test]
fn ranks_go_on_together_after_a_call_that_did_not_fit() {
    let _alone = alone();
    let group = spawn(&options(3, 0));
    for epoch in 1..4 {
        let link = group.next_epoch().unwrap();
        assert_eq!((link.epoch(), link.ranks()), (epoch, 3));
        // The children call a gather of their roll where this is a barrier.
        let comm = World::new(link.clone()).all(super::ARENA_BYTES).unwrap();
        let why = comm.barrier().unwrap_err();
        assert!(matches!(why, GroupError::Mismatch { rank: 0, .. }), "{why}");
    }
}
