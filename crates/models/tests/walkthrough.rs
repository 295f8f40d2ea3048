//! A tour of the crate: open a checkpoint, look at it, load it.
#![allow(clippy::unwrap_used)]

use std::path::PathBuf;

use pomona_kernels::CpuOps;
use pomona_models::{Checkpoint, LoadOptions, ModelError};
use pomona_types::LayerKind;

#[test]
fn a_checkpoint_is_opened_before_its_weights_are_touched() {
    let golden = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let checkpoint = Checkpoint::open(&golden.join("gemma3")).unwrap();
    let spec = checkpoint.spec();
    assert_eq!((spec.architecture.as_str(), spec.vocab), ("gemma3", 272));
    assert_eq!(spec.layers[0], LayerKind::Sliding { window: 9 });
    assert!(checkpoint.tensors().iter().any(|t| t.name == "model.embed_tokens.weight"));

    // Loading maps the weights and makes room for steps of so many tokens.
    let ops = CpuOps::detect(1);
    let options = LoadOptions { max_tokens: 32, max_outputs: 32 };
    let model = checkpoint.load(&ops, &options, &mut |_| {}).unwrap();
    assert_eq!(model.spec(), spec);

    // What is not a model is refused with a reason.
    let refused = Checkpoint::open(&golden);
    assert!(matches!(refused, Err(ModelError::Invalid(why)) if why.contains("config.json")));
}
