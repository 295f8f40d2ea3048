//! CPU time of threads, in seconds (proc(5), `schedstat`). 0 where there is no such file.

use std::fs;
use std::path::Path;

/// Of all living threads of this process that have one of these names.
pub fn of_threads(names: &[&str]) -> f64 {
    let Ok(tasks) = fs::read_dir("/proc/self/task") else { return 0.0 };
    let named = |path: &Path| {
        fs::read_to_string(path.join("comm")).is_ok_and(|n| names.contains(&n.trim()))
    };
    tasks.flatten().map(|task| task.path()).filter(|path| named(path)).map(|path| at(&path)).sum()
}

/// Of the thread that asks.
pub fn own() -> f64 {
    at(Path::new("/proc/thread-self"))
}

fn at(thread: &Path) -> f64 {
    let times = fs::read_to_string(thread.join("schedstat")).unwrap_or_default();
    times.split(' ').next().and_then(|ns| ns.parse::<f64>().ok()).unwrap_or(0.0) / 1e9
}
