//! Units of a disk: bytes, blocks, groups of blocks, and the only conversions between them.
//!
//! Pure: no files, no clock, no threads.

pub mod changes;
pub mod digest;
pub mod extent;
pub(crate) mod layout;
pub mod tree;

use serde::{Deserialize, Serialize};
use std::fmt;
use std::ops::Range;

/// Bytes in a block: our unit of comparison and shipping, equal to qcow2's default cluster and to the default
/// granularity of QEMU's dirty bitmaps, so that one bit, one cluster and one digest speak of the same bytes.
pub const BLOCK_LEN: usize = 64 << 10;

/// Children of one node in the digest tree. A group is the blocks below one lowest parent: 64 blocks, 4 MiB.
pub const FANOUT: usize = 64;

/// Bytes in a group.
pub const GROUP_LEN: u64 = (BLOCK_LEN * FANOUT) as u64;

/// Bytes in a piece, the unit in which changes inside a differing block may travel.
pub const PIECE_LEN: usize = 4 << 10;

/// Size of a disk as the guest sees it, in bytes; not a multiple of anything. A document or message has none above
/// [`DiskSize::MAX`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u64")]
pub struct DiskSize(pub u64);

/// A half-open range of bytes of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ByteRange {
    /// Offset of the first byte.
    pub start: u64,
    /// Offset behind the last byte; equal to `start` in an empty range.
    pub end: u64,
}

/// Number of a block within its disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct BlockIndex(pub u64);

/// Number of a group within its disk; a node of level 1 of the digest tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GroupIndex(pub u64);

/// QEMU's sector: the guest sees whole ones.
pub const SECTOR_LEN: u64 = 512;

impl TryFrom<u64> for DiskSize {
    type Error = String;
    fn try_from(bytes: u64) -> Result<Self, String> {
        match bytes <= Self::MAX.0 {
            true => Ok(DiskSize(bytes)),
            false => Err(format!("a disk of {bytes} bytes is larger than any")),
        }
    }
}

impl DiskSize {
    /// 1 PiB: bounds every length that is derived from a size which a peer sent.
    pub const MAX: DiskSize = DiskSize(1 << 50);

    /// The size that QEMU shows a guest of an image of so many bytes: the last sector counts whole.
    pub fn whole_sectors(self) -> DiskSize {
        DiskSize(self.0.checked_next_multiple_of(SECTOR_LEN).unwrap_or(self.0))
    }

    /// Blocks, the last one possibly short.
    pub fn blocks(self) -> u64 {
        self.0.div_ceil(BLOCK_LEN as u64)
    }

    /// Groups, the last one possibly short.
    pub fn groups(self) -> u64 {
        self.0.div_ceil(GROUP_LEN)
    }

    /// All bytes of a disk of this size.
    pub fn range(self) -> ByteRange {
        ByteRange { start: 0, end: self.0 }
    }
}

impl fmt::Display for DiskSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl BlockIndex {
    /// Offset of the block's first byte in the disk.
    pub fn offset(self) -> u64 {
        self.0 * BLOCK_LEN as u64
    }

    /// The block's bytes within a disk of this size. Empty if the block lies beyond it.
    pub fn bytes(self, size: DiskSize) -> ByteRange {
        let start = self.offset().min(size.0);
        ByteRange { start, end: (self.offset().saturating_add(BLOCK_LEN as u64)).min(size.0) }
    }

    /// Group that contains the block.
    pub fn group(self) -> GroupIndex {
        GroupIndex(self.0 / FANOUT as u64)
    }
}

impl GroupIndex {
    /// The group's bytes within a disk of this size. Empty if the group lies beyond it.
    pub fn bytes(self, size: DiskSize) -> ByteRange {
        let start = (self.0 * GROUP_LEN).min(size.0);
        ByteRange { start, end: (start.saturating_add(GROUP_LEN)).min(size.0) }
    }

    /// The blocks of the group within a disk of this size.
    pub fn blocks(self, size: DiskSize) -> Range<u64> {
        let first = self.0 * FANOUT as u64;
        first..(first + FANOUT as u64).min(size.blocks())
    }
}

impl ByteRange {
    /// The range from byte `start` to before byte `end`. `start` must not be behind `end`.
    pub fn new(start: u64, end: u64) -> Self {
        debug_assert!(start <= end);
        Self { start, end }
    }

    /// Number of bytes in the range.
    pub fn len(self) -> u64 {
        self.end - self.start
    }

    /// True if the range contains no byte.
    pub fn is_empty(self) -> bool {
        self.end == self.start
    }

    /// The part that both have; `None` where they only touch.
    pub fn intersect(self, other: ByteRange) -> Option<ByteRange> {
        let (start, end) = (self.start.max(other.start), self.end.min(other.end));
        (start < end).then_some(ByteRange { start, end })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_sector_counts_whole() {
        let whole = |bytes: u64| DiskSize(bytes).whole_sectors().0;
        assert_eq!([whole(0), whole(1), whole(512), whole(1_000_001)], [0, 512, 512, 1_000_448]);
        assert_eq!(whole(u64::MAX), u64::MAX, "no image is that large");
    }

    #[test]
    fn the_last_block_may_be_short() {
        let size = DiskSize(BLOCK_LEN as u64 + 1);
        assert_eq!(size.blocks(), 2);
        assert_eq!(BlockIndex(1).bytes(size), ByteRange::new(65536, 65537));
        assert!(BlockIndex(2).bytes(size).is_empty());
        assert_eq!(DiskSize(0).blocks(), 0);
    }

    #[test]
    fn groups_end_where_the_disk_ends() {
        let size = DiskSize(GROUP_LEN + 65536);
        assert_eq!(size.groups(), 2);
        assert_eq!(GroupIndex(1).blocks(size), 64..65);
        assert_eq!(GroupIndex(1).bytes(size).len(), 65536);
        assert_eq!(BlockIndex(64).group(), GroupIndex(1));
    }
}
