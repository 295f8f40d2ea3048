//! Stop strings in a stream of text. Text that could be the beginning of a stop string waits until
//! it is known not to be; the result does not depend on how the text was cut into pieces.

/// What a piece of text led to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StopStep {
    /// Text that may go to the client now.
    pub emit: String,
    /// The stop string that was met, as its index in the list given to [`StopStrings::new`].
    /// Nothing is emitted after it.
    pub hit: Option<usize>,
}

/// Watches a stream for stop strings. The one that *ends* first wins; of several that end at the
/// same place, the longest; of equal ones, the first in the list. An empty string never stops.
///
/// Costs O(stop strings) per byte of text (Knuth, Morris, Pratt, "Fast pattern matching in
/// strings", 1977) and holds back less than the longest stop string.
#[derive(Clone, Debug)]
pub struct StopStrings {
    stops: Vec<Matcher>,
    include_stop: bool,
    held: String,
    hit: Option<usize>,
}

/// One stop string and how much of it the text so far ends with.
#[derive(Clone, Debug)]
struct Matcher {
    index: usize,
    pattern: Vec<u8>,
    /// `fallback[i]`: the longest proper prefix of the pattern that ends `pattern[..=i]`.
    fallback: Vec<u32>,
    matched: usize,
}

impl StopStrings {
    /// Watches for `stops`; `include_stop` keeps the stop string itself in the text.
    pub fn new(stops: Vec<String>, include_stop: bool) -> Self {
        let stops = stops
            .into_iter()
            .enumerate()
            .filter(|(_, stop)| !stop.is_empty())
            .map(|(index, stop)| Matcher::new(index, stop.into_bytes()))
            .collect();
        Self { stops, include_stop, held: String::new(), hit: None }
    }

    /// Takes the next piece of text. After a hit, text is swallowed.
    pub fn push(&mut self, text: &str) -> StopStep {
        if self.hit.is_some() {
            return StopStep { emit: String::new(), hit: self.hit };
        }
        if self.stops.is_empty() {
            return StopStep { emit: text.to_owned(), hit: None };
        }
        for (at, byte) in text.bytes().enumerate() {
            let met = self.stops.iter_mut().filter_map(|stop| stop.step(byte)).min();
            if let Some((std::cmp::Reverse(length), index)) = met {
                self.hit = Some(index);
                let mut emit = std::mem::take(&mut self.held);
                emit.push_str(&text[..=at]);
                if !self.include_stop {
                    emit.truncate(emit.len() - length);
                }
                return StopStep { emit, hit: self.hit };
            }
        }
        let keep = self.stops.iter().map(|stop| stop.matched).max().unwrap_or(0);
        self.held.push_str(text);
        let waiting = self.held.split_off(self.held.len() - keep);
        StopStep { emit: std::mem::replace(&mut self.held, waiting), hit: None }
    }

    /// The text is over: what was held back, unless a stop string was met.
    pub fn flush(&mut self) -> String {
        for stop in &mut self.stops {
            stop.matched = 0;
        }
        std::mem::take(&mut self.held)
    }
}

impl Matcher {
    fn new(index: usize, pattern: Vec<u8>) -> Self {
        let mut fallback = vec![0u32; pattern.len()];
        let mut length = 0;
        for at in 1..pattern.len() {
            while length > 0 && pattern[at] != pattern[length] {
                length = fallback[length - 1] as usize;
            }
            if pattern[at] == pattern[length] {
                length += 1;
            }
            fallback[at] = length as u32;
        }
        Self { index, pattern, fallback, matched: 0 }
    }

    /// Takes one byte; the match that it ends, ordered so that the least is to be preferred.
    fn step(&mut self, byte: u8) -> Option<(std::cmp::Reverse<usize>, usize)> {
        while self.matched > 0 && self.pattern[self.matched] != byte {
            self.matched = self.fallback[self.matched - 1] as usize;
        }
        if self.pattern[self.matched] == byte {
            self.matched += 1;
        }
        (self.matched == self.pattern.len())
            .then_some((std::cmp::Reverse(self.pattern.len()), self.index))
    }
}
