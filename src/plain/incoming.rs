//! A patch on its way into a plain image: what it starts from, where it goes, and what is kept of the old content.
//!
//! Invariants
//! - What is learned of the image beforehand ([`Base`]) is not changed by what arrives.
//! - Blocks are checked and written by the [`applier`](crate::engine::applier), and by nobody else.

use super::redo::Spool;
use super::undo::Undo;
use crate::block::changes::{ChangesHeader, ChangesReader, ChangesWriter};
use crate::block::digest::Digest;
use crate::block::{BlockIndex, DiskSize};
use crate::engine::applier::{Applied, Applier, Change, PatchedImage, TreeBefore};
use crate::engine::disk_target::DiskApplied;
use crate::engine::nodefile::NodeFile;
use crate::error::{Error, Kind, Result};
use crate::image::foreign::writer::ForeignWriter;
use crate::image::qcow2::Qcow2Writer;
use crate::image::raw::RawWriter;
use crate::image::{Image, ImageMut};
use crate::patch::{Decoder, Header, Item, Limits, Trailer};
use crate::plain::reading::read_block;
use crate::plain::write_target::WriteTarget;
use std::fs::File;
use std::io::{BufReader, BufWriter, Seek};
use std::sync::Arc;

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
pub(super) enum Writer {
    Raw(RawWriter),
    Qcow2(Qcow2Writer),
    /// A format of others.
    Served(ForeignWriter),
    /// Nowhere yet: the patch itself is kept.
    Spool(Spool),
}

impl Writer {
    pub(super) fn image(&self) -> Option<&dyn ImageMut> {
        match self {
            Writer::Raw(writer) => Some(writer),
            Writer::Qcow2(writer) => Some(writer),
            Writer::Served(writer) => Some(writer),
            Writer::Spool(_) => None,
        }
    }
}

/// What an image became: where the patch went, and which blocks it changed.
pub(super) struct Finished {
    pub(super) landing: WriteTarget,
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
    applier: Applier,
    image: OpenImage,
}

/// Where the patch goes, and what the image was.
struct OpenImage {
    /// Of the disk after the patch.
    size: DiskSize,
    landing: WriteTarget,
    undo: Option<Undo>,
    base: Base,
}

impl PatchedImage for OpenImage {
    fn image(&self) -> Result<Option<&dyn ImageMut>> {
        Ok(self.landing.into.image())
    }

    fn block_before(&self, block: BlockIndex) -> Result<Vec<u8>> {
        self.base.block(block, self.size)
    }

    fn before_change(&mut self, block: BlockIndex, _: Change) -> Result<()> {
        let size = self.base.size();
        match &mut self.undo {
            Some(undo) if block.0 < size.blocks() => undo.push(block, &self.base.block(block, size)?),
            _ => Ok(()),
        }
    }
}

/// Opens where the patch of this header goes, if it fits what is there.
pub(super) type Begin = Box<dyn FnOnce(&Header) -> Result<WriteTarget> + Send>;

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
                (item, Some(open)) => open.applier.take(item, &mut open.image)?,
                (_, None) => return Err(Error::new(Kind::Usage, "the patch was refused already")),
            }
        }
        match &mut self.open {
            Some(Open { image: OpenImage { landing: WriteTarget { into: Writer::Spool(spool), .. }, .. }, .. }) => {
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
        let from = match (&header.from_root, &self.base.tree) {
            (Some(_), Some((nodes, _))) => {
                let nodes = nodes.clone();
                Some(TreeBefore {
                    nodes: Box::new(move |level, range| nodes.nodes(level, range)),
                    size: header.size_from,
                })
            }
            _ => None,
        };
        let list = match self.keep_list {
            true => {
                let file = tempfile::tempfile().map_err(|e| Error::from_io("cannot create a temporary file", e))?;
                let of = ChangesHeader { size: header.size, from_root: header.from_root };
                Some(ChangesWriter::new(BufWriter::new(file), &of)?)
            }
            false => None,
        };
        let applier = Applier::new(from, header.size, list)?;
        let image = OpenImage { size: header.size, landing, undo: self.undo.take(), base: self.base.clone() };
        self.open = Some(Open { header, applier, image });
        Ok(())
    }

    /// The trailer was seen, and the root is the one it names. The undo patch, if there is one, is durable.
    pub(super) fn finish(&mut self) -> Result<Finished> {
        let trailer = self.decoder.finish()?;
        let open = self.open.take().ok_or_else(|| Error::new(Kind::Usage, "the patch was ended already"))?;
        open.finish(&trailer)
    }
}

impl Open {
    fn finish(self, trailer: &Trailer) -> Result<Finished> {
        let wrong = |e: Error| match e.kind() {
            Kind::Corrupt => e.hint("nothing was put in place; make the patch again"),
            _ => e,
        };
        let Applied { disk: applied, list } = self.applier.finish(trailer).map_err(wrong)?;
        let OpenImage { landing, undo, base, .. } = self.image;
        if let Some(mut undo) = undo {
            let size = base.size();
            for block in self.header.size.blocks()..size.blocks() {
                // What the patch cuts off. A disk that is cut is read there once: rarely, and to its old end.
                let old = base.block(BlockIndex(block), size)?;
                undo.push(BlockIndex(block), &old)?;
            }
            let from_root = self.header.from_root.ok_or_else(|| {
                Error::new(Kind::Usage, "the patch starts from nothing: there is nothing that could be undone")
            })?;
            undo.finish((self.header.size_from, from_root), (self.header.size, applied.root))?;
        }
        let written = |e: std::io::Error| Error::from_io("cannot write a temporary file", e);
        let list = list.map(|list| list.into_inner().map_err(|e| written(e.into_error()))).transpose()?;
        let outcome = Outcome { header: self.header, root: applied.root, list };
        Ok(Finished { landing, applied, outcome })
    }
}
