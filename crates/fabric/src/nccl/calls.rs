//! What the ranks of a communicator do together. Each call gives work to a stream.

use pomona_types::GroupError;

use super::comm::{Called, NcclComm};
use super::ffi::{Code, Copy2D, Handle, IN_PROGRESS, SUCCESS, SUM};
use super::library::Library;
use super::memory::BYTE;
use super::{DeviceBytes, Number, Stream};
use crate::coll::{Mark, Operation};

/// What ranks have of rows that are joined: rank `r` has `widths[r]` bytes of each.
#[derive(Clone, Copy, Debug)]
pub struct Columns<'a> {
    /// How many rows.
    pub rows: usize,
    /// Bytes of a row, by rank.
    pub widths: &'a [usize],
}

impl NcclComm {
    /// Sums of all ranks' numbers, in an order of NCCL's own: the same bits on all ranks, but not
    /// those of another number of ranks, or another version. `from` and `into` may be the same.
    pub fn all_reduce(
        &mut self,
        stream: Stream,
        number: Number,
        from: DeviceBytes,
        into: DeviceBytes,
    ) -> Result<(), GroupError> {
        let count = numbers(number, from)?;
        if numbers(number, into)? != count {
            return invalid(format!("sums of {} bytes for {}", from.len(), into.len()));
        }
        let shape = [number.code() as usize];
        self.together(Operation::AllReduce, from.len(), shape, |library, comm| {
            // SAFETY: the communicator is open; the memory is as long as its maker said.
            unsafe {
                let (from, into, kind) = (from.address(), into.address(), number.code());
                (library.all_reduce)(from, into, count, kind, SUM, comm.as_ptr(), stream.0)
            }
        })
    }

    /// The same, of which rank `r` keeps `counts[r]` numbers, those of rank 0 first.
    pub fn reduce_scatter(
        &mut self,
        stream: Stream,
        number: Number,
        counts: &[usize],
        from: DeviceBytes,
        own: DeviceBytes,
    ) -> Result<(), GroupError> {
        let (me, kind) = (self.rank(), number.code());
        self.fits("numbers", counts, numbers(number, own)?, numbers(number, from)?)?;
        let shape = counts.iter().copied().chain([kind as usize]);
        let even = all_equal(counts);
        self.together(Operation::ReduceScatter, from.len(), shape, |library, comm| {
            let comm = comm.as_ptr();
            if even {
                let (from, own, count) = (from.address(), own.address(), counts[0]);
                // SAFETY: as in `all_reduce`; the lengths were checked.
                return unsafe {
                    (library.reduce_scatter)(from, own, count, kind, SUM, comm, stream.0)
                };
            }
            library.group(parts(counts).map(|(rank, start, count)| {
                let from = from.address() + (start * number.bytes()) as u64;
                // Others do not write their results.
                let own = if rank == me { own.address() } else { from };
                let root = rank as i32;
                // SAFETY: as above.
                move || unsafe {
                    (library.reduce)(from, own, count, kind, SUM, root, comm, stream.0)
                }
            }))
        })
    }

    /// Joins the bytes of all ranks, of which rank `r` has `widths[r]`, those of rank 0 first.
    pub fn all_gather(
        &mut self,
        stream: Stream,
        widths: &[usize],
        own: DeviceBytes,
        all: DeviceBytes,
    ) -> Result<(), GroupError> {
        let me = self.rank();
        self.fits("bytes", widths, own.len(), all.len())?;
        let shape = widths.iter().copied();
        let even = all_equal(widths);
        self.together(Operation::AllGather, all.len(), shape, |library, comm| {
            let comm = comm.as_ptr();
            if even {
                let (own, all, width) = (own.address(), all.address(), widths[0]);
                // SAFETY: as in `all_reduce`; the lengths were checked.
                return unsafe { (library.all_gather)(own, all, width, BYTE, comm, stream.0) };
            }
            library.group(parts(widths).map(|(rank, start, width)| {
                let place = all.address() + start as u64;
                let from = if rank == me { own.address() } else { place };
                let root = rank as i32;
                // SAFETY: as above.
                move || unsafe {
                    (library.broadcast)(from, place, width, BYTE, root, comm, stream.0)
                }
            }))
        })
    }

    /// Joins columns: every rank has its rows in `own`, and gets rows of all ranks' bytes in `all`,
    /// those of rank 0 first. NCCL knows no rows: each rank's come together
    /// to `scratch`, as long as `all`, and are copied to their places from there. With one row, or
    /// one rank, `scratch` is not touched and may be empty.
    pub fn all_gather_columns(
        &mut self,
        stream: Stream,
        columns: Columns<'_>,
        own: DeviceBytes,
        scratch: DeviceBytes,
        all: DeviceBytes,
    ) -> Result<(), GroupError> {
        let Columns { rows, widths } = columns;
        let bytes: Option<Vec<usize>> =
            widths.iter().map(|width| width.checked_mul(rows)).collect();
        let Some(bytes) = bytes else {
            return invalid(format!("{rows} rows with widths {widths:?}"));
        };
        if rows == 1 || self.ranks() == 1 {
            return self.all_gather(stream, &bytes, own, all);
        }
        if scratch.len() < all.len() {
            return invalid(format!("{} bytes of scratch for {}", scratch.len(), all.len()));
        }
        self.all_gather(stream, &bytes, own, scratch.part(0..all.len()))?;
        let stride: usize = widths.iter().sum();
        for (_, column, width) in parts(widths).filter(|_| rows > 0) {
            let from = scratch.address() + (column * rows) as u64;
            let to = all.address() + column as u64;
            let copy = Copy2D::spread(from, to, rows, width, stride);
            // SAFETY: the description is read before the function returns; the rows are within
            // `scratch` and `all`, whose lengths were checked, and the stream keeps the order.
            let code = unsafe { (self.nccl.driver.copy_2d)(&copy, stream.0) };
            let copied = self.nccl.driver.check("cuMemcpy2DAsync", code);
            let copied = copied.map_err(|error| self.control.failed(error.to_string()));
            self.settle(copied)?;
        }
        Ok(())
    }

    /// Rank `r` is sent `sent[r]` bytes of `out`, which has them in order of ranks, and as many
    /// bytes come from it to `into` as it sends: `received[r]`, known to both.
    pub fn all_to_all(
        &mut self,
        stream: Stream,
        sent: &[usize],
        out: DeviceBytes,
        received: &[usize],
        into: DeviceBytes,
    ) -> Result<(), GroupError> {
        let me = self.rank();
        let own = |list: &[usize]| list.get(me).copied().unwrap_or(0);
        self.fits("bytes sent", sent, own(sent), out.len())?;
        self.fits("bytes received", received, own(received), into.len())?;
        if sent[me] != received[me] {
            return invalid(format!("{} bytes for oneself, as {}", sent[me], received[me]));
        }
        // Lengths differ from rank to rank, so they are in nobody's mark.
        self.together(Operation::AllToAll, 0, [], |library, comm| {
            let message = move |function, place: DeviceBytes, (rank, start, bytes)| {
                let peer: usize = rank;
                (function, place.part(start..start + bytes), peer as i32)
            };
            let sends = parts(sent).map(|part| message(library.send, out, part));
            let receives = parts(received).map(|part| message(library.receive, into, part));
            library.group(sends.chain(receives).map(|(function, place, peer)| {
                // SAFETY: as in `all_reduce`.
                move || unsafe {
                    function(place.address(), place.len(), BYTE, peer, comm.as_ptr(), stream.0)
                }
            }))
        })
    }

    /// Every rank gets the bytes of `root`, in place.
    pub fn broadcast(
        &mut self,
        stream: Stream,
        root: usize,
        bytes: DeviceBytes,
    ) -> Result<(), GroupError> {
        if root >= self.ranks() {
            return invalid(format!("a broadcast by rank {root} of {}", self.ranks()));
        }
        self.together(Operation::Broadcast, bytes.len(), [root], |library, comm| {
            let (at, count, root) = (bytes.address(), bytes.len(), root as i32);
            // SAFETY: as in `all_reduce`.
            unsafe { (library.broadcast)(at, at, count, BYTE, root, comm.as_ptr(), stream.0) }
        })
    }

    /// Sends to one rank, which calls [`receive`](NcclComm::receive) with the same length. On the
    /// device, it is done when the other is: two ranks that both send first wait for ever, or
    /// rather for the deadline. An exchange is an [`all_to_all`](NcclComm::all_to_all).
    pub fn send(
        &mut self,
        stream: Stream,
        to: usize,
        bytes: DeviceBytes,
    ) -> Result<(), GroupError> {
        self.message(to, bytes, |library, comm| {
            let (at, count, peer) = (bytes.address(), bytes.len(), to as i32);
            // SAFETY: as in `all_reduce`.
            unsafe { (library.send)(at, count, BYTE, peer, comm.as_ptr(), stream.0) }
        })
    }

    /// The other side of [`send`](NcclComm::send).
    pub fn receive(
        &mut self,
        stream: Stream,
        from: usize,
        bytes: DeviceBytes,
    ) -> Result<(), GroupError> {
        self.message(from, bytes, |library, comm| {
            let (at, count, peer) = (bytes.address(), bytes.len(), from as i32);
            // SAFETY: as in `all_reduce`.
            unsafe { (library.receive)(at, count, BYTE, peer, comm.as_ptr(), stream.0) }
        })
    }

    /// A call of all ranks. One of no bytes anywhere is noted, and gives nothing to the stream.
    fn together(
        &mut self,
        operation: Operation,
        bytes: usize,
        shape: impl IntoIterator<Item = usize>,
        give: impl FnOnce(&Library, Handle) -> Code,
    ) -> Result<(), GroupError> {
        self.handle()?;
        let mark = self.control.note(operation, bytes, shape);
        let mark = self.settle(mark)?;
        self.called = Called::Together(mark);
        if bytes == 0 && operation != Operation::AllToAll {
            return Ok(());
        }
        let library = self.nccl.library;
        self.launch(mark, None, &mark.to_string(), |comm| give(&library, comm))
    }

    fn message(
        &mut self,
        peer: usize,
        bytes: DeviceBytes,
        give: impl FnOnce(&Library, Handle) -> Code,
    ) -> Result<(), GroupError> {
        if peer >= self.ranks() || peer == self.rank() {
            let why =
                format!("rank {peer} as the peer of rank {} of {}", self.rank(), self.ranks());
            return invalid(why);
        }
        self.handle()?;
        let mark = Mark::message(bytes.len());
        if let Called::Nothing = self.called {
            self.called = Called::Message(mark, peer);
        }
        if bytes.is_empty() {
            return Ok(());
        }
        let library = self.nccl.library;
        self.launch(mark, Some(peer), &mark.to_string(), |comm| give(&library, comm))
    }

    /// Checks that each rank has a part, the own one `own`, and that all together are `all`.
    fn fits(&self, what: &str, each: &[usize], own: usize, all: usize) -> Result<(), GroupError> {
        let sum = each.iter().try_fold(0usize, |sum, part| sum.checked_add(*part));
        let mine = each.get(self.rank()).copied();
        if each.len() != self.ranks() || sum != Some(all) || mine != Some(own) {
            return invalid(format!(
                "{each:?} {what} for {} ranks, {own} for this one, {all} in all: the lengths do \
                 not fit",
                self.ranks()
            ));
        }
        Ok(())
    }
}

impl Library {
    /// Makes calls that NCCL is to do at once.
    fn group<F: FnOnce() -> Code>(&self, calls: impl Iterator<Item = F>) -> Code {
        // SAFETY: the two belong together on one thread, and nothing returns between them.
        let start = unsafe { (self.group_start)() };
        if start != SUCCESS {
            return start;
        }
        let failed = calls.map(|call| call()).find(|code| ![SUCCESS, IN_PROGRESS].contains(code));
        // SAFETY: as above.
        let end = unsafe { (self.group_end)() };
        failed.unwrap_or(end)
    }
}

/// The parts that are not empty: whose, where they begin, how long they are.
fn parts(each: &[usize]) -> impl Iterator<Item = (usize, usize, usize)> {
    let starts = each.iter().scan(0, |next, length| {
        let start = *next;
        *next += length;
        Some(start)
    });
    let all = each.iter().copied().zip(starts).enumerate();
    all.filter(|(_, (length, _))| *length > 0).map(|(rank, (length, start))| (rank, start, length))
}

fn all_equal(each: &[usize]) -> bool {
    each.windows(2).all(|pair| pair[0] == pair[1])
}

/// How many numbers these bytes are.
fn numbers(number: Number, bytes: DeviceBytes) -> Result<usize, GroupError> {
    let size = number.bytes();
    if !bytes.len().is_multiple_of(size) || !bytes.address().is_multiple_of(size as u64) {
        return invalid(format!(
            "{} bytes at {:#x} as numbers of {size} bytes",
            bytes.len(),
            bytes.address()
        ));
    }
    Ok(bytes.len() / size)
}

fn invalid<T>(why: String) -> Result<T, GroupError> {
    Err(GroupError::Invalid(why))
}
