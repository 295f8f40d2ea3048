//! Log-probabilities in the three shapes that clients know: chat, completions, and vLLM's for
//! prompts.

use std::collections::BTreeMap;
use std::sync::Arc;

use pomona_text::{Detokenizer, Tokenizer};
use pomona_types::{TokenId, TokenLogprobs};
use serde::{Serialize, Serializer};

use crate::choice::Scored;

/// JSON has no infinity; OpenAI writes this for "impossible".
const LOGPROB_MIN: f32 = -9999.0;

fn finite(logprob: f32) -> f32 {
    if logprob.is_nan() { LOGPROB_MIN } else { logprob.clamp(LOGPROB_MIN, 0.0) }
}

/// The chat shape.
#[derive(Serialize)]
pub(crate) struct ChatLogprobs {
    pub(crate) content: Vec<ChatToken>,
    refusal: Option<()>,
}

/// A token in the chat shape.
#[derive(Serialize)]
pub(crate) struct ChatToken {
    #[serde(flatten)]
    own: ChatAlternative,
    top_logprobs: Vec<ChatAlternative>,
}

#[derive(Serialize)]
struct ChatAlternative {
    token: String,
    logprob: f32,
    bytes: Vec<u8>,
}

impl ChatLogprobs {
    /// Tokens with their alternatives.
    pub(crate) fn new(tokenizer: &Tokenizer, scored: &[Scored]) -> ChatLogprobs {
        let alternative = |token: TokenId, logprob: f32| ChatAlternative {
            token: tokenizer.token_text(token),
            logprob: finite(logprob),
            bytes: tokenizer.token_bytes(token).unwrap_or_default(),
        };
        let content = scored.iter().map(|scored| ChatToken {
            own: alternative(scored.token, scored.logprob),
            top_logprobs: scored.top.iter().map(|(id, lp)| alternative(*id, *lp)).collect(),
        });
        ChatLogprobs { content: content.collect(), refusal: None }
    }

    /// Nothing yet.
    pub(crate) fn empty() -> ChatLogprobs {
        ChatLogprobs { content: Vec::new(), refusal: None }
    }
}

/// The shape of completions: columns.
#[derive(Default, Serialize)]
pub(crate) struct TextLogprobs {
    text_offset: Vec<usize>,
    token_logprobs: Vec<Option<f32>>,
    tokens: Vec<String>,
    top_logprobs: Vec<Option<Ranked>>,
}

/// Alternatives as an object, best first.
struct Ranked(Vec<(String, f32)>);

impl Serialize for Ranked {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(token, logprob)| (token, logprob)))
    }
}

impl TextLogprobs {
    /// Adds tokens of an answer; `shift` characters stand before it (an echoed prompt).
    pub(crate) fn extend(&mut self, tokenizer: &Tokenizer, scored: &[Scored], shift: usize) {
        for scored in scored {
            let own = (scored.token, scored.logprob);
            self.push(tokenizer, shift + scored.offset, own, &scored.top);
        }
    }

    /// Adds the columns of a later piece.
    pub(crate) fn append(&mut self, mut later: TextLogprobs) {
        self.text_offset.append(&mut later.text_offset);
        self.token_logprobs.append(&mut later.token_logprobs);
        self.tokens.append(&mut later.tokens);
        self.top_logprobs.append(&mut later.top_logprobs);
    }

    /// Adds the tokens of a prompt, whose first has no probability.
    pub(crate) fn prompt(
        &mut self,
        tokenizer: &Arc<Tokenizer>,
        prompt: &[TokenId],
        logprobs: &[Option<TokenLogprobs>],
    ) {
        let mut text = Detokenizer::new(tokenizer.clone(), true);
        let mut offset = 0;
        for (index, token) in prompt.iter().enumerate() {
            match logprobs.get(index).and_then(Option::as_ref) {
                Some(lp) => self.push(tokenizer, offset, (*token, lp.logprob), &lp.top),
                None => {
                    self.text_offset.push(offset);
                    self.token_logprobs.push(None);
                    self.tokens.push(legacy(tokenizer, *token));
                    self.top_logprobs.push(None);
                }
            }
            offset += text.push(*token).chars().count();
        }
    }

    fn push(
        &mut self,
        tokenizer: &Tokenizer,
        offset: usize,
        own: (TokenId, f32),
        top: &[(TokenId, f32)],
    ) {
        self.text_offset.push(offset);
        self.token_logprobs.push(Some(finite(own.1)));
        self.tokens.push(legacy(tokenizer, own.0));
        let mut ranked: Vec<(String, f32)> = Vec::with_capacity(top.len() + 1);
        let chosen = top.iter().all(|(token, _)| *token != own.0).then_some(&own);
        for (token, logprob) in top.iter().chain(chosen) {
            let text = legacy(tokenizer, *token);
            // Two tokens of one text: the likelier one stands for both.
            if ranked.iter().all(|(known, _)| *known != text) {
                ranked.push((text, finite(*logprob)));
            }
        }
        self.top_logprobs.push(Some(Ranked(ranked)));
    }
}

/// A token as the completions endpoint writes it: its text, or its bytes if it is none.
fn legacy(tokenizer: &Tokenizer, token: TokenId) -> String {
    match String::from_utf8(tokenizer.token_bytes(token).unwrap_or_default()) {
        Ok(text) => text,
        Err(error) => {
            let hex: String =
                error.as_bytes().iter().map(|byte| format!("\\x{byte:02x}")).collect();
            format!("bytes:{hex}")
        }
    }
}

/// A prompt's log-probabilities in vLLM's shape: per token an object by token id.
pub(crate) type PromptLogprobs = Vec<Option<BTreeMap<TokenId, PromptToken>>>;

/// A token in vLLM's shape.
#[derive(Serialize)]
pub(crate) struct PromptToken {
    logprob: f32,
    rank: u32,
    decoded_token: String,
}

/// vLLM's shape of a prompt's log-probabilities.
pub(crate) fn prompt_logprobs(
    tokenizer: &Tokenizer,
    logprobs: &[Option<TokenLogprobs>],
) -> PromptLogprobs {
    let entry = |token: TokenId, logprob: f32, rank: u32| {
        let decoded_token = tokenizer.token_text(token);
        (token, PromptToken { logprob: finite(logprob), rank, decoded_token })
    };
    let one = |lp: &TokenLogprobs| {
        let top = (1..).zip(&lp.top).map(|(rank, (token, logprob))| entry(*token, *logprob, rank));
        top.chain([entry(lp.token, lp.logprob, lp.rank)]).collect()
    };
    logprobs.iter().map(|lp| lp.as_ref().map(one)).collect()
}
