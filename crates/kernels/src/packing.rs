//! Where packed matrices are: in memory of their own, or in a file that an earlier run packed or
//! that this one packs for the next. The bytes are the same everywhere.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use pomona_device::{Buffer, DType, HostMemory, Piece, Pieces, PiecesWriter, Pool, split};

use crate::linear::Shared;
use crate::linear::packed::{self, GROUP};
use crate::{OpError, WeightSource};

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
    from: &'a WeightSource,
    row_bytes: usize,
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
    let WeightSource { format, rows, cols, .. } = *source;
    let shape = |why: String| OpError::Shape { operation: "matrix", why };
    let bytes = packed::matrix_bytes(format, rows, cols).ok_or_else(|| {
        shape(format!("{format:?} has no matrix of {rows} rows and {cols} columns"))
    })?;
    let row_bytes = format.row_bytes(cols).unwrap_or_default();
    let matrix = Source { from: source, row_bytes, bytes };
    // Before memory is taken for rows that only a damaged header has.
    if rows == 0 || matrix.rows(rows - 1..rows, &mut Vec::new()).is_none() {
        return Err(matrix.missing());
    }
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
    fn missing(&self) -> OpError {
        let (rows, bytes) = (self.from.rows, self.row_bytes);
        let why = format!("{rows} rows of {bytes} bytes are not all there");
        OpError::Shape { operation: "matrix", why }
    }

    /// Packs into memory.
    fn keep(&self, memory: &dyn HostMemory, pool: &Pool) -> Result<Buffer, OpError> {
        let view = memory.alloc_view(DType::U8, &[self.bytes])?;
        let access = memory.enter();
        // SAFETY: the only slice of this access.
        let out = Shared(unsafe { access.write::<u8>(&view)? }.as_mut_ptr());
        let width = packed::group_bytes(self.from.format, self.from.cols);
        let missing = AtomicBool::new(false);
        self.in_turns(&mut |groups| {
            pool.run(&|worker| {
                let own = split(groups.len(), 1, pool.threads(), worker);
                let mut room = Vec::new();
                for group in groups.start + own.start..groups.start + own.end {
                    // SAFETY: the group's own bytes of the view, and workers have disjoint groups.
                    let out =
                        unsafe { std::slice::from_raw_parts_mut(out.at(group * width), width) };
                    if self.pack(group, out, &mut room).is_none() {
                        missing.store(true, Ordering::Relaxed);
                    }
                }
            });
            if missing.load(Ordering::Relaxed) { Err(self.missing()) } else { Ok(()) }
        })?;
        Ok(view.buffer().clone())
    }

    /// Packs into a file and maps it from there. Each worker writes what it packed.
    fn save(&self, pool: &Pool, writer: &mut PiecesWriter, name: &str) -> io::Result<Piece> {
        let width = packed::group_bytes(self.from.format, self.from.cols);
        let most = (WRITTEN_AT_ONCE / width).max(1);
        self.in_turns(&mut |groups| {
            let failure = Mutex::new(None);
            let write = |own: Range<usize>| -> io::Result<()> {
                let mut buffer = vec![0; most.min(own.len()) * width];
                let mut room = Vec::new();
                for first in own.clone().step_by(most) {
                    let count = most.min(own.end - first);
                    let buffer = &mut buffer[..count * width];
                    buffer.fill(0);
                    for (group, out) in (first..).zip(buffer.chunks_exact_mut(width)) {
                        let packed = self.pack(group, out, &mut room);
                        packed.ok_or_else(|| io::Error::other(self.missing()))?;
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

    /// Runs `pack` on ranges of groups, one after the other. The file is read ahead of it, and the
    /// pages that each has read are given back, so that little is in memory twice.
    fn in_turns<E>(&self, pack: &mut dyn FnMut(Range<usize>) -> Result<(), E>) -> Result<(), E> {
        let groups = self.from.rows.div_ceil(GROUP);
        let most = (PACKED_AT_ONCE / (GROUP * self.row_bytes)).max(1);
        for start in (0..groups).step_by(most) {
            let end = groups.min(start + most);
            let rows = start * GROUP..self.from.rows.min(end * GROUP);
            self.from.content.soon(rows.clone());
            pack(start..end)?;
            self.from.content.done_with(rows);
        }
        Ok(())
    }

    /// Packs a group of rows, `None` where they are not there; the last group may have fewer.
    fn pack(&self, group: usize, out: &mut [u8], room: &mut Vec<u8>) -> Option<()> {
        let rows = self.rows(group * GROUP..self.from.rows.min((group + 1) * GROUP), room)?;
        packed::pack(self.from.format, rows, self.from.cols, out);
        Some(())
    }

    fn rows<'a>(&'a self, rows: Range<usize>, room: &'a mut Vec<u8>) -> Option<&'a [u8]> {
        let bytes = rows.len().checked_mul(self.row_bytes)?;
        self.from.content.rows(rows, room).filter(|rows| rows.len() == bytes)
    }
}
