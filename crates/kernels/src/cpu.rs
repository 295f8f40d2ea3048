//! [`Ops`] on memory that the host's instructions can reach.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use bytemuck::{cast_slice, cast_slice_mut};
use pomona_device::{
    Access, Buffer, DType, Device, DeviceError, HostDevice, HostMemory, Pool, View, split,
};
use pomona_types::Collective;

use crate::attention::{
    self, BLOCK, Cache, CacheMut, HEAD_DIM_MAX, KvWrite, Layer, Problem, Shares, Workspace,
    kv_row_bytes,
};
use crate::experts::{self, Combine, Exchange, Means, Route, Weight};
use crate::linear::packed::{self, GROUP};
use crate::linear::{self, Job, Out, Part, Rows, Shared, linear};
use crate::packing::{self, PackedStore};
use crate::rows::{Glu, RmsNorm, Rope};
use crate::{
    Activation, ActivationBits, Attention, Context, Divided, Embedding, Experts, Format, Isa,
    KvLayer, LinearPart, LinearPath, Matrix, NO_SLOT, OpError, Ops, OwnExperts, Pairs, Placement,
    RopeStyle, RouteWeights, Routes, WeightSource, Write,
};

/// Elements from which an operation on rows is worth a join.
const JOIN_ELEMENTS: usize = 32 * 1024;

/// The CPU's operations, over the host's memory or over a test device that behaves like a foreign
/// one.
pub struct CpuOps {
    memory: Arc<dyn HostMemory>,
    device: Arc<dyn Device>,
    pool: Pool,
    isa: Isa,
    bits: ActivationBits,
    scratch: Mutex<Scratch>,
    packed: Mutex<PackedStore>,
}

#[derive(Default)]
struct Scratch {
    linear: linear::Workspace,
    attention: Workspace,
    pairs: experts::Pairs,
    /// Results on their way to other ranks, and from them.
    exchanged: [Vec<f32>; 2],
}

/// What a [`Matrix`] is on the CPU: its packed bytes.
struct Stored(Buffer);

impl CpuOps {
    /// Operations over `memory`, with at most the instructions that the machine has.
    pub fn new(memory: Arc<dyn HostMemory>, pool: Pool, isa: Isa) -> CpuOps {
        let device: Arc<dyn Device> = memory.clone();
        let isa = isa.within_machine();
        let (scratch, packed) = (Mutex::default(), Mutex::default());
        CpuOps { memory, device, pool, isa, bits: ActivationBits::default(), scratch, packed }
    }

    /// The same, with activations of so many bits.
    pub fn with_activation_bits(self, bits: ActivationBits) -> CpuOps {
        CpuOps { bits, ..self }
    }

    /// The same, with matrices that come from or go to `store`.
    pub fn with_packed(self, store: PackedStore) -> CpuOps {
        CpuOps { packed: Mutex::new(store), ..self }
    }

    /// Takes the store back when all matrices are loaded; any further ones are packed into memory.
    pub fn take_packed(&self) -> PackedStore {
        std::mem::take(&mut self.packed.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Operations over the host's memory with the machine's best instructions.
    pub fn detect(threads: usize) -> CpuOps {
        CpuOps::new(Arc::new(HostDevice::new()), Pool::new(threads), Isa::detect())
    }

    /// The instruction tier in use.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Which code multiplies weights of a format.
    pub fn linear_path(&self, format: Format) -> LinearPath {
        LinearPath::of(self.isa, format, self.bits)
    }

    /// Runs `each(range of rows)` over `rows` rows of `width` elements, in a join if it is worth
    /// one.
    fn by_rows(&self, rows: usize, width: usize, each: &(dyn Fn(Range<usize>) + Sync)) {
        if rows * width < JOIN_ELEMENTS {
            return each(0..rows);
        }
        let threads = self.pool.threads();
        self.pool.run(&|worker| each(split(rows, 1, threads, worker)));
    }

    /// Adds up the rows of each token's `k` pairs, by their weights.
    fn combine_rows(
        &self,
        rows: &[&[f32]],
        (weights, k): (&[f32], usize),
        write: Write,
        (out, width): (&mut [f32], usize),
    ) {
        let out = RowsMut::new(out, width);
        self.by_rows(out.rows, k * width, &|range| {
            let pairs = range.start * k..range.end * k;
            let (rows, weights) = (&rows[pairs.clone()], &weights[pairs]);
            // SAFETY: workers have disjoint ranges.
            let out = unsafe { out.rows(range) };
            self.isa.run(Combine { rows, weights, k, width, write, out });
        });
    }

    /// Gates rows of so many elements; without `gate`, `out` holds it.
    fn glu_rows(
        &self,
        (gate, up): (Option<&[f32]>, &[f32]),
        activation: Activation,
        (out, width): (&mut [f32], usize),
    ) {
        let rows = RowsMut::new(out, width);
        self.by_rows(rows.rows, width, &|range| {
            let elements = range.start * width..range.end * width;
            // SAFETY: workers have disjoint ranges.
            let out = unsafe { rows.rows(range) };
            if let Some(gate) = gate {
                out.copy_from_slice(&gate[elements.clone()]);
            }
            self.isa.run(Glu { up: &up[elements], activation, out });
        });
    }
}

/// Checks a condition on shapes; the text is made only when it fails.
fn ensure(
    holds: bool,
    operation: &'static str,
    why: impl FnOnce() -> String,
) -> Result<(), OpError> {
    if holds { Ok(()) } else { Err(OpError::Shape { operation, why: why() }) }
}

/// The length of the last axis, the product of the others.
fn rows_of(view: &View) -> (usize, usize) {
    let shape = view.shape();
    let last = shape[shape.len() - 1];
    (shape[..shape.len() - 1].iter().product(), last)
}

fn apart(operation: &'static str, out: &View, inputs: &[&View]) -> Result<(), OpError> {
    let clash = inputs.iter().any(|i| out.overlaps(i));
    ensure(!clash, operation, || "the output overlaps an input".to_owned())
}

/// A view that workers write by rows, each its own.
#[derive(Clone, Copy)]
struct RowsMut {
    at: *mut f32,
    rows: usize,
    width: usize,
}

// SAFETY: `rows()` is called with disjoint ranges by its users.
unsafe impl Sync for RowsMut {}
// SAFETY: as above.
unsafe impl Send for RowsMut {}

impl RowsMut {
    fn new(out: &mut [f32], width: usize) -> RowsMut {
        RowsMut { at: out.as_mut_ptr(), rows: out.len() / width.max(1), width }
    }

    /// # Safety
    /// Ranges that are alive at the same time are disjoint, and the slice that this was made from
    /// is not used meanwhile.
    #[allow(clippy::mut_from_ref)]
    unsafe fn rows(&self, range: Range<usize>) -> &mut [f32] {
        assert!(range.start <= range.end && range.end <= self.rows);
        // SAFETY: in bounds by the assertion; disjoint by contract.
        unsafe {
            let start = self.at.add(range.start * self.width);
            std::slice::from_raw_parts_mut(start, range.len() * self.width)
        }
    }
}

impl Ops for CpuOps {
    fn device(&self) -> &Arc<dyn Device> {
        &self.device
    }

    fn workers(&self) -> &Pool {
        &self.pool
    }

    fn matrix(&self, source: &WeightSource) -> Result<Matrix, OpError> {
        let WeightSource { format, rows, cols, .. } = *source;
        let buffer = packing::matrix(self.memory.as_ref(), &self.pool, &self.packed, source)?;
        let storage = Arc::new(Stored(buffer));
        Ok(Matrix { format, rows, cols, storage })
    }

    fn embed(&self, embedding: &Embedding<'_>, tokens: &View, out: &View) -> Result<(), OpError> {
        let Embedding { table, first, vocab, scale } = *embedding;
        let (rows, width) = rows_of(out);
        ensure(width == table.cols && tokens.elements() == rows, "embed", || {
            format!("{:?} from {} columns and {:?}", out.shape(), table.cols, tokens.shape())
        })?;
        apart("embed", out, &[tokens])?;
        let access = self.memory.enter();
        let bytes = stored(table)?;
        // SAFETY: `out` overlaps neither input (weights are read-only or another allocation).
        let (weights, tokens, out) = unsafe {
            (access.read::<u8>(&bytes)?, access.read::<u32>(tokens)?, access.write::<f32>(out)?)
        };
        let largest = tokens.iter().max().map_or(0, |token| *token as usize);
        ensure(largest < vocab, "embed", || format!("token {largest} of a vocabulary of {vocab}"))?;
        let group_bytes = weights.len() / table.rows.div_ceil(GROUP);
        let out = RowsMut::new(out, width);
        self.by_rows(rows, width, &|range| {
            // SAFETY: workers have disjoint ranges.
            let out = unsafe { out.rows(range.clone()) };
            for (token, out) in tokens[range].iter().zip(out.chunks_exact_mut(width)) {
                let here = (*token as usize).checked_sub(first);
                let Some(token) = here.filter(|token| *token < table.rows) else {
                    out.fill(0.0);
                    continue;
                };
                let group = &weights[token / GROUP * group_bytes..][..group_bytes];
                packed::row(table.format, group, token % GROUP, out);
                if scale != 1.0 {
                    out.iter_mut().for_each(|o| *o *= scale);
                }
            }
        });
        Ok(())
    }

    fn rms_norm(
        &self,
        x: &View,
        weight: &View,
        eps: f32,
        write: Write,
        out: &View,
    ) -> Result<(), OpError> {
        let (rows, width) = rows_of(x);
        let fits = out.shape() == x.shape() && weight.elements() == width && width > 0;
        ensure(fits, "rms_norm", || format!("{:?} by {:?}", x.shape(), weight.shape()))?;
        apart("rms_norm", out, &[weight])?;
        let same = (x.offset(), x.buffer().base()) == (out.offset(), out.buffer().base());
        let in_place = same && write == Write::Set;
        if !in_place {
            apart("rms_norm", out, &[x])?;
        }
        let access = self.memory.enter();
        // SAFETY: `out` overlaps neither input, or is the input and `x` is not read.
        let (x, weight, out) = unsafe {
            let x = if in_place { None } else { Some(access.read::<f32>(x)?) };
            (x, access.read::<f32>(weight)?, access.write::<f32>(out)?)
        };
        let out = RowsMut::new(out, width);
        self.by_rows(rows, width, &|range| {
            let x = x.map(|x| &x[range.start * width..range.end * width]);
            // SAFETY: workers have disjoint ranges.
            let out = unsafe { out.rows(range) };
            self.isa.run(RmsNorm { x, weight, eps, write, out });
        });
        Ok(())
    }

    fn linear(&self, x: &View, parts: &[LinearPart<'_>], write: Write) -> Result<(), OpError> {
        let (tokens, cols) = rows_of(x);
        check_linear((x, cols), parts)?;
        let access = self.memory.enter();
        let mut scratch = self.scratch.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes: Vec<View> = parts.iter().map(|p| stored(p.weight)).collect::<Result<_, _>>()?;
        // SAFETY: no output overlaps the input, a bias, or another output; weights are their own
        // buffers, which no view but `stored` refers to.
        let (x, job) = unsafe { (access.read::<f32>(x)?, job(&access, tokens, parts, &bytes)?) };
        let how = (write, self.bits, &mut scratch.linear);
        linear(&self.pool, self.isa, (x, cols), &[job], how);
        Ok(())
    }

    fn divided_linear(
        &self,
        group: &dyn Collective,
        input: &Divided<'_>,
        parts: &[LinearPart<'_>],
        write: Write,
    ) -> Result<(), OpError> {
        let Divided { widths, own, all } = *input;
        let (tokens, width) = rows_of(own);
        let formats = parts.iter().map(|part| part.weight.format);
        if !linear::can_divide(tokens, widths, formats) {
            self.all_gather(group, widths, own, all)?;
            return self.linear(all, parts, write);
        }
        ensure(widths.get(group.rank()) == Some(&width), "divided_linear", || {
            format!("{:?} with widths {widths:?}", own.shape())
        })?;
        check_linear((own, widths.iter().sum()), parts)?;
        let access = self.memory.enter();
        let mut scratch = self.scratch.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes: Vec<View> = parts.iter().map(|p| stored(p.weight)).collect::<Result<_, _>>()?;
        // SAFETY: as for `linear`.
        let (own, job) =
            unsafe { (access.read::<f32>(own)?, job(&access, tokens, parts, &bytes)?) };
        let means = (&self.pool, self.isa, group);
        let how = (write, self.bits, &mut scratch.linear);
        Ok(linear::divided(means, (own, widths), &job, how)?)
    }

    fn rope_table(
        &self,
        positions: &View,
        inv_freq: &View,
        scale: f32,
        out: &View,
    ) -> Result<(), OpError> {
        let pairs = inv_freq.elements();
        let fits = out.elements() == positions.elements() * pairs * 2 && pairs > 0;
        ensure(fits, "rope_table", || {
            format!("{:?} for {:?} and {pairs} pairs", out.shape(), positions.shape())
        })?;
        apart("rope_table", out, &[positions, inv_freq])?;
        let access = self.memory.enter();
        // SAFETY: `out` overlaps neither input.
        let (positions, inv_freq, out) = unsafe {
            (
                access.read::<u32>(positions)?,
                access.read::<f32>(inv_freq)?,
                access.write::<f32>(out)?,
            )
        };
        let width = 2 * pairs;
        let out = RowsMut::new(out, width);
        self.by_rows(positions.len(), width, &|range| {
            // SAFETY: workers have disjoint ranges.
            let out = unsafe { out.rows(range.clone()) };
            for (position, out) in positions[range].iter().zip(out.chunks_exact_mut(width)) {
                for (f, pair) in inv_freq.iter().zip(out.as_chunks_mut::<2>().0) {
                    let (sin, cos) = (*position as f32 * f).sin_cos();
                    *pair = [cos * scale, sin * scale];
                }
            }
        });
        Ok(())
    }

    fn rope(
        &self,
        x: &View,
        norm: Option<(&View, f32)>,
        table: &View,
        style: RopeStyle,
    ) -> Result<(), OpError> {
        let shape = x.shape();
        ensure(shape.len() == 3, "rope", || format!("{shape:?} is not [tokens, heads, dim]"))?;
        let (tokens, heads, head_dim) = (shape[0], shape[1], shape[2]);
        if x.elements() == 0 {
            return Ok(());
        }
        let rotated = table.elements() / tokens;
        let fits = table.elements() == tokens * rotated
            && rotated <= head_dim
            && rotated.is_multiple_of(2)
            && rotated > 0
            && norm.is_none_or(|(w, _)| w.elements() == head_dim);
        ensure(fits, "rope", || format!("{shape:?} by a table of {:?}", table.shape()))?;
        apart("rope", x, &[table])?;
        norm.map_or(Ok(()), |(w, _)| apart("rope", x, &[w]))?;
        let access = self.memory.enter();
        // SAFETY: `x` overlaps neither the table nor the weight.
        let (x, norm, table) = unsafe {
            let norm = norm.map(|(w, eps)| Ok::<_, DeviceError>((access.read::<f32>(w)?, eps)));
            (access.write::<f32>(x)?, norm.transpose()?, access.read::<f32>(table)?)
        };
        let width = heads * head_dim;
        let x = RowsMut::new(x, width);
        self.by_rows(tokens, width, &|range| {
            let (tokens, table) = (range.len(), &table[range.start * rotated..range.end * rotated]);
            if tokens > 0 {
                // SAFETY: workers have disjoint ranges.
                let x = unsafe { x.rows(range) };
                self.isa.run(Rope { x, head_dim, norm, table, tokens, style });
            }
        });
        Ok(())
    }

    fn kv_write(&self, k: &View, v: &View, slots: &View, layer: &KvLayer) -> Result<(), OpError> {
        let tokens = slots.elements();
        if tokens == 0 {
            return Ok(());
        }
        let heads = layer.k.shape().get(1).copied().unwrap_or_default();
        let head_dim = k.elements() / (tokens * heads).max(1);
        let [blocks, heads] = kv_shape("kv_write", layer, head_dim)?;
        let fits = k.elements() == tokens * heads * head_dim && v.elements() == k.elements();
        ensure(fits, "kv_write", || format!("{:?} into {:?}", k.shape(), layer.k.shape()))?;
        for cache in [&layer.k, &layer.v] {
            apart("kv_write", cache, &[k, v, slots])?;
        }
        apart("kv_write", &layer.k, &[&layer.v])?;
        let access = self.memory.enter();
        // SAFETY: the caches overlap none of the inputs.
        let (k, v, slots) =
            unsafe { (access.read::<f32>(k)?, access.read::<f32>(v)?, access.read::<u32>(slots)?) };
        let outside = slots.iter().find(|s| **s != NO_SLOT && **s as usize >= blocks * BLOCK);
        ensure(outside.is_none(), "kv_write", || format!("slot {outside:?} of {blocks} blocks"))?;
        // SAFETY: keys and values overlap no input, and are views of their own.
        let (keys, values) =
            unsafe { (cache_mut(&access, &layer.k)?, cache_mut(&access, &layer.v)?) };
        let write = |worker: usize, workers: usize| {
            let write = KvWrite { k, v, slots, heads, head_dim, keys, values, worker, workers };
            self.isa.run(write);
        };
        match self.pool.threads() {
            workers if k.len() < JOIN_ELEMENTS / 4 || workers == 1 => write(0, 1),
            workers => self.pool.run(&|worker| write(worker, workers)),
        }
        Ok(())
    }

    fn attention(
        &self,
        q: &View,
        layer: &KvLayer,
        how: &Attention<'_>,
        out: &View,
    ) -> Result<(), OpError> {
        ensure(out.shape() == q.shape(), "attention", || {
            format!("{:?} into {:?}", q.shape(), out.shape())
        })?;
        check_attention((q, layer), how, &|_, _| true)?;
        apart("attention", out, &[q, &layer.k, &layer.v])?;
        let access = self.memory.enter();
        let mut scratch = self.scratch.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: `out` overlaps none of the inputs.
        let (problem, out) =
            unsafe { (problem(&access, q, layer, how, self.bits)?, access.write::<f32>(out)?) };
        attention::attention(&self.pool, self.isa, &problem, &mut scratch.attention, out);
        Ok(())
    }

    fn shared_attention(
        &self,
        context: &Context<'_>,
        q: &View,
        layer: &KvLayer,
        how: &Attention<'_>,
        out: &View,
    ) -> Result<(), OpError> {
        let Context { group, heads, origins } = *context;
        let (rank, shape) = (group.rank(), q.shape());
        let fits = heads.len() == group.ranks()
            && origins.len() == how.spans.len()
            && shape.len() == 3
            && heads.iter().all(|own| own.end <= shape[1])
            && out.shape() == [shape[0], heads[rank].len(), shape[2]];
        ensure(fits, "shared_attention", || {
            format!("{shape:?} into {:?} for heads {heads:?}", out.shape())
        })?;
        let shares = Shares { rank, heads, origins };
        check_attention((q, layer), how, &|span, block| shares.has(span, block))?;
        apart("shared_attention", out, &[q, &layer.k, &layer.v])?;
        let access = self.memory.enter();
        let mut scratch = self.scratch.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: `out` overlaps none of the inputs.
        let (problem, out) =
            unsafe { (problem(&access, q, layer, how, self.bits)?, access.write::<f32>(out)?) };
        let Scratch { attention: work, exchanged, .. } = &mut *scratch;
        let means = (&self.pool, self.isa, group);
        attention::shared_attention(means, &problem, &shares, (work, exchanged), out)?;
        Ok(())
    }

    fn glu(
        &self,
        gate: &View,
        up: &View,
        activation: Activation,
        out: &View,
    ) -> Result<(), OpError> {
        let (_, width) = rows_of(gate);
        let fits = gate.shape() == up.shape() && gate.shape() == out.shape();
        ensure(fits, "glu", || format!("{:?} and {:?}", gate.shape(), up.shape()))?;
        apart("glu", out, &[up])?;
        let same = (gate.offset(), gate.buffer().base()) == (out.offset(), out.buffer().base());
        if !same {
            apart("glu", out, &[gate])?;
        }
        let access = self.memory.enter();
        // SAFETY: `out` overlaps neither input, or is the gate, which is then not read.
        let (gate, up, out) = unsafe {
            let gate = if same { None } else { Some(access.read::<f32>(gate)?) };
            (gate, access.read::<f32>(up)?, access.write::<f32>(out)?)
        };
        self.glu_rows((gate, up), activation, (out, width));
        Ok(())
    }

    fn permute(&self, x: &View, order: &View) -> Result<(), OpError> {
        let (rows, width) = rows_of(x);
        ensure(order.elements() == width, "permute", || {
            format!("{:?} by an order of {:?}", x.shape(), order.shape())
        })?;
        apart("permute", x, &[order])?;
        let access = self.memory.enter();
        // SAFETY: `x` does not overlap the order.
        let (x, order) = unsafe { (access.write::<f32>(x)?, access.read::<u32>(order)?) };
        let outside = order.iter().find(|at| **at as usize >= width);
        ensure(outside.is_none(), "permute", || format!("column {outside:?} of {width}"))?;
        let x = RowsMut::new(x, width);
        self.by_rows(rows, width, &|range| {
            let mut before = vec![0.0; width];
            // SAFETY: workers have disjoint ranges.
            let x = unsafe { x.rows(range) };
            for row in x.chunks_exact_mut(width.max(1)) {
                before.copy_from_slice(row);
                row.iter_mut().zip(order).for_each(|(to, at)| *to = before[*at as usize]);
            }
        });
        Ok(())
    }

    fn gather(&self, x: &View, rows: &View, out: &View) -> Result<(), OpError> {
        let (count, width) = rows_of(x);
        ensure(out.elements() == rows.elements() * width, "gather", || {
            format!("{:?} rows of {:?} into {:?}", rows.shape(), x.shape(), out.shape())
        })?;
        apart("gather", out, &[x, rows])?;
        let access = self.memory.enter();
        // SAFETY: `out` overlaps neither input.
        let (x, rows, out) = unsafe {
            (access.read::<f32>(x)?, access.read::<u32>(rows)?, access.write::<f32>(out)?)
        };
        for (row, out) in rows.iter().zip(out.chunks_exact_mut(width.max(1))) {
            let row = *row as usize;
            ensure(row < count, "gather", || format!("row {row} of {count}"))?;
            out.copy_from_slice(&x[row * width..][..width]);
        }
        Ok(())
    }

    fn columns(&self, x: &View, first: usize, out: &View) -> Result<(), OpError> {
        let ((rows, width), (count, own)) = (rows_of(x), rows_of(out));
        let fits = rows == count && first.checked_add(own).is_some_and(|end| end <= width);
        ensure(fits && own > 0, "columns", || {
            format!("{:?} from column {first} of {:?}", out.shape(), x.shape())
        })?;
        apart("columns", out, &[x])?;
        let access = self.memory.enter();
        // SAFETY: `out` does not overlap the input.
        let (x, out) = unsafe { (access.read::<f32>(x)?, access.write::<f32>(out)?) };
        for (x, out) in x.chunks_exact(width).zip(out.chunks_exact_mut(own)) {
            out.copy_from_slice(&x[first..][..own]);
        }
        Ok(())
    }

    fn all_gather(
        &self,
        group: &dyn Collective,
        widths: &[usize],
        own: &View,
        all: &View,
    ) -> Result<(), OpError> {
        let ((rows, width), (all_rows, all_width)) = (rows_of(own), rows_of(all));
        let fits = rows == all_rows
            && widths.get(group.rank()) == Some(&width)
            && widths.iter().sum::<usize>() == all_width;
        ensure(fits, "all_gather", || {
            format!("{:?} into {:?}, widths {widths:?}", own.shape(), all.shape())
        })?;
        apart("all_gather", all, &[own])?;
        let access = self.memory.enter();
        // SAFETY: the output does not overlap the input.
        let (own, all) = unsafe { (access.read::<f32>(own)?, access.write::<f32>(all)?) };
        let widths: Vec<usize> = widths.iter().map(|width| width * size_of::<f32>()).collect();
        Ok(group.all_gather(rows, &widths, cast_slice(own), cast_slice_mut(all))?)
    }

    fn all_reduce(&self, group: &dyn Collective, x: &View) -> Result<(), OpError> {
        let access = self.memory.enter();
        // SAFETY: the only view that is used.
        let x = unsafe { access.write::<f32>(x)? };
        Ok(group.all_reduce(x)?)
    }

    fn send(&self, group: &dyn Collective, to: usize, x: &View) -> Result<(), OpError> {
        let access = self.memory.enter();
        // SAFETY: the only view that is used.
        let x = unsafe { access.read::<f32>(x)? };
        Ok(group.send(to, cast_slice(x))?)
    }

    fn receive(&self, group: &dyn Collective, from: usize, x: &View) -> Result<(), OpError> {
        let access = self.memory.enter();
        // SAFETY: the only view that is used.
        let x = unsafe { access.write::<f32>(x)? };
        Ok(group.receive(from, cast_slice_mut(x))?)
    }

    fn route(
        &self,
        logits: &View,
        weights_of: RouteWeights,
        routes: &Routes<'_>,
    ) -> Result<(), OpError> {
        let ((tokens, experts), (rows, k)) = (rows_of(logits), rows_of(routes.ids));
        let Routes { ids, weights, loads } = *routes;
        let fits = rows == tokens
            && (1..=experts).contains(&k)
            && weights.shape() == ids.shape()
            && loads.elements() == experts;
        ensure(fits, "route", || format!("{:?} into {:?}", logits.shape(), ids.shape()))?;
        apart("route", ids, &[logits, weights, loads])?;
        apart("route", weights, &[logits, loads])?;
        apart("route", loads, &[logits])?;
        let access = self.memory.enter();
        // SAFETY: no output overlaps the input or another output.
        let (logits, ids, weights, loads) = unsafe {
            (
                access.read::<f32>(logits)?,
                access.write::<u32>(ids)?,
                access.write::<f32>(weights)?,
                access.write::<u32>(loads)?,
            )
        };
        self.isa.run(Route { logits, experts, weights_of, ids, weights, k });
        for id in ids {
            let load = &mut loads[*id as usize];
            *load = load.wrapping_add(1);
        }
        Ok(())
    }

    fn experts(
        &self,
        x: &View,
        ids: &View,
        experts: &Experts<'_>,
        out: &View,
    ) -> Result<(), OpError> {
        let ((tokens, hidden), (rows, k)) = (rows_of(x), rows_of(ids));
        let Some(ffn) = experts.here.first().map(|expert| expert.gate.rows) else { return Ok(()) };
        let [gate, up] = experts.between;
        let shape = |matrix: &Matrix| [matrix.rows, matrix.cols];
        let fits = rows == tokens
            && out.elements() == tokens * k * hidden
            && experts.between.iter().all(|view| view.elements() == tokens * k * ffn)
            && experts.here.iter().all(|expert| {
                let wide = [&expert.gate, &expert.up].map(shape);
                wide == [[ffn, hidden]; 2] && shape(&expert.down) == [hidden, ffn]
            });
        ensure(fits && tokens * k * hidden * ffn > 0, "experts", || {
            format!("{:?} by {:?} of width {ffn} into {:?}", x.shape(), ids.shape(), out.shape())
        })?;
        apart("experts", out, &[x, ids, gate, up])?;
        apart("experts", gate, &[x, ids, up])?;
        apart("experts", up, &[x, ids])?;
        let access = self.memory.enter();
        let mut scratch = self.scratch.lock().unwrap_or_else(PoisonError::into_inner);
        let Scratch { linear: workspace, pairs, .. } = &mut *scratch;
        // SAFETY: neither the output nor the memory between overlaps anything else; weights are
        // their own buffers, which no view but `stored` refers to.
        let (x, ids, out, gate, up) = unsafe {
            (
                access.read::<f32>(x)?,
                access.read::<u32>(ids)?,
                access.write::<f32>(out)?,
                access.write::<f32>(gate)?,
                access.write::<f32>(up)?,
            )
        };
        pairs.sort(ids, k, experts.here.len());
        let weight = |matrix: &Matrix| -> Result<Weight<'_>, OpError> {
            // SAFETY: as above.
            let bytes = unsafe { access.read::<u8>(&stored(matrix)?)? };
            Ok(Weight { format: matrix.format, bytes, rows: matrix.rows })
        };
        let (mut wide, mut narrow) = (Vec::new(), Vec::new());
        for (expert, _) in &pairs.active {
            let expert = &experts.here[*expert];
            wide.push([weight(&expert.gate)?, weight(&expert.up)?]);
            narrow.push([weight(&expert.down)?]);
        }
        let (pool, isa, bits) = (&self.pool, self.isa, self.bits);
        let mut means = Means { pool, isa, bits, workspace };
        means.widen((x, hidden), pairs, &wide, [&mut *gate, &mut *up]);
        let used = pairs.len() * ffn;
        self.glu_rows((None, &up[..used]), experts.activation, (&mut gate[..used], ffn));
        means.narrow((gate, ffn), pairs, &narrow, out);
        Ok(())
    }

    fn combine(&self, x: &View, weights: &View, write: Write, out: &View) -> Result<(), OpError> {
        let ((tokens, k), (rows, width)) = (rows_of(weights), rows_of(out));
        let fits = rows == tokens && x.elements() == tokens * k * width && k * width > 0;
        ensure(fits, "combine", || {
            format!("{:?} by {:?} into {:?}", x.shape(), weights.shape(), out.shape())
        })?;
        apart("combine", out, &[x, weights])?;
        let access = self.memory.enter();
        // SAFETY: `out` overlaps neither input.
        let (x, weights, out) = unsafe {
            (access.read::<f32>(x)?, access.read::<f32>(weights)?, access.write::<f32>(out)?)
        };
        let rows: Vec<&[f32]> = x.chunks_exact(width).collect();
        self.combine_rows(&rows, (weights, k), write, (out, width));
        Ok(())
    }

    fn own_experts(
        &self,
        ids: &View,
        placement: &Placement,
        rank: usize,
        out: &OwnExperts<'_>,
    ) -> Result<(), OpError> {
        let OwnExperts { ids: own, work } = *out;
        let fits = own.shape() == ids.shape() && work.elements() > placement.ranks();
        ensure(fits, "own_experts", || {
            format!("{:?} and {:?} for {:?}", own.shape(), work.shape(), ids.shape())
        })?;
        apart("own_experts", own, &[ids, work])?;
        apart("own_experts", work, &[ids])?;
        let access = self.memory.enter();
        // SAFETY: no output overlaps the input or the other output.
        let (ids, own, work) = unsafe {
            (access.read::<u32>(ids)?, access.write::<u32>(own)?, access.write::<u32>(work)?)
        };
        known_experts("own_experts", ids, placement)?;
        let pairs = placement.own(ids, rank, own);
        let most = pairs.iter().copied().max().unwrap_or(0);
        if let [of_ranks @ .., of_slowest] = work {
            *of_slowest = of_slowest.wrapping_add(most as u32);
            for (sum, pairs) in of_ranks.iter_mut().zip(pairs) {
                *sum = sum.wrapping_add(pairs as u32);
            }
        }
        Ok(())
    }

    fn combine_divided(
        &self,
        group: &dyn Collective,
        pairs: &Pairs<'_>,
        results: &View,
        write: Write,
        out: &View,
    ) -> Result<(), OpError> {
        let Pairs { ids, weights, placement, columns } = *pairs;
        let ((_, width), (tokens, k), rank) = (rows_of(results), rows_of(ids), group.rank());
        let own = columns.get(rank).map_or(0, |columns| columns.len());
        let fits = results.elements() == tokens * k * width
            && weights.elements() == tokens * k
            && columns.len() == group.ranks()
            && placement.ranks() <= group.ranks()
            && columns.iter().all(|columns| !columns.is_empty() && columns.end <= width)
            && rows_of(out) == (tokens, own)
            && k > 0;
        ensure(fits, "combine_divided", || {
            let (results, out) = (results.shape(), out.shape());
            format!("{results:?} of {:?} into {out:?}, columns {columns:?}", ids.shape())
        })?;
        apart("combine_divided", out, &[results, ids, weights])?;
        let access = self.memory.enter();
        let mut scratch = self.scratch.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the output overlaps no input.
        let (ids, results, weights, out) = unsafe {
            let weights = access.read::<f32>(weights)?;
            let results = access.read::<f32>(results)?;
            (access.read::<u32>(ids)?, results, weights, access.write::<f32>(out)?)
        };
        known_experts("combine_divided", ids, placement)?;
        let exchange = Exchange::new(placement, ids, columns, rank);
        let [packed, came] = &mut scratch.exchanged;
        exchange.pack(results, width, packed);
        let [sent, received] = [exchange.sent(), exchange.received()]
            .map(|counts| counts.iter().map(|count| count * size_of::<f32>()).collect::<Vec<_>>());
        came.resize(received.iter().sum::<usize>() / size_of::<f32>(), 0.0);
        group.all_to_all(&sent, cast_slice(packed), &received, cast_slice_mut(came))?;
        let rows = exchange.rows((results, width), came);
        self.combine_rows(&rows, (weights, k), write, (out, own));
        Ok(())
    }
}

/// Checks the products of an input with so many columns, of which `x` has some.
fn check_linear((x, cols): (&View, usize), parts: &[LinearPart<'_>]) -> Result<(), OpError> {
    let (tokens, _) = rows_of(x);
    for (i, part) in parts.iter().enumerate() {
        let weight = part.weight;
        let fits = weight.cols == cols
            && part.out.elements() == tokens * weight.rows
            && part.bias.is_none_or(|b| b.elements() == weight.rows);
        ensure(fits && cols > 0, "linear", || {
            let out = part.out.shape();
            format!("[{tokens}, {cols}] by [{}, {}] into {out:?}", weight.rows, weight.cols)
        })?;
        apart("linear", part.out, &[x])?;
        parts[..i].iter().try_for_each(|p| apart("linear", part.out, &[p.out]))?;
        part.bias.map_or(Ok(()), |bias| apart("linear", part.out, &[bias]))?;
    }
    Ok(())
}

/// Products that were checked, of `tokens` rows one after the other; `bytes` are what is
/// [`stored`] of their weights.
///
/// # Safety
/// As for [`Access::read`] and [`Access::write`].
unsafe fn job<'a>(
    access: &'a Access<'_>,
    tokens: usize,
    parts: &[LinearPart<'_>],
    bytes: &[View],
) -> Result<Job<'a>, OpError> {
    let part = |(part, bytes): (&LinearPart<'_>, &View)| -> Result<Part<'a>, DeviceError> {
        // SAFETY: the caller's contract.
        unsafe {
            Ok(Part {
                format: part.weight.format,
                weight: access.read::<u8>(bytes)?,
                rows: part.weight.rows,
                bias: part.bias.map(|b| access.read::<f32>(b)).transpose()?,
                out: Out::new(access.write::<f32>(part.out)?),
            })
        }
    };
    let rows = Rows::From(0);
    let parts = parts.iter().zip(bytes).map(part).collect::<Result<_, _>>()?;
    Ok(Job { tokens, inputs: rows, outputs: rows, parts })
}

/// Experts that a router has chosen are below their number.
fn known_experts(
    operation: &'static str,
    ids: &[u32],
    placement: &Placement,
) -> Result<(), OpError> {
    let count = placement.experts();
    let strange = ids.iter().find(|id| **id as usize >= count);
    ensure(strange.is_none(), operation, || format!("expert {strange:?} of {count}"))
}

/// A matrix's bytes.
fn stored(matrix: &Matrix) -> Result<View, OpError> {
    let buffer = matrix.storage.downcast_ref::<Stored>().ok_or_else(|| OpError::Shape {
        operation: "matrix",
        why: "it was made by another backend".to_owned(),
    })?;
    Ok(View::new(buffer.0.clone(), 0, DType::U8, &[buffer.0.bytes()])?)
}

/// `[blocks, kv_heads]` of a layer's cache, whose heads have so many numbers.
fn kv_shape(
    operation: &'static str,
    layer: &KvLayer,
    head_dim: usize,
) -> Result<[usize; 2], OpError> {
    let (shape, dtype) = (layer.k.shape(), layer.k.dtype());
    let fits = shape.len() == 4
        && shape[2] == BLOCK
        && head_dim > 0
        && shape[3] * dtype.bytes() == kv_row_bytes(dtype, head_dim)
        && shape.iter().all(|n| *n > 0)
        && layer.v.shape() == shape
        && layer.v.dtype() == dtype;
    ensure(fits, operation, || {
        format!("a cache of {shape:?} is not [blocks, kv_heads, {BLOCK}, {head_dim} as {dtype:?}]")
    })?;
    ensure(dtype != DType::I8 || head_dim <= HEAD_DIM_MAX, operation, || {
        format!("heads of {head_dim} numbers do not fit 8-bit keys and values: choose another type")
    })?;
    apart(operation, &layer.k, &[&layer.v])?;
    Ok([shape[0], shape[1]])
}

/// Checks shapes, spans, and the blocks of spans that are `here`.
fn check_attention(
    (q, layer): (&View, &KvLayer),
    how: &Attention<'_>,
    here: &dyn Fn(usize, usize) -> bool,
) -> Result<(), OpError> {
    let shape = q.shape();
    let [blocks, kv_heads] = kv_shape("attention", layer, head_dim(q))?;
    let fits = shape.len() == 3
        && how.heads.skipped < how.heads.size
        && (shape[1] + how.heads.skipped).div_ceil(how.heads.size) == kv_heads;
    ensure(fits, "attention", || format!("{shape:?} over {:?}", layer.k.shape()))?;
    ensure(how.window != Some(0), "attention", || "a window of 0 tokens sees nothing".to_owned())?;
    let (rows, mut next) = (shape[0], 0);
    for (at, span) in how.spans.iter().enumerate() {
        let end = span.start as usize + span.rows as usize;
        let table = how.tables.get(span.table as usize..).unwrap_or_default();
        let table = table.get(..span.table_len as usize).unwrap_or_default();
        let seen = how.window.map_or(0, |w| (span.start + 1).saturating_sub(w)) as usize / BLOCK;
        let used = table.get(seen..end.div_ceil(BLOCK));
        let known = |used: &[u32]| {
            let mut places = (seen..).zip(used);
            places.all(|(place, block)| (*block as usize) < blocks || !here(at, place))
        };
        let fits = span.first_row as usize >= next && span.rows > 0 && used.is_some_and(known);
        ensure(fits, "attention", || format!("{span:?} over {blocks} blocks: {table:?}"))?;
        next = span.first_row as usize + span.rows as usize;
    }
    ensure(next <= rows, "attention", || format!("spans reach row {next} of {rows}"))
}

/// What attention computes with, once it is checked.
///
/// # Safety
/// As for [`Access::read`].
unsafe fn problem<'a>(
    access: &'a Access<'_>,
    q: &View,
    layer: &KvLayer,
    how: &Attention<'a>,
    bits: ActivationBits,
) -> Result<Problem<'a>, OpError> {
    let head_dim = head_dim(q);
    let [_, kv_heads] = kv_shape("attention", layer, head_dim)?;
    // SAFETY: the caller's contract.
    let (values, layer) = unsafe { (access.read::<f32>(q)?, layer_of(access, layer, bits)?) };
    Ok(Problem {
        q: values,
        layer,
        heads: q.shape()[1],
        kv_heads,
        groups: how.heads,
        head_dim,
        scale: how.scale,
        window: how.window,
        tables: how.tables,
        spans: how.spans,
    })
}

/// The numbers of a head.
fn head_dim(rows: &View) -> usize {
    rows.shape().last().copied().unwrap_or_default()
}

/// # Safety
/// As for [`Access::read`].
unsafe fn layer_of<'a>(
    access: &'a Access<'_>,
    layer: &KvLayer,
    bits: ActivationBits,
) -> Result<Layer<'a>, OpError> {
    // SAFETY: the caller's contract.
    unsafe {
        Ok(match layer.k.dtype() {
            DType::I8 => {
                let integers = [access.read::<u8>(&layer.k)?, access.read::<u8>(&layer.v)?];
                Layer::Integers(integers, bits)
            }
            _ => Layer::Numbers([cache(access, &layer.k)?, cache(access, &layer.v)?]),
        })
    }
}

/// # Safety
/// As for [`Access::read`].
unsafe fn cache<'a>(access: &'a Access<'_>, view: &View) -> Result<Cache<'a>, OpError> {
    // SAFETY: the caller's contract.
    unsafe {
        Ok(match view.dtype() {
            DType::F16 => Cache::F16(access.read::<u16>(view)?),
            DType::BF16 => Cache::BF16(access.read::<u16>(view)?),
            _ => Cache::F32(access.read::<f32>(view)?),
        })
    }
}

/// # Safety
/// As for [`Access::write`], for as long as the cache is used.
unsafe fn cache_mut(access: &Access<'_>, view: &View) -> Result<CacheMut, OpError> {
    // SAFETY: the caller's contract.
    unsafe {
        Ok(match view.dtype() {
            DType::F16 => CacheMut::F16(Shared(access.write::<u16>(view)?.as_mut_ptr())),
            DType::BF16 => CacheMut::BF16(Shared(access.write::<u16>(view)?.as_mut_ptr())),
            DType::I8 => CacheMut::I8(Shared(access.write::<u8>(view)?.as_mut_ptr())),
            _ => CacheMut::F32(Shared(access.write::<f32>(view)?.as_mut_ptr())),
        })
    }
}
