//! What a disk at a point is made of: the chain of its images and the merged list of its digests; and the head's digest
//! file, which is made from them.
//!
//! Everything follows the manifest: what an image's header says of its backing image is compared, never believed. In
//! two places there is a choice between answers that the manifest both knows: whether the links below a point are
//! folded into it already, and whether a disk that is detaching stands alone already. The header of its image says so,
//! and the root that its change list starts from.

use super::digests::{Binding, DigestFile, Opened};
use super::files::Dir;
use super::manifest::{self, Manifest, Point, changes_file, image_file};
use crate::block::changes::{ChangesReader, MergedChanges};
use crate::error::{Error, Kind, Result, advice};
use crate::image::qcow2::Header;
use crate::image::{Chain, Format, Layer};
use crate::name::{DiskName, PointId};
use std::fs::File;
use std::io::BufReader;
use std::path::PathBuf;

/// A change list, read from its file.
pub(super) type List = ChangesReader<BufReader<File>>;

/// The points and links whose images make up `disk` at `point`, uppermost first: those of the manifest, without the
/// links that are folded already.
pub(super) fn image_links<'m>(
    points: &Dir,
    manifest: &'m Manifest,
    point: &PointId,
    disk: &DiskName,
) -> Result<Vec<&'m Point>> {
    effective(manifest, point, disk, |upper, below| {
        let (file, path) = open_image(points, upper, disk)?;
        let backing = Header::read(&file, &path)?.backing;
        let is = |below: Option<&Point>| match (below, &backing) {
            (Some(below), Some(name)) => *name == manifest::backing_reference(&below.id, disk),
            (None, None) => true,
            _ => false,
        };
        below.iter().position(|b| is(*b)).ok_or_else(|| {
            Error::new(Kind::Corrupt, "the image's header names another backing image than the manifest").path(path)
        })
    })
}

/// As [`image_links`], of the change lists.
pub(super) fn list_links<'m>(
    points: &Dir,
    manifest: &'m Manifest,
    point: &PointId,
    disk: &DiskName,
) -> Result<Vec<&'m Point>> {
    effective(manifest, point, disk, |upper, below| {
        let from_root = changes(points, upper, disk)?.header().from_root;
        let root = |below: Option<&Point>| below.and_then(|b| b.disk(disk)).map(|d| d.root);
        // The nearest that fits: if the links changed nothing in the end, it does not matter whether they are passed
        // by.
        below.iter().position(|b| root(*b) == from_root).ok_or_else(|| {
            Error::new(Kind::Corrupt, "the change list starts from no state that the manifest knows")
                .point(&upper.id)
                .disk(disk)
        })
    })
}

/// Walks the recorded chain, passing by what `choose` says is not below any more: it gets a point, and what may lie
/// below it now, links first, then the first point, and nothing (`None`) if the point's disk is detaching; and picks
/// one.
fn effective<'m>(
    manifest: &'m Manifest,
    point: &PointId,
    disk: &DiskName,
    choose: impl Fn(&Point, &[Option<&Point>]) -> Result<usize>,
) -> Result<Vec<&'m Point>> {
    let recorded = manifest.chain(point, disk)?;
    let mut chain = vec![recorded[0]];
    let mut at = 0;
    while at + 1 < recorded.len() {
        let links = recorded[at + 1..].iter().take_while(|p| manifest.is_link(&p.id)).count();
        let detaching = recorded[at].disk(disk).is_some_and(|d| d.detaching);
        let end = at + 1 + links;
        let mut below: Vec<Option<&Point>> = recorded[at + 1..end].iter().map(|p| Some(*p)).collect();
        below.push(recorded.get(end).copied());
        if detaching && end < recorded.len() {
            below.push(None);
        }
        // One answer needs no choice: most points are like that.
        let step = if below.len() == 1 { 0 } else { choose(recorded[at], &below)? };
        let Some(next) = below[step] else { break };
        chain.push(next);
        at += 1 + step;
    }
    Ok(chain)
}

/// The images of `disk` at `point`, uppermost first, by absolute paths under `points`. Each is seen to be a file of
/// ours.
pub(super) fn images(points: &Dir, manifest: &Manifest, point: &PointId, disk: &DiskName) -> Result<Chain> {
    layers(points, &image_links(points, manifest, point, disk)?, disk)
}

/// The images of `disk` of these points.
pub(super) fn layers(points: &Dir, chain: &[&Point], disk: &DiskName) -> Result<Chain> {
    let layer = |link: &&Point| {
        let path = open_image(points, link, disk)?.1;
        Ok(Layer { path, format: Format::Qcow2, block_device: false, data_file: None })
    };
    chain.iter().map(layer).collect::<Result<Vec<Layer>>>().map(Chain)
}

fn open_image(points: &Dir, point: &Point, disk: &DiskName) -> Result<(File, PathBuf)> {
    let dir = point_dir(points, &point.id)?;
    let name = image_file(disk);
    let path = dir.join(&name);
    let file = dir.open(&name)?.ok_or_else(|| gone(&point.id, disk).path(&path))?;
    Ok((file, path))
}

/// The content of `disk` at `point` as its change lists tell it, in ascending order: whatever is in no run is zero.
/// Memory is a buffer and a run per point of the chain.
pub(super) fn merged(
    points: &Dir,
    manifest: &Manifest,
    point: &PointId,
    disk: &DiskName,
) -> Result<MergedChanges<BufReader<File>>> {
    let merged = merged_of(points, &list_links(points, manifest, point, disk)?, disk)?;
    if merged.header().from_root.is_some() {
        let what = "the oldest change list of the chain does not start from nothing";
        return Err(Error::new(Kind::Corrupt, what).disk(disk).point(point));
    }
    Ok(merged)
}

/// The lists of these points, uppermost first and one upon the other, as one.
pub(super) fn merged_of(points: &Dir, chain: &[&Point], disk: &DiskName) -> Result<MergedChanges<BufReader<File>>> {
    // They are laid over each other from the oldest on.
    let lists: Result<Vec<List>> = chain.iter().rev().map(|link| changes(points, link, disk)).collect();
    MergedChanges::new(lists?)
}

/// The list of what `point` itself changed on `disk`.
pub(super) fn changes(points: &Dir, point: &Point, disk: &DiskName) -> Result<List> {
    let dir = point_dir(points, &point.id)?;
    let name = changes_file(disk);
    let file = dir.open(&name)?.ok_or_else(|| gone(&point.id, disk).path(dir.join(&name)))?;
    let list = ChangesReader::new(BufReader::new(file)).map_err(|e| e.path(dir.join(&name)))?;
    if point.disk(disk).is_none_or(|record| record.size != list.header().size) {
        return Err(Error::new(Kind::Corrupt, "the change list is of a disk of another size").path(dir.join(&name)));
    }
    Ok(list)
}

pub(super) fn point_dir(points: &Dir, id: &PointId) -> Result<Dir> {
    let gone = || Error::new(Kind::Corrupt, "the point's directory is gone").path(points.join(id.as_str())).point(id);
    points.sub(id.as_str())?.ok_or_else(gone)
}

fn gone(point: &PointId, disk: &DiskName) -> Error {
    Error::new(Kind::Corrupt, "a file that the manifest names is gone").point(point).disk(disk)
}

/// What the head's digest file of a disk must be bound to, and to what it may still be bound if the last update did not
/// come to its end. `None` if the head does not have the disk.
fn bindings(manifest: &Manifest, disk: &DiskName) -> Option<(Binding, Option<Binding>)> {
    let bind = |point: &Point, d: &manifest::Disk| Binding { point: point.id.clone(), size: d.size, root: d.root };
    let head = manifest.head()?;
    let record = head.disk(disk)?;
    let below = record.backing.as_ref().and_then(|id| manifest.named(id)).and_then(|p| Some(bind(p, p.disk(disk)?)));
    Some((bind(head, record), below))
}

/// The head's digest file, if it is there and sound; touches nothing.
pub(super) fn ready_head_digests(replica: &Dir, manifest: &Manifest, disk: &DiskName) -> Result<Option<DigestFile>> {
    let Some((wanted, below)) = bindings(manifest, disk) else { return Ok(None) };
    let Some(digests) = replica.sub(manifest::DIGESTS_DIR)? else { return Ok(None) };
    match DigestFile::open(&digests, disk, &wanted, below.as_ref())? {
        Opened::Ready(file) => Ok(Some(file)),
        Opened::Behind(_) | Opened::Unusable(_) => Ok(None),
    }
}

/// The head's digest file, brought up to date or made anew where it is not sound. The caller holds the lock.
/// `None` if the head does not have the disk. [`Kind::Corrupt`] if the replica itself is no longer what was sealed.
pub(super) fn mend_head_digests(replica: &Dir, manifest: &Manifest, disk: &DiskName) -> Result<Option<DigestFile>> {
    let Some((wanted, below)) = bindings(manifest, disk) else { return Ok(None) };
    let digests = match replica.sub(manifest::DIGESTS_DIR)? {
        Some(digests) => digests,
        None => replica.sub_or_create(manifest::DIGESTS_DIR)?,
    };
    let points_gone = || Error::new(Kind::Corrupt, "the directory of the points is gone").path(replica.path());
    let points = replica.sub(manifest::POINTS_DIR)?.ok_or_else(points_gone)?;
    let why = match DigestFile::open(&digests, disk, &wanted, below.as_ref())? {
        Opened::Ready(file) => return Ok(Some(file)),
        Opened::Behind(mut file) => {
            let head = manifest.head().expect("it has the disk");
            match changes(&points, head, disk).and_then(|list| file.update(&wanted, list)) {
                Ok(()) => return Ok(Some(file)),
                Err(e) if e.kind() != Kind::Corrupt => return Err(e),
                Err(e) => e.chain(),
            }
        }
        Opened::Unusable(why) => why,
    };
    rebuild(&digests, &points, manifest, disk, &wanted, &why).map(Some)
}

fn rebuild(
    digests: &Dir,
    points: &Dir,
    manifest: &Manifest,
    disk: &DiskName,
    wanted: &Binding,
    why: &str,
) -> Result<DigestFile> {
    tracing::debug!(%disk, point = %wanted.point, why, "making the head's digests from the change lists");
    let from_lists =
        merged(points, manifest, &wanted.point, disk).and_then(|m| DigestFile::rebuild(digests, disk, wanted, m));
    match from_lists {
        Err(e) if e.kind() == Kind::Corrupt => {
            tracing::warn!(%disk, error = %e.chain(), "the change lists are damaged; reading the images instead");
        }
        other => return other,
    }
    let images = images(points, manifest, &wanted.point, disk)?;
    let reading = crate::replica::reading::runs_of(&images, wanted.size)?;
    DigestFile::rebuild(digests, disk, wanted, reading).map_err(|e| match e.kind() {
        Kind::Corrupt => Error::new(Kind::Corrupt, "neither the change lists nor the images are what was sealed")
            .source(e)
            .advise(advice::Store::VerifyAndSendAnew),
        _ => e,
    })
}

/// Removes what the head no longer has a use for. The caller holds the lock.
pub(super) fn drop_other_digests(replica: &Dir, manifest: &Manifest) -> Result<()> {
    let Some(digests) = replica.sub(manifest::DIGESTS_DIR)? else { return Ok(()) };
    let wanted: Vec<String> =
        manifest.head().map_or(&[][..], |p| &p.disks).iter().map(|d| manifest::digests_file(&d.name)).collect();
    for name in digests.entries()? {
        if !wanted.contains(&name) {
            digests.remove_all(&name)?;
        }
    }
    Ok(())
}
