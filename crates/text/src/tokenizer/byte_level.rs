//! The alphabet of byte-level BPE (GPT-2, 2019): every byte is written as one printable character.

/// The byte that `letter` stands for in a byte-level vocabulary.
///
/// Printable bytes of Latin-1 stand for themselves; the others are numbered from U+0100 in order.
pub(crate) fn byte_of(letter: char) -> Option<u8> {
    let code = u32::from(letter);
    match code {
        0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff => Some(code as u8),
        0x100..=0x120 => Some((code - 0x100) as u8),
        0x121..=0x142 => Some((code - 0x121 + 0x7f) as u8),
        0x143 => Some(0xad),
        _ => None,
    }
}

/// The character that `byte` is written as.
pub(crate) fn letter_of(byte: u8) -> char {
    let shifted = |first: u32, at: u8| char::from_u32(first + u32::from(at)).unwrap_or_default();
    match byte {
        0x00..=0x20 => shifted(0x100, byte),
        0x7f..=0xa0 => shifted(0x121, byte - 0x7f),
        0xad => '\u{143}',
        _ => char::from(byte),
    }
}

/// The bytes that a token of a byte-level vocabulary stands for. A token with a character that is
/// not of the alphabet stands for its own UTF-8.
pub(crate) fn bytes_of(token: &str) -> Vec<u8> {
    token
        .chars()
        .map(byte_of)
        .collect::<Option<Vec<u8>>>()
        .unwrap_or_else(|| token.as_bytes().to_vec())
}

#[cfg(test)]
mod tests {
    use super::{byte_of, letter_of};

    #[test]
    fn each_byte_has_exactly_one_character() {
        let mut seen: Vec<u8> = (0..0x400).filter_map(char::from_u32).filter_map(byte_of).collect();
        seen.sort_unstable();
        assert_eq!(seen, (0..=255).collect::<Vec<u8>>());
        assert!(seen.iter().all(|byte| byte_of(letter_of(*byte)) == Some(*byte)));
        assert_eq!(byte_of('Ġ'), Some(b' '));
        assert_eq!(byte_of('Ċ'), Some(b'\n'));
    }
}
