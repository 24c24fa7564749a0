//! The head's copy of one disk, read while the open point above it is written.
//!
//! Sees the images of the head's chain and never the open overlay, so that its answer does not depend on how much of a
//! patch was applied. The chain is the manifest's; the lock of the open point keeps every image of it in place.
//! Memory: one block per call, and the tables that the readers of the images cache.

use super::chain;
use super::files::Dir;
use super::manifest::Manifest;
use crate::block::digest::{BLOCK_PIECES, BlockPieces, PieceDigest, piece_digests};
use crate::block::{BLOCK_LEN, BlockIndex, DiskSize};
use crate::error::{Error, Kind, Result};
use crate::image::Image;
use crate::image::qcow2::Qcow2Image;
use crate::name::{DiskName, PointId};

/// Of a block that the head does not have.
pub(super) const NO_PIECES: BlockPieces = [PieceDigest::ZERO; BLOCK_PIECES];

pub(super) struct HeadImage {
    image: Qcow2Image,
    /// Of the disk; the image is longer by less than a sector.
    size: DiskSize,
}

impl HeadImage {
    /// Opens the chain of `disk` at `point`, read-only. Blocks.
    pub fn open(points: &Dir, manifest: &Manifest, point: &PointId, disk: &DiskName, size: DiskSize) -> Result<Self> {
        let images = chain::images(points, manifest, point, disk)?;
        let image = Qcow2Image::open(&images)?;
        if image.size() < size {
            let what = format!("the image has {} bytes, the point has {size}", image.size());
            return Err(Error::new(Kind::Corrupt, what).path(&images.top().path));
        }
        Ok(Self { image, size })
    }

    /// Digests of the pieces of each block. Several threads may ask at once.
    pub fn pieces(&self, blocks: &[BlockIndex]) -> Result<Vec<BlockPieces>> {
        let mut buffer = vec![0; BLOCK_LEN];
        let of_block = |block: &BlockIndex| {
            // Any number may come from the other side, also one whose bytes no disk could have.
            if block.0 >= self.size.blocks() {
                return Ok(NO_PIECES);
            }
            let range = block.bytes(self.size);
            let bytes = &mut buffer[..range.len() as usize];
            // What no image of the chain has is filled with zeros without a file's being read.
            self.image.read_at(range.start, bytes)?;
            Ok(piece_digests(bytes))
        };
        blocks.iter().map(of_block).collect()
    }
}
