//! The words of reading a plain image that both its source and its redo need: its layer, its lock, one block.

use crate::block::{BLOCK_LEN, BlockIndex, DiskSize};
use crate::error::{Error, Kind, Result, advice};
use crate::image::locks::QemuLock;
use crate::image::{Format, Image, Layer, chain};
use std::path::Path;

/// Takes the whole lock of an image that is to be written. `Busy` if a QEMU has it open.
pub(super) fn lock_whole(path: &Path) -> Result<QemuLock> {
    QemuLock::take(path)?.ok_or_else(|| in_use(path, "a QEMU program has the image open, or another copy"))
}

/// Reads one block, which lies in the image at least in part, as it would be in a disk of `size`: cut, or zeros behind
/// its end.
pub(super) fn read_block(image: &dyn Image, block: BlockIndex, size: DiskSize) -> Result<Vec<u8>> {
    let wanted = block.bytes(size).len() as usize;
    let mut bytes = vec![0; wanted.max(block.bytes(image.size()).len() as usize).min(BLOCK_LEN)];
    let there = block.bytes(image.size()).len().min(wanted as u64) as usize;
    image.read_at(block.offset().min(image.size().0), &mut bytes[..there])?;
    bytes.truncate(wanted);
    Ok(bytes)
}

/// The layer at a path: a file or a block device.
pub(super) fn layer(path: &Path, format: Format) -> Result<Layer> {
    std::fs::metadata(path).map_err(|e| Error::io("cannot look at the image", path, e))?;
    let block_device = chain::is_block_device(path);
    Ok(Layer { path: path.to_owned(), format, block_device, data_file: None })
}

/// The error of an image that somebody else has.
pub(super) fn in_use(path: &Path, what: &'static str) -> Error {
    Error::new(Kind::Busy, what).path(path).advise(advice::Image::InUse)
}
