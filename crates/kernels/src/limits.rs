//! What the machine can do at most with the instructions that these kernels use.

use pomona_device::{Pool, Probe, probe};

use crate::linear::amx::peak::tile_peaks;

/// Measures a pool's cores together: their vectors, or their tile registers where they have such.
/// Takes about a second, and 256 MiB a worker, 1 GiB at least.
pub fn limits(pool: &Pool) -> Probe {
    let mut found = probe(pool);
    if let Some(tiles) = tile_peaks(pool) {
        (found.int8_ops_per_s, found.bf16_ops_per_s) = (tiles.int8, tiles.bf16);
    }
    found
}
