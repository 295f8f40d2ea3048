//! Bodies of HTTP requests, against the gateway over a replica that answers at once.

use std::sync::Arc;

use bytes::Bytes;
use pomona_gateway::{Config, Gateway, SamplingDefaults, ServedModel, router};
use pomona_text::{ChatTemplate, Tokenizer, TokenizerSource};
use pomona_types::{
    Finish, FinishReason, Load, Micros, Refusal, Replica, ReplicaInfo, Request, RequestId,
    TokenOutput, TokenSink,
};
use serde_json::{Map, Value, json};

/// Tokens of an answer.
const ANSWER_TOKENS: u32 = 4;
/// Longest sequence.
const MODEL_LEN_MAX: u32 = 512;

/// `/v1/chat/completions`.
pub fn chat_body(input: &[u8]) {
    post("/v1/chat/completions", input);
}

/// `/v1/completions`.
pub fn completions_body(input: &[u8]) {
    post("/v1/completions", input);
}

/// `/tokenize` and `/detokenize`.
pub fn tokenize_body(input: &[u8]) {
    post("/tokenize", input);
    post("/detokenize", input);
}

/// Whatever the body, the mistake is not the server's.
fn post(path: &str, input: &[u8]) {
    thread_local! {
        static SERVER: (tokio::runtime::Runtime, Gateway) = (runtime(), gateway());
    }
    SERVER.with(|(runtime, gateway)| {
        let body = Bytes::copy_from_slice(input);
        let (status, answer) = runtime.block_on(gateway.call("POST", path, body));
        let shown = String::from_utf8_lossy(&answer);
        assert!(status < 500, "{path} answers {status}: {shown}");
    });
}

fn runtime() -> tokio::runtime::Runtime {
    let mut builder = tokio::runtime::Builder::new_current_thread();
    builder.enable_all().build().expect("a test machine has room for a runtime")
}

fn gateway() -> Gateway {
    let source = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}";
    let template = ChatTemplate::new(source, None, None).expect("this template is well-formed");
    let info = ReplicaInfo {
        model: "words".into(),
        max_model_len: MODEL_LEN_MAX,
        vocab_size: 95,
        eos_token_ids: Arc::new([]),
        kv_tokens: MODEL_LEN_MAX,
    };
    let model = ServedModel {
        names: vec!["words".to_owned()],
        replica: Arc::new(Echo { info }),
        tokenizer: Arc::new(tokenizer()),
        template: Some(Arc::new(template)),
        defaults: SamplingDefaults::default(),
    };
    router(Config::default(), vec![model])
}

/// A tokeniser of printable ASCII characters.
fn tokenizer() -> Tokenizer {
    let letter =
        |byte: u8| if byte == b' ' { "Ġ".to_owned() } else { char::from(byte).to_string() };
    let vocab: Map<String, Value> =
        (b' '..=b'~').map(|byte| (letter(byte), json!(byte - b' '))).collect();
    let level = json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
                        "use_regex": true });
    let model = json!({ "type": "BPE", "dropout": null, "unk_token": null,
                        "continuing_subword_prefix": null, "end_of_word_suffix": null,
                        "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": [] });
    let file = json!({ "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
                       "normalizer": null, "pre_tokenizer": level, "post_processor": null,
                       "decoder": level, "model": model });
    let source = TokenizerSource::Json { tokenizer_json: file.to_string().into(), config: None };
    Tokenizer::new(&source).expect("this vocabulary is well-formed")
}

/// Answers with the beginning of the alphabet.
struct Echo {
    info: ReplicaInfo,
}

impl Replica for Echo {
    fn info(&self) -> &ReplicaInfo {
        &self.info
    }

    fn submit(&self, request: Request, mut sink: Box<dyn TokenSink>) -> Result<(), Refusal> {
        for token in 33..33 + request.sampling.max_tokens.min(ANSWER_TOKENS) {
            sink.token(TokenOutput { token, logprobs: None });
        }
        sink.finish(Finish {
            reason: FinishReason::Length,
            message: None,
            cached_tokens: 0,
            queued: Micros(0),
            preemptions: 0,
        });
        Ok(())
    }

    fn cancel(&self, _: RequestId) {}

    fn load(&self) -> Load {
        Load::default()
    }
}
