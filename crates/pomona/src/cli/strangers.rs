//! Flags that users of other servers write by habit, and what to write here instead.

use clap::Error;
use clap::builder::StyledStr;
use clap::error::{ContextKind, ContextValue, ErrorKind};

/// Flags of llama.cpp, Ollama and vLLM that have another name here, or none; each with advice.
const STRANGERS: &[(&[&str], &str)] = &[
    (&["-m"], "the model follows the verb, without a flag: `pomona serve ./model.gguf`"),
    (&["--hf-repo", "--hf-file"], "name the repository as the model: org/repo or org/repo:Q4_K_M"),
    (
        &["-c", "--ctx-size", "--context-length", "--num-ctx", "--max-seq-len"],
        "the longest sequence is --max-model-len here, as in vLLM",
    ),
    (
        &["-n", "--predict", "--n-predict", "--num-predict", "--max-new-tokens"],
        "the most tokens of an answer are --max-tokens here; clients of a server send max_tokens",
    ),
    (&["-p", "--prompt"], "the prompt follows the model: `pomona run MODEL 'PROMPT'`"),
    (&["-t", "--threads-batch", "-tb"], "worker threads are --threads here"),
    (&["-np", "--parallel"], "sequences that run at once are --max-num-seqs here"),
    (&["-b", "-ub", "--batch-size", "--ubatch-size"], "see --max-num-batched-tokens"),
    (&["-a", "--alias"], "the name for clients is --served-model-name here"),
    (&["-s"], "the seed is --seed here"),
    (&["-ctk", "-ctv", "--cache-type-k", "--cache-type-v"], "see --kv-cache-dtype"),
    (
        &["-ngl", "--n-gpu-layers", "--gpu-layers", "--gpu-memory-utilization", "--device"],
        "this version runs on CPUs only; memory for keys and values is --kv-cache-memory",
    ),
    (
        &["-tp", "-cp", "-pp", "-dp", "-ep"],
        "with two dashes: --tp, --cp, --pp, --dp or --ep, or in full, such as \
         --tensor-parallel-size",
    ),
    (
        &["--enable-eplb", "--eplb-config", "--enable-ep-weight-filter"],
        "copies of busy experts are --num-redundant-experts N, and which are busy is kept by \
         --expert-loads FILE",
    ),
    (&["--numa"], "ranks take cores of their own: see --tensor-parallel-size"),
    (
        &["-md", "--draft", "--draft-n", "--speculative-model", "--num-speculative-tokens"],
        "a draft model is --model-draft FILE here, with --draft-max N; other methods are \
         --speculative-config, as in vLLM",
    ),
    (&["--trust-remote-code"], "models bring no code to run here; leave the flag out"),
    (&["--tokenizer", "--hf-config-path"], "these come from the model's own files"),
    (&["--swap-space", "--cpu-offload-gb"], "keys and values stay in --kv-cache-memory"),
];

/// The error with advice, if it is about a flag that other servers have.
pub fn explained(mut error: Error) -> Error {
    let ErrorKind::UnknownArgument = error.kind() else { return error };
    let Some(ContextValue::String(flag)) = error.get(ContextKind::InvalidArg) else {
        return error;
    };
    let Some(advice) = advice(flag, std::env::args()) else { return error };
    error.remove(ContextKind::SuggestedArg);
    let advice = ContextValue::StyledStrs(vec![StyledStr::from(advice)]);
    error.insert(ContextKind::Suggested, advice);
    error
}

/// What to write in place of `flag`. Of `-ngl 99` clap reports `-n`: the word that was written is
/// looked for first.
fn advice(flag: &str, mut words: impl Iterator<Item = String>) -> Option<&'static str> {
    let known = |word: &str| {
        let word = word.split('=').next().unwrap_or_default();
        STRANGERS.iter().find(|(flags, _)| flags.contains(&word)).map(|(_, advice)| *advice)
    };
    let short = flag.len() == 2;
    let written = words.find(|word| short && !word.starts_with("--") && word.starts_with(flag));
    written.and_then(|word| known(&word)).or_else(|| known(flag))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;
    use crate::cli::Cli;

    fn advice_for(line: &str) -> Option<&'static str> {
        let words = line.split_whitespace().map(str::to_owned);
        let error = Cli::command().try_get_matches_from(words.clone()).unwrap_err();
        let flag = error.get(ContextKind::InvalidArg)?.to_string();
        advice(&flag, words)
    }

    #[test]
    fn each_strange_flag_is_refused_by_serve_and_has_advice() {
        for (flags, expected) in STRANGERS {
            for flag in *flags {
                let line = format!("pomona serve smollm2 {flag} 1");
                assert_eq!(advice_for(&line), Some(*expected), "{flag}");
            }
        }
    }

    #[test]
    fn other_mistakes_are_left_to_clap() {
        assert_eq!(advice_for("pomona serve smollm2 --max-model-length 5"), None);
        assert_eq!(
            advice_for("pomona serve smollm2 --ctx-size=5").map(|a| a.is_empty()),
            Some(false)
        );
        assert_eq!(advice_for("pomona bench smollm2 -x"), None);
    }
}
