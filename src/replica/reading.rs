//! A disk of a point read from its images, window by window, with the digests of its blocks.

use crate::block::changes::{RUN_DIGESTS_MAX, Run};
use crate::block::digest::{Digest, block_digest};
use crate::block::extent::Content;
use crate::block::{BLOCK_LEN, BlockIndex, ByteRange, DiskSize};
use crate::error::{Error, Kind, Result};
use crate::image::qcow2::Qcow2Image;
use crate::image::{Chain, Image};
use std::ops::Range;

/// A disk as its images have it now, as runs in ascending order: what a change list would say of it, had it started
/// from nothing. A block that cannot be read ends it with an error.
pub(super) fn runs_of(images: &Chain, size: DiskSize) -> Result<impl Iterator<Item = Result<Run>>> {
    let mut reading = Reading::open(images, size)?;
    let mut ready = Vec::new().into_iter();
    let mut next = move || -> Result<Option<Run>> {
        loop {
            if let Some(run) = ready.next() {
                return Ok(Some(run));
            }
            match reading.next_window()? {
                Some(window) => ready = window.into_runs()?.into_iter(),
                None => return Ok(None),
            }
        }
    };
    Ok(std::iter::from_fn(move || next().transpose()))
}

/// Goes through a disk window by window.
pub(crate) struct Reading {
    image: Qcow2Image,
    size: DiskSize,
    next_block: u64,
    pub(super) bytes_read: u64,
}

impl Reading {
    pub(super) fn open(images: &Chain, size: DiskSize) -> Result<Self> {
        let image = Qcow2Image::open(images)?;
        if image.size() < size {
            let what = format!("the image has {} bytes, the point has {size}", image.size());
            return Err(Error::new(Kind::Corrupt, what).path(&images.top().path));
        }
        Ok(Self { image, size, next_block: 0, bytes_read: 0 })
    }

    /// `None` at the end of the disk.
    pub(super) fn next_window(&mut self) -> Result<Option<Window>> {
        let blocks = self.next_block..(self.next_block + WINDOW_BLOCKS).min(self.size.blocks());
        if blocks.is_empty() {
            return Ok(None);
        }
        self.next_block = blocks.end;
        let to_read = self.blocks_with_data(&blocks)?;
        self.bytes_read += to_read.iter().map(|b| BlockIndex(*b).bytes(self.size).len()).sum::<u64>();
        let digests = std::thread::scope(|scope| {
            let parts = to_read.chunks(to_read.len().div_ceil(READERS).max(1));
            let readers: Vec<_> = parts.map(|part| scope.spawn(|| self.read(part))).collect();
            readers.into_iter().flat_map(|r| r.join().expect("a reader does not panic")).collect()
        });
        Ok(Some(Window { blocks, digests }))
    }

    /// Blocks of which any byte may be anything but zero.
    fn blocks_with_data(&self, blocks: &Range<u64>) -> Result<Vec<u64>> {
        let end = (blocks.end * BLOCK_LEN as u64).min(self.size.0);
        let extents = self.image.extents(ByteRange::new(blocks.start * BLOCK_LEN as u64, end))?;
        let mut found: Vec<u64> = Vec::new();
        for extent in extents.into_iter().filter(|e| e.content == Content::Data) {
            let first = extent.range.start / BLOCK_LEN as u64;
            let last = extent.range.end.div_ceil(BLOCK_LEN as u64);
            let unseen = found.last().map_or(first, |seen| first.max(seen + 1));
            found.extend(unseen..last);
        }
        Ok(found)
    }

    fn read(&self, blocks: &[u64]) -> Vec<(u64, Option<Digest>)> {
        let mut buffer = vec![0; BLOCK_LEN];
        let mut read = |block: u64| {
            let range = BlockIndex(block).bytes(self.size);
            let bytes = &mut buffer[..range.len() as usize];
            match self.image.read_at(range.start, bytes) {
                Ok(()) => Some(block_digest(bytes)),
                Err(e) => {
                    tracing::warn!(block, error = %e.chain(), "a block of the point cannot be read");
                    None
                }
            }
        };
        blocks.iter().map(|block| (*block, read(*block))).collect()
    }
}

/// What was found in a stretch of blocks.
pub(super) struct Window {
    pub(super) blocks: Range<u64>,
    /// Blocks that had to be read, ascending; `None`: reading failed.
    pub(super) digests: Vec<(u64, Option<Digest>)>,
}

impl Window {
    fn into_runs(self) -> Result<Vec<Run>> {
        let mut runs: Vec<Run> = Vec::new();
        for (block, digest) in self.digests {
            let unreadable = || Error::new(Kind::Corrupt, "a block cannot be read").offset(BlockIndex(block).offset());
            let digest = digest.ok_or_else(unreadable)?;
            match runs.last_mut() {
                _ if digest.is_zero() => {}
                Some(Run::Digests { first, digests })
                    if first.0 + digests.len() as u64 == block && digests.len() < RUN_DIGESTS_MAX =>
                {
                    digests.push(digest);
                }
                _ => runs.push(Run::Digests { first: BlockIndex(block), digests: vec![digest] }),
            }
        }
        Ok(runs)
    }
}

/// Blocks read between two reports of progress: 64 MiB.
pub(crate) const WINDOW_BLOCKS: u64 = 1024;

const READERS: usize = 2;
