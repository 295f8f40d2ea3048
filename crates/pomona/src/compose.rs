//! Putting the crates together: a name becomes a checkpoint, a checkpoint finds room in memory,
//! and with operations, an engine and a tokenizer it becomes a replica. Decides nothing that a
//! crate below could decide.

mod follow;

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use pomona_device::{DType, Pool};
use pomona_engine::{Engine, EngineConfig, Others, Seat, draft_block_bytes, kv_block_bytes};
use pomona_gateway::{SamplingDefaults, ServedModel};
use pomona_kernels::{CpuOps, Ops};
use pomona_models::{Checkpoint, Division, LoadOptions, Model, Ranks};
use pomona_scheduler::batch::Ordering;
use pomona_text::{ChatTemplate, Tokenizer};
use pomona_types::{Micros, ModelSpec};

use crate::bench::report::Facts;
use crate::cli::{EngineArgs, Policy};
use crate::crew::Crew;
use crate::memory::{self, Fit, Needs, Wishes};
use crate::models::progress::{Progress, human_bytes, say};
use crate::models::weight_cache::{Entry, Finishing};
use crate::models::{Resolved, Surroundings, catalogue, resolve};
use follow::Setup;

pub use follow::follow;

/// Memory that a system has which does not say how much.
const MEMORY_ASSUMED: u64 = 8 << 30;

/// Loading that takes longer than this shows progress.
const PATIENCE: Duration = Duration::from_secs(1);

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

/// Worker threads: one for each core that the process may use, or fewer, as asked. More would only
/// wait for each other: each step is cut into equal parts, and the slowest part is what it takes.
/// The ranks of a divided model share the cores.
pub fn threads(args: &EngineArgs) -> usize {
    let cores = (Pool::default_threads() / args.parallel.division().ranks()).max(1);
    args.threads.map_or(cores, |threads| usize::from(threads).min(cores))
}

/// The CPU's operations as the flags want them.
pub fn cpu_ops(args: &EngineArgs) -> CpuOps {
    CpuOps::detect(threads(args)).with_activation_bits(args.activation_bits)
}

/// What to say where there are fewer threads than the user asked for, or the machine has cores.
fn threads_note(asked: Option<u16>, cores: usize, quota: Option<f64>) -> Option<String> {
    let quota = quota.filter(|quota| *quota <= cores as f64);
    let quota = quota.map(|quota| format!("the cgroup's CPU quota is {quota:.1} cores"));
    match asked {
        None => quota.map(|quota| format!("{quota}: threads are cut to {cores}")),
        Some(asked) if usize::from(asked) > cores => Some(format!(
            "--threads {asked} is cut to {cores}: {}, and more threads would wait for each other",
            quota.unwrap_or_else(|| format!("the process may use {cores} cores"))
        )),
        Some(_) => None,
    }
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
    /// Its files.
    pub resolved: Resolved,
    /// What is in them.
    pub checkpoint: Checkpoint,
    /// The room.
    pub fit: Fit,
    draft: Option<Checkpoint>,
    args: EngineArgs,
}

/// Opens a model and finds room for it, before anything large is touched.
pub fn prepare(name: &str, args: &EngineArgs) -> Result<Prepared> {
    let (resolved, checkpoint) = open_to_load(name, args)?;
    let draft = open_draft(args)?;
    let wishes = wishes(&checkpoint, draft.as_ref(), args)?;
    let fit = memory::fit(checkpoint.spec(), &wishes)?;
    let division = Division::new(checkpoint.spec(), args.parallel.division())?;
    let (name, args) = (name.to_owned(), args.clone());
    Ok(Prepared { name, division, resolved, checkpoint, fit, draft, args })
}

/// What flags and machine say about memory.
///
/// # Errors
/// When the draft model does not belong to the model.
pub fn wishes(
    checkpoint: &Checkpoint,
    draft: Option<&Checkpoint>,
    args: &EngineArgs,
) -> Result<Wishes> {
    let division = Division::new(checkpoint.spec(), args.parallel.division())?;
    let ranks = 0..division.parallel.ranks();
    let ranks: Needs = ranks.map(|rank| rank_needs(checkpoint, &division, rank, args)).sum();
    let draft = draft.map_or(Ok(Needs::default()), |draft| draft_needs(checkpoint, draft, args))?;
    Ok(Wishes {
        needs: ranks + draft,
        available_bytes: pomona_device::available_memory().unwrap_or(MEMORY_ASSUMED),
        max_model_len: args.max_model_len,
        max_num_seqs: args.max_num_seqs,
        max_num_batched_tokens: args.max_num_batched_tokens,
        kv_bytes: args.kv_cache_memory,
    })
}

/// What one rank of a model needs.
pub fn rank_needs(
    checkpoint: &Checkpoint,
    division: &Division,
    rank: usize,
    args: &EngineArgs,
) -> Needs {
    let (spec, place) = (checkpoint.spec(), division.parallel.place(rank));
    let part = division.part(spec, place);
    Needs::program()
        + Needs {
            weight_bytes: checkpoint.part_bytes(division, place),
            block_bytes: kv_block_bytes(spec, &part, args.kv_cache_dtype.0),
            scratch_bytes: memory::scratch_bytes(spec, &part.spec, args.max_num_batched_tokens),
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
    /// Running.
    pub engine: Engine,
    /// The model's.
    pub tokenizer: Arc<Tokenizer>,
    /// The model's, or the one that was given; `None` for a base model.
    pub template: Option<Arc<ChatTemplate>>,
    defaults: SamplingDefaults,
    /// Packed weights are still on their way to the disk, perhaps.
    _finishing: Finishing,
    /// The other ranks. Behind the engine, which tells them that it is over.
    _crew: Option<Crew>,
}

/// Weights in their place.
pub struct Weights {
    /// What they belong to.
    pub model: Box<dyn Model>,
    /// A smaller one that proposes tokens.
    draft: Option<Box<dyn Model>>,
    /// What they run on.
    pub ops: Arc<dyn Ops>,
    /// Their file, which may still be written.
    pub finishing: Finishing,
}

impl Loaded {
    /// The same for the gateway, under these names.
    pub fn served(&self, names: Vec<String>) -> ServedModel {
        ServedModel {
            names,
            replica: self.engine.replica(),
            tokenizer: self.tokenizer.clone(),
            template: self.template.clone(),
            defaults: self.defaults.clone(),
        }
    }
}

impl Prepared {
    /// Loads weights and tokenizer side by side and starts the engine. The other ranks of a divided
    /// model are started first, and load at the same time.
    pub fn load(self) -> Result<Loaded> {
        self.load_with_template(None)
    }

    /// The same, with a chat template in place of the model's.
    pub fn load_with_template(self, template: Option<&str>) -> Result<Loaded> {
        let crew = match self.division.parallel.ranks() {
            1 => None,
            _ => Some(Crew::start(&self.name, &self.args)?),
        };
        let seat = crew.as_ref().map(|crew| Seat::take(crew.link(), &self.division)).transpose()?;
        let (world, ranks) = seat.map(|seat| (seat.world, seat.ranks)).unzip();
        if let Some(world) = &world {
            Setup::of(&self)?.send(world.as_ref())?;
        }
        let (tokenizer, weights) = std::thread::scope(|scope| {
            let tokenizer = scope.spawn(|| self.tokenizer());
            let weights = self.load_weights_of(ranks);
            (tokenizer.join().unwrap_or_else(|_| Err(anyhow!("the tokenizer failed"))), weights)
        });
        let (tokenizer, Weights { model, draft, ops, finishing }) = (tokenizer?, weights?);
        let text = |id: Option<u32>| id.map(|id| tokenizer.token_text(id));
        let (bos, eos) = (text(tokenizer.bos()), text(tokenizer.eos()));
        let template = template
            .or(self.checkpoint.chat_template())
            .map(|source| ChatTemplate::new(source, bos.as_deref(), eos.as_deref()))
            .transpose()
            .context("cannot use the chat template; --chat-template FILE takes another")?;
        let mut ends: Vec<u32> = self.checkpoint.eos_token_ids().to_vec();
        ends.extend(tokenizer.end_ids());
        ends.sort_unstable();
        ends.dedup();
        let kv = human_bytes(self.fit.kv_bytes);
        if let Some(world) = &world {
            world.barrier().context("not all ranks have loaded their part of the model")?;
        }
        let stages = self.division.parallel.pipeline as usize;
        let others = world.map(|world| Others::new(world, stages));
        let engine = Engine::lead(self.engine_config(ends), model, draft, ops, others)
            .with_context(|| {
                format!(
                    "cannot start with {kv} of keys and values: if memory is short, choose less \
                 --kv-cache-memory or a smaller --max-model-len, or stop other programs"
                )
            })?;
        let template = template.map(Arc::new);
        let defaults = match catalogue::find(&self.resolved.name)? {
            Some(entry) => SamplingDefaults {
                temperature: entry.sampling.temperature,
                top_p: entry.sampling.top_p,
                ..SamplingDefaults::default()
            },
            None => sampling_defaults(&self.resolved.path),
        };
        let tokenizer = Arc::new(tokenizer);
        Ok(Loaded { engine, tokenizer, template, defaults, _finishing: finishing, _crew: crew })
    }

    fn engine_config(&self, eos_token_ids: Vec<u32>) -> EngineConfig {
        EngineConfig {
            name: self.resolved.name.as_str().into(),
            max_model_len: self.fit.max_model_len,
            max_num_seqs: self.args.max_num_seqs,
            max_num_batched_tokens: self.args.max_num_batched_tokens,
            kv_dtype: self.args.kv_cache_dtype.0,
            kv_blocks: self.fit.kv_blocks,
            prefix_caching: self.args.prefix_caching(),
            ordering: match self.args.scheduling_policy {
                Policy::Fcfs => Ordering::Fcfs,
                Policy::Priority => Ordering::Priority,
                Policy::Fair => Ordering::Fair,
            },
            max_waiting: self.args.max_waiting,
            step_target: match self.args.step_target_ms {
                0 => None,
                ms => Some(Micros(1000 * u64::from(ms))),
            },
            eos_token_ids,
            seed: self.args.seed,
            speculation: self.args.drafting().map(|mut drafting| {
                // Making a draft is reading the draft model's weights.
                let bytes = self.draft.as_ref().map_or(0, Checkpoint::weight_bytes);
                let share = bytes as f32 / self.checkpoint.weight_bytes().max(1) as f32;
                drafting.speculation.draft_cost = share;
                drafting.speculation
            }),
        }
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

    /// Puts all weights in memory.
    pub fn load_weights(&self) -> Result<Weights> {
        self.load_weights_of(None)
    }

    /// The same for one rank's part.
    fn load_weights_of(&self, ranks: Option<Ranks>) -> Result<Weights> {
        let mut entry = self.packed_weights(ranks.as_ref())?;
        let store = std::mem::take(&mut entry.store);
        let (cores, quota) = (Pool::default_threads(), pomona_device::cpu_quota());
        if let Some(note) = threads_note(self.args.threads, cores, quota) {
            say(&note);
        }
        let ops = Arc::new(cpu_ops(&self.args).with_packed(store));
        let begun = Instant::now();
        let mut progress: Option<Progress> = None;
        let mut before = 0;
        let options = LoadOptions {
            max_tokens: self.args.max_num_batched_tokens as usize,
            max_outputs: self.args.max_num_batched_tokens as usize,
        };
        let total = match &ranks {
            Some(ranks) => self.checkpoint.part_bytes(&self.division, ranks.place),
            None => self.fit.weight_bytes,
        };
        let mut load = |checkpoint: &Checkpoint, ranks| -> Result<Box<dyn Model>> {
            let mut show = |done: u64| {
                if begun.elapsed() >= PATIENCE {
                    progress.get_or_insert_with(|| Progress::new("loading", Some(total)));
                }
                if let Some(progress) = &mut progress {
                    progress.set(before + done);
                }
            };
            let model = match ranks {
                Some(ranks) => checkpoint.load_part(ops.as_ref(), &options, ranks, &mut show),
                None => checkpoint.load(ops.as_ref(), &options, &mut show),
            };
            before += checkpoint.weight_bytes();
            model.with_context(|| format!("cannot load {}", checkpoint.name()))
        };
        let model = load(&self.checkpoint, ranks)?;
        // The cache is the model's: a draft model, whose tensors have the same names, is packed in
        // memory.
        let finishing = entry.finish(ops.take_packed());
        let draft = self.draft.as_ref().map(|draft| load(draft, None)).transpose()?;
        Ok(Weights { model, draft, ops, finishing })
    }

    /// What the cache of packed weights has for this model.
    fn packed_weights(&self, ranks: Option<&Ranks>) -> Result<Entry> {
        let cache = self.args.weight_cache.cache()?;
        let (Some(cache), Some(whole)) = (cache, self.checkpoint.fingerprint()) else {
            return Ok(Entry::none());
        };
        let name = &self.resolved.name;
        Ok(match ranks {
            None => cache.entry(name, &whole, self.checkpoint.weight_bytes()),
            Some(Ranks { division, place, .. }) => {
                let part = format!("{whole}{:?} {place:?}\n", division.parallel);
                cache.entry(name, &part, self.checkpoint.part_bytes(division, *place))
            }
        })
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
        let (mut weights, mut table_bytes, mut has_output) = (0u64, 0u64, false);
        for tensor in self.checkpoint.tensors() {
            weights += tensor.shape.iter().map(|n| *n as u64).product::<u64>();
            let name = tensor.name.as_str();
            if name.contains("embed_tokens.weight") || name == "token_embd.weight" {
                table_bytes = tensor.bytes;
            }
            has_output |= matches!(name, "lm_head.weight" | "output.weight");
        }
        // A tied table is read as the output matrix; an untied one only a row at a time.
        let tables = if has_output { 2 } else { 1 };
        let weight_bytes = self.checkpoint.weight_bytes();
        Facts {
            name: self.resolved.name.clone(),
            architecture: spec.architecture.clone(),
            weight_bytes,
            step_bytes: weight_bytes - if has_output { table_bytes } else { 0 },
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
    fn recommendations_are_taken_where_they_make_sense() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(sampling_defaults(folder.path()), SamplingDefaults::default());
        let text = r#"{"temperature": 0.6, "top_k": 20, "top_p": 7, "do_sample": true}"#;
        std::fs::write(folder.path().join("generation_config.json"), text).unwrap();
        let defaults = sampling_defaults(folder.path());
        assert_eq!((defaults.temperature, defaults.top_k), (Some(0.6), Some(20)));
        assert_eq!(defaults.top_p, None);
    }

    #[test]
    fn threads_beyond_the_cores_or_the_quota_are_remarked_upon() {
        assert_eq!(threads_note(None, 2, None), None);
        assert_eq!(threads_note(None, 2, Some(2.5)), None);
        assert_eq!(threads_note(Some(2), 2, Some(1.5)), None);
        assert!(threads_note(None, 1, Some(0.5)).unwrap().contains("0.5 cores"));
        assert!(threads_note(Some(3), 2, Some(1.5)).unwrap().contains("quota is 1.5 cores"));
        assert!(threads_note(Some(3), 2, None).unwrap().contains("may use 2 cores"));
    }
}
