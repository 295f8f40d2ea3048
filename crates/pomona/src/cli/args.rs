//! Flags that several verbs share, under the names that vLLM gave them, and how their values are
//! read. Every refusal says what to write instead.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};

use pomona_device::DType;
use pomona_fabric::secure::Token;
use pomona_kernels::ActivationBits;
use pomona_models::{Parallel, Quantization};

use super::experts::ExpertArgs;
use super::speculative::{Drafting, SpeculativeArgs};
use crate::models::Surroundings;
use crate::models::weight_cache::WeightCache;

/// A model, as first argument or as `--model`.
#[derive(Args, Clone, Debug)]
#[group(multiple = false)]
pub struct ModelName {
    /// A catalogue name (smollm2, gemma3-270m), a GGUF file, a checkpoint folder, or
    /// org/repo[:FILE]
    #[arg(value_name = "MODEL")]
    positional: Option<String>,
    /// The same, as a flag
    #[arg(long = "model", value_name = "MODEL")]
    flag: Option<String>,
}

impl ModelName {
    /// What was given, if anything.
    pub fn get(&self) -> Option<&str> {
        self.positional.as_deref().or(self.flag.as_deref())
    }

    /// What was given.
    ///
    /// # Errors
    /// When nothing was; says how `verb` is used.
    pub fn require(&self, verb: &str) -> Result<&str> {
        self.get().with_context(|| format!("name a model, such as `pomona {verb} smollm2`"))
    }
}

/// How the engine is set up.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Engine")]
pub struct EngineArgs {
    /// Longest sequence, prompt and answer together (1k = 1000, 1K = 1024) [default: what the
    /// model declares, or what fits into memory]
    #[arg(long, value_name = "TOKENS", value_parser = parse_tokens)]
    pub max_model_len: Option<u32>,
    /// Most sequences that run at once; more wait
    #[arg(long, value_name = "N", default_value_t = 64,
          value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub max_num_seqs: u32,
    /// Most tokens in one step: larger prefills faster, smaller keeps streams even
    #[arg(long, value_name = "TOKENS", default_value = "256", value_parser = parse_tokens)]
    pub max_num_batched_tokens: u32,
    /// About how many milliseconds a step may take that reads prompts while others wait for their
    /// next token; 0 for as long as --max-num-batched-tokens take
    #[arg(long, value_name = "MS", default_value_t = 500)]
    pub step_target_ms: u32,
    /// Number type of activations
    #[arg(long, value_name = "TYPE", default_value = "auto", value_parser = parse_dtype)]
    pub dtype: Dtype,
    /// Bits of activations where they meet quantised weights: 8 read prompts faster, at the small
    /// cost in predictions that `pomona bench --quality` shows; with 8, those that meet BF16
    /// weights are bf16
    #[arg(long, value_name = "BITS", default_value = "16", value_parser = parse_activation_bits)]
    pub activation_bits: ActivationBits,
    /// Quantise weights of 16 and 32 bits while loading: int8, or int4 where memory matters more
    /// [default: as they are stored]
    #[arg(short, long, value_name = "FORMAT", value_parser = parse_quantization)]
    pub quantization: Option<Quantization>,
    /// Number type of keys and values: auto (float16), float32, float16, bfloat16, or int8: half
    /// the memory, and faster attention over long contexts, most so with --activation-bits 8
    #[arg(long, value_name = "TYPE", default_value = "auto", value_parser = parse_kv_dtype)]
    pub kv_cache_dtype: KvDtype,
    /// Memory for keys and values, such as 2GiB [default: 1,024 tokens for each of
    /// --max-num-seqs, at most a quarter of the free memory]
    #[arg(long, alias = "kv-cache-memory-bytes", value_name = "SIZE", value_parser = parse_size)]
    pub kv_cache_memory: Option<u64>,
    /// Reuse keys and values of equal prompt beginnings (on unless switched off)
    #[arg(long, overrides_with = "no_enable_prefix_caching")]
    enable_prefix_caching: bool,
    /// Compute every prompt from its start
    #[arg(long, overrides_with = "enable_prefix_caching")]
    no_enable_prefix_caching: bool,
    /// Who goes first when not all can run
    #[arg(long, value_enum, value_name = "POLICY", default_value = "fcfs")]
    pub scheduling_policy: Policy,
    /// Requests that may wait before more are refused with 429
    #[arg(long, value_name = "N", default_value_t = 1024,
          value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub max_waiting: u32,
    /// Seeds requests that bring no seed
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
    /// Worker threads [default, and at most: one for each core that the process may use]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,

    #[command(flatten)]
    pub weight_cache: WeightCacheArgs,

    #[command(flatten)]
    speculative: SpeculativeArgs,

    #[command(flatten)]
    pub parallel: ParallelArgs,

    #[command(flatten)]
    pub experts: ExpertArgs,

    #[command(flatten)]
    pub nodes: NodesArgs,
}

/// Whether ranks are on other machines.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Parallelism")]
pub struct NodesArgs {
    /// Take the other ranks from other machines, which join here by `pomona node --join` [default:
    /// they are processes of this machine]
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub node_listen: Option<String>,
    /// What nodes must know to join: 16 characters or more [default: a new one, printed]
    #[arg(long, requires = "node_listen")]
    pub token: Option<Token>,
    /// A file that has it, for others can read flags
    #[arg(long, value_name = "FILE", conflicts_with = "token", requires = "node_listen")]
    pub token_file: Option<PathBuf>,
    /// What is protected between machines: off, auth (mutual TLS for control) or seal (and all data
    /// encrypted)
    #[arg(long, value_name = "POLICY", default_value = "seal")]
    pub node_security: pomona_fabric::secure::Policy,
    /// What carries data between machines. libfabric has RDMA where the machines do; it is opened
    /// at run time, cannot be sealed, and where it is missing tcp is taken
    #[arg(long, value_name = "TRANSPORT", value_enum, default_value_t = NodeTransport::Tcp)]
    pub node_transport: NodeTransport,
    /// This is one of those machines.
    #[arg(skip)]
    pub joined: bool,
}

impl NodesArgs {
    /// What was given of a token.
    ///
    /// # Errors
    /// When it is none, or its file cannot be read.
    pub fn token(&self) -> Result<Option<Token>> {
        read_token(self.token.as_ref(), self.token_file.as_deref())
    }

    /// Whether each machine has one rank of a replica.
    pub fn apart(&self) -> bool {
        self.joined || self.node_listen.is_some()
    }
}

/// What carries data between machines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum NodeTransport {
    /// Connections of Pomona's own
    Tcp,
    /// libfabric, by the best provider that there is
    Libfabric,
}

/// Over how many ranks a model is divided: processes of this machine, or of several.
#[derive(Args, Clone, Copy, Debug, PartialEq, Eq)]
#[command(next_help_heading = "Parallelism")]
pub struct ParallelArgs {
    /// Ranks that share every layer, each with some of its heads and rows
    #[arg(long, visible_alias = "tp", value_name = "N", default_value_t = 1,
          value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub tensor_parallel_size: u32,
    /// Ranks for each of these that keep keys and values of a sequence in turn, 256 tokens each:
    /// for contexts that one rank cannot hold
    #[arg(long, visible_alias = "cp", alias = "decode-context-parallel-size", value_name = "N",
          default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub context_parallel_size: u32,
    /// Stages that have some layers each; several steps are under way at a time
    #[arg(long, visible_alias = "pp", value_name = "N", default_value_t = 1,
          value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub pipeline_parallel_size: u32,
    /// Replicas of the model; each request goes to the one that is likely to be done with it first
    #[arg(long, visible_alias = "dp", value_name = "N", default_value_t = 1,
          value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub data_parallel_size: u32,
}

impl ParallelArgs {
    /// Ranks of all replicas.
    pub fn processes(&self) -> usize {
        self.division().ranks() * self.data_parallel_size as usize
    }

    /// The same for one replica.
    pub fn division(&self) -> Parallel {
        Parallel {
            tensor: self.tensor_parallel_size,
            context: self.context_parallel_size,
            pipeline: self.pipeline_parallel_size,
        }
    }
}

/// A token, from a flag or a file.
pub fn read_token(flag: Option<&Token>, file: Option<&Path>) -> Result<Option<Token>> {
    let Some(file) = file else { return Ok(flag.cloned()) };
    let cannot = || format!("cannot use --token-file {}", file.display());
    let text = std::fs::read_to_string(file).with_context(cannot)?;
    text.trim().parse().map(Some).with_context(cannot)
}

/// Size of the weight cache unless a flag says another.
const WEIGHT_CACHE_BYTES: &str = "32GiB";

/// Where packed weights are kept between runs.
#[derive(Args, Clone, Debug)]
pub struct WeightCacheArgs {
    /// Folder where packed weights are kept, so that later starts are quick [default: weights in
    /// POMONA_HOME]
    #[arg(long, value_name = "FOLDER")]
    weight_cache: Option<PathBuf>,

    /// Most memory on disk for packed weights; the least recently used are removed
    #[arg(long, value_name = "SIZE", default_value = WEIGHT_CACHE_BYTES, value_parser = parse_size)]
    weight_cache_size: u64,

    /// Pack weights in memory at each start
    #[arg(long, conflicts_with = "weight_cache")]
    no_weight_cache: bool,
}

impl WeightCacheArgs {
    /// The cache; `None` where there shall be none.
    ///
    /// # Errors
    /// When there is no folder for it.
    pub fn cache(&self) -> Result<Option<WeightCache>> {
        if self.no_weight_cache {
            return Ok(None);
        }
        let folder = match &self.weight_cache {
            Some(folder) => folder.clone(),
            None => Surroundings::from_env()?.home.join("weights"),
        };
        let (bytes_max, patience) = (self.weight_cache_size, Duration::ZERO);
        Ok(Some(WeightCache { folder, bytes_max, patience }))
    }

    /// From now on means a folder in the one that was meant, and yields it.
    pub fn set_apart(&mut self, name: &str) -> Result<Option<WeightCache>> {
        self.weight_cache = self.cache()?.map(|cache| cache.folder.join(name));
        self.cache()
    }

    fn to_flags(&self) -> Vec<String> {
        let size = ["--weight-cache-size".to_owned(), self.weight_cache_size.to_string()];
        let folder = self.weight_cache.as_ref();
        let folder = folder.map(|f| ["--weight-cache".to_owned(), f.display().to_string()]);
        let none = self.no_weight_cache.then(|| "--no-weight-cache".to_owned());
        size.into_iter().chain(folder.into_iter().flatten()).chain(none).collect()
    }
}

impl EngineArgs {
    /// Whether equal beginnings share blocks.
    pub fn prefix_caching(&self) -> bool {
        self.enable_prefix_caching || !self.no_enable_prefix_caching
    }

    /// Where drafts come from, if they are wanted.
    pub fn drafting(&self) -> Option<Drafting> {
        self.speculative.drafting()
    }

    /// Which flags about ranks and drafts were given: they change what a model needs and how fast
    /// it is, and no number that it computes.
    pub fn ranks_and_drafts(&self) -> Vec<&'static str> {
        let parallel = &self.parallel;
        let ranks = [
            ("--tensor-parallel-size", parallel.tensor_parallel_size > 1),
            ("--context-parallel-size", parallel.context_parallel_size > 1),
            ("--pipeline-parallel-size", parallel.pipeline_parallel_size > 1),
            ("--data-parallel-size", parallel.data_parallel_size > 1),
            ("--node-listen", self.nodes.node_listen.is_some()),
        ];
        let given = ranks.into_iter().filter(|(_, given)| *given).map(|(name, _)| name);
        given.chain(self.experts.given()).chain(self.drafts()).collect()
    }

    /// Which flags about drafts were given.
    pub fn drafts(&self) -> Vec<&'static str> {
        let flags = self.speculative.to_flags().into_iter();
        flags.filter(|(_, value)| value.is_some()).map(|(name, _)| name).collect()
    }

    /// The same, but that experts are not counted where that is kept: what a measurement asks for
    /// tells nothing of what users will, and each start is to find experts where the last one did.
    pub fn measured(&self) -> EngineArgs {
        let mut engine = self.clone();
        engine.experts.expert_loads_read_only = engine.experts.expert_loads.is_some();
        engine
    }

    /// The flags that give the same settings to another server of this machine.
    pub fn to_server_flags(&self) -> Vec<String> {
        self.to_flags().into_iter().chain(self.experts.to_flags()).collect()
    }

    /// The flags that give the same settings to another rank, which is told where experts are by
    /// the first one.
    pub fn to_flags(&self) -> Vec<String> {
        let kv_dtype = match self.kv_cache_dtype.0 {
            DType::F32 => "float32",
            DType::BF16 => "bfloat16",
            DType::I8 => "int8",
            _ => "float16",
        };
        let activation_bits = match self.activation_bits {
            ActivationBits::Eight => "8",
            ActivationBits::Sixteen => "16",
        };
        let policy = match self.scheduling_policy {
            Policy::Fcfs => "fcfs",
            Policy::Priority => "priority",
            Policy::Fair => "fair",
        };
        let prefix_caching = match self.prefix_caching() {
            true => "--enable-prefix-caching",
            false => "--no-enable-prefix-caching",
        };
        let always = [
            ("--max-num-seqs", Some(self.max_num_seqs.to_string())),
            ("--max-num-batched-tokens", Some(self.max_num_batched_tokens.to_string())),
            ("--step-target-ms", Some(self.step_target_ms.to_string())),
            ("--activation-bits", Some(activation_bits.to_owned())),
            ("--kv-cache-dtype", Some(kv_dtype.to_owned())),
            ("--scheduling-policy", Some(policy.to_owned())),
            ("--max-waiting", Some(self.max_waiting.to_string())),
            ("--seed", Some(self.seed.to_string())),
            ("--tensor-parallel-size", Some(self.parallel.tensor_parallel_size.to_string())),
            ("--context-parallel-size", Some(self.parallel.context_parallel_size.to_string())),
            ("--pipeline-parallel-size", Some(self.parallel.pipeline_parallel_size.to_string())),
            ("--data-parallel-size", Some(self.parallel.data_parallel_size.to_string())),
            ("--max-model-len", self.max_model_len.map(|n| n.to_string())),
            ("--kv-cache-memory", self.kv_cache_memory.map(|n| n.to_string())),
            ("--quantization", self.quantization.map(|to| format!("{to:?}").to_lowercase())),
            ("--threads", self.threads.map(|n| n.to_string())),
        ];
        let all = always.into_iter().chain(self.speculative.to_flags());
        let given = all.filter_map(|(name, value)| Some([name.into(), value?]));
        let given = given.flatten().chain([prefix_caching.to_owned()]);
        given.chain(self.weight_cache.to_flags()).collect()
    }
}

/// Type of activations: the kernels have one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dtype;

/// Type of keys and values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvDtype(pub DType);

/// Who goes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Policy {
    /// First come, first served
    Fcfs,
    /// By each request's `priority`, lowest first
    Priority,
    /// Equal shares of tokens for each API key
    Fair,
}

fn parse_dtype(text: &str) -> std::result::Result<Dtype, String> {
    match text {
        "auto" | "float32" | "float" => Ok(Dtype),
        "half" | "float16" | "bfloat16" => {
            Err("activations are float32, weights stay as they are \
             stored: write auto or float32, and --activation-bits 8 to have activations rounded to \
             bfloat16 where they meet weights of that type"
                .to_owned())
        }
        _ => Err("write auto or float32".to_owned()),
    }
}

fn parse_activation_bits(text: &str) -> std::result::Result<ActivationBits, String> {
    match text {
        "8" => Ok(ActivationBits::Eight),
        "16" => Ok(ActivationBits::Sixteen),
        _ => Err("write 8 or 16".to_owned()),
    }
}

fn parse_quantization(text: &str) -> std::result::Result<Quantization, String> {
    match text {
        "int8" => Ok(Quantization::Int8),
        "int4" => Ok(Quantization::Int4),
        "gptq" | "awq" | "gguf" | "auto" => Err("checkpoints that are quantised say so \
             themselves: leave the flag out"
            .to_owned()),
        _ => Err("write int8 or int4".to_owned()),
    }
}

fn parse_kv_dtype(text: &str) -> std::result::Result<KvDtype, String> {
    match text {
        "auto" | "float16" | "half" => Ok(KvDtype(DType::F16)),
        "float32" | "float" => Ok(KvDtype(DType::F32)),
        "bfloat16" => Ok(KvDtype(DType::BF16)),
        "int8" | "q8_0" => Ok(KvDtype(DType::I8)),
        _ => Err("write auto, float32, float16, bfloat16, or int8 for half the memory".to_owned()),
    }
}

/// A count of tokens: `4096`, `4k` (4,000) or `4K` (4,096), as vLLM reads it.
pub fn parse_tokens(text: &str) -> std::result::Result<u32, String> {
    let (digits, unit) = match text.as_bytes().last() {
        Some(b'k') => (&text[..text.len() - 1], 1000),
        Some(b'K') => (&text[..text.len() - 1], 1024),
        _ => (text, 1),
    };
    let count = digits.replace(['_', ','], "").parse::<u32>().ok();
    match count.and_then(|count| count.checked_mul(unit)).filter(|count| *count > 0) {
        Some(count) => Ok(count),
        None => Err("write a number of tokens, such as 8192 or 8K".to_owned()),
    }
}

/// A size: bytes, or with a unit such as `512MiB`, `2GiB`, `1.5G`. Units are powers of 1,024.
pub fn parse_size(text: &str) -> std::result::Result<u64, String> {
    let bad = || "write a size such as 512MiB or 2GiB".to_owned();
    let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let unit = unit.trim().to_ascii_lowercase();
    let factor: u64 = match unit.trim_end_matches('b').trim_end_matches('i') {
        "" => 1,
        "k" => 1 << 10,
        "m" => 1 << 20,
        "g" => 1 << 30,
        "t" => 1 << 40,
        _ => return Err(bad()),
    };
    let number: f64 = number.parse().map_err(|_| bad())?;
    let bytes = number * factor as f64;
    if (1.0..1e18).contains(&bytes) { Ok(bytes as u64) } else { Err(bad()) }
}

#[cfg(test)]
impl EngineArgs {
    /// What these flags say.
    pub(crate) fn of(flags: &str) -> EngineArgs {
        #[derive(clap::Parser)]
        struct Line {
            #[command(flatten)]
            engine: EngineArgs,
        }
        let words = std::iter::once("pomona").chain(flags.split_whitespace());
        <Line as clap::Parser>::parse_from(words).engine
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_read_as_vllm_reads_them() {
        for (text, count) in [("8192", 8192), ("8k", 8000), ("8K", 8192), ("1_024", 1024)] {
            assert_eq!(parse_tokens(text), Ok(count));
        }
        for text in ["", "0", "-1", "k", "8M", "5000000K"] {
            assert!(parse_tokens(text).is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_have_binary_units() {
        for (text, bytes) in
            [("1024", 1024), ("1.5G", 3 << 29), ("512MiB", 512 << 20), ("2 gib", 2 << 30)]
        {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for text in ["", "0", "GiB", "2XB", "1e400", "-1G"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn flags_survive_the_way_to_another_process() {
        let given = "--max-model-len 4K --kv-cache-dtype bfloat16 --scheduling-policy fair \
                     --no-enable-prefix-caching --kv-cache-memory 1GiB --threads 2 --seed 3 \
                     --activation-bits 8 --tp 2 --cp 2 --pipeline-parallel-size 3 --dp 2 \
                     --weight-cache /srv/x --weight-cache-size 1GiB --quantization int4 \
                     --model-draft m.gguf --draft-max 5";
        let first = EngineArgs::of(given);
        let flags = first.to_flags();
        let again = EngineArgs::of(&flags.join(" "));
        assert_eq!(again.to_flags(), flags);
        assert_eq!(again.parallel, first.parallel);
        assert_eq!(again.parallel.division().ranks(), 12);
        assert_eq!(again.max_model_len, Some(4096));
        assert_eq!(again.activation_bits, ActivationBits::Eight);
        assert_eq!(again.drafting(), first.drafting());
        assert_eq!(again.drafting().and_then(|d| d.model), Some("m.gguf".to_owned()));
        assert_eq!(again.quantization, Some(Quantization::Int4));
        assert!(!again.prefix_caching());
    }

    #[test]
    fn flags_of_experts_go_to_servers_and_not_to_ranks() {
        let given = "--ep --num-redundant-experts 2 --expert-loads loads.json --tp 2";
        let first = EngineArgs::of(given).measured();
        assert!(first.experts.expert_loads_read_only);
        let again = |flags: Vec<String>| EngineArgs::of(&flags.join(" "));
        assert_eq!(again(first.to_server_flags()).experts, first.experts);
        assert_eq!(again(first.to_flags()).experts, ExpertArgs::default());
    }

    #[test]
    fn flags_of_ranks_and_drafts_are_told_from_others() {
        let check = |given: &str, names: &[&str]| {
            assert_eq!(EngineArgs::of(given).ranks_and_drafts(), names, "{given}");
        };
        check("--threads 2 --activation-bits 8 --quantization int8 --tp 1", &[]);
        check("--tp 2 --pp 2", &["--tensor-parallel-size", "--pipeline-parallel-size"]);
        check("--cp 2 --dp 2", &["--context-parallel-size", "--data-parallel-size"]);
        check("--node-listen 0.0.0.0:1 --ep", &["--node-listen", "--enable-expert-parallel"]);
        check("--model-draft m --draft-max 4", &["--model-draft", "--draft-max"]);
    }

    #[test]
    fn unsupported_types_say_what_is_supported() {
        assert!(parse_dtype("bfloat16").unwrap_err().contains("auto or float32"));
        assert!(parse_quantization("awq").unwrap_err().contains("leave the flag out"));
        assert!(parse_quantization("fp8").unwrap_err().contains("int8 or int4"));
        assert!(parse_kv_dtype("fp8").unwrap_err().contains("float16"));
        assert_eq!(parse_kv_dtype("auto"), Ok(KvDtype(DType::F16)));
    }
}
