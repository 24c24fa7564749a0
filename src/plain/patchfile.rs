//! Patches in files and pipes: looked at, checked, and applied.

use super::{Finish, PlainTarget, Way};
use crate::block::DiskSize;
use crate::block::digest::Digest;
use crate::block::tree::RootBuilder;
use crate::error::advice::{self, Advice};
use crate::error::{Error, Kind, Result};
use crate::name::{DiskName, DomainUuid};
use crate::patch::{self, Decoder, Header, Item, Limits, Trailer, plain_names};
use serde::Serialize;
use std::io::Read;

/// Bytes of patch read at once.
const CHUNK_LEN: usize = 1 << 20;

/// What stands in a patch. The JSON of this struct is a contract with scripts: fields are added, never renamed.
#[derive(Debug, Clone, Serialize)]
pub struct PatchInfo {
    /// Whose disk it is of; absent of a plain image.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub domain: Option<DomainUuid>,
    /// Name of the disk that the patch is of. `None`: it is of a plain image.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk: Option<DiskName>,
    /// Size before the patch; 0 if it starts from nothing.
    pub size_from: DiskSize,
    /// Size after the patch.
    pub size: DiskSize,
    /// Absent: it starts from nothing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub from_root: Option<Digest>,
    /// Root after the patch, as its trailer says.
    pub to_root: Digest,
    /// Of the patch.
    pub bytes: u64,
    /// Number of records in the patch.
    pub records: u64,
    /// Blocks that travel whole, in pieces, and as zeros.
    pub blocks_whole: u64,
    /// Blocks of which only some pieces travel.
    pub blocks_in_pieces: u64,
    /// Blocks that the patch makes read as zeros.
    pub blocks_zero: u64,
    /// Bytes of content, once decompressed.
    pub content_bytes: u64,
}

/// A patch that is read in chunks.
pub(super) struct Incoming<R> {
    input: R,
    decoder: Decoder,
    /// The bytes that were read last.
    chunk: Vec<u8>,
    bytes: u64,
}

impl<R: Read> Incoming<R> {
    pub(super) fn new(input: R) -> Result<Self> {
        Ok(Self { input, decoder: Decoder::new(Limits::default())?, chunk: Vec::new(), bytes: 0 })
    }

    /// Reads on, as much as a chunk holds or there is; false at the end. What is read is not taken apart yet.
    fn read_on(&mut self) -> Result<bool> {
        self.chunk.clear();
        let read = (&mut self.input).take(CHUNK_LEN as u64).read_to_end(&mut self.chunk);
        self.bytes += read.map_err(|e| Error::from_io("cannot read the patch", e))? as u64;
        Ok(!self.chunk.is_empty())
    }

    /// The next item; `None` behind the trailer, where the stream was found to be whole.
    pub(super) fn next_item(&mut self) -> Result<Option<Item>> {
        loop {
            if let Some(item) = self.decoder.next_item()? {
                return Ok(Some(item));
            }
            if !self.read_on()? {
                self.decoder.finish()?;
                return Ok(None);
            }
            self.decoder.push(&self.chunk);
        }
    }

    /// The header, which the first chunk holds.
    pub(super) fn header(&mut self) -> Result<Header> {
        match self.next_item()? {
            Some(Item::Header(header)) => Ok(header),
            _ => Err(Error::new(Kind::Corrupt, "the patch is empty")),
        }
    }
}

/// Reads a patch to its end. With `check` every block that travels whole is compared with its digest, and of a patch
/// that starts from nothing the root, too; what travels in pieces can be checked only where it is applied.
pub fn look(input: impl Read, check: bool) -> Result<PatchInfo> {
    let mut patch = Incoming::new(input)?;
    let header = patch.header()?;
    let of = (!header.is_plain()).then(|| (header.domain.clone(), header.disk.clone()));
    let (domain, disk) = of.map_or((None, None), |(domain, disk)| (Some(domain), Some(disk)));
    let mut info = PatchInfo {
        domain,
        disk,
        size_from: header.size_from,
        size: header.size,
        from_root: header.from_root,
        to_root: Digest::ZERO,
        bytes: 0,
        records: 0,
        blocks_whole: 0,
        blocks_in_pieces: 0,
        blocks_zero: 0,
        content_bytes: 0,
    };
    let mut root = (check && header.from_root.is_none()).then(|| RootBuilder::new(header.size));
    while let Some(item) = patch.next_item()? {
        match item {
            Item::Data { block, digest, bytes } => {
                if check {
                    patch::check_block(block, &bytes, digest)?;
                }
                if let Some(root) = &mut root {
                    root.push_block(block, digest);
                }
                (info.blocks_whole, info.content_bytes) =
                    (info.blocks_whole + 1, info.content_bytes + bytes.len() as u64);
            }
            Item::Pieces { bytes, .. } if header.from_root.is_some() => {
                info.blocks_in_pieces += 1;
                info.content_bytes += bytes.len() as u64;
            }
            Item::Pieces { block, .. } => {
                let what = "the patch starts from nothing, and yet has pieces of blocks";
                return Err(Error::new(Kind::Corrupt, what).offset(block.offset()));
            }
            Item::Zero { count, .. } => info.blocks_zero += count,
            Item::Trailer(Trailer { records, to_root }) => (info.records, info.to_root) = (records, to_root),
            Item::Header(_) => {}
        }
    }
    info.bytes = patch.bytes;
    match root.map(RootBuilder::finish) {
        Some(root) if root != info.to_root => {
            let what = format!("the patch leads to root {root}, and says {}", info.to_root);
            Err(Error::new(Kind::Corrupt, what))
        }
        _ => Ok(info),
    }
}

/// What applying did. The JSON of this struct is a contract with scripts: fields are added, never renamed.
#[derive(Debug, Clone, Serialize)]
pub struct Applied {
    /// The image was already as the patch makes it; nothing was done.
    pub already: bool,
    /// Size of the image after the patch.
    pub size: DiskSize,
    /// Root of the image after the patch.
    pub root: Digest,
    /// How the image was changed. `None`: it was already as the patch makes it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub way: Option<Way>,
    /// Bytes read from the image to learn its root; 0 if the root was known or did not matter.
    pub bytes_read: u64,
    /// Bytes of content that were written.
    pub bytes_written: u64,
    /// Blocks that the patch changed.
    pub blocks_changed: u64,
    /// Before anything else, a change that was cut short was completed.
    pub redone: bool,
}

/// Opens the image that a patch of this header is for.
pub type OpenImage<'a> = &'a dyn Fn(&Header) -> Result<Box<dyn PlainTarget>>;

/// Applies the patch to the image that `open` gives. An image that is as the patch makes it is left alone; any other
/// base than the patch's is a `Conflict`. `replace`: a patch that starts from nothing may take the place of what is
/// there. `progress` gets (done, total) bytes while the image is read. Durable when it returns.
pub fn apply(
    input: impl Read,
    open: OpenImage,
    finish: &Finish,
    replace: bool,
    progress: &mut dyn FnMut(u64, u64),
    keep_going: &dyn Fn() -> Result<()>,
) -> Result<Applied> {
    let mut patch = Incoming::new(input)?;
    let header = patch.header()?;
    let target = open(&header)?;
    let view = target.view()?;
    let blind = header.from_root.is_none() && (replace || !view.exists || view.resumes);
    let mut applied = Applied {
        already: false,
        size: header.size,
        root: Digest::ZERO,
        way: None,
        bytes_read: 0,
        bytes_written: 0,
        blocks_changed: 0,
        redone: view.redone,
    };
    if !blind {
        let whole = match view.exists {
            true => Some(target.read(progress)?),
            false => None,
        };
        applied.bytes_read = whole.as_ref().map_or(0, |w| w.bytes_read);
        let found = whole.map(|w| (w.size, w.root));
        if found != header.from_root.map(|root| (header.size_from, root)) {
            (applied.already, applied.root) = (true, already_applied(&mut patch, &header, found)?);
            return Ok(applied);
        }
    }
    let (_, disk) = plain_names();
    loop {
        keep_going()?;
        target.apply(&disk, &patch.chunk)?;
        if !patch.read_on()? {
            break;
        }
    }
    let done = target.finish_disk(&disk)?;
    let committed = target.commit(finish)?;
    (applied.root, applied.way) = (done.root, committed.way);
    (applied.bytes_written, applied.blocks_changed) = (done.bytes_written, done.blocks_changed);
    Ok(applied)
}

/// The root of an image that the patch has been applied to already. The patch is read to its end, to know what it
/// makes.
fn already_applied<R: Read>(
    patch: &mut Incoming<R>,
    header: &Header,
    found: Option<(DiskSize, Digest)>,
) -> Result<Digest> {
    let mut to = None;
    while let Some(item) = patch.next_item()? {
        if let Item::Trailer(trailer) = item {
            to = Some((header.size, trailer.to_root));
        }
    }
    if let Some((_, root)) = found.filter(|found| Some(*found) == to) {
        return Ok(root);
    }
    let name = |image: Option<(DiskSize, Digest)>| {
        image.map_or("nothing".to_owned(), |(size, root)| format!("root {root} ({size} bytes)"))
    };
    let wanted = header.from_root.map(|root| (header.size_from, root));
    let what = format!("the patch leads from {} to {}, and the image has {}", name(wanted), name(to), name(found));
    let advice = match (wanted, found) {
        (None, _) => advice::Image::Overwrite.into(),
        (_, None) => Advice::from("the patch needs the image that it was made against"),
        _ => advice::Image::PatchesBetween.into(),
    };
    Err(Error::new(Kind::Conflict, what).advise(advice))
}
