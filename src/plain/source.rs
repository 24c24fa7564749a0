//! An image that is read: opened under QEMU's locks, seen to stand still, and hashed by all cores.

use super::identity::Identity;
use super::redo;
use crate::block::changes::Run;
use crate::block::digest::{Digest, block_digest};
use crate::block::extent::Content;
use crate::block::tree::ZeroNodes;
use crate::block::{BLOCK_LEN, BlockIndex, ByteRange, DiskSize, GROUP_LEN, GroupIndex};
use crate::engine::nodefile::NodeFile;
use crate::engine::ordered::in_order;
use crate::engine::pump::{EXTENT_WINDOW, Progress, read_group};
use crate::error::{Error, Kind, Result, advice};
use crate::image::foreign::format::{AnyFormat, Foreign};
use crate::image::locks::ReadLock;
use crate::image::open::{self, OpenOptions, Opened};
use crate::image::raw::RawImage;
use crate::image::{Chain, Format, Image, Layer, chain};
use crate::plain::reading::{in_use, layer};
use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// How an image is opened for reading.
#[derive(Debug, Clone)]
pub struct ReadOptions {
    /// Locks, readers and directory for sockets.
    pub open: OpenOptions,
    /// Let a raw image end in the middle of a sector, where its file does.
    pub exact: bool,
    /// Of a block device, only so much is the image.
    pub device_max: Option<DiskSize>,
    /// Where redo files of block devices lie.
    pub redo_dir: PathBuf,
    /// Every layer lies below this directory, or the image is refused.
    pub within: Option<PathBuf>,
    /// Without [`ReadOptions::within`]: directories, beside the image's own, in which files that it names may lie.
    pub backing: Vec<PathBuf>,
}

/// An image open for reading.
pub struct Source {
    /// Content of the image. The file may be written to meanwhile; `keep_going` finds that out.
    pub image: Arc<dyn Image>,
    /// Path of the uppermost layer, as the caller gave it.
    pub path: PathBuf,
    /// How it is read, as part of a sentence.
    pub how: String,
    opened: Option<Opened>,
    seen: Vec<(PathBuf, Identity)>,
    /// A QEMU may be writing to it, and that was accepted.
    shared: bool,
    _locks: Vec<ReadLock>,
}

impl Source {
    /// Opens the image at `path` with all below it. `Busy` if a QEMU has a layer open for writing, unless
    /// `options.open.force_share`; `Conflict` if an `apply` or `copy` into it was cut short. Blocks.
    pub fn open(path: &Path, format: Format, options: &ReadOptions) -> Result<Source> {
        let layer = layer(path, format)?;
        redo::refuse_if_torn(&crate::plain::beside::real_path(path)?, layer.block_device, &options.redo_dir)?;
        let beside = chain::named_beside(path, &options.backing);
        let may = |file: &Path| match &options.within {
            Some(root) => crate::plain::beside::check_within(file, root).map(drop),
            None => beside(file),
        };
        let chain = chain::resolve_chain_where(&layer, &may)?;
        let mut files: Vec<&Path> = chain.0.iter().map(|l| l.path.as_path()).collect();
        files.extend(chain.0.iter().filter_map(|l| l.data_file.as_deref()));
        let shared = options.open.force_share;
        let locks = match shared {
            true => Vec::new(),
            false => files.iter().map(|file| lock(file)).collect::<Result<_>>()?,
        };
        let seen = files.iter().map(|f| Ok((f.to_path_buf(), Identity::of(f)?))).collect::<Result<_>>()?;
        let exact = format == Format::Raw && (options.exact || layer.block_device);
        let (image, how, opened): (Arc<dyn Image>, _, _) = match exact {
            true => {
                let image = RawImage::open_exact(&layer, options.device_max)?;
                (Arc::new(image), open::explain(&chain)?, None)
            }
            false => {
                let opened = open::open_read(&chain, &options.open)?;
                (opened.image.clone(), opened.how.clone(), Some(opened))
            }
        };
        Ok(Source { image, path: path.to_owned(), how, opened, seen, shared, _locks: locks })
    }

    /// As [`Source::open`], of an image in any format.
    pub fn open_any(path: &Path, format: AnyFormat, options: &ReadOptions) -> Result<Source> {
        match format {
            AnyFormat::Own(format) => Source::open(path, format, options),
            AnyFormat::Of(format) => Source::open_foreign(path, format, options),
        }
    }

    /// As [`Source::open`], of an image in a format of others, which is one file.
    pub fn open_foreign(path: &Path, format: Foreign, options: &ReadOptions) -> Result<Source> {
        let layer = layer(path, Format::Raw)?;
        redo::refuse_if_torn(&crate::plain::beside::real_path(path)?, layer.block_device, &options.redo_dir)?;
        if let Some(root) = &options.within {
            crate::plain::beside::check_within(path, root)?;
        }
        let shared = options.open.force_share;
        let locks = if shared { Vec::new() } else { vec![lock(path)?] };
        let seen = vec![(path.to_owned(), Identity::of(path)?)];
        let opened = open::open_foreign(&layer, format, &options.open)?;
        let (image, how) = (opened.image.clone(), opened.how.clone());
        Ok(Source { image, path: path.to_owned(), how, opened: Some(opened), seen, shared, _locks: locks })
    }

    /// Size of the image, as a guest would see it.
    pub fn size(&self) -> DiskSize {
        self.image.size()
    }

    /// Fails if a file of the image was touched since it was opened, unless that was accepted.
    pub fn keep_going(&self) -> Result<()> {
        if self.shared {
            return Ok(());
        }
        for (path, seen) in &self.seen {
            if Identity::of(path)? != *seen {
                return Err(Error::new(Kind::Conflict, "the image was written to while it was read")
                    .path(path)
                    .advise(advice::Image::ReadStill));
            }
        }
        Ok(())
    }

    /// The files that it is read from, the image itself first.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        self.seen.iter().map(|(path, _)| path.as_path())
    }

    /// Ends a helper process, if there is one. Blocks.
    pub fn close(self) -> Result<()> {
        self.opened.map_or(Ok(()), Opened::close)
    }
}

fn lock(path: &Path) -> Result<ReadLock> {
    ReadLock::take(path)?.ok_or_else(|| in_use(path, "a QEMU program has the image open for writing"))
}

/// A chain of one layer.
pub(super) fn alone(layer: &Layer) -> Chain {
    Chain(vec![layer.clone()])
}

/// The digest tree of an image.
pub struct Hashed {
    /// Digest tree of the whole image, in a temporary file.
    pub nodes: NodeFile,
    /// Root of the tree.
    pub root: Digest,
}

/// Reads and hashes the whole image. `keep_going` is asked between groups; an error of it ends the work. Blocks.
pub fn hash(
    image: &dyn Image,
    workers: usize,
    progress: &Progress,
    keep_going: &dyn Fn() -> Result<()>,
) -> Result<Hashed> {
    let size = image.size();
    let nodes = NodeFile::temporary(size)?;
    let groups = Groups { image, at: 0, ready: VecDeque::new() };
    let root = in_order(
        workers,
        groups,
        || vec![0; STRIDE_LEN as usize],
        |buffer, (group, data): (GroupIndex, Vec<ByteRange>)| hash_group(image, group, &data, buffer, progress),
        |results| {
            let runs = results.flat_map(|group| {
                let group = keep_going().and(group);
                match group {
                    Ok(runs) => runs.into_iter().map(Ok).collect::<Vec<_>>(),
                    Err(e) => vec![Err(e)],
                }
            });
            nodes.apply(ZeroNodes, runs)
        },
    )?;
    progress.scanned.store(size.0, Ordering::Relaxed);
    Ok(Hashed { nodes, root })
}

/// Bytes read before they are hashed: they are still in the cache of the core then, and a whole group would not be.
const STRIDE_LEN: u64 = 256 << 10;

fn hash_group(
    image: &dyn Image,
    group: GroupIndex,
    data: &[ByteRange],
    buffer: &mut [u8],
    progress: &Progress,
) -> Result<Vec<Run>> {
    let bytes = group.bytes(image.size());
    data.iter().for_each(|range| image.expect(*range));
    let mut runs: Vec<Run> = Vec::new();
    let mut at = bytes.start;
    while at < bytes.end {
        let stride = ByteRange::new(at, bytes.end.min(at + STRIDE_LEN));
        at = stride.end;
        let data: Vec<ByteRange> = data.iter().filter_map(|range| range.intersect(stride)).collect();
        if data.is_empty() {
            continue;
        }
        let read = read_group(image, stride, &data, buffer)?;
        progress.read.fetch_add(read, Ordering::Relaxed);
        for block in stride.start / BLOCK_LEN as u64..stride.end.div_ceil(BLOCK_LEN as u64) {
            let range = BlockIndex(block).bytes(image.size());
            if !data.iter().any(|d| d.intersect(range).is_some()) {
                continue;
            }
            let (from, to) = (range.start - stride.start, range.end - stride.start);
            let digest = block_digest(&buffer[from as usize..to as usize]);
            match runs.last_mut() {
                _ if digest.is_zero() => {}
                Some(Run::Digests { first, digests }) if first.0 + digests.len() as u64 == block => {
                    digests.push(digest);
                }
                _ => runs.push(Run::Digests { first: BlockIndex(block), digests: vec![digest] }),
            }
        }
    }
    progress.scanned.fetch_max(bytes.end, Ordering::Relaxed);
    Ok(runs)
}

/// The groups of an image that may have data, in order, with where it is.
struct Groups<'a> {
    image: &'a dyn Image,
    at: u64,
    ready: VecDeque<(GroupIndex, Vec<ByteRange>)>,
}

impl Groups<'_> {
    fn window(&mut self) -> Result<()> {
        let size = self.image.size();
        let window = ByteRange::new(self.at, size.0.min(self.at.saturating_add(EXTENT_WINDOW)));
        self.at = window.end;
        for extent in self.image.extents(window)?.into_iter().filter(|e| e.content == Content::Data) {
            for group in extent.range.start / GROUP_LEN..extent.range.end.div_ceil(GROUP_LEN) {
                let group = GroupIndex(group);
                let Some(part) = extent.range.intersect(group.bytes(size)) else { continue };
                match self.ready.back_mut() {
                    Some((last, parts)) if *last == group => parts.push(part),
                    _ => self.ready.push_back((group, vec![part])),
                }
            }
        }
        Ok(())
    }
}

impl Iterator for Groups<'_> {
    type Item = Result<(GroupIndex, Vec<ByteRange>)>;

    fn next(&mut self) -> Option<Self::Item> {
        while self.ready.is_empty() && self.at < self.image.size().0 {
            if let Err(e) = self.window() {
                self.at = self.image.size().0;
                return Some(Err(e));
            }
        }
        self.ready.pop_front().map(Ok)
    }
}
