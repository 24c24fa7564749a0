//! What a protected file says of itself to a reader without any key: that it is encrypted, for how many recipients, and
//! which key signed it. Pure; nothing here proves anything.
//!
//! Formats: docs/formats/envelope.md.

use super::crypt::{ARMOR, BANNER};
use crate::error::{Error, Kind, Result, printable};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Serialize;

/// So many bytes of a file hold every header that is looked at.
pub const BEGINNING_LEN: usize = 64 << 10;

/// Most kinds of recipients that are told apart; age knows a handful.
const KINDS_MAX: usize = 16;

/// Most of a word of the header, or of a comment, that is shown.
const WORD_MAX: usize = 40;
const COMMENT_MAX: usize = 300;

/// Lines that age puts in so that readers get used to unknown ones. They are no recipients.
const GREASE: &str = "-grease";

/// The unencrypted header of a file of age.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Encrypted {
    /// As the first line says: `v1`.
    pub version: String,
    /// Written as text, as for a letter.
    pub armored: bool,
    /// How many recipients there are of each kind (`X25519`). Age does not write down who they are.
    pub recipients: Vec<(String, u64)>,
    /// The header ends within what was looked at.
    pub whole: bool,
}

/// The header of a file that begins so; `None` if it is not encrypted.
pub fn encrypted(beginning: &[u8]) -> Option<Encrypted> {
    if beginning.starts_with(ARMOR) {
        return Some(Encrypted { version: String::new(), armored: true, recipients: Vec::new(), whole: false });
    }
    let rest = beginning.strip_prefix(BANNER)?;
    let mut lines = rest.split(|byte| *byte == b'\n').map(|line| String::from_utf8_lossy(line));
    let version = printable(&lines.next().unwrap_or_default(), WORD_MAX);
    let (mut recipients, mut whole) = (Vec::<(String, u64)>::new(), false);
    for line in lines {
        if line.starts_with("--- ") {
            whole = true;
            break;
        }
        let Some(kind) = line.strip_prefix("-> ").and_then(|rest| rest.split(' ').next()) else { continue };
        if kind.ends_with(GREASE) {
            continue;
        }
        let kind = printable(kind, WORD_MAX);
        match recipients.iter().position(|(known, _)| *known == kind) {
            Some(at) => recipients[at].1 += 1,
            None if recipients.len() < KINDS_MAX => recipients.push((kind, 1)),
            None => {}
        }
    }
    Some(Encrypted { version, armored: false, recipients, whole })
}

/// What a signature of minisign says beside the bytes. Nothing of it was checked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SignatureSeen {
    /// Of the key, as minisign prints it: 16 hex digits.
    pub key_id: String,
    /// It signs a hash of the file; a signature of the old kind does not.
    pub hashed: bool,
    /// The comment that the signature covers.
    pub comment: String,
    /// The comment that anybody may have changed.
    pub untrusted_comment: String,
}

/// Reads the text of a `.minisig` file. `Corrupt` if it is none.
pub fn signature(text: &str) -> Result<SignatureSeen> {
    let none = || Error::new(Kind::Corrupt, "this is no signature of minisign").hint("bring the .minisig file again");
    let mut lines = text.lines();
    let untrusted = lines.next().and_then(|line| line.strip_prefix("untrusted comment:")).ok_or_else(none)?;
    let bytes = lines.next().and_then(|line| STANDARD.decode(line.trim()).ok()).ok_or_else(none)?;
    let (algorithm, rest) = bytes.split_first_chunk::<2>().ok_or_else(none)?;
    let (key_id, signed) = rest.split_first_chunk::<8>().ok_or_else(none)?;
    let hashed = match algorithm {
        b"ED" => true,
        b"Ed" => false,
        _ => return Err(none()),
    };
    if signed.len() != 64 {
        return Err(none());
    }
    let comment = lines.next().and_then(|line| line.strip_prefix("trusted comment:")).ok_or_else(none)?;
    Ok(SignatureSeen {
        key_id: format!("{:016X}", u64::from_le_bytes(*key_id)),
        hashed,
        comment: printable(comment, COMMENT_MAX),
        untrusted_comment: printable(untrusted, COMMENT_MAX),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn recipients_are_counted_and_grease_is_none() {
        let header = b"age-encryption.org/v1\n-> X25519 abc\nbody\n-> X25519 def\nbody\n-> ssh-rsa x\nbody\n\
            -> 7a-grease x\nbody\n--- mac\nnothing of this counts\n-> X25519 abc\n";
        let seen = encrypted(header).unwrap();
        assert_eq!(seen.recipients, [("X25519".to_owned(), 2), ("ssh-rsa".to_owned(), 1)]);
        assert!(seen.whole && !seen.armored && seen.version == "v1");
        assert!(!encrypted(&header[..60]).unwrap().whole);
        assert_eq!(encrypted(b"virt-replica patch 1\n"), None);
    }

    #[test]
    fn kinds_and_words_of_a_header_are_bounded_and_clean() {
        let mut header = b"age-encryption.org/v\x1b[2J1\n".to_vec();
        (0..1000).for_each(|n| header.extend_from_slice(format!("-> k\x1b{n}{}\n", "x".repeat(99)).as_bytes()));
        let seen = encrypted(&header).unwrap();
        assert_eq!(seen.recipients.len(), KINDS_MAX);
        let words = seen.recipients.iter().map(|(kind, _)| kind).chain([&seen.version]);
        assert!(words.clone().all(|word| word.len() <= WORD_MAX + 8 && !word.contains('\x1b')), "{seen:?}");
    }

    #[test]
    fn what_is_no_signature_is_none() {
        for text in ["", "untrusted comment: x", "untrusted comment: x\nRUQ=\ntrusted comment: y\nz\n", "\u{0}\n\n\n"] {
            assert_eq!(signature(text).unwrap_err().kind(), Kind::Corrupt, "{text:?}");
        }
    }
}
