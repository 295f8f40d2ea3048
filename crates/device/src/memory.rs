//! How much memory there is and how much this process holds.

use std::fs;

use crate::cgroup;

/// Bytes that can be had without swapping: the system's MemAvailable, or what is left of the
/// limit of a cgroup that the process is in, if that is less. `None` where the system does not say.
pub fn available_memory() -> Option<u64> {
    let system = field("/proc/meminfo", "MemAvailable:");
    let left = cgroup::least("memory", cgroup::memory_left).map(|bytes| bytes as u64);
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
