//! `pomona inspect`: what a model is, what it will need, what it will run on. Loads nothing.

use std::collections::BTreeMap;
use std::io::{self, Write, stdout};
use std::ops::Range;

use anyhow::Result;
use clap::Args;
use pomona_kernels::{ActivationBits, Format, Isa, LinearPath, Placement};
use pomona_models::{Checkpoint, Division, TensorInfo};
use pomona_policy::experts::Counted;
use pomona_types::LayerKind;
use serde::Serialize;

use super::args::{EngineArgs, ModelName};
use crate::compose;
use crate::memory;
use crate::models::progress::human_bytes;

/// What becomes of vectors, such as norms and biases.
const VECTOR: &str = "f32 vector";

/// Flags of `inspect`.
#[derive(Args, Debug)]
pub struct InspectArgs {
    #[command(flatten)]
    model: ModelName,
    /// Print JSON, with every tensor
    #[arg(long)]
    json: bool,
    /// List every tensor
    #[arg(long)]
    tensors: bool,
    #[command(flatten)]
    engine: EngineArgs,
}

#[derive(Serialize)]
struct Findings {
    name: String,
    path: String,
    origin: String,
    architecture: String,
    layers: usize,
    sliding_layers: usize,
    hidden: u32,
    ffn: u32,
    /// Experts of a layer, and how many of them a token meets; none in dense models.
    experts: Option<u32>,
    experts_per_token: Option<u32>,
    heads: u32,
    kv_heads: u32,
    head_dim: u32,
    vocab: u32,
    context: u32,
    chat_template: bool,
    end_tokens: Vec<u32>,
    parameters: u64,
    /// Those that a token meets.
    active_parameters: u64,
    formats: Vec<FormatRow>,
    memory: MemoryRow,
    /// Where experts are divided.
    placement: Option<PlacementRow>,
    machine: MachineRow,
    tensors: Vec<TensorRow>,
}

#[derive(Serialize)]
struct FormatRow {
    format: String,
    path: &'static str,
    tensors: usize,
    weights: u64,
    bytes: u64,
}

#[derive(Serialize)]
struct MemoryRow {
    weight_bytes: u64,
    kv_token_bytes: u64,
    /// One sequence of the model's whole context.
    kv_context_bytes: u64,
    available_bytes: u64,
    /// What `serve` with the same flags would take; `None` when there is no room.
    fit: Option<FitRow>,
    refusal: Option<String>,
    /// None where the model is not divided.
    ranks: Vec<RankRow>,
}

#[derive(Serialize)]
struct PlacementRow {
    /// Copies beyond one of each expert, in all layers.
    copies: usize,
    /// Whether tokens were counted; otherwise experts are taken to be alike.
    counted: bool,
    /// What the busiest rank would have to do, over the mean of all.
    balance: f64,
    /// The same with experts divided as if nothing were known of them, once each.
    balance_plain: f64,
    /// By layer and expert, of the ranks that share the layer those that have it.
    holders: Vec<Vec<Vec<usize>>>,
}

/// Ranges are first and one past the last.
#[derive(Serialize)]
struct RankRow {
    rank: usize,
    layers: [u32; 2],
    heads: [u32; 2],
    kv_heads: [u32; 2],
    ffn: [u32; 2],
    /// Of all its layers together, copies included.
    experts: Option<usize>,
    /// Rows of the embedding and the output matrix.
    vocab: Option<[u32; 2]>,
    weight_bytes: u64,
    kv_bytes: u64,
    scratch_bytes: u64,
}

#[derive(Serialize)]
struct FitRow {
    max_model_len: u32,
    kv_bytes: u64,
    scratch_bytes: u64,
    total_bytes: u64,
}

#[derive(Serialize)]
struct MachineRow {
    kernels: String,
    threads: usize,
    /// What would be faster here.
    advice: Option<String>,
}

#[derive(Serialize)]
struct TensorRow {
    name: String,
    format: String,
    shape: Vec<usize>,
    bytes: u64,
    /// Which code multiplies it here.
    path: &'static str,
}

/// Runs the verb.
pub fn run(args: &InspectArgs) -> Result<()> {
    let findings = look(args)?;
    let mut out = stdout().lock();
    if args.json {
        writeln!(out, "{}", serde_json::to_string_pretty(&findings)?)?;
    } else {
        print(&mut out, &findings, args.tensors)?;
    }
    Ok(())
}

fn look(args: &InspectArgs) -> Result<Findings> {
    let model = args.model.require("inspect")?;
    let (resolved, checkpoint) = compose::open_to_load(model, &args.engine)?;
    let draft = compose::open_draft(&args.engine)?;
    let (division, counted) = compose::divide(&checkpoint, &args.engine)?;
    let wishes = compose::wishes(&checkpoint, &division, draft.as_ref(), &args.engine)?;
    let spec = checkpoint.spec();
    let (isa, bits) = (Isa::detect(), args.engine.activation_bits);
    let tensors: Vec<TensorRow> = checkpoint
        .tensors()
        .iter()
        .map(|tensor| TensorRow {
            name: tensor.name.clone(),
            format: tensor.format.clone(),
            shape: tensor.shape.clone(),
            bytes: tensor.bytes,
            path: match checkpoint.matrices(&tensor.name).first() {
                Some(matrix) => LinearPath::of(isa, matrix.format, bits).words(),
                None if tensor.shape.len() < 2 => VECTOR,
                None => "not supported",
            },
        })
        .collect();
    let weights = |t: &TensorRow| t.shape.iter().map(|n| *n as u64).product::<u64>();
    let mut formats: BTreeMap<(&str, &str), FormatRow> = BTreeMap::new();
    for tensor in &tensors {
        let kind = (tensor.format.as_str(), tensor.path);
        let row = formats.entry(kind).or_insert_with(|| FormatRow {
            format: tensor.format.clone(),
            path: tensor.path,
            tensors: 0,
            weights: 0,
            bytes: 0,
        });
        row.tensors += 1;
        row.weights += weights(tensor);
        row.bytes += tensor.bytes;
    }
    let mut formats: Vec<FormatRow> = formats.into_values().collect();
    formats.sort_by_key(|row| std::cmp::Reverse(row.bytes));
    Ok(Findings {
        path: resolved.path.display().to_string(),
        name: resolved.name,
        origin: resolved.origin,
        architecture: spec.architecture.clone(),
        layers: spec.layers.len(),
        sliding_layers: spec.layers.iter().filter(|kind| **kind != LayerKind::Full).count(),
        hidden: spec.hidden,
        ffn: spec.ffn,
        experts: spec.experts.map(|experts| experts.count),
        experts_per_token: spec.experts.map(|experts| experts.per_token),
        heads: spec.heads,
        kv_heads: spec.kv_heads,
        head_dim: spec.head_dim,
        vocab: spec.vocab,
        context: spec.max_position,
        chat_template: checkpoint.chat_template().is_some(),
        end_tokens: checkpoint.eos_token_ids().to_vec(),
        parameters: tensors.iter().map(weights).sum(),
        active_parameters: checkpoint.active(TensorInfo::weights),
        formats,
        memory: memory_row(&division, &wishes, &checkpoint, &args.engine),
        placement: placement_row(&division, counted.as_ref(), &checkpoint)?,
        machine: MachineRow {
            kernels: isa.name().to_owned(),
            threads: compose::threads(&args.engine),
            advice: advice(isa, bits, &checkpoint),
        },
        tensors,
    })
}

/// What reads prompts faster, for who asks for it.
fn advice(isa: Isa, bits: ActivationBits, checkpoint: &Checkpoint) -> Option<String> {
    let with_8 = LinearPath::of(isa, Format::BF16, ActivationBits::Eight);
    let mut matrices = checkpoint.tensors().iter().flat_map(|t| checkpoint.matrices(&t.name));
    let applies = bits != ActivationBits::Eight
        && with_8.is_bfloat()
        && matrices.any(|matrix| matrix.format == Format::BF16);
    let words = with_8.words();
    applies.then(|| {
        format!("--activation-bits 8 gives {words}: faster prompts, activations rounded to bf16")
    })
}

fn memory_row(
    division: &Division,
    wishes: &memory::Wishes,
    checkpoint: &Checkpoint,
    args: &EngineArgs,
) -> MemoryRow {
    let spec = checkpoint.spec();
    let fit = compose::fit(checkpoint, division, wishes, args);
    let row_bytes = compose::kv_row_bytes(spec, args);
    let blocks = fit.as_ref().map_or(0, |fit| fit.kv_blocks);
    MemoryRow {
        ranks: rank_rows(checkpoint, division, args, blocks),
        weight_bytes: wishes.needs.weight_bytes,
        kv_token_bytes: memory::kv_token_bytes(spec, row_bytes),
        kv_context_bytes: memory::blocks_for(
            spec,
            spec.max_position,
            wishes.max_num_batched_tokens,
            1,
        ) * spec.block_bytes(row_bytes),
        available_bytes: wishes.available_bytes,
        refusal: fit.as_ref().err().map(|error| error.to_string()),
        fit: fit.ok().map(|fit| FitRow {
            max_model_len: fit.max_model_len,
            kv_bytes: fit.kv_bytes,
            scratch_bytes: fit.scratch_bytes,
            total_bytes: fit.total_bytes(),
        }),
    }
}

/// Who has which experts, and what is expected of that.
fn placement_row(
    division: &Division,
    counted: Option<&Counted>,
    checkpoint: &Checkpoint,
) -> Result<Option<PlacementRow>> {
    let plain = Division::new(checkpoint.spec(), division.parallel)?;
    let expected = compose::expected(division, counted).zip(compose::expected(&plain, counted));
    Ok(expected.map(|((copies, balance), (_, balance_plain))| PlacementRow {
        copies,
        counted: counted.is_some_and(|c| c.tokens.iter().flatten().any(|tokens| *tokens > 0)),
        balance,
        balance_plain,
        holders: division.experts.iter().map(|layer| layer.holders().to_vec()).collect(),
    }))
}

/// What each rank would hold of a model that is divided.
fn rank_rows(
    checkpoint: &Checkpoint,
    division: &Division,
    args: &EngineArgs,
    blocks: u32,
) -> Vec<RankRow> {
    let row = |rank: usize| {
        let place = division.parallel.place(rank);
        let needs = compose::rank_needs(checkpoint, division, rank, args);
        let range = |r: &Range<u32>| [r.start, r.end];
        let layers = division.layers[place.stage].clone();
        let layers = division.experts.get(layers.start as usize..layers.end as usize);
        let held = |layer: &Placement| layer.here(place.tensor).count();
        RankRow {
            rank,
            layers: range(&division.layers[place.stage]),
            heads: range(&division.heads[place.tensor]),
            kv_heads: range(&division.kv_heads(place.tensor)),
            ffn: range(&division.ffn[place.tensor]),
            experts: layers.map(|layers| layers.iter().map(held).sum()),
            vocab: (place.stage == 0).then(|| range(&division.vocab[place.tensor])),
            weight_bytes: needs.weight_bytes,
            kv_bytes: needs.block_bytes * u64::from(blocks),
            scratch_bytes: needs.scratch_bytes,
        }
    };
    let ranks = division.parallel.ranks();
    if ranks > 1 { (0..ranks).map(row).collect() } else { Vec::new() }
}

fn print(out: &mut dyn Write, f: &Findings, every_tensor: bool) -> io::Result<()> {
    let million = f.parameters as f64 / 1e6;
    match f.name == f.path {
        true => writeln!(out, "{} ({})", f.path, f.origin)?,
        false => writeln!(out, "{} ({}, {})", f.name, f.path, f.origin)?,
    }
    writeln!(out, "architecture   {}, {million:.1} M parameters", f.architecture)?;
    let sliding = match f.sliding_layers {
        0 => String::new(),
        n => format!(" ({n} with a sliding window)"),
    };
    writeln!(
        out,
        "layers         {}{sliding}, width {}, feed-forward {}",
        f.layers, f.hidden, f.ffn
    )?;
    if let (Some(experts), Some(met)) = (f.experts, f.experts_per_token) {
        let million = f.active_parameters as f64 / 1e6;
        let parameters = format!("{million:.1} M parameters");
        writeln!(out, "experts        {experts} in each layer, {met} a token: {parameters}")?;
    }
    writeln!(
        out,
        "attention      {} heads of {}, {} of keys and values",
        f.heads, f.head_dim, f.kv_heads
    )?;
    writeln!(out, "context        {} tokens, vocabulary {}", f.context, f.vocab)?;
    let chat = if f.chat_template { "has a template" } else { "no template: a base model" };
    writeln!(out, "chat           {chat}; an answer ends at {:?}", f.end_tokens)?;
    writeln!(out, "\nformat     tensors      weights       bytes  path")?;
    for row in &f.formats {
        let bytes = human_bytes(row.bytes);
        let FormatRow { format, tensors, weights, path, .. } = row;
        writeln!(out, "{format:<10} {tensors:>7} {weights:>12} {bytes:>11}  {path}")?;
    }
    let m = &f.memory;
    writeln!(out, "\nmemory         weights {}", human_bytes(m.weight_bytes))?;
    writeln!(
        out,
        "               KV {} a token, {} for the whole context",
        human_bytes(m.kv_token_bytes),
        human_bytes(m.kv_context_bytes)
    )?;
    match (&m.fit, &m.refusal) {
        (Some(fit), _) => writeln!(
            out,
            "               as served: {} for sequences of up to {} tokens (KV {}, activations \
             and program {}); {} available",
            human_bytes(fit.total_bytes),
            fit.max_model_len,
            human_bytes(fit.kv_bytes),
            human_bytes(fit.scratch_bytes),
            human_bytes(m.available_bytes)
        )?,
        (None, refusal) => {
            writeln!(out, "               {}", refusal.as_deref().unwrap_or_default())?;
        }
    }
    print_ranks(out, &m.ranks)?;
    if let Some(p) = &f.placement {
        print_placement(out, p)?;
    }
    writeln!(out, "runs on        {} kernels, {} threads", f.machine.kernels, f.machine.threads)?;
    if let Some(advice) = &f.machine.advice {
        writeln!(out, "               {advice}")?;
    }
    if every_tensor {
        writeln!(out)?;
        for t in &f.tensors {
            let shape = format!("{:?}", t.shape);
            writeln!(out, "{:<10} {shape:<20} {:<32} {}", t.format, t.path, t.name)?;
        }
    }
    Ok(())
}

fn print_ranks(out: &mut dyn Write, ranks: &[RankRow]) -> io::Result<()> {
    if ranks.is_empty() {
        return Ok(());
    }
    writeln!(
        out,
        "\nrank   layers   heads  kv heads          ffn  experts          vocabulary     \
                   weights          KV  activations"
    )?;
    for r in ranks {
        let range = |[first, end]: [u32; 2]| format!("{first}..{end}");
        writeln!(
            out,
            "{:>4} {:>8} {:>7} {:>9} {:>12} {:>8} {:>19} {:>11} {:>11} {:>12}",
            r.rank,
            range(r.layers),
            range(r.heads),
            range(r.kv_heads),
            range(r.ffn),
            r.experts.map_or("-".to_owned(), |experts| experts.to_string()),
            r.vocab.map_or("-".to_owned(), range),
            human_bytes(r.weight_bytes),
            human_bytes(r.kv_bytes),
            human_bytes(r.scratch_bytes),
        )?;
    }
    Ok(())
}

fn print_placement(out: &mut dyn Write, p: &PlacementRow) -> io::Result<()> {
    let by = match p.counted {
        true => "by tokens counted",
        false => "if all experts get as many tokens",
    };
    writeln!(
        out,
        "placement      {} copies of experts in {} layers; the busiest rank has {:.2} times the \
         mean to do, {by} ({:.2} with experts divided in order)",
        p.copies,
        p.holders.len(),
        p.balance,
        p.balance_plain,
    )
}
