//! Which cores this process may use.

use std::fs;
use std::path::Path;

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

/// Where cgroups are mounted (cgroups(7)).
const CGROUPS: &str = "/sys/fs/cgroup";

/// CPUs' worth of time that the process's cgroup, or one that it lies in, allows: 0.5 is half a
/// core. `None` where nothing is limited.
pub fn cpu_quota() -> Option<f64> {
    let own = fs::read_to_string("/proc/self/cgroup").ok()?;
    own.lines().filter_map(|line| least_quota(Path::new(CGROUPS), line)).reduce(f64::min)
}

/// The least quota on the way up from the group that a line of `/proc/self/cgroup` names, which
/// may be seen from outside a container: then it is `root`'s own that is found.
fn least_quota(root: &Path, line: &str) -> Option<f64> {
    let mut words = line.splitn(3, ':').skip(1);
    let (controllers, path) = (words.next()?, words.next()?);
    let mount = match controllers {
        // cgroup v2 has no names of controllers.
        "" => root.to_owned(),
        list if list.split(',').any(|name| name == "cpu") => root.join(list),
        _ => return None,
    };
    let group = mount.join(path.trim_start_matches('/'));
    let groups = group.ancestors().take_while(|group| group.starts_with(&mount));
    groups.filter_map(quota_of).reduce(f64::min)
}

/// A group's own quota: cgroup v2's `cpu.max`, or v1's `cpu.cfs_quota_us`.
fn quota_of(group: &Path) -> Option<f64> {
    let read = |name: &str| fs::read_to_string(group.join(name)).ok();
    let text = match read("cpu.max") {
        Some(text) => text,
        None => format!("{} {}", read("cpu.cfs_quota_us")?, read("cpu.cfs_period_us")?),
    };
    let mut words = text.split_whitespace().map(|word| word.parse::<f64>().ok());
    let (quota, period) = (words.next()??, words.next()??);
    (quota > 0.0 && period > 0.0).then_some(quota / period)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_quota_above_a_group_counts() {
        let root = tempfile::tempdir().unwrap();
        let put = |file: &str, text: &str| {
            let path = root.path().join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        put("cpu.max", "max 100000\n");
        put("pod/cpu.max", "150000 100000\n");
        put("pod/server/cpu.max", "400000 100000\n");
        put("cpu,cpuacct/half/cpu.cfs_quota_us", "50000\n");
        put("cpu,cpuacct/half/cpu.cfs_period_us", "100000\n");
        put("cpu,cpuacct/cpu.cfs_quota_us", "-1\n");
        put("cpu,cpuacct/cpu.cfs_period_us", "100000\n");
        let least = |line: &str| least_quota(root.path(), line);
        assert_eq!(least("0::/pod/server"), Some(1.5));
        assert_eq!(least("0::/"), None);
        assert_eq!(least("0::/../elsewhere"), None);
        assert_eq!(least("4:cpu,cpuacct:/half/inner"), Some(0.5));
        assert_eq!(least("4:cpu,cpuacct:/"), None);
        assert_eq!(least("3:cpuset:/pod"), None);
        assert_eq!(least("nonsense"), None);
    }

    #[test]
    fn there_is_a_core_to_use() {
        assert!(!usable_cores().is_empty());
    }
}
