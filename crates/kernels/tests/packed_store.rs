//! Packed matrices come from a file as they go into it, bit for bit.
#![allow(clippy::unwrap_used)] // A panic is how a test fails.

use std::sync::Arc;

use pomona_device::{ArenaDevice, DType, HostMemory, Pieces, PiecesWriter, Pool};
use pomona_kernels::{
    CpuOps, Format, Isa, LinearPart, Ops, PackedStore, StoredRows, WeightSource, Write,
};

const COLS: usize = 256;
const KEY: [u8; 32] = [1; 32];

/// Weights of a few hundred rows; the last group is not full. `seed` 0 gives zeros.
fn source(name: &str, format: Format, seed: u32) -> WeightSource {
    let rows = 333;
    let bytes = (0..rows * format.row_bytes(COLS).unwrap() as u32)
        // Small enough for every two bytes to be a finite number.
        .map(|i| (i.wrapping_mul(seed).wrapping_mul(0x9e37_79b9) >> 24) as u8 & 0x3f)
        .collect::<Vec<u8>>();
    let (name, rows) = (name.to_owned(), rows as usize);
    let row_bytes = format.row_bytes(COLS).unwrap();
    let content = Arc::new(StoredRows { bytes: Arc::new(bytes), offset: 0, row_bytes });
    WeightSource { name, format, rows, cols: COLS, content }
}

fn product(ops: &CpuOps, source: &WeightSource) -> Vec<u8> {
    let matrix = ops.matrix(source).unwrap();
    let device = ops.device();
    let x = device.alloc_view(DType::F32, &[1, COLS]).unwrap();
    let values: Vec<u8> = (0..COLS).flat_map(|i| (i as f32 - 99.0).to_ne_bytes()).collect();
    device.upload(&values, &x).unwrap();
    let out = device.alloc_view(DType::F32, &[1, source.rows]).unwrap();
    let part = LinearPart { weight: &matrix, bias: None, out: &out };
    ops.linear(&x, &[part], Write::Set).unwrap();
    let mut bytes = vec![0; out.bytes()];
    device.download(&out, &mut bytes).unwrap();
    bytes
}

#[test]
fn matrices_of_a_file_are_those_that_were_packed_into_it() {
    let folder = tempfile::tempdir().unwrap();
    let (part, path) = (folder.path().join("part"), folder.path().join("file"));
    let sources = Format::ALL.map(|format| source(&format!("{format:?}"), format, 3));
    let plain = CpuOps::detect(2);
    let expected = sources.each_ref().map(|source| product(&plain, source));

    let writer = PiecesWriter::create(&part).unwrap();
    let saving = CpuOps::detect(2).with_packed(PackedStore::Saving(writer));
    assert_eq!(sources.each_ref().map(|source| product(&saving, source)), expected);
    let PackedStore::Saving(writer) = saving.take_packed() else { panic!("it went on saving") };
    writer.finish(&KEY, &path).unwrap();

    // Sources of zeros: whatever is not zero comes from the file. On a device whose memory the
    // host cannot reach, it comes as a copy.
    let arena: Arc<dyn HostMemory> = Arc::new(ArenaDevice::new(64 << 20).unwrap());
    let foreign = CpuOps::new(arena, Pool::new(2), Isa::detect());
    for ops in [CpuOps::detect(2), foreign] {
        let pieces = Pieces::open(&path, &KEY).unwrap().unwrap();
        let saved = ops.with_packed(PackedStore::Saved(pieces));
        let empty = Format::ALL.map(|format| source(&format!("{format:?}"), format, 0));
        assert_eq!(empty.each_ref().map(|source| product(&saved, source)), expected);
    }
}

#[test]
fn what_a_file_lacks_is_packed() {
    let folder = tempfile::tempdir().unwrap();
    let (part, path) = (folder.path().join("part"), folder.path().join("file"));
    let writer = PiecesWriter::create(&part).unwrap();
    let saving = CpuOps::detect(1).with_packed(PackedStore::Saving(writer));
    product(&saving, &source("a", Format::F16, 3));
    let PackedStore::Saving(writer) = saving.take_packed() else { panic!("it went on saving") };
    writer.finish(&KEY, &path).unwrap();

    let pieces = Pieces::open(&path, &KEY).unwrap().unwrap();
    let saved = CpuOps::detect(1).with_packed(PackedStore::Saved(pieces));
    let plain = CpuOps::detect(1);
    // Another name, and the same name with another format.
    for other in [source("b", Format::F16, 5), source("a", Format::BF16, 5)] {
        assert_eq!(product(&saved, &other), product(&plain, &other));
    }
}
