//! A typed, shaped window on a buffer. Contiguous, row-major, at most four axes.

use crate::{Buffer, DeviceError, DeviceId};

/// Element type of a view. Quantised weights are `U8` bytes with a format beside them.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum DType {
    /// IEEE binary32.
    F32,
    /// IEEE binary16.
    F16,
    /// The upper half of binary32.
    BF16,
    /// Signed bytes; quantised keys and values keep their scales among them.
    I8,
    /// Bytes.
    U8,
    /// Token ids, positions, slots, block ids.
    U32,
}

impl DType {
    /// Bytes of one element.
    pub fn bytes(self) -> usize {
        match self {
            DType::F32 | DType::U32 => 4,
            DType::F16 | DType::BF16 => 2,
            DType::I8 | DType::U8 => 1,
        }
    }
}

/// Most axes that a view has.
const AXES_MAX: usize = 4;

/// A window on a buffer. Cheap to clone; cloning shares the memory.
#[derive(Clone, Debug)]
pub struct View {
    buffer: Buffer,
    offset: usize,
    dtype: DType,
    shape: [usize; AXES_MAX],
    axes: usize,
}

impl View {
    /// A view of `shape` at `offset` bytes into `buffer`.
    ///
    /// # Errors
    /// When it does not lie within the buffer, is not aligned to its element, or has no or more
    /// than four axes.
    pub fn new(
        buffer: Buffer,
        offset: usize,
        dtype: DType,
        shape: &[usize],
    ) -> Result<View, DeviceError> {
        let bad = |why: &str| {
            let held = buffer.bytes();
            DeviceError::Mismatch(format!(
                "a view of {dtype:?} {shape:?} at byte {offset} of {held}: {why}"
            ))
        };
        if shape.is_empty() || shape.len() > AXES_MAX {
            return Err(bad("one to four axes are possible"));
        }
        let end = shape
            .iter()
            .try_fold(dtype.bytes(), |a, b| a.checked_mul(*b))
            .and_then(|bytes| bytes.checked_add(offset))
            .ok_or_else(|| bad("its size overflows"))?;
        if end > buffer.bytes() {
            return Err(bad("it ends outside the buffer"));
        }
        if !(buffer.base().as_ptr() as usize + offset).is_multiple_of(dtype.bytes()) {
            return Err(bad("it is not aligned"));
        }
        let mut axes = [1; AXES_MAX];
        axes[..shape.len()].copy_from_slice(shape);
        Ok(View { buffer, offset, dtype, shape: axes, axes: shape.len() })
    }

    /// The device whose operations may touch it.
    pub fn device(&self) -> DeviceId {
        self.buffer.device()
    }

    /// The memory behind it.
    pub fn buffer(&self) -> &Buffer {
        &self.buffer
    }

    /// Where it starts in the buffer, in bytes.
    pub fn offset(&self) -> usize {
        self.offset
    }

    /// Its element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Its axes, outermost first.
    pub fn shape(&self) -> &[usize] {
        &self.shape[..self.axes]
    }

    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.shape().iter().product()
    }

    /// Size in bytes.
    pub fn bytes(&self) -> usize {
        self.elements() * self.dtype.bytes()
    }

    /// `count` entries of the first axis from `start`.
    ///
    /// # Panics
    /// When they are not there: a bug of the caller.
    pub fn rows(&self, start: usize, count: usize) -> View {
        assert!(
            start.checked_add(count).is_some_and(|end| end <= self.shape[0]),
            "rows {start}+{count} of a view of {:?}",
            self.shape()
        );
        let row_bytes = self.bytes().checked_div(self.shape[0]).unwrap_or(0);
        let mut view = self.clone();
        view.offset += start * row_bytes;
        view.shape[0] = count;
        view
    }

    /// The same bytes under another shape with as many elements.
    ///
    /// # Panics
    /// When the element counts differ: a bug of the caller.
    pub fn reshape(&self, shape: &[usize]) -> View {
        let same = shape.iter().product::<usize>() == self.elements();
        assert!(same && shape.len() <= AXES_MAX, "reshape {:?} to {shape:?}", self.shape());
        let mut view = self.clone();
        view.shape = [1; AXES_MAX];
        view.shape[..shape.len()].copy_from_slice(shape);
        view.axes = shape.len();
        view
    }

    /// Whether it shares bytes with another view.
    pub fn overlaps(&self, other: &View) -> bool {
        let start = |v: &View| v.buffer.base().as_ptr() as usize + v.offset;
        self.device() == other.device()
            && start(self) < start(other) + other.bytes()
            && start(other) < start(self) + self.bytes()
    }
}
