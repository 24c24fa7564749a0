//! Folding links, the images of removed points, into the point above them.
//!
//! A row of links `V1 .. Vk` lies between a point `S` and what is below it, `A` (a point, or nothing). Afterwards `S`
//! lies on `A` and reads as before. Two ways, the cheaper one is taken:
//! - **down**: what differs between `V1` and `S` is written into `V1`'s image, which then takes the place of `S`'s;
//! - **up**: what `S` reads from the row is written into `S`'s image, which then names `A` as its backing image.
//!
//! Invariants
//! - Whoever reads `S`, or a point above it, reads the same at every instant. *Down* writes just those blocks of `V1`
//!   that an image above it hides; nobody reads `V1` but through these. *Up* writes blocks of `S` that it did not have,
//!   with the content it read from below anyway. The switch is one rename, or one write within a sector.
//! - No point's image is committed into: `V1` is a link, and the manifest has said so, durably, before.
//! - Every block that is copied is compared with its digest first: damage is not carried on, and not hidden.
//! - Every step may be repeated, and the way may change, until the switch; from there on the only way is forward.
//!   Whether it happened is seen in the header of `S`'s image, and of the change list in its from-root (`chain.rs`).
//! - What is seen is not yet durable: a switch or a list that is found in its place is synced before anything rests on
//!   it.
//!
//! The caller holds the writer's lock and has closed the gate of the leases; QEMU is kept out by its own locks.
//! Crash order: docs/replication.md, steps p2 to p7; the failpoints carry its numbers.

use super::chain::{self, point_dir};
use super::copy::{self, Copier, data_blocks};
use super::files::Dir;
use super::manifest::{self, Manifest, Point, changes_file, folded_changes_file, image_file};
use crate::block::DiskSize;
use crate::block::changes::{ChangesWriter, Run, Without};
use crate::error::{Error, Kind, Result};
use crate::image::locks::QemuLock;
use crate::image::qcow2::{self, Qcow2Image};
use crate::image::{Chain, Layer, qemu_img};
use crate::name::{DiskName, PointId};
use crate::replica::manifest_file::publish;
use std::io::BufWriter;
use std::path::Path;

/// Where a replica's links are folded.
pub(super) struct Folder<'a> {
    pub replica: &'a Dir,
    pub points: &'a Dir,
    /// Told of bytes copied.
    pub copied: &'a mut dyn FnMut(u64),
}

/// What is to be done for one disk.
struct Task<'m> {
    disk: &'m DiskName,
    /// `S`, then the links whose images are still read through, then what is below.
    images: Vec<&'m Point>,
    /// How many of these are links.
    row: usize,
    /// `S`, then the links whose change lists are not yet part of its own, then what is below; and how many.
    lists: Vec<&'m Point>,
    list_row: usize,
    /// An earlier attempt may have been cut short while it wrote an image.
    resumed: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Down,
    Up,
}

impl Folder<'_> {
    /// Folds the row of links below `above`, on all disks. The manifest on disk and `manifest` then know nothing of
    /// them.
    pub fn fold(&mut self, manifest: &mut Manifest, above: &PointId) -> Result<()> {
        let rows = manifest.rows();
        let row = rows.iter().find(|(point, _)| point.id == *above);
        let Some((point, links)) = row else { return Ok(()) };
        let links: Vec<PointId> = links.iter().map(|l| l.id.clone()).collect();
        for disk in &point.disks {
            self.fold_disk(manifest, point, &disk.name).map_err(|e| e.disk(&disk.name).point(above))?;
        }
        // step p6
        let mut next = manifest.clone();
        next.folded(above)?;
        publish(self.replica, &next)?;
        *manifest = next;
        crate::failpoint!("p6");
        // step p7
        for id in &links {
            self.points.remove_all(id.as_str())?;
        }
        self.points.sync()?;
        crate::failpoint!("p7");
        Ok(())
    }

    fn fold_disk(&mut self, manifest: &Manifest, above: &Point, disk: &DiskName) -> Result<()> {
        let recorded = manifest.chain(&above.id, disk)?;
        let links = |chain: &[&Point]| chain[1..].iter().take_while(|p| manifest.is_link(&p.id)).count();
        let row = links(&recorded);
        if row == 0 {
            return Ok(());
        }
        let begun = |p: &&Point| Ok(point_dir(self.points, &p.id)?.open(&folded_changes_file(disk))?.is_some());
        let resumed = recorded[..=row].iter().map(begun).collect::<Result<Vec<bool>>>()?.contains(&true);
        let images = chain::image_links(self.points, manifest, &above.id, disk)?;
        let lists = chain::list_links(self.points, manifest, &above.id, disk)?;
        let recorded_row = row;
        let (row, list_row) = (links(&images), links(&lists));
        if row < recorded_row {
            self.make_switch_durable(&recorded[..=recorded_row], disk)?;
        }
        let task = Task { disk, images, row, lists, list_row, resumed };
        let dir = point_dir(self.points, &above.id)?;
        if task.list_row > 0 {
            self.write_list(&task, &dir)?;
        }
        if task.row > 0 {
            self.fold_images(&task, &dir)?;
        }
        if task.list_row > 0 {
            dir.rename(&folded_changes_file(disk), &changes_file(disk))?;
        }
        // Also where the list is found in its place: the manifest is about to forget what it was made of.
        dir.sync()?;
        if task.list_row > 0 {
            // step p5
            crate::failpoint!("p5");
        }
        Ok(())
    }

    /// A switch that is found done may be that of a fold that died before its fsync. Neither a list nor the manifest
    /// may rest on it before it is durable: behind p6 nothing leads back to the links.
    fn make_switch_durable(&self, row: &[&Point], disk: &DiskName) -> Result<()> {
        point_dir(self.points, &row[0].id)?.sync_file(&image_file(disk))?;
        row.iter().try_for_each(|point| point_dir(self.points, &point.id)?.sync())
    }

    /// Step p2: the change list that the point will have, aside. Reads every list to its end: behind this they are
    /// known to be whole.
    fn write_list(&self, task: &Task, dir: &Dir) -> Result<()> {
        let name = folded_changes_file(task.disk);
        dir.remove_all(&name)?;
        let file = dir.create(&name)?;
        let at = |e| Error::io("cannot write the change list", dir.join(&name), e);
        let mut merged = chain::merged_of(self.points, &task.lists[..=task.list_row], task.disk)?;
        let out = BufWriter::new(file.try_clone().map_err(at)?);
        let mut writer = ChangesWriter::new(out, &merged.header())?;
        for run in merged.by_ref() {
            writer.push_run(&run?)?;
        }
        let root = merged.to_root().expect("read to its end");
        if task.images[0].disk(task.disk).is_none_or(|record| record.root != root) {
            return Err(Error::new(Kind::Corrupt, "the change lists do not lead to the point's root"));
        }
        writer.finish(root)?;
        file.sync_all().map_err(at)?;
        dir.seal_file(&name)?;
        dir.sync()?;
        crate::failpoint!("p2");
        Ok(())
    }

    /// Steps p3 and p4.
    fn fold_images(&mut self, task: &Task, dir: &Dir) -> Result<()> {
        let name = image_file(task.disk);
        let way = self.choose(task)?;
        let changed = match way {
            Way::Down => task.images[task.row],
            Way::Up => task.images[0],
        };
        let changed_dir = point_dir(self.points, &changed.id)?;
        let writable: Vec<Dir> =
            task.images[..=task.row].iter().map(|p| point_dir(self.points, &p.id)).collect::<Result<_>>()?;
        writable.iter().try_for_each(|dir| dir.unseal_file(&name))?;
        let sound = if task.resumed { make_sound(&changed_dir.join(&name)) } else { Ok(()) };
        let folded = sound.and_then(|()| self.copy_and_switch(task, way, dir, &changed_dir));
        if folded.is_err() {
            for dir in &writable {
                // What was switched away is not there any more.
                let _ = dir.seal_file(&name);
            }
        }
        folded
    }

    fn copy_and_switch(&mut self, task: &Task, way: Way, dir: &Dir, changed_dir: &Dir) -> Result<()> {
        let name = image_file(task.disk);
        let locks: Result<Vec<QemuLock>> =
            task.images[..=task.row].iter().map(|p| self.keep_qemu_out(p, &name)).collect();
        let _locks = locks?;
        let layers = |points: &[&Point]| -> Result<Vec<Layer>> { Ok(chain::layers(self.points, points, task.disk)?.0) };
        let (from, below) = match way {
            Way::Down => (layers(&task.images)?, layers(&task.images[task.row + 1..])?),
            // Over what will lie below it: what the row hides from there has to be hidden by the point itself.
            Way::Up => (layers(&task.images[1..])?, layers(&task.images[task.row + 1..])?),
        };
        let reader = Qcow2Image::open(&Chain(from))?;
        let writer = qcow2::open_write_over(&changed_dir.join(&name), &below)?;
        let blocks: Box<dyn Iterator<Item = Result<Run>>> = match way {
            Way::Down => Box::new(self.points_above(task)?),
            Way::Up => Box::new(self.missing_above(task)?),
        };
        let mut copier = Copier::new(reader, writer);
        let mut copied = |bytes| {
            (self.copied)(bytes);
            // step p3, in the middle of it
            crate::failpoint!("p3.part");
            Ok(())
        };
        for run in blocks {
            copier.run(&run?, &mut copied)?;
        }
        copier.finish()?;
        crate::failpoint!("p3");
        // step p4
        match way {
            Way::Down => {
                changed_dir.seal_file(&name)?;
                changed_dir.rename_into(&name, dir, &name)?;
                dir.sync()?;
                changed_dir.sync()?;
            }
            Way::Up => {
                let below = task.images.get(task.row + 1).map(|p| manifest::backing_reference(&p.id, task.disk));
                qcow2::rebase(&dir.join(&name), below.as_deref())?;
                dir.seal_file(&name)?;
            }
        }
        crate::failpoint!("p4");
        Ok(())
    }

    fn keep_qemu_out(&self, point: &Point, name: &str) -> Result<QemuLock> {
        let path = point_dir(self.points, &point.id)?.join(name);
        QemuLock::take(&path)?.ok_or_else(|| Error::new(Kind::Busy, "a QEMU program has the image open").path(path))
    }

    /// What differs between the lowest link and the point.
    fn points_above(&self, task: &Task) -> Result<impl Iterator<Item = Result<Run>> + use<>> {
        let lowest = task.images[task.row].id.seq();
        let above = task.lists.iter().take_while(|p| p.id.seq() > lowest).count();
        chain::merged_of(self.points, &task.lists[..above], task.disk)
    }

    /// What the point reads from the row. Its own image has what the lists say of everything above the uppermost link
    /// that is still read through: more than its own list, if an earlier fold was cut short behind its switch.
    fn missing_above(&self, task: &Task) -> Result<impl Iterator<Item = Result<Run>> + use<>> {
        let uppermost = task.images[1].id.seq();
        let own = task.lists.iter().take_while(|p| p.id.seq() > uppermost).count();
        let all = chain::merged_of(self.points, &task.lists[..=task.list_row], task.disk)?;
        Ok(Without::new(all, chain::merged_of(self.points, &task.lists[..own], task.disk)?))
    }

    /// The way that copies less, if there is room for it. A disk that was resized in between is folded up: an image is
    /// made longer or shorter by the run that needs it, and by nobody else.
    fn choose(&self, task: &Task) -> Result<Way> {
        let size = |p: &&Point| p.disk(task.disk).map(|d| d.size);
        let same_size = task.images[..=task.row].iter().all(|p| size(p) == size(&task.images[0]));
        let up = data_blocks(self.missing_above(task)?)?;
        let down = if same_size { data_blocks(self.points_above(task)?)? } else { u64::MAX };
        let (way, blocks) = if down <= up { (Way::Down, down) } else { (Way::Up, up) };
        tracing::debug!(disk = %task.disk, ?way, down, up, "folding removed points");
        let space = self.points.space()?;
        let usable = space.free_bytes.saturating_sub(space.floor_bytes());
        let room = |blocks: u64| copy::room_bytes(blocks, size(&task.images[0]).unwrap_or(DiskSize(0)));
        if room(blocks) <= usable {
            return Ok(way);
        }
        // What the lowest link has already takes no further room.
        let link = task.images[task.row];
        let new = match way {
            Way::Down => {
                data_blocks(Without::new(self.points_above(task)?, chain::changes(self.points, link, task.disk)?))?
            }
            Way::Up => up,
        };
        if room(new) <= usable {
            return Ok(way);
        }
        let what = format!("folding needs {} bytes for a while, {usable} are usable", room(new));
        Err(Error::new(Kind::Space, what).path(self.points.path()))
    }
}

/// An image that was being written when something died: clusters may be in use that are not counted as such. They are
/// counted again before anything is allocated.
fn make_sound(image: &Path) -> Result<()> {
    let format = crate::image::Format::Qcow2;
    if qemu_img::check(image, format)?.is_sound() {
        return Ok(());
    }
    tracing::warn!(path = %image.display(), "an interrupted fold left wrong counts in the image; repairing them");
    qemu_img::repair(image)?;
    match qemu_img::check(image, format)?.is_sound() {
        true => Ok(()),
        false => Err(Error::new(Kind::Corrupt, "the image cannot be repaired").path(image)),
    }
}
