//! Whether a disk's end was cut off and grown again since the head, which no dirty bitmap tells.
//!
//! A resize marks nothing: QEMU drops the marks behind the new end, and what grows there later is clean by its account,
//! though it reads as zeros where the head has data. A disk that is smaller or larger than in the head is seen by its
//! size; one that was shrunk and grown back between two runs is not.
//!
//! One block tells. Let the cut have been at some offset: behind it, every block reads as zeros, or was written since
//! and is marked. The highest block that has data in the head and is not marked lies behind every block that was lost
//! without a mark, so if any was lost, it was too, and reads otherwise than in the head. The head's digest tree leads
//! to it in a few questions, whatever the size of the disk.

use crate::block::digest::{Digest, block_digest};
use crate::block::tree::TreeShape;
use crate::block::{BLOCK_LEN, BlockIndex, ByteRange, DiskSize, FANOUT};
use crate::engine::disk_target::DiskTarget;
use crate::error::{Error, Kind, Result};
use crate::image::Image;
use crate::name::DiskName;
use std::ops::Range;

/// Nodes that the search may begin with: 32 KiB on the wire, and one question less than from the top.
const WIDE_MAX: u64 = 1024;

/// Questions after which the search is given up. One for each level is usual; more are asked where all that the head
/// has in a subtree is marked, but not all of the subtree.
const QUESTIONS_MAX: u32 = 256;

/// Whether the image still has, at the end of the disk, what the head has there and `dirty` does not mark. `false`: it
/// has not, or that could not be found out in a bounded time; compare by digest. Reads at most one block.
pub fn end_unchanged(
    image: &dyn Image,
    replica: &dyn DiskTarget,
    disk: &DiskName,
    head_size: DiskSize,
    dirty: &[ByteRange],
) -> Result<bool> {
    let shape = TreeShape::new(head_size);
    let level = (1..=shape.top()).find(|level| shape.nodes_at(*level) <= WIDE_MAX).unwrap_or(shape.top());
    let mut search = Search { replica, disk, shape, marked: in_blocks(dirty), questions: 0 };
    match search.highest(level, 0..shape.nodes_at(level))? {
        Found::Nothing => Ok(true),
        Found::TooDear => Ok(false),
        Found::Block(block, digest) => {
            let range = block.bytes(head_size);
            let mut data = vec![0; range.len() as usize];
            image.read_at(range.start, &mut data)?;
            Ok(block_digest(&data) == digest)
        }
    }
}

/// The blocks that ranges touch, neighbours merged.
fn in_blocks(dirty: &[ByteRange]) -> Vec<Range<u64>> {
    const BLOCK: u64 = BLOCK_LEN as u64;
    let mut blocks: Vec<Range<u64>> = Vec::new();
    for range in dirty.iter().filter(|r| !r.is_empty()) {
        let (start, end) = (range.start / BLOCK, range.end.div_ceil(BLOCK));
        match blocks.last_mut() {
            Some(last) if start <= last.end => last.end = last.end.max(end),
            _ => blocks.push(start..end),
        }
    }
    blocks
}

enum Found {
    Block(BlockIndex, Digest),
    Nothing,
    TooDear,
}

struct Search<'a> {
    replica: &'a dyn DiskTarget,
    disk: &'a DiskName,
    shape: TreeShape,
    /// Blocks, ascending, without overlap.
    marked: Vec<Range<u64>>,
    questions: u32,
}

impl Search<'_> {
    /// The highest block below these nodes of one level that has data in the head and is not marked.
    fn highest(&mut self, level: u8, nodes: Range<u64>) -> Result<Found> {
        if self.questions == QUESTIONS_MAX {
            return Ok(Found::TooDear);
        }
        self.questions += 1;
        let digests = self.replica.nodes(self.disk, level, nodes.clone())?;
        if digests.len() as u64 != nodes.end - nodes.start {
            let what = format!("asked for digests {nodes:?} of level {level}, got {} of them", digests.len());
            return Err(Error::new(Kind::Protocol, what));
        }
        for (node, digest) in nodes.rev().zip(digests.into_iter().rev()) {
            if digest.is_zero() || self.is_marked(level, node) {
                continue;
            }
            if level == 0 {
                return Ok(Found::Block(BlockIndex(node), digest));
            }
            let children = self.shape.clip(level - 1, node * FANOUT as u64..(node + 1) * FANOUT as u64);
            match self.highest(level - 1, children)? {
                Found::Nothing => {}
                found => return Ok(found),
            }
        }
        Ok(Found::Nothing)
    }

    /// Whether every block below a node is marked.
    fn is_marked(&self, level: u8, node: u64) -> bool {
        let width = (FANOUT as u64).pow(u32::from(level));
        let blocks = self.shape.clip(0, node * width..(node + 1).saturating_mul(width));
        let next = self.marked.partition_point(|m| m.end < blocks.end);
        self.marked.get(next).is_some_and(|m| m.start <= blocks.start && blocks.end <= m.end)
    }
}

#[cfg(test)]
#[path = "end_of_disk_tests.rs"]
mod tests;
