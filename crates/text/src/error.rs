//! What can go wrong with text. Every message says what was attempted, with which value, and what
//! to do about it.

/// Why text cannot be turned into tokens, or messages into a prompt.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TextError {
    /// The tokeniser's file cannot be trusted or asks for something that is not supported.
    #[error("cannot use this tokenizer: {0}")]
    Tokenizer(String),
    /// The caller's text is longer than [`crate::MAX_TEXT_BYTES`].
    #[error("text of {bytes} bytes is longer than the tokenizer takes ({max}); send less text")]
    TooLong {
        /// Bytes of the text.
        bytes: usize,
        /// Bytes that are taken.
        max: usize,
    },
    /// Encoding failed inside the tokeniser.
    #[error("cannot tokenize {bytes} bytes of text: {reason}")]
    Encode {
        /// Bytes of the text.
        bytes: usize,
        /// What the tokeniser said.
        reason: String,
    },
    /// The chat template does not compile.
    #[error("cannot compile the chat template: {0}")]
    Template(String),
    /// The chat template said no to these messages (`raise_exception`): the caller's mistake.
    #[error("the model's chat template refuses this conversation: {0}")]
    Refused(String),
    /// The chat template failed while it ran.
    #[error("the model's chat template failed: {0}")]
    Render(String),
    /// The chat template used more time or memory than a conversation can need.
    #[error("the model's chat template was stopped: {0}; use another template or fewer messages")]
    Exhausted(String),
}
