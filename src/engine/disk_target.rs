//! The port to the end of a patch: a disk that is compared with what is read here, and whose content the patch brings
//! into step. A replica's disk and a plain image are both one, near and far alike.

use crate::block::BlockIndex;
use crate::block::digest::{BlockPieces, Digest};
use crate::error::{Error, Kind, Result};
use crate::name::DiskName;
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// The end of a patch: whatever a disk is compared with and whose content the patch brings into step. Methods block.
pub trait DiskTarget: Send + Sync {
    /// Nodes of the digest tree of a disk as it is before the patch: level 0 are block digests, level 1 group digests,
    /// and so on. Beyond its size everything is zero. At most [`NODES_MAX`] in one call.
    fn nodes(&self, disk: &DiskName, level: u8, range: Range<u64>) -> Result<Vec<Digest>>;

    /// Digests of the 4 KiB pieces of these blocks, in their order, as they are in the state that the patch starts
    /// from, whatever of the patch was applied meanwhile. Zero where that state has no such block or, of a disk begun
    /// afresh, no content at all. `blocks` ascend; at most [`PIECES_MAX`] of them in one call.
    ///
    /// Costs reading those blocks, so it is asked of blocks that are known to differ. Several threads may ask at once.
    /// Of a replica it needs an open point, whose lock keeps the head in place; a failure does not harm that point.
    fn pieces(&self, disk: &DiskName, blocks: &[BlockIndex]) -> Result<Vec<BlockPieces>>;

    /// Appends bytes of the patch stream of one disk. Any cut of the stream will do.
    /// May return before they are applied; an error may then surface in a later call.
    fn apply(&self, disk: &DiskName, patch_bytes: &[u8]) -> Result<()>;

    /// Ends a disk's patch: returns when every record is applied, every digest matched and the resulting root
    /// equals the patch's to-root. Not yet durable.
    fn finish_disk(&self, disk: &DiskName) -> Result<DiskApplied>;
}

/// Most nodes in one [`DiskTarget::nodes`] call: 512 KiB on the wire at worst.
pub const NODES_MAX: u64 = 16 << 10;

/// Most blocks in one [`DiskTarget::pieces`] call: 16 MiB to read, 64 KiB of digests.
pub const PIECES_MAX: usize = 256;

/// Result of a patch that was applied to one disk.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DiskApplied {
    /// Root after the patch, computed by the target from what it wrote.
    pub root: Digest,
    /// Bytes of guest data that the target wrote.
    pub bytes_written: u64,
    /// Blocks that the patch changed.
    pub blocks_changed: u64,
}

/// Refuses what [`DiskTarget::pieces`] does not allow; asked by every implementation before anything else.
pub(crate) fn check_blocks(blocks: &[BlockIndex]) -> Result<()> {
    if blocks.len() > PIECES_MAX {
        let what = format!("pieces of {} blocks in one call; at most {PIECES_MAX} are allowed", blocks.len());
        return Err(Error::new(Kind::Usage, what));
    }
    match blocks.windows(2).find(|pair| pair[0] >= pair[1]) {
        None => Ok(()),
        Some(pair) => {
            let what = format!("pieces of block {} asked for after those of block {}", pair[1].0, pair[0].0);
            Err(Error::new(Kind::Usage, what))
        }
    }
}
