//! The control groups that the process is in (cgroups(7)), whose limits count all the way up.

use std::fs;
use std::path::{Path, PathBuf};

/// Where they are mounted.
const MOUNT: &str = "/sys/fs/cgroup";

/// The least of what `limit` finds in the groups of a controller that the process is in.
pub(crate) fn least(controller: &str, limit: fn(&Path) -> Option<f64>) -> Option<f64> {
    let own = fs::read_to_string("/proc/self/cgroup").ok()?;
    let groups = own.lines().flat_map(|line| groups(Path::new(MOUNT), line, controller));
    groups.filter_map(|group| limit(&group)).reduce(f64::min)
}

/// The group that a line of `/proc/self/cgroup` names, and those that it lies in. The line may be
/// seen from outside a container: then it is `root`'s own that are found.
fn groups(root: &Path, line: &str, controller: &str) -> Vec<PathBuf> {
    let mut words = line.splitn(3, ':').skip(1);
    let (Some(controllers), Some(path)) = (words.next(), words.next()) else { return Vec::new() };
    let mount = match controllers {
        // cgroup v2 has no names of controllers.
        "" => root.to_owned(),
        list if list.split(',').any(|name| name == controller) => root.join(list),
        _ => return Vec::new(),
    };
    let group = mount.join(path.trim_start_matches('/'));
    let groups = group.ancestors().take_while(|group| group.starts_with(&mount));
    groups.map(Path::to_owned).collect()
}

/// A group's CPU quota, in CPUs: cgroup v2's `cpu.max`, or v1's `cpu.cfs_quota_us`.
pub(crate) fn cpu_quota(group: &Path) -> Option<f64> {
    let read = |name: &str| fs::read_to_string(group.join(name)).ok();
    let text = match read("cpu.max") {
        Some(text) => text,
        None => format!("{} {}", read("cpu.cfs_quota_us")?, read("cpu.cfs_period_us")?),
    };
    let mut words = text.split_whitespace().map(|word| word.parse::<f64>().ok());
    let (quota, period) = (words.next()??, words.next()??);
    (quota > 0.0 && period > 0.0).then_some(quota / period)
}

/// Bytes that a group's limit leaves, files in memory given up: cgroup v2's `memory.max`, or v1's
/// `memory.limit_in_bytes`.
pub(crate) fn memory_left(group: &Path) -> Option<f64> {
    let read = |name: &str| fs::read_to_string(group.join(name)).ok();
    let number = |name: &str| read(name)?.trim().parse::<f64>().ok();
    let (limit, used, total) = match number("memory.max") {
        Some(limit) => (limit, number("memory.current")?, ""),
        None => (number("memory.limit_in_bytes")?, number("memory.usage_in_bytes")?, "total_"),
    };
    let stat = read("memory.stat").unwrap_or_default();
    let field = |name: &str| {
        let name = format!("{total}{name} ");
        let line = stat.lines().find_map(|line| line.strip_prefix(&name));
        line.and_then(|bytes| bytes.parse::<f64>().ok()).unwrap_or(0.0)
    };
    let files = field("inactive_file") + field("active_file");
    Some((limit - (used - files).max(0.0)).max(0.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn world(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (file, text) in files {
            let path = root.path().join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        root
    }

    #[test]
    fn the_least_quota_above_a_group_counts() {
        let root = world(&[
            ("cpu.max", "max 100000\n"),
            ("pod/cpu.max", "150000 100000\n"),
            ("pod/server/cpu.max", "400000 100000\n"),
            ("cpu,cpuacct/half/cpu.cfs_quota_us", "50000\n"),
            ("cpu,cpuacct/half/cpu.cfs_period_us", "100000\n"),
            ("cpu,cpuacct/cpu.cfs_quota_us", "-1\n"),
            ("cpu,cpuacct/cpu.cfs_period_us", "100000\n"),
        ]);
        let least = |line: &str| {
            let groups = groups(root.path(), line, "cpu");
            groups.iter().filter_map(|group| cpu_quota(group)).reduce(f64::min)
        };
        assert_eq!(least("0::/pod/server"), Some(1.5));
        assert_eq!(least("0::/"), None);
        assert_eq!(least("0::/../elsewhere"), None);
        assert_eq!(least("4:cpu,cpuacct:/half/inner"), Some(0.5));
        assert_eq!(least("4:cpu,cpuacct:/"), None);
        assert_eq!(least("3:cpuset:/pod"), None);
        assert_eq!(least("nonsense"), None);
    }

    #[test]
    fn files_in_memory_do_not_count_against_a_limit() {
        let root = world(&[
            ("pod/memory.max", "1000\n"),
            ("pod/memory.current", "700\n"),
            ("pod/memory.stat", "anon 300\ninactive_file 250\nactive_file 150\n"),
            ("memory/pod/memory.limit_in_bytes", "1000\n"),
            ("memory/pod/memory.usage_in_bytes", "700\n"),
            ("memory/pod/memory.stat", "inactive_file 1\ntotal_inactive_file 50\n"),
            ("free/memory.max", "max\n"),
        ]);
        let left = |group: &str| memory_left(&root.path().join(group));
        assert_eq!(left("pod"), Some(700.0));
        assert_eq!(left("memory/pod"), Some(350.0));
        assert_eq!(left("free"), None);
        assert_eq!(left("memory"), None);
    }
}
