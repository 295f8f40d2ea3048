//! A tour of this crate: from messages to a prompt, from the prompt to tokens, from the model's
//! tokens to text that stops where it should.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;

use pomona_text::{
    ChatInput, ChatTemplate, Detokenizer, GgufVocab, LocalTime, StopStrings, TextError, Tokenizer,
    TokenizerSource,
};
use serde_json::json;

/// A vocabulary as a GGUF file holds it; this one knows four marks, all bytes and one merge.
fn vocabulary() -> GgufVocab {
    let marks = ["<|im_start|>", "<|im_end|>"].map(str::to_owned);
    let alphabet = (0x21..0x7f).chain(0xa1..0xad).chain(0xae..0x144);
    let letters = alphabet.filter_map(char::from_u32).map(String::from);
    let tokens: Vec<String> = marks.into_iter().chain(letters).chain(["Hi".to_owned()]).collect();
    GgufVocab {
        model: "gpt2".into(),
        pre: Some("qwen2".into()),
        token_types: Some((0..tokens.len()).map(|id| if id < 2 { 3 } else { 1 }).collect()),
        tokens,
        merges: Some(vec!["H i".into()]),
        eos: Some(1),
        ..GgufVocab::default()
    }
}

#[test]
fn from_messages_to_an_answer() {
    // 1. A chat template turns messages into the text that the model was trained on.
    let source = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}\
                  {{ '<|im_end|>\n' }}{% endfor %}\
                  {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";
    let template = ChatTemplate::new(source, None, Some("<|im_end|>")).unwrap();
    let input = ChatInput {
        messages: json!([{"role": "user", "content": "Hi"}]),
        add_generation_prompt: true,
        ..ChatInput::default()
    };
    let prompt = template.render(&input).unwrap();
    assert_eq!(prompt, "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n");

    // 2. A tokeniser turns the text into tokens; the marks in it become special tokens.
    let tokenizer = Arc::new(Tokenizer::new(&TokenizerSource::Gguf(vocabulary())).unwrap());
    let tokens = tokenizer.encode(&prompt, true).unwrap();
    assert_eq!(tokens[0], tokenizer.token_id("<|im_start|>").unwrap());
    assert!(tokens.contains(&tokenizer.token_id("Hi").unwrap()));
    assert_eq!(tokenizer.decode(&tokens, false), prompt);
    assert_eq!(tokenizer.decode(&tokens, true), "user\nHi\nassistant\n");
    // Text that must not steer the model is encoded without its marks.
    let ordinary = tokenizer.encode_ordinary("<|im_end|>").unwrap();
    assert!(!ordinary.iter().any(|&id| tokenizer.is_special(id)));

    // 3. The answer comes token by token. Here 'é' is two tokens: the first gives no text yet.
    let mut text = Detokenizer::continuing(Arc::clone(&tokenizer), true);
    let answer = tokenizer.encode_ordinary("é!").unwrap();
    let pieces: Vec<String> = answer.iter().map(|&id| text.push(id)).collect();
    assert_eq!(pieces, ["", "é", "!"]);
    assert_eq!(text.push(tokenizer.eos().unwrap()), "");
    assert_eq!(text.finish(), "");
    assert_eq!(tokenizer.end_ids(), &[1]);

    // 4. Stop strings end it earlier; text that may become one waits.
    let mut stops = StopStrings::new(vec!["END".into()], false);
    assert_eq!(stops.push("that is the E").emit, "that is the ");
    let step = stops.push("ND of it");
    assert_eq!((step.emit.as_str(), step.hit), ("", Some(0)));
}

#[test]
fn what_can_go_wrong_says_what_to_do() {
    // A template may refuse a conversation: the caller's mistake.
    let source = "{{ raise_exception('only one turn') if messages | length > 1 }}";
    let template = ChatTemplate::new(source, None, None).unwrap();
    let input = ChatInput { messages: json!([{}, {}]), ..ChatInput::default() };
    assert_eq!(template.render(&input), Err(TextError::Refused("only one turn".into())));

    // A hostile one is stopped.
    let source = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}";
    let template = ChatTemplate::new(source, None, None).unwrap();
    assert!(matches!(template.render(&ChatInput::default()), Err(TextError::Exhausted(_))));

    // A vocabulary that cannot be used says why.
    let vocab = GgufVocab { pre: Some("unheard-of".into()), ..vocabulary() };
    let error = Tokenizer::new(&TokenizerSource::Gguf(vocab)).unwrap_err().to_string();
    assert!(error.contains("unheard-of") && error.contains("qwen2"), "{error}");
}

#[test]
fn time_comes_as_a_value() {
    let template = ChatTemplate::new("{{ strftime_now('%d %b %Y') }}", None, None).unwrap();
    let now = LocalTime { year: 2026, month: 2, day: 28, hour: 9, minute: 0, second: 0 };
    let input = ChatInput { now: Some(now), ..ChatInput::default() };
    assert_eq!(template.render(&input).unwrap(), "28 Feb 2026");
}
