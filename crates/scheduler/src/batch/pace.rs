//! How much of prompts a step takes while others wait for their next token.

use pomona_types::Micros;

/// Fewest tokens of prompts in a step: fewer would unpack weights for too little work.
const TOKENS_LEAST: u32 = 64;
/// Tokens come in whole tiles of this many where there are more.
const TILE: u32 = 16;
/// What the newest step counts in the means.
const NEWEST: f64 = 0.2;

/// What steps have cost so far.
#[derive(Clone, Debug, Default)]
pub(super) struct Pace {
    /// Microseconds of a step without prompts.
    decode: f64,
    /// Microseconds that each token of a prompt adds.
    token: f64,
}

/// A step that was planned.
#[derive(Clone, Copy, Debug)]
pub(super) struct Flight {
    /// Its number.
    pub(super) step: u64,
    pub(super) begun: Micros,
    pub(super) prompt_tokens: u32,
}

impl Pace {
    /// Takes note of a step that is over.
    pub(super) fn learn(&mut self, flight: Flight, now: Micros) {
        let tokens = flight.prompt_tokens;
        let took = (now - flight.begun).0 as f64;
        let learn = |mean: &mut f64, new: f64| {
            *mean = if *mean > 0.0 { *mean + NEWEST * (new - *mean) } else { new };
        };
        if tokens == 0 {
            learn(&mut self.decode, took);
        } else if tokens >= TILE {
            learn(&mut self.token, (took - self.decode).max(0.0) / f64::from(tokens));
        }
    }

    /// Tokens of prompts with which a step takes about `target`; as many as there are until the
    /// cost is known.
    pub(super) fn prompt_tokens(&self, target: Micros) -> u32 {
        if self.token == 0.0 {
            return u32::MAX;
        }
        let tokens = (target.0 as f64 - self.decode) / self.token;
        (tokens as u32 / TILE * TILE).max(TOKENS_LEAST)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_step_may_take_follows_from_what_steps_cost() {
        let mut pace = Pace::default();
        assert_eq!(pace.prompt_tokens(Micros(100_000)), u32::MAX, "nothing is known");
        let mut now = 0;
        let mut step = |pace: &mut Pace, tokens: u32, micros: u64| {
            let flight = Flight { step: 1, begun: Micros(now), prompt_tokens: tokens };
            now += micros;
            pace.learn(flight, Micros(now));
        };
        for _ in 0..50 {
            step(&mut pace, 0, 10_000);
            step(&mut pace, 256, 10_000 + 256 * 500);
        }
        // 90 ms at half a millisecond a token are 180, which is eleven tiles.
        assert_eq!(pace.prompt_tokens(Micros(100_000)), 176);
        assert_eq!(pace.prompt_tokens(Micros(1_000)), TOKENS_LEAST);
        for _ in 0..50 {
            step(&mut pace, 64, 10_000 + 64 * 2_000);
        }
        assert_eq!(pace.prompt_tokens(Micros(300_000)), 144, "it learns");
    }
}
