//! An image of somebody else's adopted as the seed of a disk: read from end to end, and kept.

use super::store::Store;
use crate::block::DiskSize;
use crate::error::Result;
use crate::image::open::{self, OpenOptions};
use crate::image::{Layer, chain};
use crate::name::DiskName;
use std::path::PathBuf;

/// Adopts the image at `top`, with all below it in its directory or below `backing`, as the seed of a disk. Returns its
/// size and the bytes of data copied. Blocks as long as the storage needs.
pub fn adopt(
    store: &Store,
    disk: &DiskName,
    (top, backing): (&Layer, &[PathBuf]),
    options: &OpenOptions,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<(DiskSize, u64)> {
    // A copy of a source's image names what the source wants.
    let chain = chain::resolve_chain_where(top, &chain::named_beside(&top.path, backing))?;
    let opened = open::open_read(&chain, options)?;
    let size = opened.image.size();
    let copied = store.adopt(disk, opened.image.as_ref(), progress);
    let closed = opened.close();
    let copied = copied?;
    closed?;
    Ok((size, copied))
}
