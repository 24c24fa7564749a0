//! The one place where a patch becomes written blocks: of a disk in the store, of a plain image, and of an export.
//!
//! Invariants
//! - A block is written only if its content has the digest that the patch names for it.
//! - The changes come out of one walk of the digest tree that the patch starts from. The tree says that a block did
//!   not change: then it is neither written nor listed, so that repeated and superfluous records cost nothing. The one
//!   exception is a block that is known to have rotted ([`PatchedImage::rotten`]).
//! - The old content of a block is offered ([`PatchedImage::before_change`]) before its first byte is overwritten.
//! - The patch holds only if all of it leads to the root that its source computed.
//!
//! Memory: one block, and the changed blocks of [`ZERO_STEP`].

use crate::block::changes::ChangesWriter;
use crate::block::digest::Digest;
use crate::block::tree::{ChangedNode, NodeSource, TreeUpdate, ZeroNodes};
use crate::block::{BLOCK_LEN, BlockIndex, ByteRange, DiskSize};
use crate::engine::disk_target::DiskApplied;
use crate::error::{Error, Kind, Result};
use crate::image::ImageMut;
use crate::patch::{self, Item, Trailer};
use std::collections::BTreeSet;
use std::fs::File;
use std::io::BufWriter;
use std::ops::Range;
use std::sync::mpsc::{self, Receiver};

/// Blocks zeroed at once (256 MiB, one node of level 2): bounds what the walk of the tree hands out in one go.
const ZERO_STEP: u64 = 4096;

type Nodes = Box<dyn FnMut(u8, Range<u64>) -> Result<Vec<Digest>> + Send>;
type Emit = Box<dyn FnMut(ChangedNode) -> Result<()> + Send>;

/// The image that a patch is applied to: what it was before, and where its blocks are written.
pub(crate) trait PatchedImage {
    /// The image that blocks are written to. `None`: none yet, because the patch itself is kept and applied later.
    fn image(&self) -> Result<Option<&dyn ImageMut>>;

    /// The content of a block before the patch, in the length that it has in the disk after the patch; zeros where
    /// nothing was.
    fn block_before(&self, block: BlockIndex) -> Result<Vec<u8>>;

    /// A block is about to be overwritten, with zeros or with data: the last chance to reserve space for it, or to keep
    /// what it was. An error ends the patch before the write.
    fn before_change(&mut self, _: BlockIndex, _: Change) -> Result<()> {
        Ok(())
    }

    /// Those of these blocks whose stored content is known to be damaged: they are written whether they changed or not.
    /// May name a block twice.
    fn rotten(&self, _: Range<u64>) -> Vec<u64> {
        Vec::new()
    }

    /// Pieces laid over a block did not give what the patch promises: the same error, or a better one if the block
    /// itself is to blame.
    fn blame(&self, _: BlockIndex, patch_error: Error) -> Error {
        patch_error
    }
}

/// How a block is overwritten.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Change {
    Data,
    Zero,
}

/// The digest tree that a patch starts from: its nodes by level and range, and the size of the disk that it is of.
pub(crate) struct TreeBefore {
    pub(crate) nodes: Nodes,
    pub(crate) size: DiskSize,
}

/// A list of changed blocks that is written on the way.
pub(crate) type List = ChangesWriter<BufWriter<File>>;

/// A patch on its way into an image, between its header and its trailer.
pub(crate) struct Applier {
    /// Of the disk after the patch.
    size: DiskSize,
    tree: TreeUpdate<Nodes, Emit>,
    /// The blocks that the tree found changed and that are not written yet.
    changed: Receiver<(BlockIndex, Digest)>,
    list: Option<List>,
    bytes_written: u64,
    blocks_changed: u64,
}

/// The result of a patch.
#[derive(Debug)]
pub(crate) struct Applied {
    pub(crate) disk: DiskApplied,
    /// The writer of the change list, flushed and not synced.
    pub(crate) list: Option<BufWriter<File>>,
}

impl Applier {
    /// `from`: `None` if the patch starts from nothing. `size`: of the disk after the patch, in bytes.
    pub(crate) fn new(from: Option<TreeBefore>, size: DiskSize, list: Option<List>) -> Result<Applier> {
        let (sender, changed) = mpsc::channel();
        let emit: Emit = Box::new(move |node| {
            if node.level == 0 {
                // The receiver lives as long as the tree.
                let _ = sender.send((BlockIndex(node.index), node.digest));
            }
            Ok(())
        });
        let nothing = || TreeBefore { nodes: Box::new(|level, range| ZeroNodes.nodes(level, range)), size };
        let from = from.unwrap_or_else(nothing);
        let tree = TreeUpdate::new(from.nodes, from.size, size, emit)?;
        Ok(Applier { size, tree, changed, list, bytes_written: 0, blocks_changed: 0 })
    }

    /// Bytes of content written so far, and blocks changed, zeroed ones included.
    pub(crate) fn written(&self) -> (u64, u64) {
        (self.bytes_written, self.blocks_changed)
    }

    /// Takes the next item of the patch. Headers and trailers change nothing: their owner judges them.
    /// [`Kind::Corrupt`] if a block is not what the patch says. After an error the image is between two states.
    pub(crate) fn take(&mut self, item: Item, to: &mut dyn PatchedImage) -> Result<()> {
        match item {
            Item::Data { block, digest, bytes } => {
                patch::check_block(block, &bytes, digest)?;
                self.write(block, digest, &bytes, to)
            }
            Item::Pieces { block, digest, mask, bytes } => {
                // A block comes once in a patch, so that what is read here is what the patch starts from.
                let mut whole = to.block_before(block)?;
                mask.scatter(&bytes, &mut whole);
                patch::check_block(block, &whole, digest).map_err(|e| to.blame(block, e))?;
                self.write(block, digest, &whole, to)
            }
            Item::Zero { first, count } => self.zero(first, count, to),
            Item::Header(_) | Item::Trailer(_) => Ok(()),
        }
    }

    /// All of the patch has been taken, and it leads where its trailer says. [`Kind::Corrupt`] if it does not. Nothing
    /// is durable yet.
    pub(crate) fn finish(self, trailer: &Trailer) -> Result<Applied> {
        let root = self.tree.finish()?;
        if root != trailer.to_root {
            let what = format!("the patch leads to root {root}, its source has root {}", trailer.to_root);
            return Err(Error::new(Kind::Corrupt, what));
        }
        let list = self.list.map(|list| list.finish(root)).transpose()?;
        let (bytes_written, blocks_changed) = (self.bytes_written, self.blocks_changed);
        Ok(Applied { disk: DiskApplied { root, bytes_written, blocks_changed }, list })
    }

    /// Writes a block whose content was checked, if it is another than before.
    fn write(&mut self, block: BlockIndex, digest: Digest, bytes: &[u8], to: &mut dyn PatchedImage) -> Result<()> {
        self.tree.push(block, digest)?;
        if self.changed.try_recv().is_err() && to.rotten(block.0..block.0 + 1).is_empty() {
            return Ok(());
        }
        to.before_change(block, Change::Data)?;
        if let Some(image) = to.image()? {
            let range = self.range_in(image, block.0..block.0 + 1);
            if range.len() == bytes.len() as u64 {
                image.write_at(range.start, bytes)?;
            } else {
                // The image is longer than the disk by less than a sector. What lies there must be zero, or a disk that
                // grows again would find in it what it once cut off.
                let mut padded = bytes.to_vec();
                padded.resize(range.len() as usize, 0);
                image.write_at(range.start, &padded)?;
            }
        }
        self.bytes_written += bytes.len() as u64;
        self.note(block, digest)
    }

    /// Zeroes those of the blocks that were not zero before.
    fn zero(&mut self, first: BlockIndex, count: u64, to: &mut dyn PatchedImage) -> Result<()> {
        let (mut at, end) = (first.0, first.0 + count);
        while at < end {
            let step_end = ((at / ZERO_STEP + 1) * ZERO_STEP).min(end);
            self.tree.push_zero(BlockIndex(at), step_end - at)?;
            let mut changed: BTreeSet<u64> =
                std::iter::from_fn(|| self.changed.try_recv().ok()).map(|(block, _)| block.0).collect();
            changed.extend(to.rotten(at..step_end));
            let mut run = at..at;
            for block in changed {
                if block != run.end {
                    self.zero_run(&run, to)?;
                    run = block..block;
                }
                run.end += 1;
                to.before_change(BlockIndex(block), Change::Zero)?;
                self.note(BlockIndex(block), Digest::ZERO)?;
            }
            self.zero_run(&run, to)?;
            at = step_end;
        }
        Ok(())
    }

    fn zero_run(&self, blocks: &Range<u64>, to: &mut dyn PatchedImage) -> Result<()> {
        match to.image()? {
            Some(image) if !blocks.is_empty() => image.zero(self.range_in(image, blocks.clone())),
            _ => Ok(()),
        }
    }

    /// The bytes of these blocks in the image. An image that ends with a sector may be longer than its disk by less
    /// than one; on a larger block device, what lies behind the disk is not ours.
    fn range_in(&self, image: &dyn ImageMut, blocks: Range<u64>) -> ByteRange {
        let whole = self.size.whole_sectors();
        let end = if image.size() == whole { whole } else { self.size };
        ByteRange::new(blocks.start * BLOCK_LEN as u64, (blocks.end * BLOCK_LEN as u64).min(end.0))
    }

    fn note(&mut self, block: BlockIndex, digest: Digest) -> Result<()> {
        self.blocks_changed += 1;
        self.list.as_mut().map_or(Ok(()), |list| list.push(block, digest))
    }
}

#[cfg(test)]
#[path = "applier_tests.rs"]
mod tests;
