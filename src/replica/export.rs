//! A disk at a point as a patch that starts from nothing, or from an earlier point: what travels to whoever wants a
//! copy.
//!
//! Blocks are read from the images and carry the digest of what was read; the trailer has the root that the manifest
//! promises. Damage therefore does not pass unseen: the receiver's root is another one. Where the patch starts from a
//! point, the change lists say which blocks differ, however the two points are related, and what is read is compared
//! with them.
//!
//! Memory: one chunk. Holes cost nothing. The points are leased as long as the stream is read.

use super::store::{Reading, Store};
use super::upkeep::PatchStream;
use super::verify::{blocks_of, read_attachment};
use super::{Attachment, chain};
use crate::block::digest::{Digest, block_digest};
use crate::block::extent::Content;
use crate::block::{BLOCK_LEN, BlockIndex, ByteRange, DiskSize};
use crate::error::{Error, Kind, Result, advice};
use crate::image::Image;
use crate::image::qcow2::Qcow2Image;
use crate::name::{DiskName, PointId};
use crate::patch::{Compression, Header, PieceMask, RecordEncoder, StreamTail};
use crate::replica::age::Clock;
use std::iter::Peekable;

/// A chunk is handed out when it has this many bytes, and one record more.
const CHUNK_LEN: usize = 512 << 10;

/// How much of the map of the images is asked for at once.
const WINDOW_BYTES: u64 = 1 << 30;

/// Most of a block's 16 pieces that are carried one by one.
const PIECES_WORTH: u32 = 12;

/// Blocks that are not zero, with their digests, ascending.
type Blocks = Peekable<Box<dyn Iterator<Item = Result<(u64, Digest)>> + Send>>;

/// What a patch starts from that does not start from nothing.
struct Since {
    /// `None` once it was released.
    reading: Option<Reading>,
    image: Qcow2Image,
    size: DiskSize,
    was: Blocks,
    is: Blocks,
    /// Blocks that were zeroed, and wait for those behind them.
    zeros: std::ops::Range<u64>,
}

pub(super) struct Export {
    /// `None` once it was released.
    reading: Option<Reading>,
    since: Option<Since>,
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
        match Self::over(store, &reading, point, disk, None) {
            Ok(made) => Ok(Export { reading: Some(reading), ..made }),
            Err(e) => {
                reading.release();
                Err(e.point(point).disk(disk))
            }
        }
    }

    /// The patch that leads from the disk at `since` to that at `point`.
    pub fn begin_since(store: &Store, since: &PointId, point: &PointId, disk: &DiskName) -> Result<Export> {
        let below = store.read(since, "diff")?;
        let reading = match store.read(point, "diff") {
            Ok(reading) => reading,
            Err(e) => {
                below.release();
                return Err(e);
            }
        };
        let made = Since::open(&below, &reading, (since, point), disk)
            .and_then(|(from, root)| Self::over(store, &reading, point, disk, Some((from, root))));
        match made {
            Ok(mut made) => {
                if let Some(from) = &mut made.since {
                    from.reading = Some(below);
                }
                Ok(Export { reading: Some(reading), ..made })
            }
            Err(e) => {
                below.release();
                reading.release();
                Err(e.point(point).disk(disk))
            }
        }
    }

    fn over(
        store: &Store,
        reading: &Reading,
        point: &PointId,
        disk: &DiskName,
        since: Option<(Since, Digest)>,
    ) -> Result<Export> {
        let record = reading.manifest.point(point).and_then(|p| p.disk(disk)).ok_or_else(no_disk)?;
        let image = open_image(reading, point, disk, record.size)?;
        let header = Header {
            domain: store.uuid.clone(),
            disk: disk.clone(),
            size_from: since.as_ref().map_or(DiskSize(0), |(from, _)| from.size),
            size: record.size,
            from_root: since.as_ref().map(|(_, root)| *root),
        };
        let mut ready = Vec::new();
        let tail = Some(StreamTail::begin(&header, &mut ready));
        Ok(Export {
            reading: None,
            since: since.map(|(from, _)| from),
            clock: store.clock.clone(),
            image,
            size: record.size,
            root: record.root,
            encoder: RecordEncoder::new(Compression::FAST)?,
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

fn no_disk() -> Error {
    Error::new(Kind::NotFound, "the point has no such disk")
}

fn open_image(reading: &Reading, point: &PointId, disk: &DiskName, size: DiskSize) -> Result<Qcow2Image> {
    let image = Qcow2Image::open(&chain::images(&reading.points, &reading.manifest, point, disk)?)?;
    match image.size() < size {
        true => {
            let what = format!("the image has {} bytes, the point has {size}", image.size());
            Err(Error::new(Kind::Corrupt, what))
        }
        false => Ok(image),
    }
}

impl Since {
    /// Gives the root that the patch starts from, too.
    fn open(
        below: &Reading,
        reading: &Reading,
        (since, point): (&PointId, &PointId),
        disk: &DiskName,
    ) -> Result<(Since, Digest)> {
        let record = below.manifest.point(since).and_then(|p| p.disk(disk)).ok_or_else(no_disk)?;
        let blocks = |reading: &Reading, point: &PointId| -> Result<Blocks> {
            let all = blocks_of(chain::merged(&reading.points, &reading.manifest, point, disk)?);
            Ok((Box::new(all) as Box<dyn Iterator<Item = _> + Send>).peekable())
        };
        let since = Since {
            reading: None,
            image: open_image(below, since, disk, record.size)?,
            size: record.size,
            was: blocks(below, since)?,
            is: blocks(reading, point)?,
            zeros: 0..0,
        };
        Ok((since, record.root))
    }

    /// The next block that differs, with its digest before and now.
    fn next(&mut self) -> Result<Option<(u64, Digest, Digest)>> {
        loop {
            let at = |blocks: &mut Blocks| match blocks.peek() {
                Some(Ok((block, _))) => *block,
                // An error comes out at once.
                Some(Err(_)) => 0,
                None => u64::MAX,
            };
            let block = at(&mut self.was).min(at(&mut self.is));
            if block == u64::MAX {
                return Ok(None);
            }
            let take = |blocks: &mut Blocks| {
                let next = blocks.next_if(|next| !matches!(next, Ok((other, _)) if *other != block));
                next.transpose().map(|next| next.map_or(Digest::ZERO, |(_, digest)| digest))
            };
            let (was, is) = (take(&mut self.was)?, take(&mut self.is)?);
            if was != is {
                return Ok(Some((block, was, is)));
            }
        }
    }
}

impl Export {
    /// Puts the next block that differs into `ready`; false behind the last one.
    fn next_difference(&mut self, buffer: &mut [u8]) -> Result<bool> {
        let since = self.since.as_mut().expect("asked where there is one");
        let mut next = since.next()?;
        // What lies behind the end of the smaller disk is gone without a record.
        while next.is_some_and(|(block, ..)| block >= self.size.blocks()) {
            next = since.next()?;
        }
        let zeroed = next.filter(|(.., is)| is.is_zero()).map(|(block, ..)| block);
        let zeros = &mut since.zeros;
        let ended = match zeroed {
            Some(block) if block == zeros.end && !zeros.is_empty() => {
                zeros.end += 1;
                return Ok(true);
            }
            Some(block) => std::mem::replace(zeros, block..block + 1),
            None => std::mem::replace(zeros, 0..0),
        };
        let at = self.ready.len();
        if !ended.is_empty() {
            self.encoder.zero(BlockIndex(ended.start), ended.end - ended.start, &mut self.ready);
        }
        if let Some((block, was, is)) = next.filter(|_| zeroed.is_none()) {
            let (block, range) = (BlockIndex(block), BlockIndex(block).bytes(self.size));
            let bytes = &mut buffer[..range.len() as usize];
            self.image.read_at(range.start, bytes)?;
            if block_digest(bytes) != is {
                let what = "a block of the point is not what was sealed";
                return Err(Error::new(Kind::Corrupt, what).offset(range.start).advise(advice::Store::VerifyPoint));
            }
            match since.pieces(block, was, bytes) {
                Some(mask) => self.encoder.pieces(block, is, mask, bytes, &mut self.ready),
                None => self.encoder.data(block, is, bytes, &mut self.ready),
            }
        }
        self.tail.as_mut().expect("there is no trailer yet").observe(&self.ready[at..]);
        Ok(next.is_some())
    }
}

impl Since {
    /// Which pieces of a block changed; `None` where it had better travel whole.
    fn pieces(&self, block: BlockIndex, was: Digest, bytes: &[u8]) -> Option<PieceMask> {
        let range = block.bytes(self.size);
        if was.is_zero() || range.len() != bytes.len() as u64 {
            return None;
        }
        let mut old = vec![0; bytes.len()];
        // What cannot be read, or is damaged, is not built on.
        self.image.read_at(range.start, &mut old).ok()?;
        let mask = PieceMask::differing(&old, bytes);
        (block_digest(&old) == was && (1..=PIECES_WORTH).contains(&mask.count())).then_some(mask)
    }
}

impl PatchStream for Export {
    fn next_chunk(&mut self) -> Result<Vec<u8>> {
        if let Some(lease) = self.reading.as_mut().and_then(|r| r.lease.as_mut()) {
            // Whoever cannot prolong it goes on: what is needed is open.
            drop(lease.renew((self.clock)()));
        }
        let below = self.since.as_mut().and_then(|s| s.reading.as_mut()).and_then(|r| r.lease.as_mut());
        drop(below.map(|lease| lease.renew((self.clock)())));
        let mut buffer = vec![0; BLOCK_LEN];
        while self.tail.is_some() && self.ready.len() < CHUNK_LEN {
            if self.since.is_some() {
                if !self.next_difference(&mut buffer)? {
                    let tail = self.tail.take().expect("asked above");
                    tail.trailer(self.root, &mut self.ready);
                }
                continue;
            }
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
        let below = self.since.as_mut().and_then(|s| s.reading.take());
        self.reading.take().into_iter().chain(below).for_each(Reading::release);
        Ok(())
    }
}

/// The content of an attachment, in chunks.
pub(super) struct AttachmentStream(Vec<u8>);

impl AttachmentStream {
    /// [`Kind::NotFound`] if the point has no such attachment, [`Kind::Corrupt`] if it is not what was sealed.
    pub fn begin(store: &Store, point: &PointId, name: Attachment) -> Result<AttachmentStream> {
        let reading = store.read(point, "export")?;
        let attached = reading.manifest.point(point).and_then(|p| p.attachments.iter().find(|a| a.name == name));
        let found = match attached {
            Some(attached) => read_attachment(&reading.points, point, attached),
            None => Err(Error::new(Kind::NotFound, format!("the point has no {}", name.file_name()))),
        };
        reading.release();
        let damaged = || Error::new(Kind::Corrupt, format!("{} is not what was sealed", name.file_name()));
        found.and_then(|content| content.ok_or_else(damaged)).map(AttachmentStream).map_err(|e| e.point(point))
    }
}

impl PatchStream for AttachmentStream {
    fn next_chunk(&mut self) -> Result<Vec<u8>> {
        let rest = self.0.split_off(self.0.len().min(CHUNK_LEN));
        Ok(std::mem::replace(&mut self.0, rest))
    }

    fn close(self: Box<Self>) -> Result<()> {
        Ok(())
    }
}
