//! What holds for all tokens and texts: streaming gives what decoding gives, never half a
//! character; stop strings are found as a plain search finds them, however the text is cut; no
//! bytes make a tokeniser or a template panic.
#![allow(clippy::unwrap_used)]

use std::cell::Cell;
use std::sync::Arc;

use pomona_text::{
    ChatInput, ChatTemplate, Detokenizer, GgufVocab, StopStrings, Tokenizer, TokenizerSource,
};
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

/// Runs `cases` cases from a fixed seed.
fn check<S: Strategy>(cases: u32, strategy: S, test: impl Fn(S::Value))
where
    S::Value: Clone + std::fmt::Debug,
{
    let config = Config { cases, failure_persistence: None, ..Config::default() };
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &[7; 32]);
    let result = TestRunner::new_with_rng(config, rng).run(&strategy, |value| {
        test(value);
        Ok(())
    });
    if let Err(failure) = result {
        panic!("{failure}");
    }
}

/// A SentencePiece vocabulary of all bytes, some letters and words, and marks.
fn pieces(add_space_prefix: bool) -> Arc<Tokenizer> {
    let words = ["▁", "a", "b", "é", "▁a", "ab", "▁ab", "🎉", "▁▁"];
    let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>", "<x>"].map(str::to_owned).into();
    let mut types = vec![2, 3, 3, 4];
    tokens.extend((0..=255).map(|byte| format!("<0x{byte:02X}>")));
    types.extend([6; 256]);
    tokens.extend(words.map(str::to_owned));
    types.extend([1; 9]);
    let vocab = GgufVocab {
        model: "llama".into(),
        scores: Some((0..tokens.len()).map(|id| -(id as f32)).collect()),
        tokens,
        token_types: Some(types),
        bos: Some(1),
        eos: Some(2),
        unk: Some(0),
        add_space_prefix: Some(add_space_prefix),
        ..GgufVocab::default()
    };
    Arc::new(Tokenizer::new(&TokenizerSource::Gguf(vocab)).unwrap())
}

/// A byte-level vocabulary: all bytes, the two halves of an emoji, a mark.
fn bytes() -> Arc<Tokenizer> {
    let alphabet = (0x21..0x7f).chain(0xa1..0xad).chain(0xae..0x100).chain(0x100..0x144);
    let mut tokens: Vec<String> =
        alphabet.filter_map(char::from_u32).map(|letter| letter.to_string()).collect();
    tokens.extend(["ðŁ", "İī", "he", "Ġhe", "<|end|>"].map(str::to_owned));
    let mut types = vec![1; tokens.len()];
    types[tokens.len() - 1] = 3;
    let vocab = GgufVocab {
        model: "gpt2".into(),
        pre: Some("gpt-2".into()),
        tokens,
        token_types: Some(types),
        merges: Some(["ð Ł", "İ ī", "h e", "Ġ he"].map(str::to_owned).into()),
        ..GgufVocab::default()
    };
    Arc::new(Tokenizer::new(&TokenizerSource::Gguf(vocab)).unwrap())
}

#[test]
fn streamed_pieces_make_the_decoded_text() {
    for tokenizer in [pieces(true), pieces(false), bytes()] {
        let ids = prop::collection::vec(0..tokenizer.vocab_size() as u32 + 3, 0..40);
        // Bytes of real text, cut anywhere, next to any tokens.
        let text = any::<String>().prop_map({
            let tokenizer = Arc::clone(&tokenizer);
            move |text| tokenizer.encode(&text, true).unwrap()
        });
        let mixed = prop::collection::vec(prop_oneof![ids.boxed(), text.boxed()], 0..4);
        check(3000, (mixed, any::<bool>()), |(parts, skip)| {
            let ids = parts.concat();
            let mut stream = Detokenizer::new(Arc::clone(&tokenizer), skip);
            let mut text: String = ids.iter().map(|&id| stream.push(id)).collect();
            text += &stream.finish();
            assert_eq!(text, tokenizer.decode(&ids, skip));
        });
    }
}

#[test]
fn a_character_leaves_whole_or_not_at_all() {
    for tokenizer in [pieces(true), pieces(false), bytes()] {
        check(1000, any::<String>(), |text| {
            let ids = tokenizer.encode_ordinary(&text).unwrap();
            let mut stream = Detokenizer::new(Arc::clone(&tokenizer), true);
            let mut whole = String::new();
            for id in ids {
                let piece = stream.push(id);
                // Half a character would show as U+FFFD, which this text may hold itself.
                whole += &piece;
                let replaced = |text: &str| text.matches('\u{fffd}').count();
                assert!(replaced(&whole) <= replaced(&text), "{text:?}: {whole:?}");
            }
            assert_eq!(stream.finish(), "", "{text:?}");
        });
    }
}

#[test]
fn a_continuation_keeps_its_leading_space() {
    let tokenizer = pieces(true);
    let ids = tokenizer.encode_ordinary("ab").unwrap();
    assert_eq!(tokenizer.decode(&ids, true), "ab");
    let mut stream = Detokenizer::continuing(Arc::clone(&tokenizer), true);
    let text: String = ids.iter().map(|&id| stream.push(id)).collect();
    assert_eq!(text, " ab");
}

/// What [`StopStrings`] should do, in the plainest way: at each end, is there a stop string?
fn plain_search(text: &str, stops: &[String], include: bool) -> (String, Option<usize>) {
    for end in 0..=text.len() {
        let met = (0..stops.len())
            .filter(|&at| {
                !stops[at].is_empty() && text.as_bytes()[..end].ends_with(stops[at].as_bytes())
            })
            .max_by_key(|&at| (stops[at].len(), std::cmp::Reverse(at)));
        if let Some(at) = met {
            let end = if include { end } else { end - stops[at].len() };
            return (text[..end].to_owned(), Some(at));
        }
    }
    (text.to_owned(), None)
}

#[test]
fn stop_strings_are_found_however_the_text_is_cut() {
    let stops = prop::collection::vec("[abé]{0,5}", 0..4);
    let chunks = prop::collection::vec("[abé]{0,6}", 0..8);
    check(20_000, (stops, chunks, any::<bool>()), |(stops, chunks, include)| {
        let expected = plain_search(&chunks.concat(), &stops, include);
        let mut watch = StopStrings::new(stops.clone(), include);
        let (mut text, mut hit) = (String::new(), None);
        for chunk in &chunks {
            let step = watch.push(chunk);
            text += &step.emit;
            hit = step.hit;
            // What is held back is less than a stop string.
            let longest = stops.iter().map(String::len).max().unwrap_or(0);
            let given: usize = chunks.iter().map(String::len).sum();
            assert!(hit.is_some() || text.len() <= given);
            assert!(longest > 0 || step.emit == *chunk);
        }
        text += &watch.flush();
        assert_eq!((text, hit), expected, "{stops:?} {chunks:?} {include}");
    });
}

#[test]
fn text_is_held_back_only_while_it_could_become_a_stop_string() {
    let mut watch = StopStrings::new(vec!["<end>".into()], false);
    assert_eq!(watch.push("a <e").emit, "a ");
    assert_eq!(watch.push("x").emit, "<ex");
    assert_eq!(watch.push("<end").emit, "");
    let step = watch.push("> more");
    assert_eq!((step.emit.as_str(), step.hit), ("", Some(0)));
    assert_eq!(watch.push("more").emit, "");
    assert_eq!(watch.flush(), "");
}

#[test]
fn any_text_survives_encoding_and_decoding() {
    let tokenizer = bytes();
    check(2000, any::<String>(), |text| {
        let ids = tokenizer.encode_ordinary(&text).unwrap();
        assert_eq!(tokenizer.decode(&ids, true), text);
    });
}

#[test]
fn no_bytes_make_a_tokenizer_panic() {
    let usable = Cell::new(0);
    let parts = [
        r#"{}"#,
        r#"null"#,
        r#"{"type":"ByteLevel"}"#,
        r#"{"type":"Metaspace","replacement":"▁","prepend_scheme":"first"}"#,
        r#"{"type":"Prepend","prepend":"▁"}"#,
        r#"{"type":"Replace","pattern":{"String":" "},"content":"▁"}"#,
        r#"{"type":"Replace","pattern":{"Regex":"a*"},"content":"bb"}"#,
        r#"{"type":"Split","pattern":{"Regex":"(a+)+b"},"behavior":"Isolated","invert":false}"#,
        r#"{"type":"Split","pattern":{"String":"a"},"behavior":"Removed","invert":true}"#,
        r#"{"type":"Sequence",
            "normalizers":[{"type":"NFKC"},{"type":"Strip","strip_left":true,"strip_right":true}],
            "decoders":[{"type":"ByteFallback"},{"type":"Fuse"}],
            "pretokenizers":[{"type":"Digits","individual_digits":true}],"processors":[]}"#,
    ];
    let part = prop::sample::select(parts.to_vec());
    let token = "[ab ▁Ġ]{0,3}";
    let vocab = prop::collection::vec((token, 0u32..12), 0..8);
    let merge = prop_oneof![9 => "[ab] [ab]", 1 => "[ab ]{0,3}"];
    let merges = prop::collection::vec(merge, 0..4);
    let added = prop::collection::vec((token, 0u32..12, any::<[bool; 5]>()), 0..3);
    let parts = (part.clone(), part.clone(), part);
    check(4000, (vocab, merges, added, parts, "[ab ▁<>\n]{0,20}"), |case| {
        let (vocab, merges, added, (first, second, third), text) = case;
        let usual = ["a", "b", "aa", "ab", "ba", "bb"].into_iter().zip(12..);
        let usual = usual.map(|(token, id)| (token.to_owned(), id));
        let vocab: serde_json::Map<String, serde_json::Value> =
            vocab.into_iter().chain(usual).map(|(token, id)| (token, id.into())).collect();
        let added: Vec<_> = added
            .into_iter()
            .map(|(content, id, [single_word, lstrip, rstrip, normalized, special])| {
                serde_json::json!({"id": id, "content": content, "single_word": single_word,
                    "lstrip": lstrip, "rstrip": rstrip, "normalized": normalized,
                    "special": special})
            })
            .collect();
        let json = format!(
            r#"{{"added_tokens":{},"normalizer":{first},"pre_tokenizer":{second},
            "decoder":{third},"model":{{"type":"BPE","vocab":{},"merges":{}}}}}"#,
            serde_json::json!(added),
            serde_json::json!(vocab),
            serde_json::json!(merges),
        );
        let source = TokenizerSource::Json { tokenizer_json: json.into_bytes(), config: None };
        if let Ok(tokenizer) = Tokenizer::new(&source) {
            usable.set(usable.get() + 1);
            let ids = tokenizer.encode(&text, true).unwrap_or_default();
            tokenizer.decode(&ids, false);
            tokenizer.encode_ordinary(&text).ok();
        }
    });
    assert!(usable.get() > 100, "only {} cases got to the end", usable.get());
}

#[test]
fn no_vocabulary_makes_a_tokenizer_panic() {
    let usable = Cell::new(0);
    let tokens = prop::collection::vec("(<0x[0-9A-F]{2}>|[ab ▁Ġé<>]{0,3})", 0..12);
    let scores = prop::option::of(prop::collection::vec(any::<f32>(), 0..12));
    let types = prop::option::of(prop::collection::vec(-1i32..8, 0..12));
    let merges = prop::option::of(prop::collection::vec("([ab] [ab]|[ab é]{0,3})", 0..3));
    let ids = prop::collection::vec(prop::option::weighted(0.2, 0u32..14), 5);
    let flags = prop::collection::vec(any::<Option<bool>>(), 3);
    let model = prop_oneof![Just("gpt2"), Just("llama"), Just("bert")];
    let case = (model, tokens, scores, types, merges, (ids, flags), "[ab ▁<>é\n]{0,20}");
    check(20_000, case, |(model, tokens, scores, token_types, merges, (ids, flags), text)| {
        // Mostly of the right length.
        let count = tokens.len();
        let fit = |mut list: Vec<f32>| {
            list.resize(count, 0.0);
            list
        };
        let vocab = GgufVocab {
            model: model.into(),
            pre: None,
            tokens,
            scores: scores.map(fit),
            token_types: token_types.map(|mut list| {
                list.resize(count, 1);
                list
            }),
            merges,
            bos: ids[0],
            eos: ids[1],
            unk: ids[2],
            pad: ids[3],
            eot: ids[4],
            add_bos: flags[0],
            add_eos: flags[1],
            add_space_prefix: flags[2],
        };
        if let Ok(tokenizer) = Tokenizer::new(&TokenizerSource::Gguf(vocab)) {
            usable.set(usable.get() + 1);
            let ids = tokenizer.encode(&text, true).unwrap();
            tokenizer.decode(&ids, false);
            tokenizer.encode_ordinary(&text).unwrap();
        }
    });
    assert!(usable.get() > 500, "only {} cases got to the end", usable.get());
}

#[test]
fn no_source_makes_a_template_panic() {
    let usable = Cell::new(0);
    let word = prop_oneof![
        "[a-z{}%#'\"()|.,~+*-]{0,6}",
        Just("{% for m in messages %}".to_owned()),
        Just("{{ m.content ~ ".to_owned()),
        Just("{% set n = namespace(a=[m]) %}".to_owned()),
        Just("{% set n.a = n.a + [n.a] %}".to_owned()),
        Just("{% macro f(x) %}{{ f(x) }}".to_owned()),
        Just("{% endmacro %}{{ f(messages) }}".to_owned()),
        Just("| join('a') | tojson(indent=3) | replace('', 'b') }}".to_owned()),
        Just("{% endfor %}".to_owned()),
        Just("{% if m is string %}{% else %}".to_owned()),
        Just("{% endif %}".to_owned()),
        Just("'a'.split('')[::-1] * 3 }}".to_owned()),
        Just("{% generation %}".to_owned()),
    ];
    let input = ChatInput {
        messages: serde_json::json!([{"role": "user", "content": "hi"}, {"role": "a"}]),
        ..ChatInput::default()
    };
    check(5000, prop::collection::vec(word, 0..12), |words| {
        if let Ok(template) = ChatTemplate::new(&words.concat(), Some("<s>"), None) {
            usable.set(usable.get() + 1);
            template.render(&input).ok();
        }
    });
    assert!(usable.get() > 300, "only {} cases got to the end", usable.get());
}
