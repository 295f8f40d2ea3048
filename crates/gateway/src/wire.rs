//! What every answer carries, in OpenAI's shapes: an id, a model, a time, usage.

use serde::Serialize;

use crate::choice::{End, StopReason};
use crate::gateway::unix_now;
use crate::generation::Counts;
use crate::options::StreamOptions;

/// What an answer says about itself.
#[derive(Clone, Serialize)]
pub(crate) struct Head {
    id: String,
    object: &'static str,
    created: u64,
    model: String,
    system_fingerprint: &'static str,
}

impl Head {
    /// For the request whose first sequence has this number.
    pub(crate) fn new(prefix: &str, object: &'static str, number: u64, model: String) -> Head {
        Head {
            id: format!("{prefix}-{number:016x}"),
            object,
            created: unix_now(),
            model,
            // Same seed and same fingerprint: same tokens.
            system_fingerprint: concat!("pomona-", env!("CARGO_PKG_VERSION")),
        }
    }
}

/// Tokens spent.
#[derive(Clone, Copy, Serialize)]
pub(crate) struct Usage {
    prompt_tokens: u64,
    completion_tokens: u64,
    total_tokens: u64,
    prompt_tokens_details: PromptDetails,
}

#[derive(Clone, Copy, Serialize)]
struct PromptDetails {
    cached_tokens: u64,
}

impl From<Counts> for Usage {
    fn from(counts: Counts) -> Usage {
        Usage {
            prompt_tokens: counts.prompt,
            completion_tokens: counts.completion,
            total_tokens: counts.prompt + counts.completion,
            prompt_tokens_details: PromptDetails { cached_tokens: counts.cached },
        }
    }
}

/// How a choice ended, as fields of it: `null` while it goes on.
#[derive(Clone, Default, Serialize)]
pub(crate) struct Ending {
    pub(crate) finish_reason: Option<&'static str>,
    pub(crate) stop_reason: Option<StopReason>,
}

impl From<End> for Ending {
    fn from(end: End) -> Ending {
        Ending { finish_reason: Some(end.reason), stop_reason: end.stop_reason }
    }
}

/// A whole answer.
#[derive(Serialize)]
pub(crate) struct Answer<C: Serialize, X: Serialize> {
    #[serde(flatten)]
    pub(crate) head: Head,
    pub(crate) choices: Vec<C>,
    pub(crate) usage: Usage,
    #[serde(flatten)]
    pub(crate) extra: X,
}

/// A piece of a streamed answer, after its head. `usage` is absent unless the client asked for it,
/// then `null` in all chunks but the last.
#[derive(Serialize)]
pub(crate) struct Chunk<'a, C: Serialize> {
    pub(crate) choices: &'a [C],
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) usage: Option<Option<Usage>>,
}

impl StreamOptions {
    /// The usage field of a chunk with text.
    pub(crate) fn usage(self, counts: Counts) -> Option<Option<Usage>> {
        match self {
            StreamOptions { continuous_usage: true, .. } => Some(Some(counts.into())),
            StreamOptions { include_usage: true, .. } => Some(None),
            _ => None,
        }
    }
}
