//! One disk of an open point: its patch taken apart, every block checked and written, and what changed written down.
//!
//! Invariants
//! - A block is written only if its content has the digest that the patch names for it.
//! - The change list and the new root come out of one walk of the head's digest tree: what the tree says did not change
//!   is neither written nor listed, so repeated and superfluous records cost nothing.
//! - The patch applies to the head's root of this disk or to nothing (I13).

use super::damage::Rotten;
use super::digests::DigestFile;
use super::files::Dir;
use super::head::NO_PIECES;
use super::manifest::{DISK_SIZE_MAX, backing_reference, changes_file, image_file, seed_patch_file};
use super::reserve::Reservation;
use super::seed::{Seed, write_whole_list};
use crate::block::changes::{ChangesHeader, ChangesWriter};
use crate::block::digest::{BlockPieces, Digest, block_digest, piece_digests};
use crate::block::tree::{ChangedNode, NodeSource, TreeUpdate, ZeroNodes};
use crate::block::{BLOCK_LEN, BlockIndex, ByteRange, DiskSize};
use crate::engine::disk_target::DiskApplied;
use crate::error::{Error, Kind, Result};
use crate::image::qcow2::{self, Qcow2Writer};
use crate::image::{Format, Image, ImageMut};
use crate::name::{DiskName, DomainUuid, PointId};
use crate::patch::{self, Decoder, Item, Limits};
use crate::replica::files::image_size;
use crate::replica::{BeginDisk, SeedView};
use std::collections::BTreeSet;
use std::fs::File;
use std::io::BufWriter;
use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver};

/// Blocks zeroed at once (256 MiB, one node of level 2): bounds what the walk of the tree hands out in one go.
const ZERO_STEP: u64 = 4096;

type Nodes = Box<dyn FnMut(u8, Range<u64>) -> Result<Vec<Digest>> + Send>;
type Emit = Box<dyn FnMut(ChangedNode) -> Result<()> + Send>;

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
    size: DiskSize,
    /// The head this builds on; `None`: from a seed or from nothing.
    below: Option<(PointId, Arc<DigestFile>)>,
    /// The seed that the image was: its digests and its list.
    seed: Option<SeedBelow>,
    /// Blocks of the head that are not what they were: written whether they changed or not.
    rotten: Rotten,
    /// `None` once it is durable and closed.
    image: Option<Qcow2Writer>,
    decoder: Decoder,
    /// `None` once the root is known.
    tree: Option<TreeUpdate<Nodes, Emit>>,
    /// The blocks that the tree found changed and that are not written yet.
    changed: Receiver<(BlockIndex, Digest)>,
    /// `None` once the list is ended.
    list: Option<ChangesWriter<BufWriter<File>>>,
    list_file: File,
    /// The list file of the point itself, where `list` is only what the patch changed of a seed.
    whole_list: Option<File>,
    reservation: Arc<Reservation>,
    bytes_written: u64,
    blocks_changed: u64,
    applied: Option<DiskApplied>,
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
        let (sender, changed) = mpsc::channel();
        let emit: Emit = Box::new(move |node| {
            if node.level == 0 {
                // The receiver lives as long as the tree.
                let _ = sender.send((BlockIndex(node.index), node.digest));
            }
            Ok(())
        });
        let (nodes, size_from): (Nodes, _) = match from {
            Some(digests) => {
                let size_from = digests.size();
                (Box::new(move |level, range| digests.nodes(level, range)), size_from)
            }
            None => (Box::new(|level, range| ZeroNodes.nodes(level, range)), disk.size),
        };
        Ok(Self {
            name: disk.name.clone(),
            domain: domain.clone(),
            size: disk.size,
            below,
            seed,
            rotten: to_repair,
            image: Some(image),
            decoder: Decoder::new(Limits { size_max: DiskSize(DISK_SIZE_MAX) })?,
            tree: Some(TreeUpdate::new(nodes, size_from, disk.size, emit)?),
            changed,
            list: Some(list),
            list_file,
            whole_list,
            reservation: reservation.clone(),
            bytes_written: 0,
            blocks_changed: 0,
            applied: None,
        })
    }

    /// The point whose image of this disk lies below.
    pub fn backing(&self) -> Option<&PointId> {
        self.below.as_ref().map(|(point, _)| point)
    }

    /// What the patch leads on from: the head's digests, or the seed's.
    pub fn from(&self) -> Option<&Arc<DigestFile>> {
        self.below.as_ref().map(|(_, head)| head).or(self.seed.as_ref().map(|s| &s.digests))
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
        let of = |block: &BlockIndex| match block.0 < self.size.blocks() {
            true => Ok(piece_digests(&self.head_block(*block)?)),
            false => Ok(NO_PIECES),
        };
        blocks.iter().map(of).collect()
    }

    /// Whether the image stands alone and holds something: worth keeping if its point is never sealed.
    pub fn is_worth_keeping(&self) -> bool {
        self.below.is_none() && (self.seed.is_some() || self.bytes_written > 0)
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
                Item::Data { block, digest, bytes } => {
                    patch::check_block(block, &bytes, digest)?;
                    self.write(block, digest, &bytes)?;
                }
                Item::Pieces { block, digest, mask, bytes } => {
                    // A block comes once in a patch, so that what is read here is the head's.
                    let mut whole = self.head_block(block)?;
                    mask.scatter(&bytes, &mut whole);
                    patch::check_block(block, &whole, digest).map_err(|e| self.blame(block, e))?;
                    self.write(block, digest, &whole)?;
                }
                Item::Zero { first, count } => self.zero(first, count)?,
                // Judged by `finish`, when it is sure that nothing follows.
                Item::Trailer(_) => {}
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
        let tree = self.tree.take().ok_or_else(|| self.failed())?;
        let root = tree.finish()?;
        if root != trailer.to_root {
            self.doubt_head();
            let what = format!("the patch leads to root {root}, the source has root {}", trailer.to_root);
            return Err(Error::new(Kind::Corrupt, what)
                .hint("run again; the digests that both sides compared with are made anew"));
        }
        self.list.take().ok_or_else(|| self.failed())?.finish(root)?;
        if let (Some(seed), Some(whole)) = (&self.seed, self.whole_list.take()) {
            write_whole_list(&seed.list, &self.list_file, &whole, self.size, root)?;
            self.list_file = whole;
        }
        let applied = DiskApplied { root, bytes_written: self.bytes_written, blocks_changed: self.blocks_changed };
        self.applied = Some(applied.clone());
        Ok(applied)
    }

    /// Step 6a: makes the image durable and closes it.
    pub fn sync_image(&mut self) -> Result<()> {
        let image = self.image.take().ok_or_else(|| self.failed())?;
        image.sync()
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
        if header.size != self.size {
            return conflict(format!("the patch is for {} bytes, the point was begun with {}", header.size, self.size));
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

    /// Writes a block whose content was checked, if it is another than before.
    fn write(&mut self, block: BlockIndex, digest: Digest, bytes: &[u8]) -> Result<()> {
        self.tree()?.push(block, digest)?;
        if self.changed.try_recv().is_err() && !self.rotten.has(block.0) {
            return Ok(());
        }
        self.reservation.spend(BLOCK_LEN as u64)?;
        let range = self.cluster_range(block.0..block.0 + 1)?;
        if range.len() == bytes.len() as u64 {
            self.image()?.write_at(range.start, bytes)?;
        } else {
            // The image is longer than the disk by less than a sector. What lies there must be zero, or a disk that
            // grows again would find in it what it once cut off.
            let mut padded = bytes.to_vec();
            padded.resize(range.len() as usize, 0);
            self.image()?.write_at(range.start, &padded)?;
        }
        self.bytes_written += bytes.len() as u64;
        self.note(block, digest)
    }

    /// Zeroes those of the blocks that were not zero before.
    fn zero(&mut self, first: BlockIndex, count: u64) -> Result<()> {
        let (mut at, end) = (first.0, first.0 + count);
        while at < end {
            let step_end = ((at / ZERO_STEP + 1) * ZERO_STEP).min(end);
            self.tree()?.push_zero(BlockIndex(at), step_end - at)?;
            let mut changed: BTreeSet<u64> =
                std::iter::from_fn(|| self.changed.try_recv().ok()).map(|(b, _)| b.0).collect();
            changed.extend(self.rotten.within(at..step_end));
            let mut run = at..at;
            for block in changed {
                if block != run.end {
                    self.zero_run(&run)?;
                    run = block..block;
                }
                run.end += 1;
                self.note(BlockIndex(block), Digest::ZERO)?;
            }
            self.zero_run(&run)?;
            at = step_end;
        }
        Ok(())
    }

    fn zero_run(&self, blocks: &Range<u64>) -> Result<()> {
        if blocks.is_empty() {
            return Ok(());
        }
        let range = self.cluster_range(blocks.clone())?;
        self.image()?.zero(range)
    }

    /// The bytes of these blocks in the image, which ends with a sector.
    fn cluster_range(&self, blocks: Range<u64>) -> Result<ByteRange> {
        let end = (blocks.end * BLOCK_LEN as u64).min(self.image()?.size().0);
        Ok(ByteRange::new(blocks.start * BLOCK_LEN as u64, end))
    }

    fn note(&mut self, block: BlockIndex, digest: Digest) -> Result<()> {
        self.blocks_changed += 1;
        match &mut self.list {
            Some(list) => list.push(block, digest),
            None => Err(self.failed()),
        }
    }

    fn head_block(&self, block: BlockIndex) -> Result<Vec<u8>> {
        let mut bytes = vec![0; block.bytes(self.size).len() as usize];
        self.image()?.read_at(block.offset(), &mut bytes)?;
        Ok(bytes)
    }

    /// Pieces laid over a block did not give what the patch promises: whether the fault is the block's.
    fn blame(&self, block: BlockIndex, patch_error: Error) -> Error {
        let Some((point, head)) = &self.below else { return patch_error };
        let sealed = head.nodes(0, block.0..block.0 + 1).ok().and_then(|nodes| nodes.first().copied());
        let stored = self.head_block(block).ok().map(|bytes| block_digest(&bytes));
        if head.size() != self.size || sealed == stored {
            return patch_error;
        }
        Error::new(Kind::Corrupt, format!("block {} of the head is not what was sealed", block.0))
            .point(point)
            .offset(block.offset())
            .hint("verify the head; what is damaged there has to be sent again, from nothing")
    }

    /// The source may be wrong, or the digests that it was compared with. They cost little to make anew, and wrong ones
    /// would fail every run to come.
    fn doubt_head(&self) {
        if let Some((point, head)) = &self.below {
            tracing::warn!(disk = %self.name, %point, "the roots differ: the head's digests are thrown away");
            head.condemn();
        }
    }

    fn image(&self) -> Result<&Qcow2Writer> {
        self.image.as_ref().ok_or_else(|| self.failed())
    }

    fn tree(&mut self) -> Result<&mut TreeUpdate<Nodes, Emit>> {
        match &mut self.tree {
            Some(tree) => Ok(tree),
            None => Err(Error::new(Kind::Usage, "the disk's patch was ended already")),
        }
    }

    fn failed(&self) -> Error {
        Error::new(Kind::Usage, "the disk was closed by an earlier call")
    }
}

fn create_image(dir: &Dir, disk: &BeginDisk, backing: Option<&str>) -> Result<Qcow2Writer> {
    let path = dir.join(&image_file(&disk.name));
    qcow2::create(&path, image_size(disk.size), backing.map(|name| (name, Format::Qcow2)))
}
