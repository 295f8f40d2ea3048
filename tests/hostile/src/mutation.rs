//! Seeded damage to an input: what disks, networks and liars do.

/// Longest input that damage makes.
const INPUT_BYTES_MAX: usize = 1 << 16;
/// Bytes that mean something to some parser.
const TELLING: &[u8] = b"\0\xff{}[]\",:%-+.0e9\\n\x7f\x80\xc3";

/// A generator of damage (SplitMix64: Steele, Lea, Flood, "Fast splittable pseudorandom number
/// generators", 2014).
pub struct Mutation(u64);

impl Mutation {
    /// The same seed, the same damage.
    pub fn new(seed: u64) -> Mutation {
        Mutation(seed)
    }

    /// A number below `bound`, which is not 0.
    pub fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 16) as usize % bound
    }

    /// `input` with a few things changed; `other` lends pieces.
    pub fn of(&mut self, input: &[u8], other: &[u8]) -> Vec<u8> {
        let mut bytes = input.to_vec();
        for _ in 0..=self.below(4) {
            self.change(&mut bytes, other);
        }
        bytes.truncate(INPUT_BYTES_MAX);
        bytes
    }

    fn change(&mut self, bytes: &mut Vec<u8>, other: &[u8]) {
        if bytes.is_empty() {
            bytes.extend_from_slice(other);
            return;
        }
        let at = self.below(bytes.len());
        let end = (at + 1 + self.below(32)).min(bytes.len());
        match self.below(9) {
            0 => bytes.truncate(at),
            1 => bytes[at] ^= 1 << self.below(8),
            2 => bytes[at] = TELLING[self.below(TELLING.len())],
            3 => drop(bytes.drain(at..end)),
            4 => {
                let piece = bytes[at..end].to_vec();
                let times = 1 + self.below(64);
                bytes.splice(at..at, piece.repeat(times));
            }
            5 if !other.is_empty() => {
                let from = self.below(other.len());
                let to = (from + 1 + self.below(64)).min(other.len());
                bytes.splice(at..end, other[from..to].iter().copied());
            }
            6 => bytes[at..end].fill(0xff),
            7 => {
                // A number that a length or a count may be.
                let value = 1u64 << self.below(64);
                let value = value.wrapping_sub(self.below(2) as u64).to_le_bytes();
                let room = (bytes.len() - at).min([4, 8][self.below(2)]);
                bytes[at..at + room].copy_from_slice(&value[..room]);
            }
            _ => bytes.insert(at, TELLING[self.below(TELLING.len())]),
        }
    }
}
