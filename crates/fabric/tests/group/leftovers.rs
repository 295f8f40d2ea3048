//! What is left of groups that came and went: nothing.

use std::fs;

use super::rank::{End, work};
use super::{alone, options, spawn};

/// Descriptors, threads, children, and mappings of this process.
fn belongings() -> [usize; 4] {
    let count = |path: &str| fs::read_dir(path).unwrap().count();
    let children = fs::read_dir("/proc/self/task").unwrap().map(|task| {
        let path = task.unwrap().path().join("children");
        fs::read_to_string(path).unwrap_or_default().split_whitespace().count()
    });
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let maps = maps.lines().filter(|line| line.contains("pomona-fabric")).count();
    // The tests that wait for this one have threads too; those of a group have its name.
    let threads = fs::read_dir("/proc/self/task").unwrap().filter(|task| {
        let path = task.as_ref().unwrap().path().join("comm");
        fs::read_to_string(path).unwrap_or_default().starts_with("fabric-")
    });
    [count("/proc/self/fd"), threads.count(), children.sum(), maps]
}

#[test]
fn nothing_is_left_of_groups_that_lost_ranks() {
    let _alone = alone();
    let mut before = None;
    for round in 0..3 {
        let group = spawn(&options(3, 1));
        let mut last = End::default();
        for epoch in 1..3 {
            let link = group.next_epoch().unwrap();
            assert_eq!(link.epoch(), epoch);
            let look = &mut |roll: &super::rank::Roll| {
                let process = roll.process_ids[2] as i32;
                let process = rustix::process::Pid::from_raw(process).unwrap();
                rustix::process::kill_process(process, rustix::process::Signal::KILL).unwrap();
            };
            last = work(link, &last, Some((round, look))).unwrap().1;
        }
        drop(group);
        // The first round opens what stays for the life of the process.
        let now = belongings();
        assert_eq!(*before.get_or_insert(now), now, "descriptors, threads, children, mappings");
        assert_eq!(now[1..], [0, 0, 0]);
    }
}
