//! A patch for later: what leads from one image, or from its digests alone, to another.

use super::copy::{Sending, compare, ship};
use super::source::Source;
use super::{Committed, Finish, ImageView, PlainTarget, Whole};
use crate::block::digest::{BLOCK_PIECES, BlockPieces, Digest, PieceDigest};
use crate::block::{BlockIndex, ByteRange, DiskSize};
use crate::engine::disk_target::{DiskApplied, DiskTarget, check_blocks};
use crate::engine::nodefile::NodeFile;
use crate::engine::pump::{KeepGoing, Progress};
use crate::error::{Error, Kind, Result};
use crate::name::DiskName;
use crate::patch;
use serde::Serialize;
use std::io::Write;
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::Ordering;

/// An image that is not here, only its digests are: the base of a patch that is made far from it.
pub struct KnownByDigests {
    /// Digest tree of the image.
    pub nodes: NodeFile,
    /// Root of the image, which the patch names as its base.
    pub root: Digest,
}

impl DiskTarget for KnownByDigests {
    fn nodes(&self, _: &DiskName, level: u8, range: Range<u64>) -> Result<Vec<Digest>> {
        self.nodes.nodes(level, range)
    }

    /// Nobody has the pieces: they are said to be as no piece is, and blocks travel whole.
    fn pieces(&self, _: &DiskName, blocks: &[BlockIndex]) -> Result<Vec<BlockPieces>> {
        check_blocks(blocks)?;
        Ok(vec![[PieceDigest([0xff; PieceDigest::LEN]); BLOCK_PIECES]; blocks.len()])
    }

    fn apply(&self, _: &DiskName, _: &[u8]) -> Result<()> {
        Err(only_digests())
    }

    fn finish_disk(&self, _: &DiskName) -> Result<DiskApplied> {
        Err(only_digests())
    }
}

fn only_digests() -> Error {
    Error::new(Kind::Usage, "there are digests only, and no image to be written")
}

impl PlainTarget for KnownByDigests {
    fn view(&self) -> Result<ImageView> {
        let (size, root) = (self.nodes.size(), Some(self.root));
        Ok(ImageView { exists: true, size, root, resumes: false, redone: false, digests_reason: None })
    }

    fn read(&self, _: &mut dyn FnMut(u64, u64)) -> Result<Whole> {
        Ok(Whole { size: self.nodes.size(), root: self.root, bytes_read: 0 })
    }

    fn commit(&self, _: &Finish) -> Result<Committed> {
        Err(only_digests())
    }
}

/// Nothing: the patch holds all.
pub struct Nothing;

impl DiskTarget for Nothing {
    fn nodes(&self, _: &DiskName, _: u8, range: Range<u64>) -> Result<Vec<Digest>> {
        Ok(vec![Digest::ZERO; (range.end - range.start) as usize])
    }

    fn pieces(&self, _: &DiskName, blocks: &[BlockIndex]) -> Result<Vec<BlockPieces>> {
        Ok(vec![[PieceDigest::ZERO; BLOCK_PIECES]; blocks.len()])
    }

    fn apply(&self, _: &DiskName, _: &[u8]) -> Result<()> {
        Err(only_digests())
    }

    fn finish_disk(&self, _: &DiskName) -> Result<DiskApplied> {
        Err(only_digests())
    }
}

impl PlainTarget for Nothing {
    fn view(&self) -> Result<ImageView> {
        let size = DiskSize(0);
        Ok(ImageView { exists: false, size, root: None, resumes: false, redone: false, digests_reason: None })
    }

    fn read(&self, _: &mut dyn FnMut(u64, u64)) -> Result<Whole> {
        Err(only_digests())
    }

    fn commit(&self, _: &Finish) -> Result<Committed> {
        Err(only_digests())
    }
}

/// What a patch was made of. The JSON of this struct is a contract with scripts: fields are added, never renamed.
#[derive(Debug, Clone, Serialize)]
pub struct Diffed {
    /// Size of the source, which is the size after the patch.
    pub size: DiskSize,
    /// Size of the base; 0 if the patch starts from nothing.
    pub size_from: DiskSize,
    /// Root of the base. `None`: the patch starts from nothing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub from_root: Option<Digest>,
    /// Root of the source, which is the root after the patch.
    pub to_root: Digest,
    /// Bytes read from the source.
    pub bytes_read: u64,
    /// Bytes read from the base to learn its digests; 0 if kept digests were believed.
    pub bytes_read_base: u64,
    /// Of the patch.
    pub bytes: u64,
    /// Blocks that differ, zeroed ones included.
    pub blocks_changed: u64,
}

/// The base is asked what it has, and what is found goes to the writer.
struct Tee<'a, W> {
    base: &'a dyn PlainTarget,
    out: Mutex<Written<W>>,
}

struct Written<W> {
    out: W,
    /// The end of what was written, as long as a trailer at least.
    end: Vec<u8>,
}

impl<W: Write + Send> DiskTarget for Tee<'_, W> {
    fn nodes(&self, disk: &DiskName, level: u8, range: Range<u64>) -> Result<Vec<Digest>> {
        self.base.nodes(disk, level, range)
    }

    fn pieces(&self, disk: &DiskName, blocks: &[BlockIndex]) -> Result<Vec<BlockPieces>> {
        self.base.pieces(disk, blocks)
    }

    fn apply(&self, _: &DiskName, bytes: &[u8]) -> Result<()> {
        let mut written = self.out.lock().expect("nothing panics while it writes");
        written.out.write_all(bytes).map_err(|e| Error::from_io("cannot write the patch", e))?;
        let from = bytes.len().saturating_sub(patch::TRAILER_LEN);
        written.end.extend_from_slice(&bytes[from..]);
        let more = written.end.len().saturating_sub(patch::TRAILER_LEN);
        written.end.drain(..more);
        Ok(())
    }

    fn finish_disk(&self, _: &DiskName) -> Result<DiskApplied> {
        let mut written = self.out.lock().expect("nothing panics while it writes");
        written.out.flush().map_err(|e| Error::from_io("cannot write the patch", e))?;
        let root = patch::to_root_at_end(&written.end);
        let root = root.ok_or_else(|| Error::new(Kind::Usage, "the patch has no end"))?;
        Ok(DiskApplied { root, bytes_written: 0, blocks_changed: 0 })
    }
}

/// Writes the patch that leads from `base` to the source. `changed` as for a copy. Blocks; not durable by itself.
pub fn diff(
    source: &Source,
    base: &dyn PlainTarget,
    out: impl Write + Send,
    changed: Option<&[ByteRange]>,
    sending: &Sending,
    progress: &Progress,
    keep_going: KeepGoing,
) -> Result<Diffed> {
    let good = || keep_going().and_then(|()| source.keep_going());
    let compared = compare(source, base, changed, sending, progress, &good)?;
    let tee = Tee { base, out: Mutex::new(Written { out, end: Vec::new() }) };
    let shipped = ship(source, &tee, &compared, progress, &good)?;
    let head = compared.shipment.head;
    Ok(Diffed {
        size: source.size(),
        size_from: head.map_or(DiskSize(0), |(size, _)| size),
        from_root: head.map(|(_, root)| root),
        to_root: shipped.root,
        bytes_read: progress.read.load(Ordering::Relaxed),
        bytes_read_base: compared.bytes_read_target,
        bytes: shipped.stats.bytes_sent,
        blocks_changed: progress.changed_blocks.load(Ordering::Relaxed),
    })
}
