//! KV memory: one buffer for keys and one for values per slot, shared by all layer groups.

use pomona_device::{DType, Device, DeviceError};
use pomona_kernels::KvLayer;
use pomona_models::KvCache;
use pomona_types::{BLOCK_TOKENS, ModelSpec};

/// Bytes of KV that one block takes.
pub fn kv_block_bytes(spec: &ModelSpec, dtype: DType) -> u64 {
    spec.block_bytes(dtype.bytes() as u32)
}

/// Allocates `blocks` blocks. Layer `i` of a group lives in slot `i` of the blocks that the group
/// owns; layers of different groups share a slot's memory, never a block.
pub fn kv_cache(
    device: &dyn Device,
    spec: &ModelSpec,
    dtype: DType,
    blocks: u32,
) -> Result<KvCache, DeviceError> {
    let shape =
        [blocks as usize, spec.kv_heads as usize, BLOCK_TOKENS as usize, spec.head_dim as usize];
    let slots: Vec<KvLayer> = (0..spec.slots_per_block())
        .map(|_| {
            Ok(KvLayer {
                k: device.alloc_view(dtype, &shape)?,
                v: device.alloc_view(dtype, &shape)?,
            })
        })
        .collect::<Result<_, DeviceError>>()?;
    let mut places = vec![(0, 0); spec.layers.len()];
    for (group, members) in spec.layer_groups().iter().enumerate() {
        for (slot, layer) in members.layers.iter().enumerate() {
            places[*layer as usize] = (group, slot);
        }
    }
    Ok(KvCache {
        layers: places.iter().map(|(_, slot)| slots[*slot].clone()).collect(),
        group_of: places.iter().map(|(group, _)| *group).collect(),
    })
}
