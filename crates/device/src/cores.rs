//! Which cores this process may use.

use std::fs;

/// CPU numbers that the affinity mask (and so the cgroup's cpuset) allows, cut to the cgroup's
/// quota: with 1.5 CPUs of quota there are two cores to use.
pub fn usable_cores() -> Vec<usize> {
    let mut cores = affinity();
    if let Some(quota) = cgroup_quota() {
        cores.truncate(quota.max(1));
    }
    cores
}

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

/// CPUs that cgroup v2's `cpu.max` or v1's `cpu.cfs_quota_us` allows, rounded up.
fn cgroup_quota() -> Option<usize> {
    let read = |path: &str| fs::read_to_string(path).ok();
    let own = read("/proc/self/cgroup").and_then(|text| {
        let path = text.lines().find_map(|l| l.strip_prefix("0::"))?;
        read(&format!("/sys/fs/cgroup{path}/cpu.max"))
    });
    let (quota, period) = match own.or_else(|| read("/sys/fs/cgroup/cpu.max")) {
        Some(text) => {
            let mut words = text.split_whitespace();
            (words.next()?.parse::<i64>().ok()?, words.next()?.parse::<i64>().ok()?)
        }
        None => {
            let number = |name: &str| {
                read(&format!("/sys/fs/cgroup/cpu/{name}"))?.trim().parse::<i64>().ok()
            };
            (number("cpu.cfs_quota_us")?, number("cpu.cfs_period_us")?)
        }
    };
    (quota > 0 && period > 0).then(|| (quota as usize).div_ceil(period as usize))
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
