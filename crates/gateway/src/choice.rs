//! One sequence on its way to the client: tokens to text, stop strings, log-probabilities, and how
//! it ended. Knows neither HTTP nor channels.

use std::sync::Arc;

use pomona_text::{Detokenizer, StopStrings, Tokenizer};
use pomona_types::{Finish, FinishReason, ReplicaInfo, Sampling, TokenId, TokenOutput};

use crate::error::ApiError;

/// How a choice's text is made.
#[derive(Clone, Debug)]
pub(crate) struct TextRules {
    pub(crate) stop: Vec<String>,
    pub(crate) include_stop: bool,
    pub(crate) skip_special: bool,
    /// Nothing of what is produced is shown or counted: the client asked for no tokens.
    pub(crate) mute: bool,
}

/// A sequence's state between its first token and its end.
pub(crate) struct Choice {
    detokenizer: Detokenizer,
    stops: StopStrings,
    rules: TextRules,
    /// Tokens that may end the sequence: the model's, and the request's own.
    ends: Vec<TokenId>,
    own_ends: Vec<TokenId>,
    min_tokens: u32,
    /// An end token, until the replica says whether it was the end.
    held: Option<TokenOutput>,
    tokens: u32,
    /// Characters decoded, held back ones included.
    decoded: usize,
    /// Characters handed out.
    shown: usize,
    scored: Vec<Scored>,
    hit: Option<usize>,
}

/// A token with its log-probability and where its text begins.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Scored {
    pub(crate) token: TokenId,
    pub(crate) logprob: f32,
    /// The likeliest tokens, best first.
    pub(crate) top: Vec<(TokenId, f32)>,
    /// Characters of the choice's text before it.
    pub(crate) offset: usize,
}

/// What a token adds for the client.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Delta {
    pub(crate) text: String,
    pub(crate) scored: Vec<Scored>,
}

/// What made a sequence stop, in vLLM's field `stop_reason`.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
#[serde(untagged)]
pub(crate) enum StopReason {
    Token(TokenId),
    Text(String),
}

/// How a sequence ended.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct End {
    /// `stop` or `length`.
    pub(crate) reason: &'static str,
    pub(crate) stop_reason: Option<StopReason>,
    pub(crate) cached_tokens: u32,
}

impl Choice {
    /// Before its first token.
    pub(crate) fn new(
        tokenizer: Arc<Tokenizer>,
        info: &ReplicaInfo,
        sampling: &Sampling,
        rules: TextRules,
    ) -> Choice {
        let own_ends = sampling.stop_token_ids.clone();
        let mut ends = own_ends.clone();
        if !sampling.ignore_eos {
            ends.extend_from_slice(&info.eos_token_ids);
        }
        Choice {
            detokenizer: Detokenizer::continuing(tokenizer, rules.skip_special),
            stops: StopStrings::new(rules.stop.clone(), rules.include_stop),
            rules,
            ends,
            own_ends,
            min_tokens: sampling.min_tokens,
            held: None,
            tokens: 0,
            decoded: 0,
            shown: 0,
            scored: Vec::new(),
            hit: None,
        }
    }

    /// Tokens produced, the one that ended it included.
    pub(crate) fn tokens(&self) -> u32 {
        self.tokens
    }

    /// Whether a stop string was met: the replica need not go on.
    pub(crate) fn stopped(&self) -> bool {
        self.hit.is_some()
    }

    /// Takes the next token.
    pub(crate) fn token(&mut self, output: TokenOutput) -> Delta {
        let mut delta = Delta::default();
        if self.rules.mute || self.stopped() {
            return delta;
        }
        if let Some(held) = self.held.take() {
            self.feed(held, &mut delta);
        }
        // The held token may have met a stop string; this one then comes too late.
        if self.stopped() {
            return delta;
        }
        self.tokens += 1;
        if self.ends.contains(&output.token) {
            self.held = Some(output);
        } else {
            self.feed(output, &mut delta);
        }
        delta
    }

    /// Takes the end.
    pub(crate) fn end(&mut self, finish: Finish) -> Result<(Delta, End), ApiError> {
        let mut delta = Delta::default();
        let (reason, stop_reason) = match finish.reason {
            _ if self.stopped() => {
                let text = self.hit.and_then(|hit| self.rules.stop.get(hit)).cloned();
                ("stop", text.map(StopReason::Text))
            }
            FinishReason::Stop(token) => {
                if !self.rules.include_stop {
                    self.held = None;
                }
                let own = self.own_ends.contains(&token);
                ("stop", own.then_some(StopReason::Token(token)))
            }
            FinishReason::Length => ("length", None),
            FinishReason::Abort => {
                return Err(ApiError::Unavailable("the server cancelled the request".to_owned()));
            }
            FinishReason::Error => {
                let message = finish.message.unwrap_or_else(|| "the engine failed".to_owned());
                return Err(ApiError::Internal(message));
            }
        };
        if !self.stopped() && !self.rules.mute {
            if let Some(held) = self.held.take() {
                self.feed(held, &mut delta);
            }
            let tail = self.detokenizer.finish();
            self.show(&tail, &mut delta);
            if !self.stopped() {
                delta.text.push_str(&self.stops.flush());
                delta.scored.append(&mut self.scored);
            }
        }
        // A mute choice may have been stopped by a token that nobody asked for.
        let reason = if self.rules.mute { "length" } else { reason };
        Ok((delta, End { reason, stop_reason, cached_tokens: finish.cached_tokens }))
    }

    fn feed(&mut self, output: TokenOutput, delta: &mut Delta) {
        let offset = self.decoded;
        let text = self.detokenizer.push(output.token);
        if let Some(lp) = output.logprobs {
            let scored = Scored { token: lp.token, logprob: lp.logprob, top: lp.top, offset };
            self.scored.push(scored);
        }
        self.show(&text, delta);
    }

    /// Moves text past the stop strings to the client, and the tokens that it came from.
    fn show(&mut self, text: &str, delta: &mut Delta) {
        self.decoded += text.chars().count();
        if self.tokens <= self.min_tokens {
            self.shown += text.chars().count();
            delta.text.push_str(text);
        } else {
            let step = self.stops.push(text);
            self.shown += step.emit.chars().count();
            delta.text.push_str(&step.emit);
            self.hit = step.hit;
        }
        let whole = self.scored.iter().take_while(|scored| scored.offset < self.shown).count();
        delta.scored.extend(self.scored.drain(..whole));
        if self.stopped() {
            self.scored.clear();
        }
    }
}
