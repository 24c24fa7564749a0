//! One disk of an open point: where its patch is written, what it is built on, and what becomes of both.
//!
//! Invariants
//! - The patch applies to the head's root of this disk or to nothing (I13).
//! - Blocks are checked and written by the [`applier`](crate::engine::applier), and by nobody else.

use super::damage::Rotten;
use super::digests::DigestFile;
use super::files::Dir;
use super::head::NO_PIECES;
use super::manifest::{DISK_SIZE_MAX, backing_reference, changes_file, image_file, seed_patch_file};
use super::reserve::Reservation;
use super::seed::{Seed, write_whole_list};
use crate::block::changes::{ChangesHeader, ChangesWriter};
use crate::block::digest::{BlockPieces, Digest, block_digest, piece_digests};
use crate::block::{BLOCK_LEN, BlockIndex, DiskSize};
use crate::engine::applier::{Applier, Change, PatchedImage, TreeBefore};
use crate::engine::disk_target::DiskApplied;
use crate::error::{Error, Kind, Result};
use crate::image::qcow2::{self, Qcow2Writer};
use crate::image::{Format, Image, ImageMut};
use crate::name::{DiskName, DomainUuid, PointId};
use crate::patch::{self, Decoder, Item, Limits};
use crate::replica::files::image_size;
use crate::replica::{BeginDisk, SeedView};
use std::fs::File;
use std::io::BufWriter;
use std::ops::Range;
use std::sync::Arc;

/// What a disk of an open point is built on.
pub(super) enum Start {
    Nothing,
    Head {
        point: PointId,
        digests: Arc<DigestFile>,
        /// What of it is to be written again, whether it changed or not.
        rotten: Rotten,
    },
    Seed(Seed),
}

struct SeedBelow {
    view: SeedView,
    digests: Arc<DigestFile>,
    list: File,
}

pub(super) struct DiskWriter {
    name: DiskName,
    domain: DomainUuid,
    /// The seed that the image was: its digests and its list.
    seed: Option<SeedBelow>,
    image: OpenImage,
    decoder: Decoder,
    /// `None` once the root is known.
    applier: Option<Applier>,
    list_file: File,
    /// The list file of the point itself, where `list_file` is only what the patch changed of a seed.
    whole_list: Option<File>,
    applied: Option<DiskApplied>,
}

/// The image of a disk of an open point, and what it is written over.
struct OpenImage {
    size: DiskSize,
    /// The head this builds on; `None`: from a seed or from nothing.
    below: Option<(PointId, Arc<DigestFile>)>,
    /// Blocks of the head that are not what they were: written whether they changed or not.
    rotten: Rotten,
    /// `None` once it is durable and closed.
    writer: Option<Qcow2Writer>,
    reservation: Arc<Reservation>,
}

impl OpenImage {
    fn writer(&self) -> Result<&Qcow2Writer> {
        self.writer.as_ref().ok_or_else(closed)
    }
}

impl PatchedImage for OpenImage {
    fn image(&self) -> Result<Option<&dyn ImageMut>> {
        self.writer().map(|writer| Some(writer as &dyn ImageMut))
    }

    fn block_before(&self, block: BlockIndex) -> Result<Vec<u8>> {
        let mut bytes = vec![0; block.bytes(self.size).len() as usize];
        self.writer()?.read_at(block.offset(), &mut bytes)?;
        Ok(bytes)
    }

    fn before_change(&mut self, _: BlockIndex, change: Change) -> Result<()> {
        match change {
            Change::Data => self.reservation.spend(BLOCK_LEN as u64),
            Change::Zero => Ok(()),
        }
    }

    fn rotten(&self, blocks: Range<u64>) -> Vec<u64> {
        self.rotten.within(blocks).collect()
    }

    fn blame(&self, block: BlockIndex, patch_error: Error) -> Error {
        let Some((point, head)) = &self.below else { return patch_error };
        let sealed = head.nodes(0, block.0..block.0 + 1).ok().and_then(|nodes| nodes.first().copied());
        let stored = self.block_before(block).ok().map(|bytes| block_digest(&bytes));
        if head.size() != self.size || sealed == stored {
            return patch_error;
        }
        Error::new(Kind::Corrupt, format!("block {} of the head is not what was sealed", block.0))
            .point(point)
            .offset(block.offset())
            .hint("verify the head; what is damaged there has to be sent again, from nothing")
    }
}

fn closed() -> Error {
    Error::new(Kind::Usage, "the disk was closed by an earlier call")
}

impl DiskWriter {
    /// Creates the image and the change list of `disk` in the open point's directory.
    pub fn create(
        dir: &Dir,
        disk: &BeginDisk,
        domain: &DomainUuid,
        start: Start,
        reservation: &Arc<Reservation>,
    ) -> Result<Self> {
        let mut to_repair = Rotten::default();
        let (image, below, seed) = match start {
            Start::Seed(seed) => {
                let view = seed.view(&disk.name);
                (seed.image, None, Some(SeedBelow { view, digests: seed.digests, list: seed.list }))
            }
            Start::Head { point, digests, rotten } => {
                to_repair = rotten;
                let reference = backing_reference(&point, &disk.name);
                (create_image(dir, disk, Some(&reference))?, Some((point, digests)), None)
            }
            Start::Nothing => (create_image(dir, disk, None)?, None, None),
        };
        let changes = dir.create(&changes_file(&disk.name))?;
        let (list_file, whole_list) = match &seed {
            Some(_) => (dir.create(&seed_patch_file(&disk.name))?, Some(changes)),
            None => (changes, None),
        };
        let at = |e| Error::io("cannot write the change list", dir.join(&changes_file(&disk.name)), e);
        let from = below.as_ref().map(|(_, head)| head).or(seed.as_ref().map(|s| &s.digests)).cloned();
        let header = ChangesHeader { size: disk.size, from_root: from.as_ref().map(|digests| digests.root()) };
        let list = ChangesWriter::new(BufWriter::new(list_file.try_clone().map_err(at)?), &header)?;
        let from = from.map(|digests| TreeBefore {
            size: digests.size(),
            nodes: Box::new(move |level, range| digests.nodes(level, range)),
        });
        Ok(Self {
            name: disk.name.clone(),
            domain: domain.clone(),
            seed,
            image: OpenImage {
                size: disk.size,
                below,
                rotten: to_repair,
                writer: Some(image),
                reservation: reservation.clone(),
            },
            decoder: Decoder::new(Limits { size_max: DiskSize(DISK_SIZE_MAX) })?,
            applier: Some(Applier::new(from, disk.size, Some(list))?),
            list_file,
            whole_list,
            applied: None,
        })
    }

    /// The point whose image of this disk lies below.
    pub fn backing(&self) -> Option<&PointId> {
        self.image.below.as_ref().map(|(point, _)| point)
    }

    /// What the patch leads on from: the head's digests, or the seed's.
    pub fn from(&self) -> Option<&Arc<DigestFile>> {
        self.image.below.as_ref().map(|(_, head)| head).or(self.seed.as_ref().map(|s| &s.digests))
    }

    pub fn is_seeded(&self) -> bool {
        self.seed.is_some()
    }

    /// The seed that the image was when it was taken.
    pub fn seed_view(&self) -> Option<&SeedView> {
        self.seed.as_ref().map(|s| &s.view)
    }

    /// Digests of the pieces of blocks of the seed, which no patch has touched yet: a block comes once.
    pub fn seed_pieces(&self, blocks: &[BlockIndex]) -> Result<Vec<BlockPieces>> {
        let of = |block: &BlockIndex| match block.0 < self.image.size.blocks() {
            true => Ok(piece_digests(&self.image.block_before(*block)?)),
            false => Ok(NO_PIECES),
        };
        blocks.iter().map(of).collect()
    }

    /// Whether the image stands alone and holds something: worth keeping if its point is never sealed.
    pub fn is_worth_keeping(&self) -> bool {
        self.image.below.is_none() && (self.seed.is_some() || self.bytes_written() > 0)
    }

    /// Set once the disk is finished.
    pub fn applied(&self) -> Option<&DiskApplied> {
        self.applied.as_ref()
    }

    pub fn apply(&mut self, patch_bytes: &[u8]) -> Result<()> {
        if self.applied.is_some() {
            return Err(Error::new(Kind::Usage, "the disk's patch was ended already"));
        }
        self.decoder.push(patch_bytes);
        while let Some(item) = self.decoder.next_item()? {
            match item {
                Item::Header(header) => self.check_header(&header)?,
                // Judged by `finish`, when it is sure that nothing follows.
                Item::Trailer(_) => {}
                item => self.applier.as_mut().ok_or_else(closed)?.take(item, &mut self.image)?,
            }
        }
        Ok(())
    }

    /// The trailer was seen, and the root is the one it names. Again and again with the same answer.
    pub fn finish(&mut self) -> Result<DiskApplied> {
        if let Some(applied) = &self.applied {
            return Ok(applied.clone());
        }
        let trailer = self.decoder.finish()?;
        let applier = self.applier.take().ok_or_else(closed)?;
        let applied = applier.finish(&trailer).map_err(|e| self.doubt_head(e))?.disk;
        if let (Some(seed), Some(whole)) = (&self.seed, self.whole_list.take()) {
            write_whole_list(&seed.list, &self.list_file, &whole, self.image.size, applied.root)?;
            self.list_file = whole;
        }
        self.applied = Some(applied.clone());
        Ok(applied)
    }

    /// Step 6a: makes the image durable and closes it.
    pub fn sync_image(&mut self) -> Result<()> {
        self.image.writer.take().ok_or_else(closed)?.sync()
    }

    /// Step 6b.
    pub fn sync_changes(&self) -> Result<()> {
        self.list_file.sync_all().map_err(|e| Error::from_io("cannot sync the change list", e))
    }

    fn check_header(&self, header: &patch::Header) -> Result<()> {
        let conflict = |what: String| Err(Error::new(Kind::Conflict, what));
        if header.is_plain() {
            return conflict("the patch is of a plain image, not of a disk of a domain".to_owned());
        }
        if header.domain != self.domain || header.disk != self.name {
            return conflict(format!("the patch is for disk '{}' of domain {}", header.disk, header.domain));
        }
        if header.size != self.image.size {
            return conflict(format!(
                "the patch is for {} bytes, the point was begun with {}",
                header.size, self.image.size
            ));
        }
        let head = self.from().map(|file| (file.root(), file.size()));
        if header.from_root.map(|root| (root, header.size_from)) == head {
            return Ok(());
        }
        let name = |root: Option<Digest>| root.map_or("nothing".to_owned(), |root| format!("root {root}"));
        conflict(format!(
            "the patch builds on {} ({} bytes), the replica is at {} ({} bytes)",
            name(header.from_root),
            header.size_from,
            name(head.map(|h| h.0)),
            head.map_or(DiskSize(0), |h| h.1),
        ))
    }

    fn bytes_written(&self) -> u64 {
        let under_way = || self.applier.as_ref().map_or(0, |applier| applier.written().0);
        self.applied.as_ref().map_or_else(under_way, |applied| applied.bytes_written)
    }

    /// The source may be wrong, or the digests that it was compared with. They cost little to make anew, and wrong ones
    /// would fail every run to come.
    fn doubt_head(&self, error: Error) -> Error {
        if error.kind() != Kind::Corrupt {
            return error;
        }
        if let Some((point, head)) = &self.image.below {
            tracing::warn!(disk = %self.name, %point, "the roots differ: the head's digests are thrown away");
            head.condemn();
        }
        error.hint("run again; the digests that both sides compared with are made anew")
    }
}

fn create_image(dir: &Dir, disk: &BeginDisk, backing: Option<&str>) -> Result<Qcow2Writer> {
    let path = dir.join(&image_file(&disk.name));
    qcow2::create(&path, image_size(disk.size), backing.map(|name| (name, Format::Qcow2)))
}
