//! Putting the crates together: a name becomes a checkpoint, a checkpoint finds room in memory,
//! and with operations, an engine and a tokenizer it becomes a replica. Decides nothing that a
//! crate below could decide.

mod expert_file;
mod experts;
mod follow;
mod replica;
mod weights;

use std::path::Path;
use std::sync::{Arc, OnceLock};

use anyhow::{Context, Result, anyhow, bail};
use pomona_device::DType;
use pomona_engine::{draft_block_bytes, kv_block_bytes};
use pomona_fabric::rendezvous::Fingerprint;
use pomona_gateway::{SamplingDefaults, ServedModel};
use pomona_models::{Checkpoint, Division, Parallel, TensorInfo};
use pomona_policy::experts::Counted;
use pomona_text::{ChatTemplate, Tokenizer};
use pomona_types::{ExpertsSpec, ModelSpec, Replica};

use crate::bench::report::Facts;
use crate::cli::EngineArgs;
use crate::memory::{self, Fit, Needs, Wishes};
use crate::models::progress::say;
use crate::models::{Resolved, Surroundings, catalogue, resolve};
use expert_file::Keeper;
use replica::Running;

pub use experts::{divide, expected};
pub use follow::Follower;
pub use weights::{Weights, cpu_ops, threads, threads_of_ranks};

/// Memory that a system has which does not say how much.
const MEMORY_ASSUMED: u64 = 8 << 30;

/// Finds a model and reads its headers. Touches no weights.
pub fn open(name: &str) -> Result<(Resolved, Checkpoint)> {
    let resolved = resolve(name, &Surroundings::from_env()?)?;
    let checkpoint = Checkpoint::open(&resolved.path)?;
    Ok((resolved, checkpoint))
}

/// Finds the draft model, if one is wanted, and reads its headers.
pub fn open_draft(args: &EngineArgs) -> Result<Option<Checkpoint>> {
    let Some(name) = args.drafting().and_then(|drafting| drafting.model) else { return Ok(None) };
    let (_, checkpoint) = open(&name).context("cannot use the draft model")?;
    Ok(Some(checkpoint))
}

/// The same, for loading as the flags say; names what --quantization leaves as it is.
pub fn open_to_load(name: &str, args: &EngineArgs) -> Result<(Resolved, Checkpoint)> {
    let (resolved, mut checkpoint) = open(name)?;
    if let Some(to) = args.quantization {
        let others = checkpoint.quantise(to);
        let list = others.iter().map(|(format, count)| format!("{count} in {format}"));
        let list = list.collect::<Vec<_>>().join(", ");
        if !list.is_empty() {
            say(&format!("--quantization leaves matrices as they are stored: {list}"));
        }
    }
    Ok((resolved, checkpoint))
}

/// The checkpoint's tokenizer.
pub fn tokenizer(checkpoint: &Checkpoint) -> Result<Tokenizer> {
    Tokenizer::new(checkpoint.tokenizer()).context("cannot use the model's tokenizer")
}

/// What the authors of a checkpoint folder recommend in its `generation_config.json`, as vLLM takes
/// it too. Missing or odd values count as not given: they are advice.
fn sampling_defaults(path: &Path) -> SamplingDefaults {
    const BYTES_MAX: u64 = 1 << 20;
    let file = path.join("generation_config.json");
    let small = std::fs::metadata(&file).is_ok_and(|meta| meta.len() <= BYTES_MAX);
    let text = if small { std::fs::read(&file).unwrap_or_default() } else { Vec::new() };
    let config: serde_json::Value = serde_json::from_slice(&text).unwrap_or_default();
    let number = |name: &str, least: f64, most: f64| {
        let value = config.get(name)?.as_f64()?;
        (least..=most).contains(&value).then_some(value as f32)
    };
    SamplingDefaults {
        temperature: number("temperature", 0.0, 100.0),
        top_p: number("top_p", f64::from(f32::MIN_POSITIVE), 1.0),
        top_k: number("top_k", 0.0, 1e6).map(|k| k as u32),
        min_p: number("min_p", 0.0, 1.0),
        repetition_penalty: number("repetition_penalty", 0.01, 100.0),
    }
}

/// A model for which there is room.
pub struct Prepared {
    /// As it was asked for.
    name: String,
    /// Over which ranks.
    division: Division,
    /// What its experts had to do in earlier runs, where that is kept.
    counted: Option<Counted>,
    /// Its files.
    pub resolved: Resolved,
    /// What is in them.
    pub checkpoint: Checkpoint,
    /// Tells its weights from others, once somebody asked.
    digest: OnceLock<Fingerprint>,
    /// The room.
    pub fit: Fit,
    draft: Option<Checkpoint>,
    args: EngineArgs,
    /// Of each rank.
    threads: usize,
}

/// Opens a model and finds room for it, before anything large is touched.
pub fn prepare(name: &str, args: &EngineArgs) -> Result<Prepared> {
    let (resolved, checkpoint) = open_to_load(name, args)?;
    let draft = open_draft(args)?;
    if draft.is_some() && args.parallel.context_parallel_size > 1 {
        bail!(
            "a draft model needs the keys and values of all ranks: leave out \
             --context-parallel-size, or take drafts from the text itself"
        );
    }
    let (division, counted) = divide(&checkpoint, args)?;
    let wishes = wishes(&checkpoint, &division, draft.as_ref(), args)?;
    let fit = fit(&checkpoint, &division, &wishes, args)?;
    if args.nodes.node_listen.is_some() && division.parallel.ranks() == 1 {
        bail!(
            "--node-listen has nothing to wait for: say over how many ranks the model is to be \
             divided, such as --tensor-parallel-size 2"
        );
    }
    weights::remark_on_threads(args);
    let (name, threads, args) = (name.to_owned(), threads(args), args.clone());
    let digest = OnceLock::new();
    Ok(Prepared {
        name,
        division,
        counted,
        resolved,
        checkpoint,
        digest,
        fit,
        draft,
        args,
        threads,
    })
}

/// What flags and machine say about memory.
///
/// # Errors
/// When the draft model does not belong to the model.
pub fn wishes(
    checkpoint: &Checkpoint,
    division: &Division,
    draft: Option<&Checkpoint>,
    args: &EngineArgs,
) -> Result<Wishes> {
    let ranks = 0..division.parallel.ranks();
    let ranks = ranks.map(|rank| rank_needs(checkpoint, division, rank, args));
    let replica = match args.nodes.apart() {
        // Each has a machine of its own. What the others have is known when they join.
        true => ranks.reduce(Needs::max).unwrap_or_default(),
        false => ranks.sum(),
    };
    let draft = draft.map_or(Ok(Needs::default()), |draft| draft_needs(checkpoint, draft, args))?;
    let replicas = args.parallel.data_parallel_size as usize;
    let needs: Needs = std::iter::repeat_n(replica + draft, replicas).sum();
    Ok(Wishes {
        needs,
        available_bytes: pomona_device::available_memory().unwrap_or(MEMORY_ASSUMED),
        max_model_len: args.max_model_len,
        max_num_seqs: args.max_num_seqs,
        max_num_batched_tokens: args.max_num_batched_tokens,
        context: division.parallel.context,
        kv_bytes: args.kv_cache_memory,
    })
}

/// Finds room for a model.
///
/// # Errors
/// As [`memory::fit`]; where more machines would have room, it says how many.
pub fn fit(
    checkpoint: &Checkpoint,
    division: &Division,
    wishes: &Wishes,
    args: &EngineArgs,
) -> Result<Fit> {
    let (spec, parallel) = (checkpoint.spec(), division.parallel);
    let why = match memory::fit(spec, wishes) {
        Ok(fit) => return Ok(fit),
        Err(why) => why,
    };
    let fits = |tensor: &u32| {
        let Ok(division) = Division::new(spec, Parallel { tensor: *tensor, ..parallel }) else {
            return false;
        };
        (0..division.parallel.ranks()).all(|rank| {
            let needs = rank_needs(checkpoint, &division, rank, args);
            memory::fit(spec, &Wishes { needs, ..*wishes }).is_ok()
        })
    };
    // What else is on a machine then is not counted here.
    let plain = args.parallel.data_parallel_size == 1
        && args.experts.num_redundant_experts == 0
        && args.drafting().is_none();
    // Where ranks share this machine, as many as asked for may do.
    let least = if args.nodes.apart() { parallel.tensor + 1 } else { parallel.tensor.max(2) };
    match (least..=spec.heads).filter(|_| plain).find(fits) {
        None => Err(why),
        Some(tensor) => bail!(
            "{why}, or divide the model over {} machines that have as much: \
             --tensor-parallel-size {tensor} --node-listen HOST:PORT here, and `pomona node --join \
             HOST:PORT` on each of the others",
            Parallel { tensor, ..parallel }.ranks(),
        ),
    }
}

/// What one rank of a model needs.
pub fn rank_needs(
    checkpoint: &Checkpoint,
    division: &Division,
    rank: usize,
    args: &EngineArgs,
) -> Needs {
    let (spec, place) = (checkpoint.spec(), division.parallel.place(rank));
    let (part, tokens) = (division.part(spec, place), args.max_num_batched_tokens);
    let scratch_bytes = memory::scratch_bytes(spec, &part.spec, tokens);
    let ranks = division.parallel.ranks();
    Needs::program()
        + Needs {
            weight_bytes: checkpoint.part_bytes(division, place),
            // Of the blocks of all context ranks, it keeps its share.
            block_bytes: kv_block_bytes(spec, &part, args.kv_cache_dtype.0)
                .div_ceil(u64::from(part.context_ranks)),
            scratch_bytes: scratch_bytes
                + memory::exchanged_bytes(spec, tokens, ranks)
                + if part.context_ranks > 1 { memory::CONTEXT_BYTES } else { 0 },
        }
}

/// What a draft model needs.
fn draft_needs(checkpoint: &Checkpoint, draft: &Checkpoint, args: &EngineArgs) -> Result<Needs> {
    let (spec, kv_dtype) = (draft.spec(), args.kv_cache_dtype.0);
    Ok(Needs {
        weight_bytes: draft.weight_bytes(),
        block_bytes: draft_block_bytes(checkpoint.spec(), spec, kv_dtype).context(
            "the draft model's layers see further back than the model's: choose one with the same \
             sliding windows or smaller ones",
        )?,
        scratch_bytes: memory::scratch_bytes(spec, spec, args.max_num_batched_tokens),
    })
}

/// Bytes of a head's key or value of one token.
pub fn kv_row_bytes(spec: &ModelSpec, args: &EngineArgs) -> u32 {
    pomona_kernels::kv_row_bytes(args.kv_cache_dtype.0, spec.head_dim as usize) as u32
}

/// A running replica and what is needed to talk to it in text.
pub struct Loaded {
    /// All that runs, as one.
    pub replica: Arc<dyn Replica>,
    running: Vec<Running>,
    /// Behind them, so that it has heard everything.
    keeper: Option<Keeper>,
    /// The model's.
    pub tokenizer: Arc<Tokenizer>,
    /// The model's, or the one that was given; `None` for a base model.
    pub template: Option<Arc<ChatTemplate>>,
    defaults: SamplingDefaults,
}

impl Loaded {
    /// Ends all requests, engines and ranks. Takes at most a step.
    pub fn stop(self) {
        drop(self.running);
        drop(self.keeper);
    }

    /// The same for the gateway, under these names.
    pub fn served(&self, names: Vec<String>) -> ServedModel {
        ServedModel {
            names,
            replica: self.replica.clone(),
            tokenizer: self.tokenizer.clone(),
            template: self.template.clone(),
            defaults: self.defaults.clone(),
        }
    }
}

impl Prepared {
    /// Loads weights and tokenizer side by side and starts the engines. The other ranks of a
    /// divided model are started first, and load at the same time.
    pub fn load(self) -> Result<Loaded> {
        self.load_with_template(None)
    }

    /// The same, with a chat template in place of the model's.
    pub fn load_with_template(self, template: Option<&str>) -> Result<Loaded> {
        let (door, prepared) = (self.door()?, Arc::new(self));
        let (tokenizer, placed) = std::thread::scope(|scope| {
            let tokenizer = scope.spawn(|| prepared.tokenizer());
            let placed = prepared.place_all(&door);
            (tokenizer.join().unwrap_or_else(|_| Err(anyhow!("the tokenizer failed"))), placed)
        });
        let (tokenizer, placed) = (tokenizer?, placed?);
        let text = |id: Option<u32>| id.map(|id| tokenizer.token_text(id));
        let (bos, eos) = (text(tokenizer.bos()), text(tokenizer.eos()));
        let template = template
            .or(prepared.checkpoint.chat_template())
            .map(|source| ChatTemplate::new(source, bos.as_deref(), eos.as_deref()))
            .transpose()
            .context("cannot use the chat template; --chat-template FILE takes another")?;
        let mut ends: Vec<u32> = prepared.checkpoint.eos_token_ids().to_vec();
        ends.extend(tokenizer.end_ids());
        ends.sort_unstable();
        ends.dedup();
        if let Some(door) = &door {
            replica::lock(door).be_quick();
        }
        let ends: Arc<[u32]> = ends.into();
        let running = placed.into_iter().map(|placed| prepared.run(placed, &ends, &door));
        let running: Vec<Running> = running.collect::<Result<_>>()?;
        let template = template.map(Arc::new);
        let defaults = match catalogue::find(&prepared.resolved.name)? {
            Some(entry) => SamplingDefaults {
                temperature: entry.sampling.temperature,
                top_p: entry.sampling.top_p,
                ..SamplingDefaults::default()
            },
            None => sampling_defaults(&prepared.resolved.path),
        };
        let replica = replica::as_one(&running)?;
        let keeper = prepared.keeper(&replica)?;
        Ok(Loaded { replica, running, keeper, tokenizer: Arc::new(tokenizer), template, defaults })
    }

    /// Keeps what experts have to do in the file that the flags name, if they do.
    fn keeper(&self, replica: &Arc<dyn Replica>) -> Result<Option<Keeper>> {
        let experts = &self.args.experts;
        let file = experts.expert_loads.clone().filter(|_| !experts.expert_loads_read_only);
        let file = file.zip(self.counted.clone());
        file.map(|(file, counted)| Keeper::start(file, counted, replica.clone())).transpose()
    }

    /// The model's tokenizer, which must be the draft model's too: its tokens are fed to both.
    fn tokenizer(&self) -> Result<Tokenizer> {
        let own = tokenizer(&self.checkpoint)?;
        let Some(draft) = &self.draft else { return Ok(own) };
        let other = tokenizer(draft).context("cannot use the draft model")?;
        let tokens = self.checkpoint.spec().vocab;
        let same = |id: &u32| own.token_bytes(*id) == other.token_bytes(*id);
        if draft.spec().vocab != tokens || !(0..tokens).all(|id| same(&id)) {
            bail!(
                "the draft model {} has another vocabulary than {}: choose a smaller model of the \
                 same family",
                draft.name(),
                self.checkpoint.name()
            );
        }
        Ok(own)
    }

    /// Tells the weights from others: reads some numbers of each tensor, the first time.
    fn digest(&self) -> Result<Fingerprint> {
        if let Some(digest) = self.digest.get() {
            return Ok(*digest);
        }
        let digest = follow::digest(&self.checkpoint)?;
        Ok(*self.digest.get_or_init(|| digest))
    }

    /// Number type of KV.
    pub fn kv_dtype(&self) -> DType {
        self.args.kv_cache_dtype.0
    }

    /// Most tokens in a step.
    pub fn step_tokens(&self) -> usize {
        self.args.max_num_batched_tokens as usize
    }

    /// Bytes of a head's key or value of one token.
    pub fn kv_row_bytes(&self) -> u32 {
        kv_row_bytes(self.checkpoint.spec(), &self.args)
    }

    /// What the model costs, for measurements.
    pub fn facts(&self) -> Facts {
        let spec = self.checkpoint.spec();
        let embedding = u64::from(spec.vocab) * u64::from(spec.hidden);
        let (mut expert_bytes, mut table_bytes, mut has_output) = (0u64, 0u64, false);
        for tensor in self.checkpoint.tensors() {
            expert_bytes += if tensor.of_experts { tensor.bytes } else { 0 };
            let name = tensor.name.as_str();
            if name.contains("embed_tokens.weight") || name == "token_embd.weight" {
                table_bytes = tensor.bytes;
            }
            has_output |= matches!(name, "lm_head.weight" | "output.weight");
        }
        // A tied table is read as the output matrix; an untied one only a row at a time.
        let tables = if has_output { 2 } else { 1 };
        let weights = self.checkpoint.active(TensorInfo::weights);
        let share = |experts: ExpertsSpec| f64::from(experts.per_token) / f64::from(experts.count);
        Facts {
            name: self.resolved.name.clone(),
            architecture: spec.architecture.clone(),
            weight_bytes: self.checkpoint.weight_bytes(),
            step_bytes: self.checkpoint.active_bytes() - if has_output { table_bytes } else { 0 },
            expert_bytes,
            expert_share: spec.experts.map_or(1.0, share),
            layer_weights: weights.saturating_sub(tables * embedding),
            output_weights: embedding,
            kv_bytes: self.fit.kv_bytes,
            kv_token_bytes: memory::kv_token_bytes(spec, self.kv_row_bytes()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_fits_nowhere_or_on_more_machines_is_told_apart() {
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/tests/golden");
        let checkpoint = Checkpoint::open(&golden.join("llama")).unwrap();
        let refusal = |flags: &str, less: u64| {
            let args = EngineArgs::of(flags);
            let (division, _) = divide(&checkpoint, &args).unwrap();
            let mut wishes = wishes(&checkpoint, &division, None, &args).unwrap();
            wishes.available_bytes = wishes.needs.weight_bytes + wishes.needs.scratch_bytes - less;
            fit(&checkpoint, &division, &wishes, &args).unwrap_err().to_string()
        };
        let over = |ranks: u32| format!("--tensor-parallel-size {ranks} --node-listen");
        assert!(refusal("", 0).contains(&over(4)), "{}", refusal("", 0));
        // Both ranks would be here, and each has room where it is alone.
        assert!(refusal("--tp 2", 0).contains(&over(2)), "{}", refusal("--tp 2", 0));
        let needed = Needs::program().scratch_bytes;
        assert!(!refusal("", needed).contains("--node-listen"), "{}", refusal("", needed));
    }

    #[test]
    fn recommendations_are_taken_where_they_make_sense() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(sampling_defaults(folder.path()), SamplingDefaults::default());
        let text = r#"{"temperature": 0.6, "top_k": 20, "top_p": 7, "do_sample": true}"#;
        std::fs::write(folder.path().join("generation_config.json"), text).unwrap();
        let defaults = sampling_defaults(folder.path());
        assert_eq!((defaults.temperature, defaults.top_k), (Some(0.6), Some(20)));
        assert_eq!(defaults.top_p, None);
    }
}
