//! Speculative decoding on the command line: vLLM's JSON with vLLM's field names, and llama.cpp's
//! flags for a draft model.

use clap::Args;
use pomona_engine::{Lookup, Method, Speculation};
use serde::{Deserialize, Serialize};

/// Drafts of a draft model where nothing else is said, as llama.cpp has it.
const DRAFT_MAX: u32 = 16;
/// Tokens that a suffix is compared over where nothing else is said, as vLLM has it.
const SUFFIX_DEPTH: u32 = 24;

/// Flags that say where drafts come from.
#[derive(Args, Clone, Debug)]
pub struct SpeculativeArgs {
    /// Guess several tokens at a time, which changes how fast answers come and nothing else:
    /// {"method": "ngram", "num_speculative_tokens": 4}, "suffix", or "draft_model" with a "model"
    #[arg(long, value_name = "JSON", value_parser = parse)]
    speculative_config: Option<Wish>,
    /// A smaller model of the same vocabulary that guesses tokens
    #[arg(long, value_name = "MODEL", conflicts_with = "speculative_config")]
    model_draft: Option<String>,
    /// Most tokens that it guesses at a time [default: 16]
    #[arg(long, value_name = "N", requires = "model_draft",
          value_parser = clap::value_parser!(u32).range(1..=64))]
    draft_max: Option<u32>,
}

/// What was asked for: how drafts are made, and by which model if by one.
#[derive(Clone, Debug, PartialEq)]
pub struct Drafting {
    /// What a draft costs is not known yet.
    pub speculation: Speculation,
    /// As named.
    pub model: Option<String>,
}

impl SpeculativeArgs {
    /// What was asked for, if anything.
    pub fn drafting(&self) -> Option<Drafting> {
        if let Some(model) = &self.model_draft {
            let drafts = self.draft_max.unwrap_or(DRAFT_MAX);
            return Some(drafting(Method::DraftModel, drafts, Some(model.clone())));
        }
        self.speculative_config.as_ref().map(|wish| wish.drafting.clone())
    }

    /// The flags that ask for the same, without those that ask for nothing.
    pub fn to_flags(&self) -> [(&'static str, Option<String>); 3] {
        [
            ("--speculative-config", self.speculative_config.as_ref().map(|w| w.text.clone())),
            ("--model-draft", self.model_draft.clone()),
            ("--draft-max", self.draft_max.map(|n| n.to_string())),
        ]
    }
}

/// A value of `--speculative-config`, as it was written and as it was understood.
#[derive(Clone, Debug, PartialEq)]
struct Wish {
    text: String,
    drafting: Drafting,
}

/// vLLM's fields, those of other methods included, so that they can be told apart from mistakes.
#[derive(Serialize, Deserialize, Default)]
#[serde(default, deny_unknown_fields)]
struct Fields {
    method: Option<String>,
    model: Option<String>,
    num_speculative_tokens: Option<u32>,
    prompt_lookup_max: Option<u32>,
    prompt_lookup_min: Option<u32>,
    suffix_decoding_max_tree_depth: Option<u32>,
    suffix_decoding_max_spec_factor: Option<f32>,
}

fn drafting(method: Method, drafts: u32, model: Option<String>) -> Drafting {
    let speculation = Speculation {
        method,
        num_speculative_tokens: drafts,
        free_tokens: Speculation::FREE_TOKENS,
        draft_cost: 0.0,
    };
    Drafting { speculation, model }
}

fn parse(text: &str) -> Result<Wish, String> {
    let fields: Fields = serde_json::from_str(text).map_err(|error| {
        format!("{error}; write {{\"method\": \"ngram\", \"num_speculative_tokens\": 4}}")
    })?;
    let drafting = understand(fields)?;
    drafting.speculation.check().map_err(|error| error.to_string())?;
    Ok(Wish { text: text.to_owned(), drafting })
}

fn understand(mut fields: Fields) -> Result<Drafting, String> {
    let named = fields.method.take();
    let method = match (&named, &fields.model) {
        (Some(method), _) => method.as_str(),
        (None, Some(_)) => "draft_model",
        (None, None) => return Err("write a \"method\": ngram, suffix or draft_model".to_owned()),
    };
    let drafts = fields.num_speculative_tokens.take();
    let needed = |drafts: Option<u32>| {
        drafts.ok_or_else(|| format!("\"num_speculative_tokens\" is missing: {method} needs it"))
    };
    let found = match method {
        "ngram" => {
            let (max, min) = (fields.prompt_lookup_max.take(), fields.prompt_lookup_min.take());
            // Of two limits that are alike one need not be written; vLLM's default is 5.
            let (max, min) = (max.or(min).unwrap_or(5), min.or(max).unwrap_or(5));
            let lookup = Lookup { min, max, drafts_per_token: f32::INFINITY };
            drafting(Method::Lookup(lookup), needed(drafts)?, None)
        }
        "suffix" => {
            let max = fields.suffix_decoding_max_tree_depth.take().unwrap_or(SUFFIX_DEPTH);
            let factor = fields.suffix_decoding_max_spec_factor.take().unwrap_or(1.0);
            let lookup = Lookup { min: 1, max, drafts_per_token: factor };
            drafting(Method::Lookup(lookup), drafts.unwrap_or(max), None)
        }
        "draft_model" => {
            let model = fields.model.take().ok_or("\"model\" is missing: which one drafts?")?;
            drafting(Method::DraftModel, needed(drafts)?, Some(model))
        }
        other => {
            return Err(format!(
                "method {other:?} is not implemented: write ngram, suffix or draft_model"
            ));
        }
    };
    let left = serde_json::to_value(&fields).map_err(|error| error.to_string())?;
    let strange = left.as_object().and_then(|o| o.iter().find(|(_, value)| !value.is_null()));
    match strange {
        Some((name, _)) => Err(format!("{name:?} says nothing to {method}: leave it out")),
        None => Ok(found),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vllms_fields_are_understood() {
        let check = |text: &str, method: Method, drafts: u32, model: Option<&str>| {
            let expected = drafting(method, drafts, model.map(str::to_owned));
            assert_eq!(parse(text).unwrap().drafting, expected, "{text}");
        };
        let lookup =
            |min, max, drafts_per_token| Method::Lookup(Lookup { min, max, drafts_per_token });
        check(
            r#"{"method":"ngram","num_speculative_tokens":4,"prompt_lookup_max":4,
                "prompt_lookup_min":2}"#,
            lookup(2, 4, f32::INFINITY),
            4,
            None,
        );
        let short = r#"{"method":"ngram","num_speculative_tokens":3,"prompt_lookup_max":2}"#;
        check(short, lookup(2, 2, f32::INFINITY), 3, None);
        check(r#"{"method":"suffix"}"#, lookup(1, 24, 1.0), 24, None);
        let model = r#"{"model":"a.gguf","num_speculative_tokens":5}"#;
        check(model, Method::DraftModel, 5, Some("a.gguf"));
    }

    #[test]
    fn mistakes_say_what_to_write() {
        for (text, words) in [
            ("ngram", "write {\"method\""),
            ("{}", "write a \"method\""),
            (r#"{"method":"eagle"}"#, "ngram, suffix or draft_model"),
            (r#"{"method":"ngram"}"#, "\"num_speculative_tokens\" is missing"),
            (r#"{"method":"ngram","num_speculative_tokens":0}"#, "write 1 to 64"),
            (r#"{"method":"ngram","num_speculative_tokens":4,"model":"x"}"#, "says nothing"),
            (r#"{"method":"suffix","tree":1}"#, "unknown field `tree`, expected one of `method`"),
            (r#"{"method":"suffix","suffix_decoding_max_tree_depth":0}"#, "write 1 to 64"),
            (
                r#"{"method":"ngram","num_speculative_tokens":4,"prompt_lookup_min":0}"#,
                "at least 1 token",
            ),
            (r#"{"method":"draft_model","num_speculative_tokens":4}"#, "\"model\" is missing"),
        ] {
            let said = parse(text).unwrap_err();
            assert!(said.contains(words), "{text}: {said}");
        }
    }
}
