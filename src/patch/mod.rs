//! The patch: an ordered stream of changed blocks that turns one point of a disk into the next. One format, on the wire
//! and in a file.
//!
//! [`encode`] makes it: records are encoded independently of each other, by as many threads as wished, and put in order
//! by one [`StreamTail`]. [`decode`] takes it apart, from any cut of the bytes.
//!
//! Invariants
//! - Records ascend, do not overlap and lie within the disk; nothing follows the trailer.
//! - Every record names the digest its block must have *after* it was applied. The decoder guards the structure;
//!   whoever applies a record compares that digest ([`check_block`]), and at the end the root.
//! - Nothing is allocated on the word of the stream: a length is compared with what the disk allows first.
//!
//! Specified in docs/formats/patch.md.

mod compression;
pub mod decode;
pub mod encode;
mod pieces;
mod record;

pub use compression::Compression;
pub use decode::{Decoder, Item, Limits};
pub use encode::{RecordEncoder, StreamTail};
pub use pieces::PieceMask;

use crate::block::digest::{Digest, block_digest};
use crate::block::layout::{Banner, Fields};
use crate::block::{BLOCK_LEN, BlockIndex, DiskSize};
use crate::error::{Error, Kind, Result};
use crate::name::{DiskName, DomainUuid};
use crate::patch::record::{CHECK_LEN, check_of};

const BANNER: Banner = Banner { what: "patch", version: 1 };

/// Bytes of a UUID as text.
const UUID_LEN: usize = 36;

/// Bytes of the stream's header without the disk's name, counted as its length field does.
const HEADER_LEN_MIN: usize = 4 + 4 + 4 + 8 + 8 + Digest::LEN + UUID_LEN + 1 + CHECK_LEN;

/// Longest header of this version: a disk name has at most 32 bytes.
const HEADER_LEN_MAX: usize = HEADER_LEN_MIN + 32;

/// Flag: the patch starts from a point (and not from nothing), and its root is given.
const FLAG_FROM_ROOT: u32 = 1;

/// Flag: the patch is of an image that is no disk of a domain; the root alone says what it applies to. A reader that
/// does not know it refuses it for its unknown flags.
const FLAG_PLAIN: u32 = 2;

/// What stands in the place of a disk's name in the patch of a plain image.
const PLAIN_DISK: &str = "image";

/// What a patch is for: it applies to this disk in the state of this root, and to nothing else (I13).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// UUID of the domain; all zero for a plain image.
    pub domain: DomainUuid,
    /// Name of the disk, for example vda; `image` for a plain image.
    pub disk: DiskName,
    /// Size of the disk before. 0 where the patch starts from nothing.
    pub size_from: DiskSize,
    /// Size of the disk after.
    pub size: DiskSize,
    /// Root of the disk before; `None`: the patch starts from nothing.
    pub from_root: Option<Digest>,
}

impl Header {
    /// Of a plain image: it applies to whatever has this size and root. `before` is `None` where it starts from
    /// nothing.
    pub fn plain(before: Option<(DiskSize, Digest)>, size: DiskSize) -> Header {
        let (domain, disk) = plain_names();
        let size_from = before.map_or(DiskSize(0), |(size, _)| size);
        Header { domain, disk, size_from, size, from_root: before.map(|(_, root)| root) }
    }

    /// Whether it is bound by its root alone, and to no disk of a domain.
    pub fn is_plain(&self) -> bool {
        self.domain.is_nil()
    }

    /// Banner and header, as a stream begins.
    ///
    /// # Panics
    /// If the patch starts from nothing and yet from a size.
    pub fn encode(&self) -> Vec<u8> {
        assert!(self.from_root.is_some() || self.size_from == DiskSize(0), "from nothing means from size 0");
        let disk = self.disk.as_str();
        let disk_len = u8::try_from(disk.len()).expect("a disk name has at most 32 bytes");
        let header_len = (HEADER_LEN_MIN + disk.len()) as u32;
        let mut out = BANNER.line().into_bytes();
        out.extend_from_slice(&header_len.to_le_bytes());
        out.extend_from_slice(&(BLOCK_LEN as u32).to_le_bytes());
        let from_root = if self.from_root.is_some() { FLAG_FROM_ROOT } else { 0 };
        let plain = if self.is_plain() { FLAG_PLAIN } else { 0 };
        out.extend_from_slice(&(from_root | plain).to_le_bytes());
        out.extend_from_slice(&self.size_from.0.to_le_bytes());
        out.extend_from_slice(&self.size.0.to_le_bytes());
        out.extend_from_slice(&self.from_root.unwrap_or(Digest::ZERO).0);
        out.extend_from_slice(self.domain.as_str().as_bytes());
        out.push(disk_len);
        out.extend_from_slice(disk.as_bytes());
        let check = check_of(&out);
        out.extend_from_slice(&check);
        out
    }

    /// `bytes` are the banner (checked already) and the header, whose length field is known to be right.
    fn decode(bytes: &[u8], banner_len: usize) -> Result<Header, &'static str> {
        let (guarded, check) = bytes.split_at(bytes.len() - CHECK_LEN);
        if check != check_of(guarded) {
            return Err("its header is damaged");
        }
        let mut fields = Fields(&guarded[banner_len + 4..]);
        if fields.u32() != BLOCK_LEN as u32 {
            return Err("it has blocks of another length");
        }
        let flags = fields.u32();
        let (size_from, size, from_root) = (DiskSize(fields.u64()), DiskSize(fields.u64()), fields.digest());
        let domain = text(fields.bytes(UUID_LEN)).and_then(|t| DomainUuid::new(t).ok()).ok_or("it names no domain")?;
        if usize::from(fields.u8()) != fields.0.len() {
            return Err("the length of its disk's name is wrong");
        }
        let disk = text(fields.0).and_then(|t| DiskName::new(t).ok()).ok_or("it names no disk")?;
        let is_plain = flags & FLAG_PLAIN != 0;
        if is_plain != domain.is_nil() || (is_plain && disk.as_str() != PLAIN_DISK) {
            return Err("it is of a plain image and yet of a domain");
        }
        let from_root = match flags & !FLAG_PLAIN {
            FLAG_FROM_ROOT => Some(from_root),
            0 if from_root.is_zero() && size_from == DiskSize(0) => None,
            0 => return Err("it starts from nothing and yet from something"),
            _ => return Err("it has unknown flags"),
        };
        Ok(Header { domain, disk, size_from, size, from_root })
    }
}

/// What stands for domain and disk where there are none.
pub fn plain_names() -> (DomainUuid, DiskName) {
    (DomainUuid::nil(), DiskName::new(PLAIN_DISK).expect("the constant is a disk's name"))
}

/// How a patch ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Trailer {
    /// Records before the trailer.
    pub records: u64,
    /// Root of the disk after the patch, as the source computed it.
    pub to_root: Digest,
}

/// Bytes of the header in front of each record's payload.
pub const RECORD_HEAD_LEN: usize = record::HEAD_LEN;

/// Bytes of the end of a patch: the trailer's record and its payload.
pub const TRAILER_LEN: usize = record::HEAD_LEN + record::TRAILER_LEN;

/// The to-root of a patch whose last [`TRAILER_LEN`] bytes these are; `None` if they are no trailer.
pub fn to_root_at_end(end: &[u8]) -> Option<Digest> {
    let head = record::Head::decode(end.get(..record::HEAD_LEN)?).ok()?;
    (end.len() == TRAILER_LEN && head.kind == record::RecordKind::End).then_some(head.digest)
}

/// Compares a block as it is after a record was applied with the digest the record names.
pub fn check_block(block: BlockIndex, bytes: &[u8], expected: Digest) -> Result<()> {
    let found = block_digest(bytes);
    if found == expected {
        return Ok(());
    }
    let what = format!("block {} does not have the digest that the patch promises ({found}, not {expected})", block.0);
    Err(Error::new(Kind::Corrupt, what).offset(block.offset()))
}

fn text(bytes: &[u8]) -> Option<&str> {
    std::str::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests;
