//! Weights and the operations that they run on: all of a model's, or one rank's.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use pomona_device::Pool;
use pomona_kernels::{CpuOps, Ops, Placement};
use pomona_models::{Checkpoint, Division, LoadOptions, Model, Place, Ranks};

use super::Prepared;
use crate::cli::EngineArgs;
use crate::models::progress::{Progress, say};
use crate::models::weight_cache::{Entry, Finishing};

/// Loading that takes longer than this shows progress.
const PATIENCE: Duration = Duration::from_secs(1);

/// How long a rank waits for those that are packing before it.
const RANKS_PATIENCE: Duration = Duration::from_secs(600);

/// Weights in their place.
pub struct Weights {
    /// What they belong to.
    pub model: Box<dyn Model>,
    /// A smaller one that proposes tokens.
    pub draft: Option<Box<dyn Model>>,
    /// What they run on.
    pub ops: Arc<dyn Ops>,
    /// Their file, which may still be written.
    pub finishing: Finishing,
}

/// Worker threads: one for each core that the process may use, or fewer, as asked. More would only
/// wait for each other: each step is cut into equal parts, and the slowest part is what it takes.
/// The ranks of a divided model share the cores.
pub fn threads(args: &EngineArgs) -> usize {
    let cores = cores(args);
    args.threads.map_or(cores, |threads| usize::from(threads).min(cores))
}

/// Threads of all ranks of this machine, as far as there are cores for them.
pub fn threads_of_ranks(args: &EngineArgs) -> usize {
    (threads(args) * sharing(args)).min(Pool::default_threads())
}

/// Ranks of this machine.
fn sharing(args: &EngineArgs) -> usize {
    match (args.nodes.joined, args.nodes.apart()) {
        (true, _) => 1,
        (false, true) => args.parallel.data_parallel_size as usize,
        (false, false) => args.parallel.processes(),
    }
}

/// Cores for each of them. To be asked before a rank takes its own.
fn cores(args: &EngineArgs) -> usize {
    (Pool::default_threads() / sharing(args)).max(1)
}

/// Says where there are fewer threads than the user asked for, or the machine has cores.
pub(super) fn remark_on_threads(args: &EngineArgs) {
    if let Some(note) = threads_note(args.threads, cores(args), pomona_device::cpu_quota()) {
        say(&note);
    }
}

/// The CPU's operations as the flags want them, on so many threads.
pub fn cpu_ops(args: &EngineArgs, threads: usize) -> CpuOps {
    CpuOps::detect(threads).with_activation_bits(args.activation_bits)
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

impl Prepared {
    /// Puts all weights in memory.
    pub fn load_weights(&self) -> Result<Weights> {
        self.load_weights_of(None)
    }

    /// The same for one rank's part.
    pub(super) fn load_weights_of(&self, ranks: Option<Ranks>) -> Result<Weights> {
        let mut entry = self.packed_weights(ranks.as_ref())?;
        let store = std::mem::take(&mut entry.store);
        let ops = Arc::new(cpu_ops(&self.args, self.threads).with_packed(store));
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
            before += total;
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
        let (Some(mut cache), Some(whole)) = (cache, self.checkpoint.fingerprint()) else {
            return Ok(Entry::none());
        };
        // Ranks load at the same time, and each should find its file the next time.
        if self.args.parallel.processes() > 1 {
            cache.patience = RANKS_PATIENCE;
        }
        let name = &self.resolved.name;
        Ok(match ranks {
            None => cache.entry(name, &whole, self.checkpoint.weight_bytes()),
            Some(Ranks { division, place, .. }) => {
                let part = format!("{whole}{}\n", part_of(division, *place));
                cache.entry(name, &part, self.checkpoint.part_bytes(division, *place))
            }
        })
    }
}

/// Which part of a model a rank packs: differs where what it holds does.
fn part_of(division: &Division, place: Place) -> String {
    let layers = division.layers[place.stage].clone();
    let layers = division.experts.get(layers.start as usize..layers.end as usize);
    let here = |layer: &Placement| layer.here(place.tensor).collect();
    let experts: Vec<Vec<usize>> = layers.unwrap_or_default().iter().map(here).collect();
    let mut rows = division.clone();
    rows.experts.clear();
    format!("{rows:?} {place:?} {experts:?}")
}

#[cfg(test)]
mod tests {
    use pomona_models::Parallel;
    use pomona_types::{ExpertsSpec, LayerKind, ModelSpec};

    use super::*;

    #[test]
    fn packed_weights_are_those_of_a_place_and_its_experts() {
        let spec = ModelSpec {
            architecture: "mixtral".into(),
            hidden: 64,
            ffn: 64,
            experts: Some(ExpertsSpec { count: 4, per_token: 2 }),
            heads: 4,
            kv_heads: 2,
            head_dim: 16,
            vocab: 100,
            max_position: 128,
            layers: vec![LayerKind::Full],
        };
        let parallel = Parallel { tensor: 2, ..Parallel::default() };
        let plain = Division::new(&spec, parallel).unwrap();
        let copied = vec![vec![vec![0], vec![0, 1], vec![1], vec![1]]];
        let copied = plain.clone().with_experts(copied).unwrap();
        let [first, second] = [0, 1].map(|rank| parallel.place(rank));
        assert_eq!(part_of(&plain, first), part_of(&copied, first));
        assert_ne!(part_of(&plain, second), part_of(&copied, second));
        assert_ne!(part_of(&plain, first), part_of(&plain, second));
    }

    #[test]
    fn threads_of_ranks_are_those_of_all_on_this_machine() {
        let cores = Pool::default_threads();
        let check = |flags: &str, expected: usize| {
            let threads = threads_of_ranks(&EngineArgs::of(flags));
            assert_eq!(threads, expected.min(cores), "{flags}");
        };
        check("", cores);
        check("--threads 1", 1);
        check("--threads 1 --tp 2", 2);
        check("--threads 1 --tp 2 --dp 2", 4);
        check("--threads 1 --tp 2 --node-listen 0.0.0.0:1", 1);
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
