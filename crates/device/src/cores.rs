//! Which cores this process may use.

use crate::cgroup;

/// CPU numbers that the affinity mask (and so the cgroup's cpuset) allows, cut to the cgroup's
/// quota: with 1.5 CPUs of quota there are two cores to use.
pub fn usable_cores() -> Vec<usize> {
    let mut cores = affinity();
    if let Some(quota) = cpu_quota() {
        cores.truncate((quota.ceil() as usize).max(1));
    }
    cores
}

/// Restricts the calling thread, and those that it starts, to these cores. Does nothing where that
/// is not possible: it is a matter of speed.
#[cfg(target_os = "linux")]
pub fn restrict_to(cores: &[usize]) {
    // SAFETY: an all-zero cpu_set_t is an empty set; indices are below CPU_SETSIZE; the kernel
    // reads at most its size.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        for core in cores.iter().filter(|core| **core < libc::CPU_SETSIZE as usize) {
            libc::CPU_SET(*core, &mut set);
        }
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &set);
    }
}

#[cfg(not(target_os = "linux"))]
pub fn restrict_to(_cores: &[usize]) {}

#[cfg(target_os = "linux")]
fn affinity() -> Vec<usize> {
    // SAFETY: an all-zero cpu_set_t is an empty set; the kernel fills at most its size.
    let set = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        let size = std::mem::size_of::<libc::cpu_set_t>();
        if libc::sched_getaffinity(0, size, &mut set) != 0 {
            return vec![0];
        }
        set
    };
    let most = libc::CPU_SETSIZE as usize;
    // SAFETY: the index is below CPU_SETSIZE.
    (0..most).filter(|cpu| unsafe { libc::CPU_ISSET(*cpu, &set) }).collect()
}

#[cfg(not(target_os = "linux"))]
fn affinity() -> Vec<usize> {
    (0..std::thread::available_parallelism().map_or(1, usize::from)).collect()
}

/// CPUs' worth of time that the process's cgroup, or one that it lies in, allows: 0.5 is half a
/// core. `None` where nothing is limited.
pub fn cpu_quota() -> Option<f64> {
    cgroup::least("cpu", cgroup::cpu_quota)
}

/// Bytes of the second cache that are a core's own: its part of one that several share. `None`
/// where the system does not say.
pub fn second_cache_bytes() -> Option<usize> {
    let core = *usable_cores().first()?;
    let of = |index: usize, what: &str| {
        let path = format!("/sys/devices/system/cpu/cpu{core}/cache/index{index}/{what}");
        std::fs::read_to_string(path).ok().map(|text| text.trim().to_owned())
    };
    let is_second = |index: &usize| of(*index, "level").is_some_and(|level| level == "2");
    let second = (0..8).find(is_second)?;
    cache_share(&of(second, "size")?, &of(second, "shared_cpu_list")?)
}

/// A core's part of a cache of so many kibibytes, such as `2048K`, that a list of cores shares,
/// such as `0-1,64`.
fn cache_share(size: &str, cores: &str) -> Option<usize> {
    let kibibytes: usize = size.strip_suffix('K')?.parse().ok()?;
    let count = |range: &str| -> Option<usize> {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        last.parse::<usize>().ok()?.checked_sub(first.parse().ok()?)?.checked_add(1)
    };
    let cores = cores.split(',').map(count).sum::<Option<usize>>()?;
    Some(kibibytes.checked_mul(1024)? / cores.max(1))
}

/// Keeps the calling thread on one core. Failing is harmless: the thread then floats.
#[cfg(target_os = "linux")]
pub(crate) fn pin_to(core: usize) {
    if core >= libc::CPU_SETSIZE as usize {
        return;
    }
    // SAFETY: the set is initialised, the index below CPU_SETSIZE, the size that of the set.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(core, &mut set);
        libc::sched_setaffinity(0, std::mem::size_of::<libc::cpu_set_t>(), &set);
    }
}

#[cfg(not(target_os = "linux"))]
pub(crate) fn pin_to(_core: usize) {}

/// How long a turn of a thread is that asked for short ones: the least that Linux gives.
#[cfg(target_os = "linux")]
const SHORT_TURN_NS: u64 = 100_000;

/// Asks for short turns on a core for the calling thread, which it then gets sooner: Linux lets a
/// thread that wakes interrupt those with longer turns (since 6.12, by EEVDF, sched(7)). Its share
/// of the time stays the same. For threads that sleep, work for microseconds, and are waited for.
/// Does nothing where that is not possible.
#[cfg(target_os = "linux")]
pub fn ask_for_short_turns() {
    let Some(mut attributes) = scheduling() else { return };
    if attributes.sched_policy == libc::SCHED_OTHER as u32 {
        attributes.sched_runtime = SHORT_TURN_NS;
        // SAFETY: the kernel reads as many bytes as the structure says it has.
        unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &attributes, 0) };
    }
}

/// How the calling thread is scheduled.
#[cfg(target_os = "linux")]
fn scheduling() -> Option<libc::sched_attr> {
    // SAFETY: all-zero is a sched_attr; the kernel writes at most the size that it is given.
    unsafe {
        let mut attributes: libc::sched_attr = std::mem::zeroed();
        let size = size_of::<libc::sched_attr>();
        let got = libc::syscall(libc::SYS_sched_getattr, 0, &mut attributes, size, 0);
        (got == 0).then_some(attributes)
    }
}

#[cfg(not(target_os = "linux"))]
pub fn ask_for_short_turns() {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_a_core_to_use() {
        assert!(!usable_cores().is_empty());
    }

    #[test]
    fn caches_are_divided_among_those_who_share_them() {
        assert_eq!(cache_share("2048K", "3"), Some(2 << 20));
        assert_eq!(cache_share("2048K", "0,64"), Some(1 << 20));
        assert_eq!(cache_share("1024K", "0-3"), Some(256 << 10));
        for (size, cores) in [("", "0"), ("2M", "0"), ("1K", ""), ("1K", "3-1"), ("1K", "a")] {
            assert_eq!(cache_share(size, cores), None, "{size} of {cores}");
        }
        assert!(second_cache_bytes().is_none_or(|bytes| bytes > 0));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn turns_are_short_where_the_system_knows_their_length() {
        std::thread::spawn(|| {
            let before = scheduling().expect("Linux tells since 3.14");
            ask_for_short_turns();
            let after = scheduling().expect("Linux tells since 3.14");
            // Before 6.12 nothing is told of ordinary threads.
            if before.sched_runtime > 0 {
                assert_eq!(after.sched_runtime, SHORT_TURN_NS);
            }
            assert_eq!(after.sched_nice, before.sched_nice);
        })
        .join()
        .unwrap();
    }
}
