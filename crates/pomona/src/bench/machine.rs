//! What this machine can do at most, measured now: the yardstick of every other number.

use pomona_device::Pool;
use pomona_kernels::{Isa, limits};

use super::report::Machine;

/// Measures with `threads` threads; takes about a second.
pub fn measure(threads: usize) -> Machine {
    let pool = Pool::new(threads);
    let found = limits(&pool);
    Machine {
        cpu: cpu_name(),
        threads,
        isa: Isa::detect().name().to_owned(),
        read_gb_per_s: found.read_bytes_per_s / 1e9,
        f32_gflop_per_s: found.f32_ops_per_s / 1e9,
        bf16_gflop_per_s: found.bf16_ops_per_s / 1e9,
        int8_gop_per_s: found.int8_ops_per_s / 1e9,
    }
}

/// The processor's name as the kernel reports it.
pub fn cpu_name() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = info.lines().find(|line| line.starts_with("model name"));
    let name = line.and_then(|line| line.split_once(':')).map(|(_, name)| name.trim());
    name.unwrap_or(std::env::consts::ARCH).to_owned()
}
