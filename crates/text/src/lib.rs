//! Text in and out of a model: tokenisers, streaming detokenisation, stop strings, chat templates.
//!
//! Knows neither models nor HTTP. Does no I/O and reads no clock: files come as bytes, time comes
//! as a value.
#![forbid(unsafe_code)]

mod chat;
mod detokenizer;
mod error;
mod stop;
mod tokenizer;

pub use chat::{ChatInput, ChatTemplate, LocalTime};
pub use detokenizer::Detokenizer;
pub use error::TextError;
pub use stop::{StopStep, StopStrings};
pub use tokenizer::{GgufVocab, MAX_TEXT_BYTES, Tokenizer, TokenizerSource};
