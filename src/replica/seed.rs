//! Seeds: copies of disks at the target that are in no point. A first copy that was broken off leaves one behind, and
//! an operator may bring one; the next first copy starts from it and sends only what differs.
//!
//! Invariants
//! - Only an image that was synced and closed gets the name of a seed: a killed agent leaves none, and what it was
//!   writing is thrown away as before.
//! - Nothing is believed of a seed. Its tables are checked and it is read whole before it is used, and what is read is
//!   what counts; one whose tables are damaged, that cannot be read or is of another size, is thrown away.
//! - A seed is used once: it moves into the open point, and is that point's image from then on.
//! - A disk that is in the head has no seed.
//!
//! Format: docs/formats/replica.md.

use super::digests::{Binding, DigestFile};
use super::files::Dir;
use super::manifest::{Manifest, SEEDS_DIR, image_file, seed_list_file};
use super::{BeginDisk, SeedView};
use crate::block::changes::{ChangesHeader, ChangesReader, ChangesWriter, Run, root_of_runs};
use crate::block::digest::Digest;
use crate::block::{BLOCK_LEN, BlockIndex, ByteRange, DiskSize, GROUP_LEN, SECTOR_LEN};
use crate::error::{Error, Kind, Result};
use crate::image::qcow2::{self, Qcow2Writer, check::check_plain};
use crate::image::{Chain, Format, Image, ImageMut, Layer};
use crate::name::{DiskName, PointId};
use crate::replica::files::image_size;
use crate::replica::reading::runs_of;
use std::fs::File;
use std::io::{BufReader, BufWriter};
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

/// A seed that was read and is about to be built on.
pub(super) struct Seed {
    pub image: Qcow2Writer,
    pub digests: Arc<DigestFile>,
    /// Of all blocks of it that are not zero, as a change list from nothing.
    pub list: File,
    pub data_bytes: u64,
}

impl Seed {
    pub fn view(&self, name: &DiskName) -> SeedView {
        let (size, root) = (self.digests.size(), self.digests.root());
        SeedView { name: name.clone(), size, root, data_bytes: self.data_bytes }
    }
}

/// Disks that have a seed, with the bytes that its file occupies.
pub(super) fn list(replica: &Dir) -> Result<Vec<(DiskName, u64)>> {
    let Some(seeds) = replica.sub(SEEDS_DIR)? else { return Ok(Vec::new()) };
    let mut found = Vec::new();
    for entry in seeds.entries()? {
        let Some(Ok(disk)) = entry.strip_suffix(".qcow2").map(DiskName::new) else { continue };
        if let Some(file) = seeds.open(&entry)? {
            let at = |e| Error::io("cannot look at the seed", seeds.join(&entry), e);
            found.push((disk, file.metadata().map_err(at)?.blocks() * 512));
        }
    }
    Ok(found)
}

/// Moves the seed of `disk` into the open point's directory and reads it whole: that takes as long as the storage
/// needs. `None` if there is none, or none that can be used.
pub(super) fn take(replica: &Dir, point: &Dir, id: &PointId, disk: &BeginDisk) -> Result<Option<Seed>> {
    let Some(seeds) = replica.sub(SEEDS_DIR)? else { return Ok(None) };
    let name = image_file(&disk.name);
    if seeds.open(&name)?.is_none() {
        return Ok(None);
    }
    seeds.rename_into(&name, point, &name)?;
    match read(point, id, disk) {
        Ok(seed) => Ok(Some(seed)),
        // Of the store, not of the seed.
        Err(e) if e.kind() == Kind::Space => Err(e),
        Err(e) => {
            tracing::warn!(disk = %disk.name, error = %e.chain(), "the seed cannot be used and is thrown away");
            for name in [name, seed_list_file(&disk.name), super::manifest::digests_file(&disk.name)] {
                point.remove(&name)?;
            }
            Ok(None)
        }
    }
}

/// Reads the image that is to be built on, block by block: its list, its tree, its root.
fn read(point: &Dir, id: &PointId, disk: &BeginDisk) -> Result<Seed> {
    let path = point.join(&image_file(&disk.name));
    let file = point.open(&image_file(&disk.name))?.ok_or_else(|| Error::new(Kind::Io, "it vanished").path(&path))?;
    // It is going to be written to, and nobody has vouched for it.
    check_plain(&file, &path)?;
    let chain = Chain(vec![Layer { path: path.clone(), format: Format::Qcow2, block_device: false, data_file: None }]);
    let size = qcow2::Qcow2Image::open(&chain)?.size();
    if size != image_size(disk.size) {
        let what = format!("the image has {size} bytes, the disk has {}", disk.size);
        return Err(Error::new(Kind::Conflict, what).path(&path));
    }
    let list_name = seed_list_file(&disk.name);
    let list = point.create(&list_name)?;
    let at = |e| Error::io("cannot write the list of the seed", point.join(&list_name), e);
    let header = ChangesHeader { size: disk.size, from_root: None };
    let mut writer = ChangesWriter::new(BufWriter::new(list.try_clone().map_err(at)?), &header)?;
    let mut data_bytes = 0;
    let runs = runs_of(&chain, disk.size)?.map(|run| {
        let run = run?;
        writer.push_run(&run)?;
        data_bytes += run.count() * BLOCK_LEN as u64;
        Ok(run)
    });
    let root = root_of_runs(disk.size, runs)?;
    writer.finish(root)?;
    let binding = Binding { point: id.clone(), size: disk.size, root };
    let runs = ChangesReader::new(BufReader::new(rewound(&list).map_err(at)?))?;
    let digests = Arc::new(DigestFile::rebuild(point, &disk.name, &binding, runs)?);
    // Opened for writing last: what was read before is all that it holds.
    Ok(Seed { image: qcow2::open_write(&path)?, digests, list, data_bytes })
}

/// The same file, read from its start.
pub(super) fn rewound(file: &File) -> std::io::Result<File> {
    use std::io::{Seek, SeekFrom};
    let mut file = file.try_clone()?;
    file.seek(SeekFrom::Start(0))?;
    Ok(file)
}

/// Gives an image of an open point, synced and closed, the name of a seed; an older one goes. Durable when it returns.
pub(super) fn keep(replica: &Dir, point: &Dir, disk: &DiskName) -> Result<()> {
    let seeds = replica.sub_or_create(SEEDS_DIR)?;
    point.rename_into(&image_file(disk), &seeds, &image_file(disk))?;
    seeds.sync()
}

/// Removes what has no use any more: seeds of disks that are in the head, and what a broken `adopt` left. The caller
/// holds the lock.
pub(super) fn sweep(replica: &Dir, manifest: &Manifest) -> Result<()> {
    let Some(seeds) = replica.sub(SEEDS_DIR)? else { return Ok(()) };
    for entry in seeds.entries()? {
        let disk = entry.strip_suffix(".qcow2").and_then(|name| DiskName::new(name).ok());
        if disk.is_none_or(|disk| manifest.head_disk(&disk).is_some()) {
            seeds.remove_all(&entry)?;
        }
    }
    Ok(())
}

/// Copies `image` into the store as the seed of `disk`, sparsely; an older one goes. `progress` is told bytes done and
/// all. Durable when it returns. The caller holds the lock.
pub(super) fn adopt(
    replica: &Dir,
    disk: &DiskName,
    image: &dyn Image,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<u64> {
    let seeds = replica.sub_or_create(SEEDS_DIR)?;
    let aside = format!("{}.new", image_file(disk));
    seeds.remove_all(&aside)?;
    let size = image.size();
    let writer = qcow2::create(&seeds.join(&aside), image_size(size), None)?;
    let copied = copy(image, &writer, size, progress).and_then(|bytes| writer.sync().map(|()| bytes));
    drop(writer);
    let bytes = copied.inspect_err(|_| {
        // Half a copy is worth nothing, and its room is.
        if let Err(e) = seeds.remove_all(&aside) {
            tracing::warn!(error = %e.chain(), "cannot remove what was copied");
        }
    })?;
    seeds.rename(&aside, &image_file(disk))?;
    seeds.sync()?;
    Ok(bytes)
}

fn copy(image: &dyn Image, writer: &Qcow2Writer, size: DiskSize, progress: &mut dyn FnMut(u64, u64)) -> Result<u64> {
    use crate::block::extent::{Content, is_zero};
    let mut buffer = vec![0; BLOCK_LEN];
    let mut copied = 0;
    let mut start = 0;
    while start < size.0 {
        let window = ByteRange::new(start, size.0.min(start + GROUP_LEN));
        let extents = image.extents(window)?;
        let has_data =
            |range: ByteRange| extents.iter().any(|e| e.content == Content::Data && e.range.intersect(range).is_some());
        for block in window.start / BLOCK_LEN as u64..window.end.div_ceil(BLOCK_LEN as u64) {
            let range = BlockIndex(block).bytes(size);
            if !has_data(range) {
                continue;
            }
            // Up to a whole sector: the image is longer than the disk by less than that.
            let len = range.len() as usize;
            let padded = len.next_multiple_of(SECTOR_LEN as usize);
            buffer[..padded].fill(0);
            image.read_at(range.start, &mut buffer[..len])?;
            if !is_zero(&buffer[..len]) {
                writer.write_at(range.start, &buffer[..padded])?;
                copied += len as u64;
            }
        }
        start = window.end;
        progress(start, size.0);
    }
    Ok(copied)
}

/// The change list of a first point that was built on a seed: all that is not zero, from the seed's own list and what
/// the patch changed. Both lists are read to their ends.
pub(super) fn write_whole_list(seed: &File, patch: &File, out: &File, size: DiskSize, root: Digest) -> Result<()> {
    let at = |e| Error::from_io("cannot read the list of the seed", e);
    let reader = |file: &File| -> Result<_> { ChangesReader::new(BufReader::new(rewound(file).map_err(at)?)) };
    let merged = crate::block::changes::MergedChanges::new([reader(seed)?, reader(patch)?])?;
    let mut writer = ChangesWriter::new(BufWriter::new(out), &ChangesHeader { size, from_root: None })?;
    for run in merged {
        match run? {
            // From nothing, zero is what needs no word.
            Run::Zero { .. } => {}
            digests => writer.push_run(&digests)?,
        }
    }
    writer.finish(root)?;
    Ok(())
}
