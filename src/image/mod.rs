//! The port to the bytes of a disk: a size, extents, and positioned verbs. No cursor, no domains, no replicas.
//!
//! Three adapters stand behind it: [`raw`] (in process), [`qcow2`] (in process, `imago`, where it understands the image
//! completely) and [`nbd`] (through a `qemu-nbd` child, for all the rest). [`open`] chooses and says why.
//!
//! Formats are never probed: a layer's format is what libvirt or our own manifest recorded.

pub mod nbd;
pub mod open;
pub mod qcow2;
pub mod qemu_img;
pub mod qemu_nbd;
pub mod raw;

use crate::block::extent::Extent;
use crate::block::{ByteRange, DiskSize};
use crate::error::Result;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Bytes of one disk, readable at any position by several threads at once.
pub trait Image: Send + Sync {
    /// Size the guest sees, fixed while the image is open.
    fn size(&self) -> DiskSize;

    /// Extents covering exactly `range`, in order, without gaps, neighbours of equal content merged.
    /// Cheap in proportion to the number of extents in the range; reads no guest data. `range` must lie within the size.
    fn extents(&self, range: ByteRange) -> Result<Vec<Extent>>;

    /// Fills `buf` from `offset_bytes`. The range must lie within the size; a short read is an error. Blocks.
    fn read_at(&self, offset_bytes: u64, buf: &mut [u8]) -> Result<()>;
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
    Raw,
    Qcow2,
}

impl Format {
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
    pub path: PathBuf,
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
    pub fn top(&self) -> &Layer {
        self.0.first().expect("a chain is never empty")
    }
}
