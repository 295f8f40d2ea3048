//! How much memory there is and how much this process holds.

use std::fs;

/// Bytes that can be had without swapping: the system's MemAvailable, or what is left of the
/// cgroup's limit if that is less. `None` where the system does not say.
pub fn available_memory() -> Option<u64> {
    let system = field("/proc/meminfo", "MemAvailable:");
    let number = |path: String| fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    let group = fs::read_to_string("/proc/self/cgroup").ok();
    let group = group.as_deref().and_then(|t| t.lines().find_map(|l| l.strip_prefix("0::")));
    let left = group.and_then(|path| {
        let max = number(format!("/sys/fs/cgroup{path}/memory.max"))?;
        let used = number(format!("/sys/fs/cgroup{path}/memory.current"))?;
        Some(max.saturating_sub(used))
    });
    match (system, left) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (a, b) => a.or(b),
    }
}

/// Bytes of this process in memory, mapped files included.
pub fn resident_memory() -> Option<u64> {
    field("/proc/self/status", "VmRSS:")
}

/// A field in kB of a file of the proc file system.
fn field(path: &str, name: &str) -> Option<u64> {
    let text = fs::read_to_string(path).ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix(name))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kb| kb * 1024)
}
