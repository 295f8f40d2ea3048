//! A tour of the crate: a request, and how a model's layers share blocks.

use pomona_types::{LayerKind, Micros, ModelSpec, Request, RequestId, Sampling, TenantId};

#[test]
fn a_request_is_tokens_and_how_to_go_on() {
    let request = Request {
        id: RequestId(0xab),
        tenant: TenantId(0),
        class: Default::default(),
        priority: 0,
        prompt: [1, 2, 3].into(),
        sampling: Sampling { max_tokens: 8, ..Sampling::default() },
    };
    assert_eq!(request.id.to_string(), "req-ab");
    // Times are values; a difference never goes below zero.
    assert_eq!(Micros(5) - Micros(7), Micros(0));
}

#[test]
fn layers_of_one_kind_form_groups_of_equal_size() {
    let sliding = LayerKind::Sliding { window: 512 };
    let spec = ModelSpec {
        architecture: "gemma3".into(),
        hidden: 640,
        ffn: 2048,
        experts: None,
        heads: 4,
        kv_heads: 1,
        head_dim: 256,
        vocab: 262_144,
        max_position: 32_768,
        layers: [[sliding; 5].as_slice(), &[LayerKind::Full]].concat().repeat(3),
    };
    // 3 layers see everything, 15 slide: one group of the former, five of the latter.
    assert_eq!(spec.layer_groups().len(), 6);
    // A block of any group holds 16 tokens of 3 layers, keys and values, here in 2 bytes each.
    assert_eq!(spec.block_bytes(2 * 256), 16 * 3 * 2 * 256 * 2);
}
