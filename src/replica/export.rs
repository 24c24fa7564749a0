//! A whole disk at a point as a patch that starts from nothing: what travels to whoever wants a copy of it.
//!
//! Blocks are read from the images and carry the digest of what was read; the trailer has the root that the manifest
//! promises. Damage therefore does not pass unseen: the receiver's root is another one.
//!
//! Memory: one chunk. Holes cost nothing. The point is leased as long as the stream is read.

use super::chain;
use super::store::{Clock, Reading, Store};
use super::upkeep::PatchStream;
use crate::block::digest::{Digest, block_digest};
use crate::block::extent::Content;
use crate::block::{BLOCK_LEN, BlockIndex, ByteRange, DiskSize};
use crate::error::{Error, Kind, Result};
use crate::image::Image;
use crate::image::qcow2::Qcow2Image;
use crate::name::{DiskName, PointId};
use crate::patch::{Compression, Header, RecordEncoder, StreamTail};

/// A chunk is handed out when it has this many bytes, and one record more.
const CHUNK_LEN: usize = 512 << 10;

/// How much of the map of the images is asked for at once.
const WINDOW_BYTES: u64 = 1 << 30;

pub(super) struct Export {
    /// `None` once it was released.
    reading: Option<Reading>,
    clock: Clock,
    image: Qcow2Image,
    size: DiskSize,
    root: Digest,
    encoder: RecordEncoder,
    tail: Option<StreamTail>,
    /// What goes out next.
    ready: Vec<u8>,
    /// Blocks of the present window that may have data, last one first.
    blocks: Vec<u64>,
    next_window: u64,
}

impl Export {
    pub fn begin(store: &Store, point: &PointId, disk: &DiskName) -> Result<Export> {
        let reading = store.read(point, "export")?;
        match Self::over(store, &reading, point, disk) {
            Ok(made) => Ok(Export { reading: Some(reading), ..made }),
            Err(e) => {
                reading.release();
                Err(e.point(point).disk(disk))
            }
        }
    }

    fn over(store: &Store, reading: &Reading, point: &PointId, disk: &DiskName) -> Result<Export> {
        let record = reading.manifest.point(point).and_then(|p| p.disk(disk));
        let record = record.ok_or_else(|| Error::new(Kind::NotFound, "the point has no such disk"))?;
        let image = Qcow2Image::open(&chain::images(&reading.points, &reading.manifest, point, disk)?)?;
        if image.size() < record.size {
            let what = format!("the image has {} bytes, the point has {}", image.size(), record.size);
            return Err(Error::new(Kind::Corrupt, what));
        }
        let header = Header {
            domain: store.uuid.clone(),
            disk: disk.clone(),
            size_from: DiskSize(0),
            size: record.size,
            from_root: None,
        };
        let mut ready = Vec::new();
        let tail = Some(StreamTail::begin(&header, &mut ready));
        Ok(Export {
            reading: None,
            clock: store.clock.clone(),
            image,
            size: record.size,
            root: record.root,
            encoder: RecordEncoder::new(Compression::default())?,
            tail,
            ready,
            blocks: Vec::new(),
            next_window: 0,
        })
    }

    /// The next block that may have data.
    fn next_block(&mut self) -> Result<Option<BlockIndex>> {
        while self.blocks.is_empty() && self.next_window < self.size.0 {
            let window = ByteRange::new(self.next_window, (self.next_window + WINDOW_BYTES).min(self.size.0));
            for extent in self.image.extents(window)?.into_iter().filter(|e| e.content == Content::Data) {
                let first = extent.range.start / BLOCK_LEN as u64;
                let first = self.blocks.last().map_or(first, |last| first.max(last + 1));
                self.blocks.extend(first..extent.range.end.div_ceil(BLOCK_LEN as u64));
            }
            self.blocks.reverse();
            self.next_window = window.end;
        }
        Ok(self.blocks.pop().map(BlockIndex))
    }
}

impl PatchStream for Export {
    fn next_chunk(&mut self) -> Result<Vec<u8>> {
        if let Some(lease) = self.reading.as_mut().and_then(|r| r.lease.as_mut()) {
            // Whoever cannot prolong it goes on: what is needed is open.
            drop(lease.renew((self.clock)()));
        }
        let mut buffer = vec![0; BLOCK_LEN];
        while self.tail.is_some() && self.ready.len() < CHUNK_LEN {
            let Some(block) = self.next_block()? else {
                let tail = self.tail.take().expect("asked above");
                tail.trailer(self.root, &mut self.ready);
                break;
            };
            let range = block.bytes(self.size);
            let bytes = &mut buffer[..range.len() as usize];
            self.image.read_at(range.start, bytes)?;
            let digest = block_digest(bytes);
            if digest.is_zero() {
                continue;
            }
            let at = self.ready.len();
            self.encoder.data(block, digest, bytes, &mut self.ready);
            self.tail.as_mut().expect("asked above").observe(&self.ready[at..]);
        }
        Ok(std::mem::take(&mut self.ready))
    }

    fn close(mut self: Box<Self>) -> Result<()> {
        if let Some(reading) = self.reading.take() {
            reading.release();
        }
        Ok(())
    }
}
