//! How well a model predicts a text, and how far its predictions lie from another's: from that of
//! the unquantised model, say. Goes below the engine, to all logits of each position.

use std::ops::Range;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use pomona_device::{DType, Device, View};
use pomona_engine::kv_cache;
use pomona_kernels::{Batch, Ops, Span};
use pomona_models::{KvCache, Model};
use pomona_types::{BLOCK_TOKENS, TokenId};
use serde::Serialize;

use super::stats::Likelihood;
use crate::compose::{Prepared, Weights};
use crate::models::progress::say;
use crate::models::weight_cache::Finishing;

/// What is read when no text is given: from chapter XVII, on the Galapagos, of Charles Darwin's
/// "The Voyage of the Beagle" (second edition, 1845; Project Gutenberg's book 944). In the public
/// domain.
pub const TEXT: &str = include_str!("galapagos.txt");
/// Tokens of a chunk, of which the second half counts, as in `pomona perplexity`.
pub const CONTEXT: u32 = 512;

/// What a text showed.
#[derive(Clone, Debug, Serialize)]
pub struct Quality {
    /// The text's file, or the built-in text.
    pub text: String,
    /// Tokens of a chunk.
    pub context: u32,
    /// Tokens that counted.
    pub tokens: u64,
    /// Of the model as it is served.
    pub perplexity: f64,
    /// Of the perplexity.
    pub standard_error: f64,
    /// Where there is a model to compare with.
    pub reference: Option<Comparison>,
}

/// Another model's predictions at the same positions.
#[derive(Clone, Debug, Serialize)]
pub struct Comparison {
    /// Its name.
    pub model: String,
    /// Its perplexity.
    pub perplexity: f64,
    /// Mean Kullback-Leibler divergence of the served model's distributions from its own, in nats.
    pub kl_mean: f64,
    /// The largest.
    pub kl_max: f64,
    /// Share of positions with the same likeliest token.
    pub top1_agreement: f64,
}

/// Reads `text` with a model and, if there is one, with a reference of the same vocabulary.
pub fn measure(
    (name, text): (&str, &str),
    model: &Prepared,
    reference: Option<&Prepared>,
) -> Result<Quality> {
    let spec = model.checkpoint.spec();
    if let Some(other) = reference.map(|reference| reference.checkpoint.spec())
        && other.vocab != spec.vocab
    {
        bail!(
            "the models have vocabularies of {} and {} tokens: choose a reference with the same",
            spec.vocab,
            other.vocab
        );
    }
    let longest = reference.map_or(u32::MAX, |r| r.checkpoint.spec().max_position);
    let context = CONTEXT.min(spec.max_position).min(longest) as usize;
    let tokenizer = crate::compose::tokenizer(&model.checkpoint)?;
    let tokens = tokenizer.encode(text, true)?;
    let chunks = tokens.len() / context;
    if chunks == 0 {
        bail!("{name} has {} tokens, fewer than {context}: give a longer text", tokens.len());
    }
    if let Some(strange) = tokens.iter().find(|token| **token >= spec.vocab) {
        bail!("token {strange} is beyond the model's vocabulary: its tokenizer is another model's");
    }
    let first = tokenizer.prefix().first().copied();
    let mut reader = Reader::new(model, context)?;
    let mut other = reference.map(|reference| Reader::new(reference, context)).transpose()?;
    let (mut served, mut theirs) = (Likelihood::default(), Likelihood::default());
    let (mut kl_sum, mut kl_max, mut agree) = (0.0, 0.0f64, 0u64);
    for (index, chunk) in tokens.chunks_exact(context).enumerate() {
        let mut chunk = chunk.to_vec();
        chunk[0] = first.unwrap_or(chunk[0]);
        reader.read(&chunk)?;
        other.iter_mut().try_for_each(|other| other.read(&chunk))?;
        // Position `p` predicts token `p + 1`.
        for at in context / 2..context - 1 {
            let next = chunk[at + 1] as usize;
            let ours = Distribution::of(reader.logits(at)?);
            served.add(-ours.log_probability(next));
            let Some(other) = &mut other else { continue };
            let other = Distribution::of(other.logits(at)?);
            theirs.add(-other.log_probability(next));
            let kl = other.divergence(&ours);
            (kl_sum, kl_max) = (kl_sum + kl, kl_max.max(kl));
            agree += u64::from(ours.likeliest() == other.likeliest());
        }
        if index % 5 == 4 || index + 1 == chunks {
            say(&format!("{} of {chunks} chunks: {:.4}", index + 1, served.perplexity()));
        }
    }
    let count = served.count() as f64;
    let reference = reference.map(|reference| Comparison {
        model: reference.resolved.name.clone(),
        perplexity: theirs.perplexity(),
        kl_mean: kl_sum / count,
        kl_max,
        top1_agreement: agree as f64 / count,
    });
    Ok(Quality {
        text: name.to_owned(),
        context: context as u32,
        tokens: served.count(),
        perplexity: served.perplexity(),
        standard_error: served.standard_error(),
        reference,
    })
}

/// A distribution over the vocabulary, as logits.
struct Distribution<'a> {
    logits: &'a [f32],
    /// Logarithm of the sum of exponentials.
    log_sum: f64,
}

impl Distribution<'_> {
    fn of(logits: &[f32]) -> Distribution<'_> {
        let most = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        let sum: f64 = logits.iter().map(|v| (f64::from(*v) - most).exp()).sum();
        Distribution { logits, log_sum: most + sum.ln() }
    }

    fn log_probability(&self, token: usize) -> f64 {
        f64::from(self.logits[token]) - self.log_sum
    }

    /// The first of the largest.
    fn likeliest(&self) -> usize {
        let logits = self.logits.iter().enumerate();
        logits.fold((0, f32::NEG_INFINITY), |a, (i, v)| if *v > a.1 { (i, *v) } else { a }).0
    }

    /// How far `other` lies from this one: the Kullback-Leibler divergence, in nats.
    fn divergence(&self, other: &Distribution<'_>) -> f64 {
        let tokens = 0..self.logits.len();
        let term = |token| {
            let log = self.log_probability(token);
            let probability = log.exp();
            // A token that never comes adds nothing, whatever the other says.
            if probability > 0.0 { probability * (log - other.log_probability(token)) } else { 0.0 }
        };
        tokens.map(term).sum::<f64>().max(0.0)
    }
}

/// A model that reads chunks, one after the other, into the same KV memory.
struct Reader {
    model: Box<dyn Model>,
    ops: Arc<dyn Ops>,
    kv: KvCache,
    groups: u32,
    /// Blocks of a group of layers.
    blocks: u32,
    /// Most tokens of a step.
    step: usize,
    chunk: Vec<TokenId>,
    /// Positions whose logits can be had: those of the last step.
    outputs: Range<usize>,
    logits: View,
    bytes: Vec<u8>,
    values: Vec<f32>,
    _finishing: Finishing,
}

impl Reader {
    fn new(prepared: &Prepared, context: usize) -> Result<Reader> {
        let Weights { model, ops, finishing, .. } = prepared.load_weights()?;
        let spec = model.spec().clone();
        let groups = spec.layer_groups().len() as u32;
        let blocks = (context as u32).div_ceil(BLOCK_TOKENS);
        let (device, dtype) = (ops.device().as_ref(), prepared.kv_dtype());
        let kv = kv_cache(device, &spec, model.part(), dtype, groups * blocks)
            .context("no memory for keys and values")?;
        let logits = ops.device().alloc_view(DType::F32, &[1, spec.vocab as usize])?;
        let bytes = vec![0; logits.bytes()];
        let step = prepared.step_tokens().min(context);
        let (chunk, values) = (Vec::new(), vec![0.0; spec.vocab as usize]);
        Ok(Reader {
            model,
            ops,
            kv,
            groups,
            blocks,
            step,
            chunk,
            outputs: 0..0,
            logits,
            bytes,
            values,
            _finishing: finishing,
        })
    }

    /// Takes up a chunk.
    fn read(&mut self, chunk: &[TokenId]) -> Result<()> {
        self.chunk = chunk.to_vec();
        self.outputs = 0..0;
        self.advance()
    }

    /// The next step of the chunk.
    fn advance(&mut self) -> Result<()> {
        let start = self.outputs.end;
        let tokens = &self.chunk[start..self.chunk.len().min(start + self.step)];
        let (device, rows) = (self.ops.device().as_ref(), tokens.len() as u32);
        let positions: Vec<u32> = (start as u32..).take(tokens.len()).collect();
        let all: Vec<u32> = (0..rows).collect();
        let span =
            Span { first_row: 0, rows, start: start as u32, table: 0, table_len: self.blocks };
        // Blocks of a group stand in order, so a token's slot is its position beyond their start.
        let first_slot = |group| group * self.blocks * BLOCK_TOKENS;
        let slots = |group| positions.iter().map(|p| first_slot(group) + p).collect::<Vec<_>>();
        let table = |group| (group * self.blocks..).take(self.blocks as usize).collect();
        let batch = Batch {
            tokens: upload(device, tokens)?,
            slots: (0..self.groups)
                .map(|group| upload(device, &slots(group)))
                .collect::<Result<_>>()?,
            positions: upload(device, &positions)?,
            tables: (0..self.groups).map(table).collect(),
            spans: vec![span],
            origins: Vec::new(),
            logit_rows: upload(device, &all)?,
            logit_spans: vec![span],
        };
        self.model.forward(self.ops.as_ref(), &batch, &self.kv)?;
        self.model.outputs(self.ops.as_ref(), tokens.len())?;
        self.outputs = start..start + tokens.len();
        Ok(())
    }

    /// Logits of a position; positions are asked for in order.
    fn logits(&mut self, position: usize) -> Result<&[f32]> {
        while !self.outputs.contains(&position) {
            self.advance()?;
        }
        let row = position - self.outputs.start;
        self.model.logits(self.ops.as_ref(), row..row + 1, &self.logits)?;
        self.ops.device().download(&self.logits, &mut self.bytes)?;
        for (value, bytes) in self.values.iter_mut().zip(self.bytes.as_chunks::<4>().0) {
            *value = f32::from_ne_bytes(*bytes);
        }
        Ok(&self.values)
    }
}

fn upload(device: &dyn Device, values: &[u32]) -> Result<View> {
    let view = device.alloc_view(DType::U32, &[values.len()])?;
    let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_ne_bytes()).collect();
    device.upload(&bytes, &view)?;
    Ok(view)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn divergence_is_zero_from_itself_and_known_for_a_coin() {
        let (fair, biased) = ([0.0, 0.0], [3.0f32.ln(), 0.0]);
        let (fair, biased) = (Distribution::of(&fair), Distribution::of(&biased));
        assert!(fair.divergence(&fair) < 1e-12);
        // Half of ln(1/2 / 3/4) and half of ln(1/2 / 1/4).
        let expected = 0.5 * (2.0f64 / 3.0).ln() + 0.5 * 2.0f64.ln();
        assert!((fair.divergence(&biased) - expected).abs() < 1e-6);
        assert_eq!((fair.likeliest(), biased.likeliest()), (0, 0));
        assert!((biased.log_probability(0).exp() - 0.75).abs() < 1e-6);
    }

    #[test]
    fn a_token_that_never_comes_adds_nothing() {
        let (never, always) = ([f32::NEG_INFINITY, 0.0], [0.0, 0.0]);
        let found = Distribution::of(&never).divergence(&Distribution::of(&always));
        assert!((found - 2.0f64.ln()).abs() < 1e-12);
    }

    #[test]
    fn the_built_in_text_has_a_few_thousand_words() {
        assert!((3_000..5_000).contains(&TEXT.split_whitespace().count()));
        assert!(TEXT.is_ascii() && TEXT.lines().all(|line| line.trim() == line));
    }
}
