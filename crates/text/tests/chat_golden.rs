//! Chat templates in the style of well-known models, against what transformers makes of them. The
//! cases in `golden/chat.json` are written by `tools/golden/chat_golden.py`.
#![allow(clippy::unwrap_used)]

use pomona_text::{ChatInput, ChatTemplate, LocalTime, TextError};
use serde_json::Value;

fn golden() -> Value {
    let path = format!("{}/tests/golden/chat.json", env!("CARGO_MANIFEST_DIR"));
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

/// Renders each conversation with each option, as `results` has them.
fn check(golden: &Value, source: &str, results: &Value) {
    let template = ChatTemplate::new(source, Some("<s>"), Some("</s>")).unwrap();
    let mut compared = 0;
    for result in results.as_array().unwrap() {
        let at = |key: &str| usize::try_from(result[key].as_u64().unwrap()).unwrap();
        let option = &golden["options"][at("option")];
        let input = ChatInput {
            messages: golden["conversations"][at("conversation")].clone(),
            tools: option.get("tools").cloned(),
            add_generation_prompt: option["add_generation_prompt"].as_bool().unwrap(),
            extra: option.get("extra").and_then(Value::as_object).cloned().unwrap_or_default(),
            now: Some(LocalTime { year: 2025, month: 7, day: 4, hour: 15, minute: 6, second: 7 }),
        };
        let got = template.render(&input);
        match (result["text"].as_str(), result["error"].as_str()) {
            (Some(text), _) => {
                assert_eq!(got.as_deref(), Ok(text), "{result}");
                compared += 1;
            }
            // A refusal carries the template's words; other errors are worded by the engine.
            (_, Some(error)) if error.starts_with("Conversation") => {
                assert_eq!(got, Err(TextError::Refused(error.into())));
            }
            _ => assert!(matches!(got, Err(TextError::Render(_))), "{got:?}"),
        }
    }
    assert!(compared > 0);
}

#[test]
fn templates_render_as_transformers_renders_them() {
    let golden = golden();
    for (name, template) in golden["templates"].as_object().unwrap() {
        println!("{name}");
        check(&golden, template["source"].as_str().unwrap(), &template["results"]);
    }
}

#[test]
fn the_template_of_smollm2_renders_as_transformers_renders_it() {
    let Ok(path) = std::env::var("POMONA_TEST_SMOLLM2") else {
        println!("SKIPPED: POMONA_TEST_SMOLLM2 does not name SmolLM2's GGUF file");
        return;
    };
    let file = gguf_metadata::read(&path);
    let golden = golden();
    check(&golden, file["tokenizer.chat_template"].as_str().unwrap(), &golden["smollm2"]);
}

#[path = "gguf_metadata/mod.rs"]
mod gguf_metadata;
