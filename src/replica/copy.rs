//! Copying blocks from a chain into one image of the store, each compared with its digest on the way: damage is neither
//! carried on nor hidden.
//!
//! Data is durable before the tables that lead to it are written: a power cut leaves an image that reads as before,
//! with clusters that may be counted wrongly.

use crate::block::changes::Run;
use crate::block::digest::{Digest, block_digest};
use crate::block::{BLOCK_LEN, BlockIndex, ByteRange, DiskSize};
use crate::error::{Error, Kind, Result, advice};
use crate::image::qcow2::{Qcow2Image, Qcow2Writer};
use crate::image::{Image, ImageMut};
use std::collections::BTreeSet;

/// Copied data is made durable in steps of this many bytes, or when so many tables of the image were touched: fewer
/// than fit into the cache of the writer.
const BATCH_BYTES: u64 = 64 << 20;
const BATCH_TABLES: usize = 32;

/// Bytes of the disk that one table of the image covers.
const TABLE_COVERS: u64 = 512 << 20;

/// Blocks zeroed at once.
const ZERO_STEP: u64 = 4096;

/// Told of every block copied, with its bytes; an error of it ends the copying.
pub(super) type Copied<'a> = &'a mut dyn FnMut(u64) -> Result<()>;

pub(super) struct Copier {
    reader: Qcow2Image,
    writer: Qcow2Writer,
    /// Since the last sync.
    bytes: u64,
    tables: BTreeSet<u64>,
    buffer: Vec<u8>,
}

impl Copier {
    pub fn new(reader: Qcow2Image, writer: Qcow2Writer) -> Copier {
        Copier { reader, writer, bytes: 0, tables: BTreeSet::new(), buffer: vec![0; BLOCK_LEN] }
    }

    /// Copies the blocks of a run; those that are zero in it become zeros. [`Kind::Corrupt`] where a block is not what
    /// its digest says.
    pub fn run(&mut self, run: &Run, copied: Copied) -> Result<()> {
        match run {
            Run::Zero { first, count } => self.zero(first.0, *count),
            Run::Digests { first, digests } => {
                (first.0..).zip(digests).try_for_each(|(block, digest)| self.block(BlockIndex(block), digest, copied))
            }
        }
    }

    /// Makes all of it durable.
    pub fn finish(mut self) -> Result<()> {
        self.sync()
    }

    fn block(&mut self, block: BlockIndex, digest: &Digest, copied: Copied) -> Result<()> {
        let range = block.bytes(self.writer.size());
        let bytes = &mut self.buffer[..range.len() as usize];
        // What is copied from may be shorter; what lies beyond it is zero.
        let there = block.bytes(self.reader.size()).len().min(range.len()) as usize;
        bytes[there..].fill(0);
        self.reader.read_at(range.start, &mut bytes[..there])?;
        if block_digest(bytes) != *digest {
            return Err(Error::new(Kind::Corrupt, format!("block {} is not what was sealed", block.0))
                .offset(range.start)
                .advise(advice::Store::VerifyUnchanged));
        }
        self.writer.write_at(range.start, bytes)?;
        self.bytes += range.len();
        self.tables.insert(range.start / TABLE_COVERS);
        if self.bytes >= BATCH_BYTES || self.tables.len() >= BATCH_TABLES {
            self.sync()?;
        }
        copied(range.len())
    }

    fn zero(&mut self, first: u64, count: u64) -> Result<()> {
        let (mut at, end) = (first, first + count);
        while at < end {
            let next = (at + ZERO_STEP).min(end);
            let size = self.writer.size();
            let range = ByteRange::new(BlockIndex(at).bytes(size).start, BlockIndex(next - 1).bytes(size).end);
            if !range.is_empty() {
                self.writer.zero(range)?;
                self.tables.insert(range.start / TABLE_COVERS);
            }
            at = next;
        }
        Ok(())
    }

    /// The data first, then the tables that lead to it.
    fn sync(&mut self) -> Result<()> {
        self.writer.sync_data()?;
        self.writer.sync()?;
        self.bytes = 0;
        self.tables.clear();
        Ok(())
    }
}

/// Blocks in these runs that are not zero.
pub(super) fn data_blocks(runs: impl Iterator<Item = Result<Run>>) -> Result<u64> {
    let mut blocks = 0;
    for run in runs {
        if let Run::Digests { digests, .. } = run? {
            blocks += digests.len() as u64;
        }
    }
    Ok(blocks)
}

/// Room that so many blocks take in an image of a disk of this size: themselves, and a table for every 512 MiB, at most
/// one for each block.
pub(super) fn room_bytes(blocks: u64, size: DiskSize) -> u64 {
    (blocks + blocks.min(size.0.div_ceil(TABLE_COVERS))) * BLOCK_LEN as u64
}
