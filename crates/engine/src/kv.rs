//! KV memory: one buffer for keys and one for values per slot, shared by all layer groups. A draft
//! model has memory of its own, under the block tables of the model that it drafts for.

use pomona_device::{DType, Device, DeviceError};
use pomona_kernels::{KvLayer, kv_row_bytes};
use pomona_models::{KvCache, ModelPart};
use pomona_types::{BLOCK_TOKENS, LayerKind, ModelSpec};

/// Bytes of KV that one block takes, of all of a model or of the part that some rank has.
pub fn kv_block_bytes(whole: &ModelSpec, part: &ModelPart, dtype: DType) -> u64 {
    block_bytes(&places(whole, part), &part.spec, dtype)
}

/// Allocates `blocks` blocks for a model or a part of it. A block belongs to one of the whole
/// model's layer groups, and has a slot for each of the group's layers that are here; layers of
/// different groups share a slot's memory, never a block.
pub fn kv_cache(
    device: &dyn Device,
    whole: &ModelSpec,
    part: &ModelPart,
    dtype: DType,
    blocks: u32,
) -> Result<KvCache, DeviceError> {
    allocate(device, &part.spec, &places(whole, part), dtype, blocks)
}

/// A group and a slot for each layer that is here.
fn places(whole: &ModelSpec, part: &ModelPart) -> Vec<(usize, usize)> {
    let groups = whole.layer_groups();
    let mut used = vec![0; groups.len()];
    let layers = part.first_layer..part.first_layer + part.spec.layers.len() as u32;
    let place = |layer: u32| {
        let group = groups.iter().position(|group| group.layers.contains(&layer)).unwrap_or(0);
        used[group] += 1;
        (group, used[group] - 1)
    };
    layers.map(place).collect()
}

fn block_bytes(places: &[(usize, usize)], spec: &ModelSpec, dtype: DType) -> u64 {
    let row = kv_row_bytes(dtype, spec.head_dim as usize) as u64;
    slots(places) as u64 * u64::from(BLOCK_TOKENS) * 2 * u64::from(spec.kv_heads) * row
}

/// Allocates KV of the model `draft` for the blocks of the model `target`; `None` when those do not
/// keep all that its layers see.
pub(crate) fn draft_kv_cache(
    device: &dyn Device,
    target: &ModelSpec,
    draft: &ModelSpec,
    dtype: DType,
    blocks: u32,
) -> Option<Result<KvCache, DeviceError>> {
    draft_places(target, draft).map(|places| allocate(device, draft, &places, dtype, blocks))
}

/// Bytes of a draft model's KV that one block of its target takes; `None` as above.
pub fn draft_block_bytes(target: &ModelSpec, draft: &ModelSpec, dtype: DType) -> Option<u64> {
    Some(block_bytes(&draft_places(target, draft)?, draft, dtype))
}

/// A group and a slot for each layer of a draft model: a group of the target that keeps what the
/// layer sees, and has the fewest of its layers so far.
fn draft_places(target: &ModelSpec, draft: &ModelSpec) -> Option<Vec<(usize, usize)>> {
    let groups = target.layer_groups();
    let mut used = vec![0; groups.len()];
    let place = |kind: &LayerKind| {
        let keeps = |group: &usize| match (groups[*group].kind, kind) {
            (LayerKind::Full, _) => true,
            (LayerKind::Sliding { window }, LayerKind::Sliding { window: seen }) => window >= *seen,
            (LayerKind::Sliding { .. }, LayerKind::Full) => false,
        };
        let group = (0..groups.len()).filter(keeps).min_by_key(|group| used[*group])?;
        used[group] += 1;
        Some((group, used[group] - 1))
    };
    draft.layers.iter().map(place).collect()
}

fn slots(places: &[(usize, usize)]) -> usize {
    places.iter().map(|(_, slot)| slot + 1).max().unwrap_or(0)
}

/// Memory for layers at these groups and slots.
fn allocate(
    device: &dyn Device,
    spec: &ModelSpec,
    places: &[(usize, usize)],
    dtype: DType,
    blocks: u32,
) -> Result<KvCache, DeviceError> {
    let row = kv_row_bytes(dtype, spec.head_dim as usize) / dtype.bytes();
    let shape = [blocks as usize, spec.kv_heads as usize, BLOCK_TOKENS as usize, row];
    let slots: Vec<KvLayer> = (0..slots(places))
        .map(|_| {
            Ok(KvLayer {
                k: device.alloc_view(dtype, &shape)?,
                v: device.alloc_view(dtype, &shape)?,
            })
        })
        .collect::<Result<_, DeviceError>>()?;
    Ok(KvCache {
        layers: places.iter().map(|(_, slot)| slots[*slot].clone()).collect(),
        group_of: places.iter().map(|(group, _)| *group).collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(layers: &[LayerKind]) -> ModelSpec {
        ModelSpec {
            architecture: "test".into(),
            hidden: 64,
            ffn: 128,
            experts: None,
            heads: 4,
            kv_heads: 2,
            head_dim: 16,
            vocab: 100,
            max_position: 128,
            layers: layers.to_vec(),
        }
    }

    #[test]
    fn a_draft_models_layers_go_where_all_that_they_see_is_kept() {
        let [full, wide, narrow] =
            [LayerKind::Full, LayerKind::Sliding { window: 64 }, LayerKind::Sliding { window: 8 }];
        let target = spec(&[full, wide]);
        let places = draft_places(&target, &spec(&[narrow, full, narrow]));
        assert_eq!(places, Some(vec![(0, 0), (0, 1), (1, 0)]));
        assert_eq!(draft_places(&spec(&[narrow]), &spec(&[wide])), None);
        assert_eq!(draft_places(&spec(&[wide]), &spec(&[full])), None);
        let bytes = draft_block_bytes(&target, &spec(&[full; 3]), DType::F16);
        assert_eq!(bytes, Some(3 * 16 * 2 * 2 * 16 * 2));
    }

    #[test]
    fn a_stage_has_slots_for_its_own_layers_in_the_groups_of_all() {
        let [full, sliding] = [LayerKind::Full, LayerKind::Sliding { window: 8 }];
        let whole = spec(&[sliding, sliding, full, sliding, sliding, full]);
        let part =
            |spec, first_layer| ModelPart { spec, first_layer, context_ranks: 1, context_rank: 0 };
        let all = part(whole.clone(), 0);
        // Three groups: the full layers 2 and 5, the sliding ones 0 and 1, 3 and 4.
        assert_eq!(places(&whole, &all), [(1, 0), (1, 1), (0, 0), (2, 0), (2, 1), (0, 1)]);
        let bytes = kv_block_bytes(&whole, &all, DType::F16);
        assert_eq!(bytes, whole.block_bytes(2 * 16));
        let stage = part(spec(&whole.layers[3..]), 3);
        assert_eq!(places(&whole, &stage), [(2, 0), (2, 1), (0, 0)]);
    }
}
