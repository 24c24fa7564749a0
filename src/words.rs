//! Text and numbers of a stranger, made harmless once: where a document comes in, before any type sees it.
//!
//! The wire and the manifest pass through here, so a field that is added tomorrow is covered, too. Pure.
//!
//! Invariants of what comes out
//! - No string has a control character: terminals and logs may print it.
//! - No string is longer than [`TEXT_MAX`] bytes as it is written.
//! - Of a message, no integer is larger than [`NUMBER_MAX`]: two of them can be added without a thought.

use crate::error::printable;
use serde::{Deserialize, Deserializer};
use std::borrow::Cow;

/// Longest string of a document, in bytes of its JSON. Longer ones are cut.
pub const TEXT_MAX: usize = 8 << 10;

/// Largest integer of a message (2^53): what every JSON parser of the world reads exactly.
pub const NUMBER_MAX: u64 = 1 << 53;

/// Longest sentence that is kept in a record, in bytes.
pub const SENTENCE_MAX: usize = 400;

/// A message as it may be read. The error says what is wrong with it, as part of a sentence.
pub fn of_message(json: &[u8]) -> Result<Cow<'_, [u8]>, &'static str> {
    let clean = of_document(json);
    match has_large_number(&clean) {
        true => Err("a number is larger than any that is meant to travel"),
        false => Ok(clean),
    }
}

/// A document of our own that holds a stranger's words. Its numbers are left alone: an old one must stay readable.
pub fn of_document(json: &[u8]) -> Cow<'_, [u8]> {
    if is_clean(json) {
        return Cow::Borrowed(json);
    }
    let mut walk = Walk { input: json, out: Vec::with_capacity(json.len()) };
    while let Some(byte) = walk.next() {
        match byte {
            b'"' => walk.string(),
            other => walk.out.push(other),
        }
    }
    Cow::Owned(walk.out)
}

/// Whether there can be nothing to change: most documents cost no copy.
fn is_clean(json: &[u8]) -> bool {
    let suspect = |byte: &u8| matches!(byte, b'\\' | 0x7f | 0xc2);
    // Without escapes, every second part between quotes is a string.
    let mut strings = json.split(|byte| *byte == b'"').skip(1).step_by(2);
    !json.iter().any(suspect) && strings.all(|text| text.len() <= TEXT_MAX)
}

fn has_large_number(json: &[u8]) -> bool {
    let (mut in_string, mut fraction, mut value) = (false, false, 0u64);
    let mut bytes = json.iter();
    while let Some(byte) = bytes.next() {
        match byte {
            b'\\' if in_string => drop(bytes.next()),
            b'"' => in_string = !in_string,
            b'0'..=b'9' if !in_string => {
                value = value.saturating_mul(10).saturating_add(u64::from(byte - b'0'));
                if value > NUMBER_MAX && !fraction {
                    return true;
                }
                continue;
            }
            _ => {}
        }
        (fraction, value) = (*byte == b'.', 0);
    }
    false
}

struct Walk<'a> {
    input: &'a [u8],
    out: Vec<u8>,
}

impl Walk<'_> {
    fn next(&mut self) -> Option<u8> {
        let (first, rest) = self.input.split_first()?;
        self.input = rest;
        Some(*first)
    }

    /// The rest of a string, its closing quote included. Broken JSON is passed on: the parser reports it.
    fn string(&mut self) {
        self.out.push(b'"');
        let start = self.out.len();
        let mut full = false;
        while let Some(byte) = self.next() {
            if byte == b'"' {
                self.out.push(byte);
                return;
            }
            let from = self.out.len();
            // Cut between characters only, and never inside of an escape.
            full |= from - start >= TEXT_MAX && byte & 0xc0 != 0x80;
            self.character(byte);
            if full {
                self.out.truncate(from);
            }
        }
    }

    fn character(&mut self, byte: u8) {
        match (byte, self.input) {
            (b'\\', [b'b' | b'f' | b'n' | b'r' | b't', ..]) => {
                self.next();
                self.out.push(b' ');
            }
            (b'\\', [b'u', hex @ ..]) => {
                let code = hex.get(..4).and_then(|h| std::str::from_utf8(h).ok());
                let code = code.and_then(|h| u32::from_str_radix(h, 16).ok());
                match code {
                    Some(0..=0x1f | 0x7f..=0x9f) => {
                        self.input = &self.input[5..];
                        self.out.push(b' ');
                    }
                    // Two escapes make one character: both, or none of them.
                    Some(0xd800..=0xdbff) if hex.get(4..6) == Some(b"\\u") => self.copy(byte, 11),
                    _ => self.copy(byte, 5),
                }
            }
            (b'\\', _) => self.copy(byte, 1),
            (0x7f, _) => self.out.push(b' '),
            (0xc2, [0x80..=0x9f, ..]) => {
                self.next();
                self.out.push(b' ');
            }
            _ => self.out.push(byte),
        }
    }

    /// This byte and as many more, as far as there are any.
    fn copy(&mut self, byte: u8, more: usize) {
        let (copied, rest) = self.input.split_at(more.min(self.input.len()));
        self.out.push(byte);
        self.out.extend_from_slice(copied);
        self.input = rest;
    }
}

/// For fields that become part of a record: a sentence, cut to [`SENTENCE_MAX`].
pub fn sentence<'de, D: Deserializer<'de>>(input: D) -> Result<String, D::Error> {
    Ok(printable(&String::deserialize(input)?, SENTENCE_MAX))
}

/// The same, of a field that may be absent.
pub fn maybe_sentence<'de, D: Deserializer<'de>>(input: D) -> Result<Option<String>, D::Error> {
    Ok(Option::<String>::deserialize(input)?.map(|text| printable(&text, SENTENCE_MAX)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn read(json: &[u8]) -> Value {
        serde_json::from_slice(&of_message(json).unwrap()).unwrap()
    }

    #[test]
    fn every_way_to_write_a_control_character_becomes_a_space() {
        let text = b"{\"a\":\"x\\u001b[2J\\n\\r\\t\\b\\f\\u0007\\u007F\\u009b\x7f\xc2\x9by\"}";
        assert_eq!(read(text)["a"], json!("x [2J          y"));
    }

    #[test]
    fn harmless_text_and_structure_stay_as_they_are() {
        for value in [
            json!({"a": "\"\\/ä€😀", "b": [1, -2, 0.5, 1e3, true, null], "c": {}}),
            json!("\u{a0}\u{e000}"),
            json!([NUMBER_MAX]),
        ] {
            assert_eq!(read(value.to_string().as_bytes()), value);
        }
        assert_eq!(read(br#""\ud83d\ude00\u00e4\\n""#), json!("😀ä\\n"));
        // Broken JSON stays broken.
        for broken in [&b"\"abc"[..], b"\"\\u12", b"{\"a\":\\}", b"\"\\"] {
            assert!(serde_json::from_slice::<Value>(&of_message(broken).unwrap()).is_err());
        }
    }

    #[test]
    fn long_text_is_cut_between_characters() {
        for unit in ["x", "ä", "😀", "\\\\", "\\ud83d\\ude00", "\\\"", "\\u001b"] {
            let json = format!("[\"{}\",7]", unit.repeat(3 * TEXT_MAX));
            let value = read(json.as_bytes());
            let length = value[0].as_str().unwrap().len();
            assert!((TEXT_MAX / 12..=TEXT_MAX + 12).contains(&length), "{unit}: {length}");
            assert_eq!(value[1], 7);
        }
    }

    #[test]
    fn numbers_beyond_the_bound_are_refused_in_messages_only() {
        for large in ["9007199254740993", "18446744073709551615", "-9007199254740993", "1e9, 99999999999999999999"] {
            let json = format!("[{large}]");
            assert!(of_message(json.as_bytes()).is_err(), "{large}");
            assert_eq!(*of_document(json.as_bytes()), *json.as_bytes());
        }
        assert!(of_message(br#"["99999999999999999999", 0.99999999999999999999]"#).is_ok(), "text, and a fraction");
    }

    #[test]
    fn a_sentence_is_short() {
        #[derive(Deserialize)]
        struct Record {
            #[serde(deserialize_with = "sentence")]
            reason: String,
            #[serde(default, deserialize_with = "maybe_sentence")]
            more: Option<String>,
        }
        let long = json!({"reason": "x".repeat(200_000), "more": "a\u{1b}"}).to_string();
        let record: Record = serde_json::from_str(&long).unwrap();
        assert!(record.reason.len() <= SENTENCE_MAX && record.reason.contains(" [...] "));
        assert_eq!(record.more.as_deref(), Some("a "));
        let none: Record = serde_json::from_str("{\"reason\":\"\"}").unwrap();
        assert_eq!(none.more, None);
    }
}
