//! The metadata of a GGUF file as JSON: just enough of the format (GGUF specification, "File
//! Structure") to test tokenisers of real models, since this crate cannot know the one that reads
//! models.

use std::io::{BufReader, Read};

use serde_json::{Map, Value, json};

/// All keys of the file and their values.
pub fn read(path: &str) -> Map<String, Value> {
    let mut file = BufReader::new(std::fs::File::open(path).unwrap());
    assert_eq!(&bytes::<4>(&mut file), b"GGUF", "{path}");
    assert!(u32::from_le_bytes(bytes(&mut file)) >= 2);
    bytes::<8>(&mut file);
    let count = u64::from_le_bytes(bytes(&mut file));
    (0..count)
        .map(|_| {
            let key = string(&mut file);
            let kind = u32::from_le_bytes(bytes(&mut file));
            (key, value(&mut file, kind))
        })
        .collect()
}

fn bytes<const N: usize>(file: &mut impl Read) -> [u8; N] {
    let mut out = [0; N];
    file.read_exact(&mut out).unwrap();
    out
}

fn string(file: &mut impl Read) -> String {
    let length = u64::from_le_bytes(bytes(file));
    let mut out = vec![0; usize::try_from(length).unwrap()];
    file.read_exact(&mut out).unwrap();
    String::from_utf8(out).unwrap()
}

fn value(file: &mut impl Read, kind: u32) -> Value {
    match kind {
        0 => json!(u8::from_le_bytes(bytes(file))),
        1 => json!(i8::from_le_bytes(bytes(file))),
        2 => json!(u16::from_le_bytes(bytes(file))),
        3 => json!(i16::from_le_bytes(bytes(file))),
        4 => json!(u32::from_le_bytes(bytes(file))),
        5 => json!(i32::from_le_bytes(bytes(file))),
        6 => json!(f32::from_le_bytes(bytes(file))),
        7 => json!(bytes::<1>(file)[0] != 0),
        8 => json!(string(file)),
        9 => {
            let kind = u32::from_le_bytes(bytes(file));
            let count = u64::from_le_bytes(bytes(file));
            (0..count).map(|_| value(file, kind)).collect()
        }
        10 => json!(u64::from_le_bytes(bytes(file))),
        11 => json!(i64::from_le_bytes(bytes(file))),
        12 => json!(f64::from_le_bytes(bytes(file))),
        other => panic!("GGUF value of type {other}"),
    }
}
