//! What our binary formats have in common: each begins with a line of text that says what it is and its version, and is
//! made of little-endian fields behind it.
//!
//! Specified per format in docs/formats/.

use super::digest::Digest;
use crate::error::{Error, Kind, Result};

/// The first line of a format: `virt-replica WHAT VERSION` and a newline.
pub(crate) struct Banner {
    pub what: &'static str,
    pub version: u32,
}

impl Banner {
    /// No banner of any version is longer, newline included.
    pub const LEN_MAX: usize = 40;

    pub fn line(&self) -> String {
        format!("virt-replica {} {}\n", self.what, self.version)
    }

    /// Compares a first line, newline included. [`Kind::Corrupt`] if it is not this format, [`Kind::Protocol`] if it is
    /// another version of it.
    pub fn check(&self, line: &[u8]) -> Result<()> {
        if line == self.line().as_bytes() {
            return Ok(());
        }
        let prefix = format!("virt-replica {} ", self.what);
        let version = line.strip_prefix(prefix.as_bytes()).and_then(|rest| rest.strip_suffix(b"\n"));
        match version.and_then(|v| std::str::from_utf8(v).ok()?.parse::<u32>().ok()) {
            Some(other) => Err(Error::new(
                Kind::Protocol,
                format!(
                    "this is version {other} of the format \"{}\", and only version {} is known here",
                    self.what, self.version
                ),
            )
            .hint("use the version of virt-replica that wrote it")),
            None => Err(self.not_this()),
        }
    }

    pub fn not_this(&self) -> Error {
        Error::new(Kind::Corrupt, format!("this does not begin like a virt-replica {}", self.what))
    }
}

/// Takes fields from the front of bytes whose number was checked before.
pub(crate) struct Fields<'a>(pub &'a [u8]);

impl<'a> Fields<'a> {
    /// # Panics
    /// If fewer bytes are left: the caller has sized the slice by the format's own constants.
    pub fn bytes(&mut self, len: usize) -> &'a [u8] {
        let (field, rest) = self.0.split_at(len);
        self.0 = rest;
        field
    }

    fn array<const N: usize>(&mut self) -> [u8; N] {
        self.bytes(N).try_into().expect("as long as asked for")
    }

    pub fn u8(&mut self) -> u8 {
        self.array::<1>()[0]
    }

    pub fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.array())
    }

    pub fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.array())
    }

    pub fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.array())
    }

    pub fn digest(&mut self) -> Digest {
        Digest(self.array())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_banner_tells_a_stranger_from_another_version() {
        let banner = Banner { what: "patch", version: 1 };
        assert_eq!(banner.line(), "virt-replica patch 1\n");
        assert!(banner.check(b"virt-replica patch 1\n").is_ok());
        for (line, kind) in [
            (&b"virt-replica patch 2\n"[..], Kind::Protocol),
            (b"virt-replica patch 1", Kind::Corrupt),
            (b"virt-replica patch one\n", Kind::Corrupt),
            (b"virt-replica changes 1\n", Kind::Corrupt),
            (b"", Kind::Corrupt),
        ] {
            assert_eq!(banner.check(line).unwrap_err().kind(), kind, "{line:?}");
        }
        let longest = Banner { what: "changes", version: u32::MAX };
        assert!(longest.line().len() <= Banner::LEN_MAX);
    }

    #[test]
    fn fields_are_little_endian() {
        let mut fields = Fields(&[1, 2, 0, 3, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!((fields.u8(), fields.u16(), fields.u32(), fields.u64()), (1, 2, 3, 4));
        assert!(fields.0.is_empty());
    }
}
