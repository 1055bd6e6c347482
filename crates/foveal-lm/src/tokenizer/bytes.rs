//! The two ways in which the text of a token writes bytes: GPT-2's alphabet, and SentencePiece's escapes.
//!
//! GPT-2 gives each of the 256 bytes a printable character: a byte that is itself a printable character of Latin-1
//! stands for itself, and the other 68 are numbered from U+0100 on. So a space is `Ġ` and a newline `Ċ`.
//! Source: Radford et al., "Language Models are Unsupervised Multitask Learners" (2019), its `encoder.py`.

/// The character SentencePiece writes for a space.
pub(super) const ESCAPED_SPACE: char = '▁';

/// The character that stands for `byte` in GPT-2's alphabet.
pub(crate) fn to_byte_level(byte: u8) -> char {
    let shift = match byte {
        0..=0x20 => 0x100,
        0x7f..=0xa0 => 0x100 - 0x7f + 0x21,
        0xad => 0x143 - 0xad,
        _ => 0,
    };
    char::from_u32(u32::from(byte) + shift).unwrap_or(char::REPLACEMENT_CHARACTER)
}

/// The bytes that `text` stands for in GPT-2's alphabet; a character outside it stands for itself.
pub(super) fn from_byte_level(text: &str) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(text.len());
    for character in text.chars() {
        match byte_of(character) {
            Some(byte) => bytes.push(byte),
            None => bytes.extend_from_slice(character.encode_utf8(&mut [0; 4]).as_bytes()),
        }
    }
    bytes
}

fn byte_of(character: char) -> Option<u8> {
    let code = u32::from(character);
    let byte = match code {
        0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff => code,
        0x100..=0x120 => code - 0x100,
        0x121..=0x142 => code - 0x121 + 0x7f,
        0x143 => 0xad,
        _ => return None,
    };
    u8::try_from(byte).ok()
}

/// The byte that a token such as `<0x0A>` stands for.
pub(super) fn parse_hexadecimal(text: &str) -> Option<u8> {
    let digits = text.strip_prefix("<0x")?.strip_suffix('>')?;
    let hexadecimal = digits.len() == 2 && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
    hexadecimal.then(|| u8::from_str_radix(digits, 16).ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_alphabet_has_a_character_for_every_byte() {
        let text: String = (0..=255).map(to_byte_level).collect();
        assert_eq!(from_byte_level(&text), (0..=255).collect::<Vec<u8>>());
        assert!(!text.contains([' ', '\n', '\u{a0}', '\u{ad}', char::REPLACEMENT_CHARACTER]));
        assert_eq!([b' ', b'\n', 0x7f, 0xa0, 0xad].map(to_byte_level), ['Ġ', 'Ċ', 'ġ', 'ł', 'Ń']);
    }

    #[test]
    fn only_two_digits_name_a_byte() {
        assert_eq!(parse_hexadecimal("<0x0A>"), Some(10));
        for text in ["<0xA>", "<0x0AB>", "<0x+1>", "0x0A", "<0xé>", ""] {
            assert_eq!(parse_hexadecimal(text), None, "{text}");
        }
    }
}
