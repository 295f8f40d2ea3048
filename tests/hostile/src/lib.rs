//! Whatever parses bytes from outside, each parser as a function of bytes that must return: no
//! panic, no abort, bounded time and memory. `fuzz/` drives these functions with libFuzzer; the
//! tests of this crate replay its corpora; the example `mutate` needs neither.
#![forbid(unsafe_code)]

mod api;
mod files;
mod kept;
pub mod mutation;
mod network;
mod text;

pub use files::load;

/// A parser, its name, and what feeds it.
pub struct Target {
    /// Its name, that of its corpus and of its fuzz target too.
    pub name: &'static str,
    /// Feeds it one input. What the parser says is of no interest; that it returns is.
    pub run: fn(&[u8]),
}

/// All of them.
pub const TARGETS: &[Target] = &[
    Target { name: "gguf", run: files::gguf },
    Target { name: "safetensors", run: files::safetensors },
    Target { name: "safetensors_index", run: files::safetensors_index },
    Target { name: "hf_config", run: files::hf_config },
    Target { name: "tokenizer_json", run: text::tokenizer_json },
    Target { name: "chat_template", run: text::chat_template },
    Target { name: "stop_strings", run: text::stop_strings },
    Target { name: "chat_body", run: api::chat_body },
    Target { name: "completions_body", run: api::completions_body },
    Target { name: "tokenize_body", run: api::tokenize_body },
    Target { name: "fabric_frames", run: network::frames },
    Target { name: "fabric_messages", run: network::messages },
    Target { name: "fabric_costs", run: kept::fabric_costs },
    Target { name: "expert_counts", run: kept::expert_counts },
];

/// Runs the target of this name.
pub fn run(name: &str, input: &[u8]) {
    let target = TARGETS.iter().find(|target| target.name == name);
    (target.expect("the fuzz targets use names of TARGETS").run)(input);
}
