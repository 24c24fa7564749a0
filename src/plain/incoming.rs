//! A patch on its way into an image: taken apart, every block checked, and written where it is to go.
//!
//! Invariants
//! - A block is written only if its content has the digest that the patch names for it, and only if it differs.
//! - What is learned of the image beforehand ([`Base`]) is not changed by what arrives.

use super::redo::Spool;
use super::undo::Undo;
use crate::block::changes::{ChangesHeader, ChangesReader, ChangesWriter};
use crate::block::digest::Digest;
use crate::block::tree::{ChangedNode, NodeSource, TreeUpdate, ZeroNodes};
use crate::block::{BLOCK_LEN, BlockIndex, ByteRange, DiskSize};
use crate::engine::disk_target::DiskApplied;
use crate::engine::nodefile::NodeFile;
use crate::error::{Error, Kind, Result};
use crate::image::foreign::writer::ForeignWriter;
use crate::image::qcow2::Qcow2Writer;
use crate::image::raw::RawWriter;
use crate::image::{Image, ImageMut};
use crate::patch::{self, Decoder, Header, Item, Limits};
use crate::plain::reading::read_block;
use crate::plain::write_target::Landing;
use std::fs::File;
use std::io::{BufReader, BufWriter, Seek};
use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver};

/// Blocks zeroed at once (256 MiB): bounds what the walk of the tree hands out in one go.
const ZERO_STEP: u64 = 4096;

type Nodes = Box<dyn FnMut(u8, Range<u64>) -> Result<Vec<Digest>> + Send>;
type Emit = Box<dyn FnMut(ChangedNode) -> Result<()> + Send>;

/// What a patch starts from.
#[derive(Clone, Default)]
pub(super) struct Base {
    /// `None`: nothing is there.
    pub(super) image: Option<Arc<dyn Image>>,
    /// Its digest tree and root, once they are known.
    pub(super) tree: Option<(Arc<NodeFile>, Digest)>,
}

impl Base {
    pub(super) fn size(&self) -> DiskSize {
        self.image.as_ref().map_or(DiskSize(0), |image| image.size())
    }

    /// A block of it, in the length that it has in a disk of `size`.
    pub(super) fn block(&self, block: BlockIndex, size: DiskSize) -> Result<Vec<u8>> {
        match &self.image {
            Some(image) => read_block(image.as_ref(), block, size),
            None => Ok(vec![0; block.bytes(size).len() as usize]),
        }
    }
}

/// Where checked blocks go.
pub(super) enum Into {
    Raw(RawWriter),
    Qcow2(Qcow2Writer),
    /// A format of others.
    Served(ForeignWriter),
    /// Nowhere yet: the patch itself is kept.
    Spool(Spool),
}

impl Into {
    pub(super) fn image(&self) -> Option<&dyn ImageMut> {
        match self {
            Into::Raw(writer) => Some(writer),
            Into::Qcow2(writer) => Some(writer),
            Into::Served(writer) => Some(writer),
            Into::Spool(_) => None,
        }
    }
}

/// What an image became: where the patch went, and which blocks it changed.
pub(super) struct Finished {
    pub(super) landing: Landing,
    pub(super) applied: DiskApplied,
    pub(super) outcome: Outcome,
}

/// What a patch made of an image's digests.
pub(super) struct Outcome {
    pub(super) header: Header,
    pub(super) root: Digest,
    /// The change list, if it was asked for.
    list: Option<File>,
}

impl Outcome {
    /// The changed blocks.
    pub(super) fn changes(self) -> Result<Option<ChangesReader<BufReader<File>>>> {
        let Some(mut file) = self.list else { return Ok(None) };
        file.rewind().map_err(|e| Error::from_io("cannot read a temporary file", e))?;
        ChangesReader::new(BufReader::new(file)).map(Some)
    }
}

/// What is known once the header has come.
struct Open {
    header: Header,
    landing: Landing,
    tree: TreeUpdate<Nodes, Emit>,
    changed: Receiver<(BlockIndex, Digest)>,
    list: Option<ChangesWriter<BufWriter<File>>>,
    undo: Option<Undo>,
    base: Base,
    bytes_written: u64,
    blocks_changed: u64,
}

/// Opens where the patch of this header goes, if it fits what is there.
pub(super) type Begin = Box<dyn FnOnce(&Header) -> Result<Landing> + Send>;

pub(super) struct Incoming {
    decoder: Decoder,
    open: Option<Open>,
    begin: Option<Begin>,
    base: Base,
    undo: Option<Undo>,
    keep_list: bool,
    /// Bytes of the stream that came before it was known where they go.
    early: Vec<u8>,
}

impl Incoming {
    pub(super) fn new(base: Base, begin: Begin, undo: Option<Undo>, keep_list: bool) -> Result<Incoming> {
        let decoder = Decoder::new(Limits::default())?;
        Ok(Incoming { decoder, open: None, begin: Some(begin), base, undo, keep_list, early: Vec::new() })
    }

    pub(super) fn apply(&mut self, bytes: &[u8]) -> Result<()> {
        self.decoder.push(bytes);
        while let Some(item) = self.decoder.next_item()? {
            match (item, &mut self.open) {
                (Item::Header(header), _) => self.start(header)?,
                (Item::Trailer(_), _) => {}
                (item, Some(open)) => open.take(item)?,
                (_, None) => return Err(Error::new(Kind::Usage, "the patch was refused already")),
            }
        }
        match &mut self.open {
            Some(Open { landing: Landing { into: Into::Spool(spool), .. }, .. }) => {
                spool.write(&std::mem::take(&mut self.early))?;
                spool.write(bytes)
            }
            Some(_) => Ok(()),
            None => {
                self.early.extend_from_slice(bytes);
                Ok(())
            }
        }
    }

    fn start(&mut self, header: Header) -> Result<()> {
        let begin = self.begin.take().ok_or_else(|| Error::new(Kind::Usage, "a second header"))?;
        let landing = begin(&header)?;
        let (sender, changed) = mpsc::channel();
        let emit: Emit = Box::new(move |node| {
            if node.level == 0 {
                // The receiver lives as long as the tree.
                let _ = sender.send((BlockIndex(node.index), node.digest));
            }
            Ok(())
        });
        let (nodes, size_from): (Nodes, _) = match (&header.from_root, &self.base.tree) {
            (Some(_), Some((nodes, _))) => {
                let nodes = nodes.clone();
                (Box::new(move |level, range| nodes.nodes(level, range)), header.size_from)
            }
            _ => (Box::new(|level, range| ZeroNodes.nodes(level, range)), header.size),
        };
        let tree = TreeUpdate::new(nodes, size_from, header.size, emit)?;
        let list = match self.keep_list {
            true => {
                let file = tempfile::tempfile().map_err(|e| Error::from_io("cannot create a temporary file", e))?;
                let of = ChangesHeader { size: header.size, from_root: header.from_root };
                Some(ChangesWriter::new(BufWriter::new(file), &of)?)
            }
            false => None,
        };
        let (undo, base) = (self.undo.take(), self.base.clone());
        self.open =
            Some(Open { header, landing, tree, changed, list, undo, base, bytes_written: 0, blocks_changed: 0 });
        Ok(())
    }

    /// The trailer was seen, and the root is the one it names. The undo patch, if there is one, is durable.
    pub(super) fn finish(&mut self) -> Result<Finished> {
        let trailer = self.decoder.finish()?;
        let open = self.open.take().ok_or_else(|| Error::new(Kind::Usage, "the patch was ended already"))?;
        open.finish(trailer.to_root)
    }
}

impl Open {
    fn take(&mut self, item: Item) -> Result<()> {
        match item {
            Item::Data { block, digest, bytes } => {
                patch::check_block(block, &bytes, digest)?;
                self.write(block, digest, &bytes)
            }
            Item::Pieces { block, digest, mask, bytes } => {
                // A block comes once in a patch, so that what is read here is what the patch starts from.
                let mut whole = self.base.block(block, self.header.size)?;
                mask.scatter(&bytes, &mut whole);
                patch::check_block(block, &whole, digest)?;
                self.write(block, digest, &whole)
            }
            Item::Zero { first, count } => self.zero(first, count),
            Item::Header(_) | Item::Trailer(_) => Ok(()),
        }
    }

    fn write(&mut self, block: BlockIndex, digest: Digest, bytes: &[u8]) -> Result<()> {
        self.tree.push(block, digest)?;
        if self.changed.try_recv().is_err() {
            return Ok(());
        }
        self.keep_old(block)?;
        if let Some(image) = self.landing.into.image() {
            image.write_at(block.offset(), bytes)?;
        }
        self.bytes_written += bytes.len() as u64;
        self.note(block, digest)
    }

    /// Zeroes those of the blocks that were not zero before.
    fn zero(&mut self, first: BlockIndex, count: u64) -> Result<()> {
        let (mut at, end) = (first.0, first.0 + count);
        while at < end {
            let step_end = ((at / ZERO_STEP + 1) * ZERO_STEP).min(end);
            self.tree.push_zero(BlockIndex(at), step_end - at)?;
            let changed: Vec<u64> = std::iter::from_fn(|| self.changed.try_recv().ok()).map(|(b, _)| b.0).collect();
            let mut run = at..at;
            for block in changed {
                if block != run.end {
                    self.zero_run(&run)?;
                    run = block..block;
                }
                run.end += 1;
                self.keep_old(BlockIndex(block))?;
                self.note(BlockIndex(block), Digest::ZERO)?;
            }
            self.zero_run(&run)?;
            at = step_end;
        }
        Ok(())
    }

    fn zero_run(&self, blocks: &Range<u64>) -> Result<()> {
        match self.landing.into.image() {
            Some(image) if !blocks.is_empty() => {
                let end = (blocks.end * BLOCK_LEN as u64).min(self.header.size.0);
                image.zero(ByteRange::new(blocks.start * BLOCK_LEN as u64, end))
            }
            _ => Ok(()),
        }
    }

    /// Before the block is overwritten.
    fn keep_old(&mut self, block: BlockIndex) -> Result<()> {
        let size = self.base.size();
        match &mut self.undo {
            Some(undo) if block.0 < size.blocks() => undo.push(block, &self.base.block(block, size)?),
            _ => Ok(()),
        }
    }

    fn note(&mut self, block: BlockIndex, digest: Digest) -> Result<()> {
        self.blocks_changed += 1;
        self.list.as_mut().map_or(Ok(()), |list| list.push(block, digest))
    }

    fn finish(mut self, to_root: Digest) -> Result<Finished> {
        let root = self.tree.finish()?;
        if root != to_root {
            let what = format!("the patch leads to root {root}, and says {to_root}");
            return Err(Error::new(Kind::Corrupt, what).hint("nothing was put in place; make the patch again"));
        }
        if let Some(mut undo) = self.undo.take() {
            let size = self.base.size();
            for block in self.header.size.blocks()..size.blocks() {
                // What the patch cuts off. A disk that is cut is read there once: rarely, and to its old end.
                let old = self.base.block(BlockIndex(block), size)?;
                undo.push(BlockIndex(block), &old)?;
            }
            let from_root = self.header.from_root.ok_or_else(|| {
                Error::new(Kind::Usage, "the patch starts from nothing: there is nothing that could be undone")
            })?;
            undo.finish((self.header.size_from, from_root), (self.header.size, root))?;
        }
        let list = match self.list.take() {
            Some(list) => {
                let out = list.finish(root)?;
                Some(out.into_inner().map_err(|e| Error::from_io("cannot write a temporary file", e.into_error()))?)
            }
            None => None,
        };
        let applied = DiskApplied { root, bytes_written: self.bytes_written, blocks_changed: self.blocks_changed };
        Ok(Finished { landing: self.landing, applied, outcome: Outcome { header: self.header, root, list } })
    }
}
