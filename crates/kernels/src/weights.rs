//! Where the rows of a weight matrix come from: a file, or numbers of a file that become a group
//! format on the way.

use std::ops::Range;
use std::sync::Arc;

use pomona_device::SharedBytes;

use crate::quantise::Quantise;
use crate::{Format, Isa, dequantize_row};

/// Rows of a matrix, each as its format stores it.
pub trait WeightRows: Send + Sync {
    /// Some rows; `None` where there are no such. What has to be made or copied is in `room`.
    fn rows<'a>(&'a self, rows: Range<usize>, room: &'a mut Vec<u8>) -> Option<&'a [u8]>;

    /// A hint that rows will be read next, and then those behind them. May wait until they are in
    /// memory.
    fn soon(&self, _rows: Range<usize>) {}

    /// A hint that rows will hardly be read again: their pages need not stay in memory.
    fn done_with(&self, _rows: Range<usize>) {}

    /// A text that differs where the rows do, had without reading them; `None` if nothing is known.
    fn identity(&self) -> Option<String> {
        None
    }
}

/// A weight matrix on its way to a device.
#[derive(Clone)]
pub struct WeightSource {
    /// Its name, of which a checkpoint has one only.
    pub name: String,
    /// How its rows are stored.
    pub format: Format,
    /// Output features.
    pub rows: usize,
    /// Input features; a whole number of blocks.
    pub cols: usize,
    /// The rows: `format.row_bytes(cols)` bytes each.
    pub content: Arc<dyn WeightRows>,
}

impl WeightSource {
    /// Some of its rows, as a matrix of its own.
    pub fn part(&self, rows: Range<usize>) -> WeightSource {
        if rows == (0..self.rows) {
            return self.clone();
        }
        WeightSource {
            name: format!("{} {rows:?}", self.name),
            format: self.format,
            rows: rows.len(),
            cols: self.cols,
            content: Arc::new(PartRows { source: self.content.clone(), rows }),
        }
    }
}

/// Some rows of a matrix.
struct PartRows {
    source: Arc<dyn WeightRows>,
    rows: Range<usize>,
}

impl PartRows {
    /// Where some of these rows are in the source; `None` beyond them.
    fn place(&self, rows: &Range<usize>) -> Option<Range<usize>> {
        let (start, end) = (self.rows.start, rows.end.checked_add(self.rows.start)?);
        (end <= self.rows.end).then_some(start + rows.start..end)
    }
}

impl WeightRows for PartRows {
    fn rows<'a>(&'a self, rows: Range<usize>, room: &'a mut Vec<u8>) -> Option<&'a [u8]> {
        self.source.rows(self.place(&rows)?, room)
    }

    fn soon(&self, rows: Range<usize>) {
        if let Some(rows) = self.place(&rows) {
            self.source.soon(rows);
        }
    }

    fn done_with(&self, rows: Range<usize>) {
        if let Some(rows) = self.place(&rows) {
            self.source.done_with(rows);
        }
    }

    fn identity(&self) -> Option<String> {
        Some(format!("{:?} of {}", self.rows, self.source.identity()?))
    }
}

/// Rows that lie one after the other, usually in a mapped file.
pub struct StoredRows {
    /// Keeps the bytes alive and yields them.
    pub bytes: SharedBytes,
    /// First byte of the first row.
    pub offset: usize,
    /// Bytes of a row.
    pub row_bytes: usize,
}

impl StoredRows {
    fn range(&self, rows: Range<usize>) -> Option<Range<usize>> {
        let at = |row: usize| row.checked_mul(self.row_bytes)?.checked_add(self.offset);
        Some(at(rows.start)?..at(rows.end)?)
    }
}

impl WeightRows for StoredRows {
    fn rows<'a>(&'a self, rows: Range<usize>, room: &'a mut Vec<u8>) -> Option<&'a [u8]> {
        self.bytes.read(self.range(rows)?, room)
    }

    fn soon(&self, rows: Range<usize>) {
        if let Some(range) = self.range(rows) {
            self.bytes.soon(range);
        }
    }

    fn done_with(&self, rows: Range<usize>) {
        if let Some(range) = self.range(rows) {
            self.bytes.done_with(range);
        }
    }

    fn identity(&self) -> Option<String> {
        Some(format!("{:?} {}", self.bytes.identity()?, self.offset))
    }
}

/// Rows of a dense format, quantised to a group format when they are asked for. The result is the
/// same bits on every tier.
pub struct QuantisedRows {
    /// What they are made from.
    pub source: Arc<dyn WeightRows>,
    /// Its format.
    pub from: Format,
    /// A group format.
    pub to: Format,
    /// Columns: a whole number of groups.
    pub cols: usize,
}

impl WeightRows for QuantisedRows {
    fn rows<'a>(&'a self, rows: Range<usize>, room: &'a mut Vec<u8>) -> Option<&'a [u8]> {
        let (from, to) = (self.from.row_bytes(self.cols)?, self.to.row_bytes(self.cols)?);
        let count = rows.len();
        let mut stored_room = Vec::new();
        let stored = self.source.rows(rows, &mut stored_room)?;
        room.clear();
        room.resize(count.checked_mul(to)?, 0);
        let mut values = vec![0.0; self.cols];
        for (stored, made) in stored.chunks_exact(from).zip(room.chunks_exact_mut(to)) {
            dequantize_row(self.from, stored, &mut values);
            Isa::detect().run(Quantise { format: self.to, values: &values, out: made });
        }
        Some(room)
    }

    fn soon(&self, rows: Range<usize>) {
        self.source.soon(rows);
    }

    fn done_with(&self, rows: Range<usize>) {
        self.source.done_with(rows);
    }

    fn identity(&self) -> Option<String> {
        Some(format!("{:?} from {}", self.to, self.source.identity()?))
    }
}
