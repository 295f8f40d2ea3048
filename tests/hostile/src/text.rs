//! Tokenisers, templates and stop strings.

use pomona_text::{ChatInput, ChatTemplate, StopStrings, Tokenizer, TokenizerSource};
use serde_json::{Value, json};

/// A text with letters of several widths, marks, and a special token's text.
const PROBE: &str = "Hello, wörld! 你好 🎉 <|im_end|>\n\t 123";

/// A `tokenizer.json`; after a zero byte, `tokenizer_config.json`.
pub fn tokenizer_json(input: &[u8]) {
    let (file, config) = halves(input);
    let config = config.and_then(|config| serde_json::from_slice(config).ok());
    let source = TokenizerSource::Json { tokenizer_json: file.to_vec(), config };
    let Ok(tokenizer) = Tokenizer::new(&source) else { return };
    let Ok(ids) = tokenizer.encode(PROBE, true) else { return };
    let _ = tokenizer.decode(&ids, true);
    let _ = tokenizer.decode(&[0, 1, u32::MAX], false);
}

/// A chat template; after a zero byte, the messages.
pub fn chat_template(input: &[u8]) {
    let (source, messages) = halves(input);
    let Ok(source) = std::str::from_utf8(source) else { return };
    let Ok(template) = ChatTemplate::new(source, Some("<s>"), Some("</s>")) else { return };
    let given = messages.and_then(|messages| serde_json::from_slice::<Value>(messages).ok());
    let plain = || json!([{ "role": "user", "content": PROBE }]);
    let messages = given.unwrap_or_else(plain);
    let input = ChatInput { messages, add_generation_prompt: true, ..ChatInput::default() };
    let _ = template.render(&input);
}

/// Stop strings, one a line, then an empty line and the text: however it is cut, the same comes
/// out.
pub fn stop_strings(input: &[u8]) {
    let text = String::from_utf8_lossy(input);
    let Some((stops, text)) = text.split_once("\n\n") else { return };
    let stops: Vec<String> = stops.lines().map(str::to_owned).collect();
    let mut whole = StopStrings::new(stops.clone(), false);
    let step = whole.push(text);
    let expected = (step.emit + &whole.flush(), step.hit);
    let mut cut = StopStrings::new(stops, false);
    let (mut out, mut hit) = (String::new(), None);
    for letter in text.chars() {
        let step = cut.push(letter.encode_utf8(&mut [0; 4]));
        out.push_str(&step.emit);
        hit = step.hit;
    }
    out.push_str(&cut.flush());
    assert_eq!((out, hit), expected, "the way a text is cut must not show");
}

/// What is before the first zero byte, and what is after it.
fn halves(input: &[u8]) -> (&[u8], Option<&[u8]>) {
    match input.iter().position(|byte| *byte == 0) {
        Some(at) => (&input[..at], Some(&input[at + 1..])),
        None => (input, None),
    }
}
