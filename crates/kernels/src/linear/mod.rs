//! Products of weights and activations: `out[token][row] = weight[row] · x[token] (+ bias)`.
//!
//! Weights lie packed, sixteen rows to a group ([`packed`]). Integer weights meet quantised
//! activations: sums of integer products are exact; each block of 32 columns then adds to f32 sums,
//! block after block. Dense weights meet f32 activations, column after column, or those of BF16,
//! where 8 bits are asked for, bf16 ones. So every (row, token) is the same bits whatever the
//! number of tokens, rows or threads, and on every tier, but for bf16 on tile registers.
//!
//! Cost: bytes of the weights at few tokens (read once), 2 operations per weight and token at many.

mod activations;
#[cfg_attr(not(target_arch = "x86_64"), path = "portable_tiles.rs")]
pub(crate) mod amx;
#[cfg_attr(not(target_arch = "x86_64"), path = "portable_avx2.rs")]
mod avx2;
#[cfg_attr(not(target_arch = "x86_64"), path = "portable.rs")]
mod avx512;
#[cfg_attr(not(target_arch = "x86_64"), path = "portable_dots.rs")]
mod bf16_dots;
mod bfloats;
mod dense;
mod jobs;
#[cfg_attr(not(target_arch = "aarch64"), path = "portable.rs")]
mod neon;
pub(crate) mod packed;
mod panel;
mod reference;
#[cfg(test)]
pub(crate) mod tests;

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

pub use activations::ActivationBits;
use activations::Activations;
pub(crate) use activations::scale_of;
use bfloats::Bfloats;
use half::bf16;
use jobs::{ABREAST, COUNTED, Input, Inputs, TILE, spread};
pub(crate) use jobs::{Job, Out, Part, Rows};
use packed::GROUP;
use panel::Panel;
use pomona_device::{Pool, second_cache_bytes};
use pomona_types::{Collective, GroupError};

use crate::{Format, Isa, Write};

/// Bytes of activations that stay in a core's cache while all groups of rows pass over them, where
/// the system does not say how large that is.
const CACHED_UNKNOWN: usize = 384 << 10;
/// Products that take as long as a byte of weights that comes from memory. With few tokens the
/// bytes take the time, with many the products.
const PRODUCTS_PER_BYTE: usize = 8;

/// Tokens that meet what is unpacked, at least, where that lies in a first cache: of their passes
/// one in thirty-two unpacks, and to read activations from further away costs less than more of it.
const PASS: usize = 256;

/// What a piece costs at least, in bytes, if there are then enough pieces: handing one out takes as
/// long as some hundred bytes.
const CHUNK: usize = 64 << 10;
/// Pieces of each worker, if they have enough groups.
const SHARES: usize = 8;

/// Tokens from which it is worth two exchanges to quantise columns but once.
const DIVIDED_TOKENS: usize = TILE;

/// Reused memory: activations in the forms that kernels take, unpacked weights for each worker.
#[derive(Default)]
pub(crate) struct Workspace {
    activations: activations::Memory,
    tiles: dense::Memory,
    rounded: dense::Memory,
    bfloats: bfloats::Memory,
    panels: Vec<Mutex<Panel>>,
}

/// Some groups of rows of a part with some tokens, and where results go.
#[derive(Clone)]
pub(crate) struct Slab<'a> {
    job: usize,
    format: Format,
    path: LinearPath,
    weight: &'a [u8],
    groups: Range<usize>,
    /// Those at hand, of all of the job's.
    tokens: Range<usize>,
    all_tokens: usize,
    cols: usize,
    sink: Sink<'a>,
}

impl Slab<'_> {
    /// Bytes of a packed group.
    #[inline(always)]
    fn group_bytes(&self) -> usize {
        packed::group_bytes(self.format, self.cols)
    }

    /// What a group takes, in bytes that come from memory in that time.
    fn group_cost(&self) -> usize {
        self.group_bytes().max(GROUP * self.cols * self.tokens.len() / PRODUCTS_PER_BYTE)
    }

    /// The same of all groups.
    fn cost(&self) -> usize {
        self.groups.len() * self.group_cost()
    }

    /// Cuts it: so that workers end together, and activations of a piece, `bytes` of each token,
    /// stay in a core's cache while all groups pass over them.
    fn chunks(&self, threads: usize, bytes: usize) -> impl Iterator<Item = Slab<'_>> {
        // A multiple of what shares a pass, so that all but the last are full; equal, so that no
        // panel is unpacked for a short rest.
        let least = if self.path == LinearPath::Int8Vectors { PASS } else { TILE };
        let cached = (cached() / bytes.max(1)).max(least) / TILE * TILE;
        let blocks = self.tokens.len().div_ceil(cached).max(1);
        let each = self.tokens.len().div_ceil(blocks).next_multiple_of(TILE);
        self.tokens.clone().step_by(each.max(1)).flat_map(move |token| {
            let tokens = token..self.tokens.end.min(token + each);
            let block = Slab { tokens, ..self.clone() };
            let panels = self.path.is_integer() || self.path == LinearPath::Bf16Vectors;
            let many = panels && self.all_tokens > COUNTED;
            let together = if many { panel::GROUPS } else { ABREAST };
            let most = (block.groups.len() / (SHARES * threads)).max(1);
            let size = (CHUNK / block.group_cost()).clamp(1, most).next_multiple_of(together);
            self.groups.clone().step_by(size).map(move |group| Slab {
                groups: group..block.groups.end.min(group + size),
                ..block.clone()
            })
        })
    }

    /// The packed bytes of a group.
    #[inline(always)]
    fn group(&self, group: usize) -> &[u8] {
        &self.weight[group * self.group_bytes()..][..self.group_bytes()]
    }
}

/// Bytes of activations that stay in a core's cache: three quarters of it, as panels and what is
/// prefetched have to have room too.
fn cached() -> usize {
    static BYTES: OnceLock<usize> = OnceLock::new();
    *BYTES.get_or_init(|| second_cache_bytes().map_or(CACHED_UNKNOWN, |bytes| bytes / 4 * 3))
}

/// Writes results of one part from several workers, each its own groups of rows.
#[derive(Clone, Copy)]
struct Sink<'a> {
    out: *mut f32,
    rows: usize,
    /// Where tokens' results go.
    places: Rows<'a>,
    bias: Option<&'a [f32]>,
    write: Write,
}

// SAFETY: workers write disjoint rows of `out`, which outlives the join.
unsafe impl Sync for Sink<'_> {}
// SAFETY: as above.
unsafe impl Send for Sink<'_> {}

impl Sink<'_> {
    /// Stores the products of a group and a token; those beyond the last row are dropped.
    ///
    /// # Safety
    /// `token` and `group` are in bounds, and no other worker stores this group of this token.
    #[inline(always)]
    unsafe fn store(&self, token: usize, group: usize, values: &[f32; GROUP]) {
        let first = group * GROUP;
        let mut values = *values;
        if let Some(bias) = self.bias {
            values.iter_mut().zip(&bias[first..]).for_each(|(value, bias)| *value += bias);
        }
        // SAFETY: in bounds by contract, and nobody else's.
        let out = unsafe {
            let at = self.places.at(token) * self.rows + first;
            std::slice::from_raw_parts_mut(self.out.add(at), GROUP.min(self.rows - first))
        };
        // A length that is known makes it one store.
        match <&mut [f32; GROUP]>::try_from(&mut *out) {
            Ok(out) => self.put(out, &values),
            Err(_) => self.put(out, &values),
        }
    }

    #[inline(always)]
    fn put(&self, out: &mut [f32], values: &[f32; GROUP]) {
        let pairs = out.iter_mut().zip(values);
        match self.write {
            Write::Set => pairs.for_each(|(out, value)| *out = *value),
            Write::Add => pairs.for_each(|(out, value)| *out += value),
        }
    }
}

/// Computes all jobs in one join. `x: [any, cols]`; shapes are the caller's responsibility.
pub(crate) fn linear(
    pool: &Pool,
    isa: Isa,
    (x, cols): (&[f32], usize),
    jobs: &[Job<'_>],
    (write, bits, workspace): (Write, ActivationBits, &mut Workspace),
) {
    let jobs: Vec<&Job<'_>> = jobs.iter().filter(|job| job.tokens > 0).collect();
    if jobs.is_empty() {
        return;
    }
    let slabs = slabs(&jobs, cols, (write, isa, bits));
    let Workspace { activations, tiles, rounded, bfloats, panels } = workspace;
    let inputs = Inputs::new((x, cols), &jobs);
    let mut forms = Forms::default();
    let any = |path: fn(LinearPath) -> bool| slabs.iter().any(|slab| path(slab.path));
    if any(LinearPath::is_integer) {
        forms.integers = activations.quantise(pool, isa, &inputs, bits);
    }
    if any(|path| path == LinearPath::Dense) {
        forms.tiles = tiles.fill(pool, &inputs, |x| x);
    }
    if any(|path| path == LinearPath::Rounded) {
        forms.rounded = rounded.fill(pool, &inputs, |x| bf16::from_f32(x).to_f32());
    }
    if any(LinearPath::is_bfloat) {
        forms.bfloats = bfloats.fill(pool, isa, &inputs);
    }
    multiply(pool, isa, &slabs, &forms, panels);
}

/// Whether [`divided`] can make these products, whoever computes them: the same on all ranks.
pub(crate) fn can_divide(
    tokens: usize,
    widths: &[usize],
    mut formats: impl Iterator<Item = Format>,
) -> bool {
    tokens >= DIVIDED_TOKENS
        && widths.iter().all(|width| width.is_multiple_of(packed::BLOCK))
        && formats.all(|format| !format.is_dense())
}

/// One job whose input's columns are divided over the ranks of a group, `own: [any,
/// widths[rank]]`: columns are quantised by who has them, and then gathered.
pub(crate) fn divided(
    (pool, isa, group): (&Pool, Isa, &dyn Collective),
    (own, widths): (&[f32], &[usize]),
    job: &Job<'_>,
    (write, bits, workspace): (Write, ActivationBits, &mut Workspace),
) -> Result<(), GroupError> {
    let slabs = slabs(&[job], widths.iter().sum(), (write, isa, bits));
    let Workspace { activations, panels, .. } = workspace;
    let inputs = Inputs::new((own, widths[group.rank()]), &[job]);
    let integers = activations.gather((pool, isa, group), &inputs, widths, bits)?;
    let forms = Forms { integers: vec![integers], ..Forms::default() };
    multiply(pool, isa, &slabs, &forms, panels);
    Ok(())
}

/// Runs all slabs in one join. Each worker begins with its own share, as large as any other's, and
/// who is through helps out: cores are not equally fast, and somebody else may be using one.
fn multiply(
    pool: &Pool,
    isa: Isa,
    slabs: &[Slab<'_>],
    forms: &Forms<'_>,
    panels: &mut Vec<Mutex<Panel>>,
) {
    panels.resize_with(pool.threads().max(panels.len()), Mutex::default);
    let (panels, threads) = (&*panels, pool.threads());
    let chunks: Vec<Slab<'_>> =
        slabs.iter().flat_map(|slab| slab.chunks(threads, forms.token_bytes(slab))).collect();
    let mut total = 0;
    let mut starts = Vec::with_capacity(chunks.len());
    for chunk in &chunks {
        starts.push(total);
        total += chunk.cost();
    }
    // Where each worker's share begins.
    let border = |worker: usize| starts.partition_point(|at| *at < total * worker / threads);
    let next: Vec<AtomicUsize> = (0..threads).map(|w| AtomicUsize::new(border(w))).collect();
    pool.run(&|worker| {
        let mut panel = panels[worker].lock().unwrap_or_else(PoisonError::into_inner);
        for share in (worker..threads).chain(0..worker) {
            let end = border(share + 1);
            // Chunks are handed out once each; what they need was there before the join.
            while let Some(chunk) = chunks[..end].get(next[share].fetch_add(1, Ordering::Relaxed)) {
                run_slab(isa, chunk, forms, &mut panel);
            }
        }
    });
}

/// All parts of all jobs, whole.
fn slabs<'a>(
    jobs: &[&Job<'a>],
    cols: usize,
    (write, isa, bits): (Write, Isa, ActivationBits),
) -> Vec<Slab<'a>> {
    let slab = |(at, job): (usize, &&Job<'a>), part: &Part<'a>| {
        let groups = part.rows.div_ceil(GROUP);
        let bytes = groups * packed::group_bytes(part.format, cols);
        assert_eq!(part.weight.len(), bytes, "a matrix has all its bytes");
        let room = part.out.len / part.rows.max(1);
        assert!(job.outputs.are_within(job.tokens, room), "an output has room for all tokens");
        let (out, rows, bias) = (part.out.at, part.rows, part.bias);
        let sink = Sink { out, rows, places: job.outputs, bias, write };
        let (format, weight, tokens) = (part.format, part.weight, job.tokens);
        let (groups, tokens, path) = (0..groups, 0..tokens, LinearPath::of(isa, format, bits));
        Slab { job: at, format, path, weight, groups, all_tokens: tokens.end, tokens, cols, sink }
    };
    let numbered = jobs.iter().enumerate();
    numbered.flat_map(|job| job.1.parts.iter().map(move |part| slab(job, part))).collect()
}

/// Which code multiplies weights.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum LinearPath {
    /// f32 multiply-adds, compiled for the tier.
    Dense,
    /// The same of activations that were rounded to bf16.
    Rounded,
    /// bf16 products on tile registers.
    Bf16Tiles,
    /// bf16 dot products of vectors (AVX512_BF16).
    Bf16Vectors,
    /// 8-bit products on tile registers; for a few tokens those of vectors.
    Int8Tiles,
    /// 8-bit dot products of vectors (VNNI).
    Int8Vectors,
    /// 16-bit dot products of vectors (AVX2).
    Int16Vectors,
    /// 8-bit dot products of vectors (NEON).
    NeonDots,
    /// 8-bit products of vectors (NEON).
    NeonProducts,
    /// Plain loops over integers: the tier has no kernel of its own for them.
    Reference,
}

impl LinearPath {
    /// The path that weights of a format take on a tier.
    pub fn of(isa: Isa, format: Format, bits: ActivationBits) -> LinearPath {
        match (isa, format) {
            (_, Format::BF16) if bits == ActivationBits::Eight => match isa {
                Isa::Amx => LinearPath::Bf16Tiles,
                Isa::Avx512 if bf16_dots::detect() => LinearPath::Bf16Vectors,
                _ => LinearPath::Rounded,
            },
            (_, format) if format.is_dense() => LinearPath::Dense,
            (Isa::Amx, _) => LinearPath::Int8Tiles,
            (Isa::Avx512, _) => LinearPath::Int8Vectors,
            (Isa::Avx2, _) => LinearPath::Int16Vectors,
            (Isa::NeonDot, _) => LinearPath::NeonDots,
            (Isa::Neon, _) => LinearPath::NeonProducts,
            (Isa::Reference, _) => LinearPath::Reference,
        }
    }

    /// What it does, in a few words; of the slow one, why.
    pub fn words(self) -> &'static str {
        match self {
            LinearPath::Dense => "f32 multiply-adds",
            LinearPath::Rounded => "f32 multiply-adds, activations in bf16",
            LinearPath::Bf16Tiles => "bf16 tile registers",
            LinearPath::Bf16Vectors => "bf16 dot products (AVX-512)",
            LinearPath::Int8Tiles => "int8 tile registers",
            LinearPath::Int8Vectors => "int8 dot products (VNNI)",
            LinearPath::Int16Vectors => "16-bit dot products (AVX2)",
            LinearPath::NeonDots => "int8 dot products (NEON)",
            LinearPath::NeonProducts => "int8 products (NEON without dot products)",
            LinearPath::Reference => "slow: plain loops, as there is no AVX2, AVX-512 VNNI or NEON",
        }
    }

    /// Whether weights and activations meet as integers.
    pub fn is_integer(self) -> bool {
        !matches!(self, LinearPath::Dense | LinearPath::Rounded) && !self.is_bfloat()
    }

    /// Whether they meet as numbers in bf16.
    pub fn is_bfloat(self) -> bool {
        matches!(self, LinearPath::Bf16Tiles | LinearPath::Bf16Vectors)
    }
}

/// Activations of each job in the forms that kernels take; empty where no kernel takes one.
#[derive(Default)]
struct Forms<'a> {
    integers: Vec<Activations<'a>>,
    tiles: Vec<dense::Tiles<'a>>,
    rounded: Vec<dense::Tiles<'a>>,
    bfloats: Vec<Bfloats<'a>>,
}

impl Forms<'_> {
    /// Bytes of a token's activations, as they are read again for each group of a slab.
    fn token_bytes(&self, slab: &Slab<'_>) -> usize {
        match slab.path {
            LinearPath::Dense | LinearPath::Rounded => slab.cols * size_of::<f32>(),
            LinearPath::Bf16Vectors => slab.cols * size_of::<u16>(),
            // That path goes about it in its own way.
            LinearPath::Bf16Tiles => 0,
            _ => self.integers[slab.job].token_bytes(),
        }
    }
}

fn run_slab(isa: Isa, slab: &Slab<'_>, forms: &Forms<'_>, panel: &mut Panel) {
    let (job, Forms { integers, tiles, rounded, bfloats }) = (slab.job, forms);
    match slab.path {
        // SAFETY: dispatch chose this tier, which Isa::detect() found.
        LinearPath::Bf16Tiles => unsafe { amx::bf16(slab, bfloats[job]) },
        // SAFETY: as above, and the instruction too has been found.
        LinearPath::Bf16Vectors => unsafe { bf16_dots::run(slab, bfloats[job]) },
        LinearPath::Dense => isa.run(dense::Dense { slab, x: tiles[job] }),
        LinearPath::Rounded => isa.run(dense::Dense { slab, x: rounded[job] }),
        LinearPath::Int8Tiles => avx512::run(slab, &integers[job], panel, true),
        LinearPath::Int8Vectors => avx512::run(slab, &integers[job], panel, false),
        LinearPath::Int16Vectors => avx2::run(slab, &integers[job], panel),
        LinearPath::NeonDots => neon::run(slab, &integers[job], panel, true),
        LinearPath::NeonProducts => neon::run(slab, &integers[job], panel, false),
        LinearPath::Reference => {
            let activations = &integers[job];
            isa.run(reference::Quantised { slab, activations, panel });
        }
    }
}

/// A pointer that workers of one join share; each touches its own elements.
#[derive(Clone, Copy)]
pub(crate) struct Shared<T>(pub(crate) *mut T);

// SAFETY: whoever uses `at` promises disjointness there.
unsafe impl<T> Sync for Shared<T> {}
// SAFETY: as above.
unsafe impl<T> Send for Shared<T> {}

impl<T> Shared<T> {
    /// # Safety
    /// `index` is within the allocation, and no one else uses the elements from there on that the
    /// caller touches.
    pub(crate) unsafe fn at(&self, index: usize) -> *mut T {
        // SAFETY: within the allocation by contract.
        unsafe { self.0.add(index) }
    }
}
