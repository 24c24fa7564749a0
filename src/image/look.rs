//! One layer of a chain as it lies there: its header, its room, and whether a QEMU has it open. Takes no lock.

use super::qcow2::Header;
use super::{Format, Layer, locks, raw};
use crate::error::{Error, Result};
use std::os::unix::fs::MetadataExt;

/// A layer, read and left alone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// The layer as its path and format name it.
    pub layer: Layer,
    /// Length of the file. 0 of a block device.
    pub file_bytes: u64,
    /// What the file occupies.
    pub occupied_bytes: u64,
    /// Of a qcow2 image.
    pub header: Option<Header>,
    /// A QEMU program holds its locks on the file.
    pub in_qemu: bool,
}

/// Reads the header of a layer. It opens a regular file or a block device, as the layer says, and nothing else: a FIFO
/// is refused and never waited for. QEMU's locks are asked for and not taken: a running domain notices nothing.
pub fn look(layer: &Layer) -> Result<Seen> {
    let file = raw::open_file(layer, false)?;
    let cannot = |e| Error::io("cannot look at the image", &layer.path, e);
    let metadata = file.metadata().map_err(cannot)?;
    let header = match layer.format {
        Format::Qcow2 => Some(Header::read(&file, &layer.path)?),
        Format::Raw => None,
    };
    Ok(Seen {
        layer: layer.clone(),
        file_bytes: metadata.len(),
        occupied_bytes: metadata.blocks().saturating_mul(512),
        header,
        in_qemu: locks::is_locked(&file).map_err(cannot)?,
    })
}
