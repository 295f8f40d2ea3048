//! Cuts text into words as a pre-tokenizer of the `tokenizers` crate does, of the kind that
//! byte-level vocabularies have: expressions that cut, one after the other, then bytes written as
//! letters. That crate keeps track of where each character comes from, which takes it several
//! times as long as the words themselves; nothing here asks for that.

use tokenizers::SplitDelimiterBehavior::Isolated;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::utils::SysRegex;

use super::pre_tokenizer::{GPT2, PLAIN};

/// How expressions take white space: all of a run that a word follows but its last character,
/// which stays with that word. The engine must backtrack for it.
const WHITE_SPACE: &str = r"|\s+(?!\S)|\s+";
/// In front of it in many expressions: a run's line breaks belong together.
const LINE_BREAKS: &str = r"|\s*[\r\n]+";

/// Most steps: each is a level of recursion. Files have one or two, and at most four.
const STEPS_MAX: usize = 16;

/// A pre-tokenizer for byte-level vocabularies.
pub(crate) struct Words {
    cuts: Vec<Cut>,
}

enum Cut {
    /// Matches, and what lies between them, are pieces.
    Matches(SysRegex),
    /// The same for an expression that ended in [`WHITE_SPACE`] and has now `|\s+` there, which
    /// needs no backtracking: the last character of a run is given back here.
    Spaced { regex: SysRegex, line_breaks: bool },
    /// Each digit is a piece.
    Digits,
}

impl Words {
    /// What `pre_tokenizer` does, or `None` if it is of another kind.
    pub(crate) fn new(pre_tokenizer: &PreTokenizerWrapper) -> Option<Self> {
        let steps = match pre_tokenizer {
            PreTokenizerWrapper::Sequence(steps) => steps.as_ref(),
            single => std::slice::from_ref(single),
        };
        let (PreTokenizerWrapper::ByteLevel(bytes), steps) = steps.split_last()? else {
            return None;
        };
        let mut cuts = steps.iter().map(Cut::of_step).collect::<Option<Vec<_>>>()?;
        if bytes.use_regex {
            cuts.push(Cut::of_expression(GPT2)?);
        }
        (!bytes.add_prefix_space && cuts.len() <= STEPS_MAX).then_some(Self { cuts })
    }

    /// Hands out the words of `text` in order, none of them empty.
    pub(crate) fn each<E>(
        &self,
        text: &str,
        take: &mut dyn FnMut(&str) -> Result<(), E>,
    ) -> Result<(), E> {
        cut(&self.cuts, text, take)
    }
}

fn cut<E>(cuts: &[Cut], text: &str, take: &mut dyn FnMut(&str) -> Result<(), E>) -> Result<(), E> {
    match cuts.split_first() {
        None if text.is_empty() => Ok(()),
        None => take(text),
        Some((first, rest)) => first.each(text, &mut |piece| cut(rest, piece, take)),
    }
}

impl Cut {
    fn of_step(step: &PreTokenizerWrapper) -> Option<Self> {
        match step {
            PreTokenizerWrapper::Split(Split {
                pattern: SplitPattern::Regex(expression),
                behavior: Isolated,
                invert: false,
                ..
            }) => Self::of_expression(expression),
            PreTokenizerWrapper::Digits(digits) if digits.individual_digits => Some(Self::Digits),
            _ => None,
        }
    }

    fn of_expression(expression: &str) -> Option<Self> {
        let spaced = PLAIN.contains(&expression).then(|| expression.strip_suffix(WHITE_SPACE));
        match spaced.flatten() {
            Some(others) => Some(Self::Spaced {
                regex: SysRegex::new(&format!(r"{others}|\s+")).ok()?,
                line_breaks: others.ends_with(LINE_BREAKS),
            }),
            None => SysRegex::new(expression).ok().map(Self::Matches),
        }
    }

    /// Hands out the pieces of `text`.
    fn each<E>(&self, text: &str, take: &mut dyn FnMut(&str) -> Result<(), E>) -> Result<(), E> {
        // Where the last piece ended.
        let mut at = 0;
        match self {
            Self::Matches(regex) => {
                for (start, end) in regex.find_iter(text) {
                    take(&text[at..start])?;
                    take(&text[start..end])?;
                    at = end;
                }
            }
            Self::Spaced { regex, line_breaks } => 'again: loop {
                let from = at;
                for (start, end) in regex.find_iter(&text[from..]) {
                    let (start, end) = (from + start, from + end);
                    take(&text[at..start])?;
                    let kept = end - given_back(&text[start..], end - start, *line_breaks);
                    take(&text[start..kept])?;
                    at = kept;
                    if kept < end {
                        continue 'again;
                    }
                }
                break;
            },
            Self::Digits => {
                for (start, digit) in text.char_indices().filter(|(_, c)| c.is_numeric()) {
                    take(&text[at..start])?;
                    at = start + digit.len_utf8();
                    take(&text[start..at])?;
                }
            }
        }
        take(&text[at..])
    }
}

/// Bytes of the last character of a match at the beginning of `text`, if the match is a run of
/// white space and something follows that the character belongs to; else 0.
fn given_back(text: &str, length: usize, line_breaks: bool) -> usize {
    let run = &text[..length];
    let Some(last) = run.chars().next_back().filter(|last| last.is_whitespace()) else { return 0 };
    let belongs_to_run = length == text.len()
        || length == last.len_utf8()
        || (line_breaks && matches!(last, '\r' | '\n'))
        || !run.chars().all(char::is_whitespace);
    if belongs_to_run { 0 } else { last.len_utf8() }
}

#[cfg(test)]
mod tests;
