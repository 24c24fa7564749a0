//! Reading a point again: every block of every disk against the digest it was sealed with (I12).
//!
//! Expected digests come from the change lists of the disk's points, never from the head's digest file: that one is a
//! cache. What an image's map calls a hole counts as zeros and costs nothing. Two threads read and hash; memory does
//! not depend on the size of the disk. Modifies nothing and needs no lock.

use super::files::Dir;
use super::manifest::{self, Attached, Manifest, Point};
use super::{ATTACHMENT_MAX, Attachment, VerifyDisk, VerifyReport, chain};
use crate::block::changes::Run;
use crate::block::digest::Digest;
use crate::block::tree::RootBuilder;
use crate::block::{BLOCK_LEN, BlockIndex, ByteRange};
use crate::error::{Error, Kind, Result};
use crate::image::{Chain, qcow2};
use crate::name::{DiskName, PointId};
use crate::replica::reading::Reading;
use std::collections::BTreeSet;

/// Most damaged blocks that a report names.
const DAMAGED_MAX: usize = 64;

pub(super) fn verify(
    points: &Dir,
    manifest: &Manifest,
    point: &Point,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<VerifyReport> {
    let total_bytes = point.disks.iter().map(|d| d.size.0).sum();
    let mut done_bytes = 0;
    let mut report = VerifyReport {
        point: point.id.clone(),
        disks: Vec::new(),
        damaged_attachments: damaged_attachments(points, point)?,
    };
    for disk in &point.disks {
        let mut advance = |bytes| {
            done_bytes += bytes;
            progress(done_bytes, total_bytes);
        };
        let verified = verify_disk(points, manifest, point, disk, &mut advance);
        report.disks.push(verified.map_err(|e| e.disk(&disk.name).point(&point.id))?);
    }
    Ok(report)
}

pub(super) fn damaged_attachments(points: &Dir, point: &Point) -> Result<Vec<Attachment>> {
    let mut damaged = Vec::new();
    for attached in &point.attachments {
        if read_attachment(points, &point.id, attached)?.is_none() {
            damaged.push(attached.name);
        }
    }
    Ok(damaged)
}

/// An attachment's content; `None` if that is not what was sealed, or is gone.
pub(super) fn read_attachment(points: &Dir, point: &PointId, attached: &Attached) -> Result<Option<Vec<u8>>> {
    let dir = points.sub(point.as_str())?;
    let content = dir.as_ref().map(|d| d.read(attached.name.file_name(), ATTACHMENT_MAX)).transpose();
    match content {
        Ok(content) => Ok(content.flatten().filter(|c| Digest(*blake3::hash(c).as_bytes()) == attached.blake3)),
        // Longer than any attachment: it is not what was sealed.
        Err(e) if e.kind() == Kind::Corrupt => Ok(None),
        Err(e) => Err(e),
    }
}

fn verify_disk(
    points: &Dir,
    manifest: &Manifest,
    point: &Point,
    disk: &manifest::Disk,
    advance: &mut dyn FnMut(u64),
) -> Result<VerifyDisk> {
    let images = chain::images(points, manifest, &point.id, &disk.name)?;
    check_headers(&images, &disk.name)?;
    let mut expected = blocks_of(chain::merged(points, manifest, &point.id, &disk.name)?).peekable();
    let mut reading = Reading::open(&images, disk.size)?;
    let mut root = RootBuilder::new(disk.size);
    let mut damaged = BTreeSet::new();
    let mut damaged_count = 0;
    while let Some(window) = reading.next_window()? {
        let mut found = window.digests.into_iter().peekable();
        // Both sides name what is not zero; a block that neither names is zero on both.
        loop {
            let next_expected = match expected.peek() {
                Some(Ok((block, _))) if *block < window.blocks.end => Some(*block),
                Some(Err(_)) => return Err(expected.next().expect("peeked").expect_err("peeked")),
                _ => None,
            };
            let next_found = found.peek().map(|(block, _)| *block);
            let Some(block) = [next_expected, next_found].into_iter().flatten().min() else { break };
            let should = if next_expected == Some(block) { expected.next().expect("peeked")?.1 } else { Digest::ZERO };
            let is = if next_found == Some(block) { found.next().expect("peeked").1 } else { Some(Digest::ZERO) };
            if is != Some(should) {
                damaged_count += 1;
                if damaged.len() < DAMAGED_MAX {
                    damaged.insert(block);
                }
            }
            // What cannot be read leaves a hole in the root, and so a root that is not the expected one.
            root.push_block(BlockIndex(block), is.unwrap_or(Digest::ZERO));
        }
        advance(
            ByteRange::new(
                window.blocks.start * BLOCK_LEN as u64,
                disk.size.0.min(window.blocks.end * BLOCK_LEN as u64),
            )
            .len(),
        );
    }
    Ok(VerifyDisk {
        name: disk.name.clone(),
        bytes_read: reading.bytes_read,
        blocks: disk.size.blocks(),
        damaged: damaged.into_iter().collect(),
        damaged_count,
        root: root.finish(),
        root_expected: disk.root,
    })
}

/// Whether what the images say of their backing images is what the manifest says: any other program that opens the
/// point goes by the headers.
pub(super) fn check_headers(images: &Chain, disk: &DiskName) -> Result<()> {
    let corrupt = |what| Error::new(Kind::Corrupt, what).disk(disk).path(&images.top().path);
    match qcow2::own_chain(&images.top().path) {
        Ok(by_header) if by_header == *images => Ok(()),
        Ok(_) => Err(corrupt("the images' headers name other backing images than the manifest")),
        // The images of the manifest are all there: it is a header that leads elsewhere.
        Err(e) if matches!(e.kind(), Kind::NotFound | Kind::Refused) => {
            Err(corrupt("an image's header names a backing image that is none of the point's").source(e))
        }
        Err(e) => Err(e),
    }
}

type Blocks = Box<dyn Iterator<Item = Result<(u64, Digest)>> + Send>;

/// The blocks of runs that are not zero, with their digests.
pub(super) fn blocks_of(runs: impl Iterator<Item = Result<Run>>) -> impl Iterator<Item = Result<(u64, Digest)>> {
    runs.flat_map(|run| -> Blocks {
        match run {
            Ok(Run::Digests { first, digests }) => Box::new((first.0..).zip(digests).map(Ok)),
            Ok(Run::Zero { .. }) => Box::new(std::iter::empty()),
            Err(e) => Box::new(std::iter::once(Err(e))),
        }
    })
}
