//! Speculative decoding: a request's row carries drafts of its next tokens, the step computes them
//! like known tokens, and those that the sampler would have chosen anyway are kept (Leviathan,
//! Kalman, Matias, "Fast Inference from Transformers via Speculative Decoding", 2023).
//!
//! Here is what drafts are made of and how many of them pay; planning reserves their blocks and
//! commit gives back those of rejected ones. A draft can change when a token comes, never which.

use pomona_types::TokenId;

use super::ConfigError;

/// Most drafts in a row.
const DRAFTS_MAX: u32 = 64;
/// How far back a lookup goes: bounds its time to some microseconds.
const LOOKUP_TOKENS: usize = 1 << 15;

/// How drafts are made. Names of the methods are vLLM's.
#[derive(Clone, Debug, PartialEq)]
pub struct Speculation {
    /// Where they come from.
    pub method: Method,
    /// Most drafts in a row.
    pub num_speculative_tokens: u32,
    /// Tokens whose arithmetic takes a step as long as everything in it that does not depend on
    /// their number, such as reading the weights. The more, the cheaper is a draft.
    pub free_tokens: f32,
    /// What making a draft costs, as a share of a step of one token.
    pub draft_cost: f32,
}

/// Where drafts come from.
#[derive(Clone, Debug, PartialEq)]
pub enum Method {
    /// The request's own tokens: what followed when its last few occurred before (prompt lookup:
    /// Saxena, 2023).
    Lookup(Lookup),
    /// A smaller model: the plan leaves room, and whoever executes it fills the drafts in.
    DraftModel,
}

/// When a lookup counts as a match.
#[derive(Clone, Debug, PartialEq)]
pub struct Lookup {
    /// Fewest tokens that must agree, at least 1.
    pub min: u32,
    /// Tokens compared at most; a longer match is preferred, then a later one.
    pub max: u32,
    /// Drafts for each token that agrees (suffix decoding: Oliaro et al., "SuffixDecoding", 2024);
    /// infinite to draft alike after every match.
    pub drafts_per_token: f32,
}

impl Speculation {
    /// A guess at [`Speculation::free_tokens`] for CPUs, whose arithmetic is never far ahead of
    /// their memory.
    pub const FREE_TOKENS: f32 = 4.0;

    /// Whether its numbers make sense.
    ///
    /// # Errors
    /// When one does not; says which.
    pub fn check(&self) -> Result<(), ConfigError> {
        let bad = |why: String| Err(ConfigError(why));
        if !(1..=DRAFTS_MAX).contains(&self.num_speculative_tokens) {
            return bad(format!(
                "num_speculative_tokens is {}, write 1 to {DRAFTS_MAX}",
                self.num_speculative_tokens
            ));
        }
        if let Method::Lookup(Lookup { min, max, .. }) = self.method
            && (min == 0 || max < min)
        {
            return bad(format!(
                "a lookup of {min} to {max} tokens finds nothing: write at least 1 token, and the \
                 larger number as the maximum"
            ));
        }
        Ok(())
    }

    /// How many drafts pay in a step that computes `tokens` tokens without them. Draft `n` is kept
    /// with probability `rate^n`. It pays if that is more than the tokens that the step makes
    /// elsewhere in the time that it takes: one in `free + tokens` of the step's time.
    pub(super) fn worthwhile(&self, acceptance: Acceptance, tokens: u32) -> u32 {
        let mut kept = 1.0;
        let pays = |n: &u32| {
            let tokens = (tokens + n) as f32;
            kept *= acceptance.rate;
            kept >= self.draft_cost + tokens / (self.free_tokens + tokens)
        };
        (0..self.num_speculative_tokens).take_while(pays).count() as u32
    }
}

impl Lookup {
    /// Where in `tokens` the best match goes on, and how many drafts it is good for.
    pub(super) fn find(&self, tokens: &[TokenId]) -> Option<(usize, u32)> {
        let last = tokens.last()?;
        let mut best = None;
        let mut best_len = self.min as usize - 1;
        let oldest = tokens.len().saturating_sub(LOOKUP_TOKENS);
        for end in (oldest + 1..tokens.len()).rev().filter(|end| tokens[end - 1] == *last) {
            let pairs = tokens[..end].iter().rev().zip(tokens.iter().rev());
            let len = pairs.take(self.max as usize).take_while(|(a, b)| a == b).count();
            if len > best_len {
                (best, best_len) = (Some(end), len);
            }
            if best_len == self.max as usize {
                break;
            }
        }
        let drafts = best_len as f32 * self.drafts_per_token;
        best.map(|end| (end, drafts.min(DRAFTS_MAX as f32) as u32))
    }
}

/// How often a request's drafts have been right lately.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Acceptance {
    rate: f32,
}

impl Acceptance {
    /// What is thought of a request that has not been tried.
    const START: f32 = 0.6;
    /// Weight of the newest draft.
    const NEWEST: f32 = 0.15;
    /// How fast a request that gets no drafts is forgotten, by step: after some dozens it is given
    /// another chance.
    const FORGOTTEN: f32 = 1.0 / 128.0;

    pub(super) fn new() -> Acceptance {
        Acceptance { rate: Acceptance::START }
    }

    /// Takes note that the first `kept` of `drafts` drafts were right and the next one, if there
    /// was one, wrong.
    pub(super) fn learn(&mut self, drafts: u32, kept: u32) {
        let mut one = |right: f32| self.rate += (right - self.rate) * Acceptance::NEWEST;
        (0..kept).for_each(|_| one(1.0));
        if kept < drafts {
            one(0.0);
        }
    }

    /// Takes note of a step in which drafts would not have paid.
    pub(super) fn forget(&mut self) {
        self.rate += (Acceptance::START - self.rate) * Acceptance::FORGOTTEN;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lookup(min: u32, max: u32) -> Lookup {
        Lookup { min, max, drafts_per_token: 1.0 }
    }

    #[test]
    fn the_longest_match_wins_then_the_latest() {
        let find = |min, max, tokens: &[TokenId]| lookup(min, max).find(tokens);
        assert_eq!(find(2, 4, &[1, 2, 3, 9, 2, 3, 8, 1, 2, 3]), Some((3, 3)));
        assert_eq!(find(2, 2, &[1, 2, 3, 9, 2, 3, 8, 1, 2, 3]), Some((6, 2)));
        assert_eq!(find(3, 4, &[2, 3, 9, 7, 2, 3]), None);
        assert_eq!(find(1, 4, &[5, 5, 5]), Some((2, 2)), "a match may overlap itself");
        assert_eq!(find(1, 4, &[5]), None);
        assert_eq!(find(1, 4, &[]), None);
    }

    #[test]
    fn fewer_drafts_pay_in_a_fuller_step_and_after_wrong_ones() {
        let method = Method::Lookup(lookup(1, 4));
        let speculation = Speculation {
            method,
            num_speculative_tokens: 8,
            free_tokens: Speculation::FREE_TOKENS,
            draft_cost: 0.0,
        };
        let mut acceptance = Acceptance::new();
        let fresh = speculation.worthwhile(acceptance, 1);
        assert!((1..8).contains(&fresh), "{fresh}");
        acceptance.learn(16, 16);
        assert_eq!(speculation.worthwhile(acceptance, 1), 8);
        assert!((1..8).contains(&speculation.worthwhile(acceptance, 16)));
        assert_eq!(speculation.worthwhile(acceptance, 512), 0);
        let costly = Speculation { draft_cost: 0.4, ..speculation.clone() };
        assert!((1..8).contains(&costly.worthwhile(acceptance, 1)));
        (0..20).for_each(|_| acceptance.learn(4, 0));
        assert_eq!(speculation.worthwhile(acceptance, 1), 0);
        let waited = (0..1000).take_while(|_| {
            acceptance.forget();
            speculation.worthwhile(acceptance, 1) == 0
        });
        assert!((16..500).contains(&waited.count()), "it is tried again, but not soon");
    }
}
