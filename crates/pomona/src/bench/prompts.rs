//! Text and tokens to measure with: the same on every machine, different in every request, so that
//! no prefix cache helps unless it is meant to.

/// Common words; one is a token or a little more in most vocabularies.
const WORDS: &str = "time year people way day man thing woman life child world school state family \
    student group country problem hand part place case week company system program question work \
    government number night point home water room mother area money story fact month lot right \
    study book eye job word business issue side kind head house service friend father power hour \
    game line end member law car city community name president team minute idea body back parent \
    face others level office door health person art war history party result change morning \
    reason research girl guy moment air teacher force education river garden winter summer letter \
    music paper table window engine market ocean bridge forest silver copper island valley";

/// A small generator of uniform numbers: SplitMix64 (Steele, Lea, Flood, "Fast splittable
/// pseudorandom number generators", 2014).
pub struct Numbers(u64);

impl Numbers {
    /// The sequence of `seed`.
    pub fn new(seed: u64) -> Numbers {
        Numbers(seed)
    }

    /// A number below `bound`, which is at least 1.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (z ^ (z >> 31)) % bound
    }
}

/// `count` words drawn with `seed`.
pub fn words(count: usize, seed: u64) -> String {
    let all: Vec<&str> = WORDS.split_whitespace().collect();
    let mut numbers = Numbers::new(seed);
    let mut text = String::new();
    for index in 0..count {
        if index > 0 {
            text.push(' ');
        }
        text.push_str(all[numbers.below(all.len() as u64) as usize]);
    }
    text
}

/// `count` words of which the first three quarters depend on `shared` alone.
pub fn words_with_shared_prefix(count: usize, shared: u64, seed: u64) -> String {
    let prefix = count / 4 * 3;
    format!("{} {}", words(prefix, shared), words(count - prefix, seed))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_are_repeatable_and_distinct() {
        assert_eq!(words(20, 7), words(20, 7));
        assert_ne!(words(20, 7), words(20, 8));
        assert_eq!(words(20, 7).split(' ').count(), 20);
    }

    #[test]
    fn a_shared_prefix_is_three_quarters() {
        let [a, b] = [1, 2].map(|seed| words_with_shared_prefix(40, 9, seed));
        let same = a.split(' ').zip(b.split(' ')).take_while(|(x, y)| x == y).count();
        assert!((30..34).contains(&same), "{same}");
    }
}
