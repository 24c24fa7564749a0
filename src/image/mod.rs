//! The port to the bytes of a disk: a size, extents, and positioned verbs. No cursor, no domains, no replicas.
//!
//! Three adapters stand behind it: [`raw`] (in process), [`qcow2`] (in process, `imago`, where it understands the image
//! completely) and [`nbd`] (through a `qemu-nbd` child, for all the rest). [`open`] chooses and says why; [`qemu_img`]
//! calls that program; [`foreign`] has the formats of others and their writer; [`locks`] keeps QEMU out of
//! an image, and [`look`] reads its header. Beneath them `blockdev` describes chains to QEMU's tools and `program` runs
//! those.
//!
//! Formats are never probed: a layer's format is what libvirt or our own manifest recorded.

mod blockdev;
pub mod chain;
pub mod foreign;
pub mod locks;
pub mod look;
pub mod nbd;
pub mod open;
mod program;
pub mod qcow2;
pub mod qemu_img;
pub mod qemu_nbd;
pub mod raw;
mod write_behind;

use crate::block::extent::{Content, Extent};
use crate::block::{ByteRange, DiskSize};
use crate::error::{Error, Kind, Result};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Bytes of one disk, readable at any position by several threads at once.
pub trait Image: Send + Sync {
    /// Size the guest sees, fixed while the image is open.
    fn size(&self) -> DiskSize;

    /// Extents covering exactly `range`, in order, without gaps, neighbours of equal content merged. Cheap in
    /// proportion to the number of extents in the range; reads no guest data. `range` must lie within the size.
    fn extents(&self, range: ByteRange) -> Result<Vec<Extent>>;

    /// Fills `buf` from `offset_bytes`. The range must lie within the size; a short read is an error. Blocks.
    fn read_at(&self, offset_bytes: u64, buf: &mut [u8]) -> Result<()>;

    /// Says that this range will be read next, in small steps: whoever can begins to fetch it. Does not block.
    fn expect(&self, _range: ByteRange) {}
}

/// An image that may be written. Nothing is durable before [`ImageMut::sync`] returned.
pub trait ImageMut: Image {
    /// Writes `data` at `offset_bytes`, within the size. Blocks.
    fn write_at(&self, offset_bytes: u64, data: &[u8]) -> Result<()>;

    /// Makes `range` read as zeros and, where the format allows it, occupy nothing.
    fn zero(&self, range: ByteRange) -> Result<()>;

    /// Durable when it returns: metadata flushed, data fsynced. An error condemns the image; it is never retried.
    fn sync(&self) -> Result<()>;
}

/// The format of one layer of a chain, as recorded, never as probed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// The bytes of the disk and nothing else, in a file or on a block device.
    Raw,
    /// QEMU's qcow2 format.
    Qcow2,
}

impl Format {
    /// QEMU's name for the format.
    pub fn as_str(self) -> &'static str {
        match self {
            Format::Raw => "raw",
            Format::Qcow2 => "qcow2",
        }
    }
}

/// One layer of a chain: where it lies and what it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layer {
    /// Path of the file or block device.
    pub path: PathBuf,
    /// Format of the image, as its owner recorded it.
    pub format: Format,
    /// A host block device instead of a file.
    #[serde(default)]
    pub block_device: bool,
    /// Where the guest's data of a qcow2 layer with an external data file lies.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data_file: Option<PathBuf>,
}

/// A chain of layers, uppermost first. Never empty.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Chain(pub Vec<Layer>);

impl Chain {
    /// Uppermost layer, which takes the guest's writes.
    pub fn top(&self) -> &Layer {
        self.0.first().expect("a chain is never empty")
    }
}

/// Fails unless `len` bytes from `offset_bytes` lie within `size`. Every adapter asks this before it touches anything.
fn within(size: DiskSize, offset_bytes: u64, len: u64) -> Result<()> {
    match offset_bytes.checked_add(len) {
        Some(end) if end <= size.0 => Ok(()),
        _ => Err(Error::new(Kind::Usage, format!("{len} bytes do not lie within a disk of {size} bytes"))
            .offset(offset_bytes)),
    }
}

/// Collects extents that follow one another, merging neighbours of equal content.
struct Cover {
    at: u64,
    extents: Vec<Extent>,
}

impl Cover {
    fn from(start: u64) -> Self {
        Self { at: start, extents: Vec::new() }
    }

    /// Where the next extent will start.
    fn at(&self) -> u64 {
        self.at
    }

    /// Says that everything up to `end` is `content`. An `end` already covered adds nothing.
    fn extend_to(&mut self, end: u64, content: Content) {
        if end <= self.at {
            return;
        }
        match self.extents.last_mut() {
            Some(last) if last.content == content => last.range.end = end,
            _ => self.extents.push(Extent { range: ByteRange::new(self.at, end), content }),
        }
        self.at = end;
    }

    fn finish(self) -> Vec<Extent> {
        self.extents
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_of_equal_content_merge_and_nothing_is_covered_twice() {
        let mut cover = Cover::from(10);
        cover.extend_to(20, Content::Data);
        cover.extend_to(20, Content::Zero);
        cover.extend_to(30, Content::Data);
        cover.extend_to(25, Content::Zero);
        cover.extend_to(40, Content::Zero);
        assert_eq!(cover.at(), 40);
        assert_eq!(
            cover.finish(),
            [
                Extent { range: ByteRange::new(10, 30), content: Content::Data },
                Extent { range: ByteRange::new(30, 40), content: Content::Zero },
            ]
        );
    }

    #[test]
    fn a_range_that_overflows_is_not_within() {
        assert!(within(DiskSize(512), 0, 512).is_ok());
        assert!(within(DiskSize(512), 512, 0).is_ok());
        assert!(within(DiskSize(512), 1, 512).is_err());
        assert!(within(DiskSize(u64::MAX), u64::MAX, 2).is_err());
    }
}
