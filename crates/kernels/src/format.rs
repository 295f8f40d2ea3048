//! Weight formats: names and sizes. Block formats are those of GGUF
//! (<https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>), and group formats of our own,
//! which no file has: weights become them while they are loaded.

/// How the numbers of a weight matrix are stored. Blocks run along a row.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[allow(missing_docs, non_camel_case_types)]
pub enum Format {
    F32,
    F16,
    BF16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q4_K,
    Q5_K,
    Q6_K,
    /// `d * q`: a 16-bit scale for each 32, 64 or 128 columns, and signed bytes.
    Int8G32,
    Int8G64,
    Int8G128,
    /// `d * (q - z)`: a 16-bit scale and a zero point in sixteenths for so many columns, and
    /// nibbles. What GPTQ and AWQ checkpoints hold is exactly such numbers.
    Int4G32,
    Int4G64,
    Int4G128,
}

impl Format {
    /// All of them.
    pub const ALL: [Format; 17] = [
        Format::F32,
        Format::F16,
        Format::BF16,
        Format::Q4_0,
        Format::Q4_1,
        Format::Q5_0,
        Format::Q5_1,
        Format::Q8_0,
        Format::Q4_K,
        Format::Q5_K,
        Format::Q6_K,
        Format::Int8G32,
        Format::Int8G64,
        Format::Int8G128,
        Format::Int4G32,
        Format::Int4G64,
        Format::Int4G128,
    ];

    /// The 8-bit format with the largest groups that `width` consists of.
    pub fn int8(width: usize) -> Option<Format> {
        [Format::Int8G128, Format::Int8G64, Format::Int8G32]
            .into_iter()
            .find(|format| width.is_multiple_of(format.block_len()))
    }

    /// The 4-bit format with the largest groups that `width` consists of.
    pub fn int4(width: usize) -> Option<Format> {
        [Format::Int4G128, Format::Int4G64, Format::Int4G32]
            .into_iter()
            .find(|format| width.is_multiple_of(format.block_len()))
    }

    /// Whether numbers are stored one by one.
    pub fn is_dense(self) -> bool {
        matches!(self, Format::F32 | Format::F16 | Format::BF16)
    }

    /// Whether it is one of ours, that no file has.
    pub fn is_grouped(self) -> bool {
        self.is_int8() || self.is_int4()
    }

    pub(crate) fn is_int8(self) -> bool {
        matches!(self, Format::Int8G32 | Format::Int8G64 | Format::Int8G128)
    }

    pub(crate) fn is_int4(self) -> bool {
        matches!(self, Format::Int4G32 | Format::Int4G64 | Format::Int4G128)
    }

    /// Weights in one block.
    pub fn block_len(self) -> usize {
        match self {
            Format::F32 | Format::F16 | Format::BF16 => 1,
            Format::Q4_0 | Format::Q4_1 | Format::Q5_0 | Format::Q5_1 | Format::Q8_0 => 32,
            Format::Q4_K | Format::Q5_K | Format::Q6_K => 256,
            Format::Int8G32 | Format::Int4G32 => 32,
            Format::Int8G64 | Format::Int4G64 => 64,
            Format::Int8G128 | Format::Int4G128 => 128,
        }
    }

    /// Bytes of one block.
    pub fn block_bytes(self) -> usize {
        match self {
            Format::F32 => 4,
            Format::F16 | Format::BF16 => 2,
            Format::Q4_0 => 18,
            Format::Q4_1 => 20,
            Format::Q5_0 => 22,
            Format::Q5_1 => 24,
            Format::Q8_0 => 34,
            Format::Q4_K => 144,
            Format::Q5_K => 176,
            Format::Q6_K => 210,
            Format::Int8G32 | Format::Int8G64 | Format::Int8G128 => 2 + self.block_len(),
            Format::Int4G32 | Format::Int4G64 | Format::Int4G128 => 3 + self.block_len() / 2,
        }
    }

    /// Bytes of a row of `cols` weights, `None` when `cols` is not a whole number of blocks or the
    /// size overflows.
    pub fn row_bytes(self, cols: usize) -> Option<usize> {
        cols.is_multiple_of(self.block_len())
            .then(|| (cols / self.block_len()).checked_mul(self.block_bytes()))
            .flatten()
    }
}
