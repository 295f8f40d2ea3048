//! A checkpoint on disk: opened and understood without reading its weights.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use pomona_device::{SharedBytes, map_file};
use pomona_kernels::{Ops, WeightSource};
use pomona_text::{GgufVocab, TokenizerSource};
use pomona_types::{ExpertsSpec, ModelSpec, TokenId};
use serde_json::Value as Json;

use crate::arch::{self, Blueprint};
use crate::layers::Decoder;
use crate::weights::gguf::{self, Gguf, Value};
use crate::weights::int4::Scheme;
use crate::weights::{Dialect, Name, Quantization, Role, Tensor, Tensors, safetensors};
use crate::{Division, Groups, Model, ModelError, Parallel, Place, Ranks, invalid};

/// Largest JSON file of a folder that is read; tokenizers reach 40 MB.
const JSON_BYTES_MAX: u64 = 256 << 20;
/// Tokens that end a turn in the chat formats of the supported models.
const END_TOKENS: [&str; 7] = [
    "<|im_end|>",
    "<|eot_id|>",
    "<|end_of_text|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|eom_id|>",
    "</s>",
];

/// A tensor's facts.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorInfo {
    /// Its name in the file.
    pub name: String,
    /// How it is stored.
    pub format: String,
    /// Outermost axis first.
    pub shape: Vec<usize>,
    /// Its size in the file.
    pub bytes: u64,
    /// Whether it belongs to experts, of which a token meets some only.
    pub of_experts: bool,
}

impl TensorInfo {
    /// How many numbers it has.
    pub fn weights(&self) -> u64 {
        self.shape.iter().map(|n| *n as u64).product()
    }
}

/// How much a loaded model is made for.
#[derive(Clone, Copy, Debug)]
pub struct LoadOptions {
    /// Most tokens in a step.
    pub max_tokens: usize,
    /// Most rows of a step whose logits are wanted.
    pub max_outputs: usize,
}

/// An opened checkpoint.
pub struct Checkpoint {
    name: String,
    blueprint: Blueprint,
    tensors: Tensors,
    infos: Vec<TensorInfo>,
    tokenizer: TokenizerSource,
    chat_template: Option<String>,
    eos_token_ids: Vec<TokenId>,
}

impl Checkpoint {
    /// Opens a GGUF file (or the first of a split set) or a Hugging Face folder.
    ///
    /// # Errors
    /// When it is neither, is damaged, or needs something that is not implemented; says what.
    pub fn open(path: &Path) -> Result<Checkpoint, ModelError> {
        let opened = if path.is_dir() { open_folder(path) } else { open_gguf(path) };
        opened.map_err(|error| match error {
            ModelError::Invalid(why) => invalid!("cannot open {}: {why}", path.display()),
            other => other,
        })
    }

    /// The model's own name, or the file's.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its sizes.
    pub fn spec(&self) -> &ModelSpec {
        &self.blueprint.spec
    }

    /// What it consists of.
    pub fn blueprint(&self) -> &Blueprint {
        &self.blueprint
    }

    /// Its vocabulary.
    pub fn tokenizer(&self) -> &TokenizerSource {
        &self.tokenizer
    }

    /// Its chat template, in Jinja; base models have none.
    pub fn chat_template(&self) -> Option<&str> {
        self.chat_template.as_deref()
    }

    /// Tokens that end a sequence, as far as the files say.
    pub fn eos_token_ids(&self) -> &[TokenId] {
        &self.eos_token_ids
    }

    /// All tensors, by name.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.infos
    }

    /// The matrices of a tensor whose format operations take: one, or several where it is of
    /// experts; of vectors and everything else, none.
    pub fn matrices(&self, name: &str) -> Vec<WeightSource> {
        self.tensors.sources(name)
    }

    /// Bytes of all tensors.
    pub fn weight_bytes(&self) -> u64 {
        self.infos.iter().map(|t| t.bytes).sum()
    }

    /// Bytes of all tensors but those experts that a token does not meet.
    pub fn active_bytes(&self) -> u64 {
        self.active(|tensor| tensor.bytes)
    }

    /// A sum over tensors, of experts as far as a token meets them.
    pub fn active(&self, of: impl Fn(&TensorInfo) -> u64) -> u64 {
        let (mut everywhere, mut in_experts) = (0, 0);
        for tensor in &self.infos {
            *(if tensor.of_experts { &mut in_experts } else { &mut everywhere }) += of(tensor);
        }
        let share = |experts: ExpertsSpec| {
            in_experts / u64::from(experts.count) * u64::from(experts.per_token)
        };
        everywhere + self.spec().experts.map_or(0, share)
    }

    /// Bytes of the tensors that one rank of a divided model has, in whole or in part.
    pub fn part_bytes(&self, division: &Division, place: Place) -> u64 {
        let layers = division.layers[place.stage].clone();
        let roles = |layer| Role::ALL.map(|role| Name::Layer(layer, role));
        let first = [Name::Embedding, Name::Output];
        let vocabulary = first.into_iter().filter(|_| place.stage == 0);
        let names = layers.clone().flat_map(roles).chain(vocabulary);
        let bytes = |name: Name| {
            let (text, tensor) = self.tensors.find(name)?;
            let rows = division.rows(self.spec(), place.tensor, name);
            Some((text, tensor.bytes as u64 * rows.own.len() as u64 / u64::from(rows.all)))
        };
        let mut of_experts: BTreeMap<u32, u64> = BTreeMap::new();
        for tensor in self.infos.iter().filter(|tensor| tensor.of_experts) {
            if let Some(layer) = self.tensors.dialect.layer_of(&tensor.name) {
                *of_experts.entry(layer).or_default() += tensor.bytes;
            }
        }
        let own = |layer: u32| {
            let placement = division.experts.get(layer as usize)?;
            let own = placement.here(place.tensor).count() as u64;
            Some(of_experts.get(&layer)? * own / placement.experts() as u64)
        };
        let experts: u64 = layers.filter_map(own).sum();
        // By name: two roles may mean one tensor.
        let shared: BTreeMap<String, u64> = names.filter_map(bytes).collect();
        shared.values().sum::<u64>() + experts
    }

    /// A text that differs where the weights do, had without reading them: what the file system
    /// knows of the files, and what each tensor is and where. `None` if it knows nothing.
    pub fn fingerprint(&self) -> Option<String> {
        let line = |(name, tensor): (&String, &Tensor)| {
            let Tensor { format, shape, content, .. } = tensor;
            Some(format!("{} {format:?} {shape:?} {name}\n", content.identity()?))
        };
        self.tensors.by_name.iter().map(line).collect()
    }

    /// Hands out what differs where the weights do, in whatever files they are: each tensor's name,
    /// format and shape, and some of its rows.
    ///
    /// # Errors
    /// When rows are missing.
    pub fn sample(&self, take: &mut dyn FnMut(&[u8])) -> Result<(), ModelError> {
        let mut room = Vec::new();
        for (name, tensor) in &self.tensors.by_name {
            let Tensor { format, shape, content, .. } = tensor;
            take(format!("{name} {format:?} {shape:?}\n").as_bytes());
            let rows: usize = shape[..shape.len().saturating_sub(1)].iter().product();
            for row in [0, rows / 2, rows.saturating_sub(1)] {
                let row = content.rows(row..row + 1, &mut room);
                take(row.ok_or_else(|| invalid!("tensor {name} is not all there"))?);
            }
        }
        Ok(())
    }

    /// Has matrices of plain numbers quantised while they are loaded; sizes are then those of the
    /// result. Returns how many matrices of which format stay as they are: quantised already, or
    /// of rows that are not whole groups.
    pub fn quantise(&mut self, to: Quantization) -> BTreeMap<String, usize> {
        let others = self.tensors.quantise(to);
        self.infos = self.tensors.infos();
        others
    }

    /// Puts the weights where `ops` wants them and allocates memory for steps. `progress` is told
    /// the bytes dealt with so far.
    ///
    /// # Errors
    /// When tensors are missing, misshapen or of an unsupported format, or memory is short.
    pub fn load(
        &self,
        ops: &dyn Ops,
        options: &LoadOptions,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Box<dyn Model>, ModelError> {
        let division = Division::new(self.spec(), Parallel::default())?;
        let place = Parallel::default().place(0);
        let ranks = Ranks { division, place, groups: Groups::default() };
        self.load_part(ops, options, ranks, progress)
    }

    /// The same for one rank of several: reads its own rows only.
    ///
    /// # Errors
    /// As [`Checkpoint::load`].
    pub fn load_part(
        &self,
        ops: &dyn Ops,
        options: &LoadOptions,
        ranks: Ranks,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Box<dyn Model>, ModelError> {
        let blueprint = self.blueprint.clone();
        let decoder = Decoder::load(blueprint, &self.tensors, ops, options, ranks, progress)?;
        Ok(Box::new(decoder))
    }
}

/// Reads a whole small file.
pub(crate) fn read(path: &Path) -> Result<Vec<u8>, ModelError> {
    let io = |source| ModelError::Io { path: path.display().to_string(), source };
    let bytes = fs::metadata(path).map_err(io)?.len();
    if bytes > JSON_BYTES_MAX {
        return Err(invalid!("{} has {bytes} bytes, too many for its kind", path.display()));
    }
    fs::read(path).map_err(io)
}

fn read_json(path: &Path) -> Result<Json, ModelError> {
    serde_json::from_slice(&read(path)?).map_err(|e| invalid!("{}: {e}", path.display()))
}

fn optional_json(path: &Path) -> Result<Option<Json>, ModelError> {
    if path.exists() { read_json(path).map(Some) } else { Ok(None) }
}

fn open_folder(folder: &Path) -> Result<Checkpoint, ModelError> {
    let config = folder.join("config.json");
    if !config.exists() {
        return Err(invalid!("the folder has no config.json: it is not a Hugging Face model"));
    }
    let config = read_json(&config)?;
    let blueprint = arch::from_hugging_face(&config)?;
    let dialect = Dialect::HuggingFace { sandwich: blueprint.sandwich };
    let by_name = safetensors::open(folder, Scheme::of(&config)?)?;
    let tensors = Tensors { by_name, dialect };
    let tokenizer_config = optional_json(&folder.join("tokenizer_config.json"))?;
    let generation = optional_json(&folder.join("generation_config.json"))?;
    let template_file = folder.join("chat_template.jinja");
    let chat_template = if template_file.exists() {
        Some(String::from_utf8_lossy(&read(&template_file)?).into_owned())
    } else {
        tokenizer_config.as_ref().and_then(template_of)
    };
    let mut ends = BTreeSet::new();
    for source in [Some(&config), generation.as_ref()].into_iter().flatten() {
        let value = source.get("eos_token_id");
        let list =
            value.and_then(|v| v.as_array().map(Vec::as_slice).or(Some(std::slice::from_ref(v))));
        ends.extend(list.unwrap_or_default().iter().filter_map(|v| v.as_u64()));
    }
    let name = folder.file_name().map(|n| n.to_string_lossy().into_owned());
    let tokenizer_json = folder.join("tokenizer.json");
    Ok(Checkpoint {
        name: name.unwrap_or_default(),
        infos: tensors.infos(),
        tensors,
        tokenizer: TokenizerSource::Json {
            tokenizer_json: if tokenizer_json.exists() { read(&tokenizer_json)? } else { vec![] },
            config: tokenizer_config,
        },
        chat_template,
        eos_token_ids: known_tokens(ends, blueprint.spec.vocab),
        blueprint,
    })
}

/// A template in `tokenizer_config.json`: a string, or the one called `default` of a list.
fn template_of(config: &Json) -> Option<String> {
    let template = config.get("chat_template")?;
    let named = template.as_array().and_then(|list| {
        let default = |t: &&Json| t.get("name").and_then(Json::as_str) == Some("default");
        list.iter().find(default)?.get("template")
    });
    named.unwrap_or(template).as_str().map(str::to_owned)
}

fn known_tokens(ids: BTreeSet<u64>, vocab: u32) -> Vec<TokenId> {
    ids.into_iter().filter(|id| *id < u64::from(vocab)).map(|id| id as TokenId).collect()
}

fn open_gguf(path: &Path) -> Result<Checkpoint, ModelError> {
    let (mut gguf, file) = map_gguf(path)?;
    let blueprint = arch::from_gguf(&gguf)?;
    let mut by_name = BTreeMap::new();
    let mut collect = |gguf: &Gguf, file: &SharedBytes| {
        for (name, entry) in &gguf.tensors {
            let range = entry.offset..entry.offset + entry.bytes;
            let (format, shape) = (entry.format.clone(), entry.shape.clone());
            let tensor = Tensor::stored(format, shape, file.clone(), range);
            by_name.insert(name.clone(), tensor);
        }
    };
    collect(&gguf, &file);
    for part in further_parts(path, &gguf)? {
        let (gguf, file) = map_gguf(&part)?;
        collect(&gguf, &file);
    }
    let tensors = Tensors { by_name, dialect: Dialect::Gguf };
    let stem = path.file_stem().map(|n| n.to_string_lossy().into_owned());
    let vocab = gguf_vocab(&mut gguf)?;
    let text = |key: &str| gguf.metadata.get(key).and_then(Value::as_str).map(str::to_owned);
    let mut ends = BTreeSet::new();
    ends.extend([vocab.eos, vocab.eot].into_iter().flatten().map(u64::from));
    for (id, token) in (0u64..).zip(&vocab.tokens) {
        // Only control tokens end a turn; the same text may be an ordinary piece elsewhere.
        let control = vocab.token_types.as_ref().and_then(|t| t.get(id as usize)) == Some(&3);
        if control && END_TOKENS.contains(&token.as_str()) {
            ends.insert(id);
        }
    }
    Ok(Checkpoint {
        name: text("general.name").or(stem).unwrap_or_default(),
        infos: tensors.infos(),
        tensors,
        tokenizer: TokenizerSource::Gguf(vocab),
        chat_template: text("tokenizer.chat_template"),
        eos_token_ids: known_tokens(ends, blueprint.spec.vocab),
        blueprint,
    })
}

fn map_gguf(path: &Path) -> Result<(Gguf, SharedBytes), ModelError> {
    let io = |source| ModelError::Io { path: path.display().to_string(), source };
    let file = map_file(path).map_err(io)?;
    Ok((gguf::parse((*file).as_ref())?, file))
}

/// The other files of a split set, `NAME-00001-of-0000N.gguf`.
fn further_parts(path: &Path, gguf: &Gguf) -> Result<Vec<PathBuf>, ModelError> {
    let count = gguf.metadata.get("split.count").and_then(Value::as_u64).unwrap_or(1);
    if count <= 1 {
        return Ok(Vec::new());
    }
    let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    let first = format!("-00001-of-{count:05}.gguf");
    let stem = name.strip_suffix(&first).filter(|_| count < 100_000).ok_or_else(|| {
        invalid!("this is one of {count} files: give the one that ends in {first}")
    })?;
    let part = |i| path.with_file_name(format!("{stem}-{i:05}-of-{count:05}.gguf"));
    Ok((2..=count).map(part).collect())
}

/// Takes the vocabulary out of the metadata: it is nearly all of it.
fn gguf_vocab(gguf: &mut Gguf) -> Result<GgufVocab, ModelError> {
    let mut take = |key: &str| gguf.metadata.remove(&format!("tokenizer.ggml.{key}"));
    let tokens = take("tokens").and_then(Value::into_strings);
    let scores = take("scores").and_then(Value::into_numbers);
    let token_types = take("token_type").and_then(Value::into_numbers);
    let merges = take("merges").and_then(Value::into_strings);
    let get = |key: &str| gguf.metadata.get(&format!("tokenizer.ggml.{key}"));
    let id = |key: &str| get(key).and_then(Value::as_u64).and_then(|v| TokenId::try_from(v).ok());
    let flag = |key: &str| get(key).and_then(Value::as_bool);
    Ok(GgufVocab {
        model: get("model").and_then(Value::as_str).unwrap_or_default().to_owned(),
        pre: get("pre").and_then(Value::as_str).map(str::to_owned),
        tokens: tokens.ok_or_else(|| invalid!("the file has no tokenizer.ggml.tokens"))?,
        scores: scores.map(|list| list.into_iter().map(|v| v as f32).collect()),
        token_types: token_types.map(|list| list.into_iter().map(|v| v as i32).collect()),
        merges,
        bos: id("bos_token_id"),
        eos: id("eos_token_id"),
        unk: id("unknown_token_id"),
        pad: id("padding_token_id"),
        eot: id("eot_token_id"),
        add_bos: flag("add_bos_token"),
        add_eos: flag("add_eos_token"),
        add_space_prefix: flag("add_space_prefix"),
    })
}
