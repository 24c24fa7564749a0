//! Digest of a block, of a node above blocks, and of a whole disk.
//!
//! - A block: BLAKE3 of its 64 KiB; a short last block is hashed as if padded with zeros, so that growing a disk by
//!   zeros changes no digest. A block of zeros has the constant [`Digest::ZERO`], so that holes cost nothing.
//! - A node: BLAKE3 in key-derivation mode (its own domain) over its 64 children; all children zero: zero.
//!   Missing children on the right edge count as zero.
//! - A disk's root: BLAKE3 in a third domain over size and topmost node: it binds the size.
//!
//! Specified in docs/formats/digest.md.

use serde::{Deserialize, Serialize};
use std::fmt;

/// 32 bytes of BLAKE3, or all zero for zeros.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Digest(pub [u8; 32]);

impl Digest {
    /// Of a block, a subtree that reads as zeros.
    pub const ZERO: Digest = Digest([0; 32]);
    pub const LEN: usize = 32;

    pub fn is_zero(&self) -> bool {
        *self == Self::ZERO
    }

    pub fn from_hex(text: &str) -> Option<Digest> {
        let mut out = [0u8; 32];
        if text.len() != 64 {
            return None;
        }
        for (byte, pair) in out.iter_mut().zip(text.as_bytes().chunks(2)) {
            *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
        }
        Some(Digest(out))
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl Serialize for Digest {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let text = String::deserialize(d)?;
        Digest::from_hex(&text).ok_or_else(|| serde::de::Error::custom("a digest has 64 hex digits"))
    }
}
