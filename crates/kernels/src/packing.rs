//! Where packed matrices are: in memory of their own, or in a file that an earlier run packed or
//! that this one packs for the next. The bytes are the same everywhere.

use std::io;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use pomona_device::{
    Buffer, DType, HostMemory, Piece, Pieces, PiecesWriter, Pool, SharedBytes, split,
};

use crate::linear::Shared;
use crate::linear::packed::{self, GROUP};
use crate::{Format, OpError, WeightSource};

/// Bytes of a file that are packed before their pages are given back.
const PACKED_AT_ONCE: usize = 8 << 20;
/// Packed bytes that are written to a file at once: they should still be in the core's cache.
const WRITTEN_AT_ONCE: usize = 256 << 10;

/// Where the matrices of a model come from, and where they go.
#[derive(Default)]
pub enum PackedStore {
    /// Packed into memory, and gone with it.
    #[default]
    Memory,
    /// Mapped from the file of an earlier run; what it lacks is packed into memory.
    Saved(Pieces),
    /// Packed into a file, and mapped from there.
    Saving(PiecesWriter),
    /// Writing failed: what was written stays mapped, the rest is packed into memory.
    Failed(io::Error),
}

/// A matrix on its way.
struct Source<'a> {
    format: Format,
    cols: usize,
    /// Its rows, as stored in `file` from byte `offset` on.
    stored: &'a [u8],
    file: &'a SharedBytes,
    offset: usize,
    /// Its packed size.
    bytes: usize,
}

/// Brings a matrix into the layout of [`packed`], from wherever that costs least.
pub(crate) fn matrix(
    memory: &dyn HostMemory,
    pool: &Pool,
    store: &Mutex<PackedStore>,
    source: &WeightSource,
) -> Result<Buffer, OpError> {
    let WeightSource { format, rows, cols, offset, .. } = *source;
    let shape = |why: String| OpError::Shape { operation: "matrix", why };
    let bytes = packed::matrix_bytes(format, rows, cols).ok_or_else(|| {
        shape(format!("{format:?} has no matrix of {rows} rows and {cols} columns"))
    })?;
    let row_bytes = format.row_bytes(cols).unwrap_or_default();
    let file = &source.bytes;
    let stored = (**file).as_ref().get(offset..).and_then(|rest| rest.get(..rows * row_bytes));
    let stored = stored.ok_or_else(|| {
        shape(format!("{rows} rows of {row_bytes} bytes do not lie at byte {offset}"))
    })?;
    let matrix = Source { format, cols, stored, file, offset, bytes };
    let name = format!("{format:?} {rows} {cols} {}", source.name);
    let mut store = store.lock().unwrap_or_else(PoisonError::into_inner);
    let piece = match &mut *store {
        PackedStore::Saved(pieces) => pieces.find(&name).filter(|p| p.as_ref().len() == bytes),
        PackedStore::Saving(writer) => match matrix.save(pool, writer, &name) {
            Ok(piece) => Some(piece),
            Err(error) => {
                *store = PackedStore::Failed(error);
                None
            }
        },
        PackedStore::Memory | PackedStore::Failed(_) => None,
    };
    match piece {
        Some(piece) => Ok(memory.adopt(piece)?),
        None => matrix.keep(memory, pool),
    }
}

impl Source<'_> {
    /// Packs into memory.
    fn keep(&self, memory: &dyn HostMemory, pool: &Pool) -> Result<Buffer, OpError> {
        let view = memory.alloc_view(DType::U8, &[self.bytes])?;
        let access = memory.enter();
        // SAFETY: the only slice of this access.
        let out = Shared(unsafe { access.write::<u8>(&view)? }.as_mut_ptr());
        let width = packed::group_bytes(self.format, self.cols);
        self.in_turns(&mut |groups| {
            pool.run(&|worker| {
                let own = split(groups.len(), 1, pool.threads(), worker);
                for group in groups.start + own.start..groups.start + own.end {
                    // SAFETY: the group's own bytes of the view, and workers have disjoint groups.
                    let out =
                        unsafe { std::slice::from_raw_parts_mut(out.at(group * width), width) };
                    packed::pack(self.format, self.rows(group), self.cols, out);
                }
            });
            Ok::<_, OpError>(())
        })?;
        Ok(view.buffer().clone())
    }

    /// Packs into a file and maps it from there. Each worker writes what it packed.
    fn save(&self, pool: &Pool, writer: &mut PiecesWriter, name: &str) -> io::Result<Piece> {
        let width = packed::group_bytes(self.format, self.cols);
        let most = (WRITTEN_AT_ONCE / width).max(1);
        self.in_turns(&mut |groups| {
            let failure = Mutex::new(None);
            let write = |own: Range<usize>| -> io::Result<()> {
                let mut buffer = vec![0; most.min(own.len()) * width];
                for first in own.clone().step_by(most) {
                    let count = most.min(own.end - first);
                    let buffer = &mut buffer[..count * width];
                    buffer.fill(0);
                    for (group, out) in (first..).zip(buffer.chunks_exact_mut(width)) {
                        packed::pack(self.format, self.rows(group), self.cols, out);
                    }
                    writer.write_at(buffer, first * width)?;
                }
                Ok(())
            };
            pool.run(&|worker| {
                let own = split(groups.len(), 1, pool.threads(), worker);
                if let Err(error) = write(groups.start + own.start..groups.start + own.end) {
                    *failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
                }
            });
            failure.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
        })?;
        writer.end_piece(name, self.bytes)
    }

    /// Runs `pack` on ranges of groups, one after the other, and gives back the pages of the file
    /// that each has read, so that little is in memory twice.
    fn in_turns<E>(&self, pack: &mut dyn FnMut(Range<usize>) -> Result<(), E>) -> Result<(), E> {
        let group_rows = self.group_rows_bytes();
        let groups = self.stored.len().div_ceil(group_rows);
        let most = (PACKED_AT_ONCE / group_rows).max(1);
        for start in (0..groups).step_by(most) {
            let end = groups.min(start + most);
            pack(start..end)?;
            let read = start * group_rows..self.stored.len().min(end * group_rows);
            self.file.done_with(self.offset + read.start..self.offset + read.end);
        }
        Ok(())
    }

    /// A group's rows as stored; the last group may have fewer.
    fn rows(&self, group: usize) -> &[u8] {
        let bytes = self.group_rows_bytes();
        &self.stored[group * bytes..self.stored.len().min((group + 1) * bytes)]
    }

    fn group_rows_bytes(&self) -> usize {
        GROUP * self.format.row_bytes(self.cols).expect("the matrix has a size")
    }
}
