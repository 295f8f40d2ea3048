//! A tour of the crate: weights, activations, an operation, and a refusal.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;

use pomona_device::{DType, Device, View};
use pomona_kernels::{CpuOps, Format, LinearPart, OpError, Ops, StoredRows, WeightSource, Write};

fn put(device: &dyn Device, values: &[f32], shape: &[usize]) -> View {
    let view = device.alloc_view(DType::F32, shape).unwrap();
    let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_ne_bytes()).collect();
    device.upload(&bytes, &view).unwrap();
    view
}

#[test]
fn a_product_of_weights_and_activations() {
    let ops = CpuOps::detect(2);
    let device = ops.device().clone();
    // Weights are packed from where they lie: here a vector, usually a mapped file.
    let weights: Vec<u8> = [1.0f32, 2.0, 3.0, 4.0].iter().flat_map(|v| v.to_le_bytes()).collect();
    let content = Arc::new(StoredRows { bytes: Arc::new(weights), offset: 0, row_bytes: 8 });
    let name = "weights".to_owned();
    let source = WeightSource { name, format: Format::F32, rows: 2, cols: 2, content };
    let matrix = ops.matrix(&source).unwrap();
    let x = put(device.as_ref(), &[10.0, 1.0], &[1, 2]);
    let out = device.alloc_view(DType::F32, &[1, 2]).unwrap();
    let part = || LinearPart { weight: &matrix, bias: None, out: &out };
    ops.linear(&x, &[part()], Write::Set).unwrap();
    let mut bytes = [0; 8];
    device.download(&out, &mut bytes).unwrap();
    assert_eq!(bytes.as_chunks::<4>().0.map_floats(), [12.0, 34.0]);
    // Shapes that do not fit are refused, not computed.
    let wrong = put(device.as_ref(), &[1.0; 3], &[1, 3]);
    let refusal = ops.linear(&wrong, &[part()], Write::Set);
    assert!(matches!(refusal, Err(OpError::Shape { operation: "linear", .. })));
}

trait MapFloats {
    fn map_floats(&self) -> Vec<f32>;
}

impl MapFloats for [[u8; 4]] {
    fn map_floats(&self) -> Vec<f32> {
        self.iter().map(|b| f32::from_ne_bytes(*b)).collect()
    }
}
