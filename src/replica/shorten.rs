//! Keeping chains short: when a disk of the newest point consists of too many images, the point gets images that stand
//! alone, and the next points build on these. No point is removed for it, and none below is touched.
//!
//! The images are made aside while runs go on, under a lease; only the switch needs the writer's lock, and copies
//! nothing. The price is a second whole copy of these disks, once in as many points as a chain may be deep. It is given
//! back when the points below are pruned: nobody reads through them any more, so their removal copies nothing either.
//!
//! Invariants
//! - Whoever reads the point, or one above it, reads the same at every instant: both images have its content. Between
//!   the two the manifest says that the disk is *detaching*, and `chain.rs` asks the header and the list which of them
//!   is there.
//! - What is aside counts for nothing until its change list is whole, which is written last; without it, it is made
//!   anew.
//! - Every block is compared with its digest on the way.
//! - Behind the manifest's word (step s4) the only way is forward, and needs no room.
//!
//! Crash order: docs/replication.md, steps s1 to s7; the failpoints carry its numbers.

use super::chain::{self, point_dir};
use super::copy::{Copier, data_blocks, room_bytes};
use super::files::Dir;
use super::lease::Leases;
use super::lock::WriterLock;
use super::manifest::{
    self, Manifest, POINTS_DIR, Point, alone_changes_file, alone_image_file, changes_file, image_file,
};
use super::prune::{in_use, reads_through};
use super::store::{Reading, Store, read_manifest};
use super::upkeep::{Lease, SHORTEN_STEP_MAX, ShortenStart, ShortenStep, Shortening};
use crate::block::changes::{ChangesHeader, ChangesReader, ChangesWriter, MergedChanges};
use crate::block::digest::Digest;
use crate::error::{Error, Kind, Result, advice};
use crate::flock::Flock;
use crate::image::qcow2::{self, Qcow2Image};
use crate::name::{DiskName, PointId};
use crate::replica::files::image_size;
use crate::replica::manifest_file::publish;
use std::collections::VecDeque;
use std::fs::File;
use std::io::{BufReader, BufWriter};

/// Held by the one shortening. Never removed.
const LOCK_FILE: &str = "shorten.lock";

pub(super) struct Shorten {
    store: Store,
    dir: Dir,
    start: ShortenStart,
    bytes_done: u64,
    /// `None` once it was released.
    reading: Option<Reading>,
    /// Disks of which nothing is aside yet.
    left: VecDeque<manifest::Disk>,
    at: Option<Making>,
    _lock: Flock,
}

/// One disk's image and list, being made aside.
struct Making {
    disk: manifest::Disk,
    copier: Copier,
    runs: MergedChanges<BufReader<File>>,
    list: ChangesWriter<BufWriter<File>>,
    list_file: File,
}

impl Shorten {
    pub fn begin(store: &Store) -> Result<Option<Shorten>> {
        let missing = || Error::new(Kind::NotFound, "there is no replica of this domain").path(store.path());
        let dir = store.replica_dir()?.ok_or_else(missing)?;
        let manifest = read_manifest(&dir, &store.uuid)?.ok_or_else(missing)?;
        let points = dir.sub(POINTS_DIR)?.ok_or_else(missing)?;
        let Some(head) = manifest.head() else { return Ok(None) };
        let deep = too_deep(&points, &manifest, head, store.limits.depth_max)?;
        if deep.is_empty() && !has_remains(&points, &manifest)? {
            return Ok(None);
        }
        let lock = match lock(&dir) {
            // What lies aside is being made by somebody else, and this chain needs nothing.
            Err(e) if e.kind() == Kind::Busy && deep.is_empty() => return Ok(None),
            lock => lock?,
        };
        sweep_aside(&points, &manifest, Some(&head.id).filter(|_| !deep.is_empty()))?;
        if deep.is_empty() {
            return Ok(None);
        }
        let reading = store.read(&head.id, "shorten")?;
        let disks = deep.iter().map(|d| d.name.clone()).collect();
        let start = ShortenStart { point: head.id.clone(), disks, bytes_total: 0 };
        let (store, at, left) = (store.beside(), None, VecDeque::new());
        let mut this = Shorten { store, dir, start, bytes_done: 0, reading: Some(reading), left, at, _lock: lock };
        match this.look(deep) {
            Ok(()) => Ok(Some(this)),
            Err(e) => {
                this.release();
                Err(e)
            }
        }
    }

    /// What has to be copied, and whether there is room for it.
    fn look(&mut self, deep: Vec<manifest::Disk>) -> Result<()> {
        let reading = self.reading.as_ref().expect("taken a line above");
        let (points, manifest) = (&reading.points, &reading.manifest);
        let dir = point_dir(points, &self.start.point)?;
        let mut room = 0;
        for disk in deep {
            if is_whole_aside(&dir, &disk)? {
                continue;
            }
            let blocks = data_blocks(chain::merged(points, manifest, &self.start.point, &disk.name)?)?;
            room += room_bytes(blocks, disk.size);
            self.start.bytes_total += blocks * crate::block::BLOCK_LEN as u64;
            self.left.push_back(disk);
        }
        let space = points.space()?;
        let usable = space.free_bytes.saturating_sub(space.floor_bytes());
        if room > usable {
            let what = format!("images that stand alone need {room} bytes, {usable} are usable");
            return Err(Error::new(Kind::Space, what)
                .point(&self.start.point)
                .path(points.path())
                .advise(advice::Store::Prune));
        }
        Ok(())
    }

    fn dir_of_point(&self) -> Result<Dir> {
        let reading = self.reading.as_ref().ok_or_else(|| Error::new(Kind::Usage, "the shortening has ended"))?;
        point_dir(&reading.points, &self.start.point)
    }

    /// Step s1: an image without anything below it, and the reader that fills it.
    fn make(&self, disk: manifest::Disk) -> Result<Making> {
        let reading = self.reading.as_ref().expect("asked by dir_of_point");
        let (points, manifest, dir) = (&reading.points, &reading.manifest, self.dir_of_point()?);
        remove_aside(&dir, &disk.name)?;
        let images = chain::images(points, manifest, &self.start.point, &disk.name)?;
        let runs = chain::merged(points, manifest, &self.start.point, &disk.name)?;
        let image = dir.join(&alone_image_file(&disk.name));
        let copier = Copier::new(Qcow2Image::open(&images)?, qcow2::create(&image, image_size(disk.size), None)?);
        let name = alone_changes_file(&disk.name);
        let list_file = dir.create(&name)?;
        let at = |e| Error::io("cannot write the change list", dir.join(&name), e);
        let out = BufWriter::new(list_file.try_clone().map_err(at)?);
        let list = ChangesWriter::new(out, &ChangesHeader { size: disk.size, from_root: None })?;
        Ok(Making { disk, copier, runs, list, list_file })
    }

    /// Copies up to about `bytes_max`; whether that ended the disk.
    fn copy_on(&mut self, making: &mut Making, bytes_max: u64) -> Result<bool> {
        let until = self.bytes_done + bytes_max;
        while self.bytes_done < until {
            let Some(run) = making.runs.next().transpose()? else { return Ok(true) };
            making.list.push_run(&run)?;
            // Nothing lies below: what is zero is zero already.
            if matches!(run, crate::block::changes::Run::Zero { .. }) {
                continue;
            }
            making.copier.run(&run, &mut |bytes| {
                self.bytes_done += bytes;
                crate::failpoint!("s1");
                Ok(())
            })?;
        }
        Ok(false)
    }

    /// Steps s2 and s3: first the image, then the list that vouches for it.
    fn finish_disk(&self, making: Making) -> Result<()> {
        let (dir, disk) = (self.dir_of_point()?, &making.disk);
        making.copier.finish()?;
        dir.sync()?;
        crate::failpoint!("s2");
        let root = making.runs.to_root().expect("read to its end");
        if root != disk.root {
            return Err(Error::new(Kind::Corrupt, "the change lists do not lead to the point's root"));
        }
        making.list.finish(root)?;
        let name = alone_changes_file(&disk.name);
        let at = |e| Error::io("cannot write the change list", dir.join(&name), e);
        making.list_file.sync_all().map_err(at)?;
        dir.seal_file(&name)?;
        dir.seal_file(&alone_image_file(&disk.name))?;
        dir.sync()?;
        crate::failpoint!("s3");
        Ok(())
    }

    /// Works on the disk at hand for one step; whether all disks are aside now.
    fn work(&mut self, bytes_max: u64) -> Result<bool> {
        let mut making = match self.at.take() {
            Some(making) => making,
            None => match self.left.pop_front() {
                Some(disk) => self.make(disk)?,
                None => return Ok(true),
            },
        };
        match self.copy_on(&mut making, bytes_max)? {
            true => self.finish_disk(making)?,
            false => self.at = Some(making),
        }
        Ok(self.at.is_none() && self.left.is_empty())
    }

    /// Steps s4 to s7. No run writes meanwhile, nobody begins to read, and nobody reads through the point.
    fn switch(&mut self) -> Result<()> {
        let _writer = WriterLock::take(&self.dir, None, (self.store.clock)())?;
        let _gate = Leases::of(&self.dir)?.close_gate()?;
        // Our own lease, which kept the point as it was until here.
        self.release();
        let mut manifest = read_manifest(&self.dir, &self.store.uuid)?.ok_or_else(|| self.gone())?;
        let points = self.dir.sub(POINTS_DIR)?.ok_or_else(|| self.gone())?;
        let in_the_way = |lease: &Lease| reads_through(&manifest, &lease.point, &self.start.point);
        let held = in_use(&self.dir, &points, &manifest, (self.store.clock)())?;
        if let Some(lease) = held.iter().find(|lease| in_the_way(lease)) {
            let what = format!("point {} is in use ({}, {})", lease.point, lease.purpose, lease.owner);
            return Err(Error::new(Kind::Busy, what).hint("what was copied is kept: the next run needs only a moment"));
        }
        // step s4
        manifest.detach(&self.start.point, &self.start.disks)?;
        publish(&self.dir, &manifest)?;
        crate::failpoint!("s4");
        finish_detaching(&self.dir, &points, &mut manifest)
    }

    fn gone(&self) -> Error {
        Error::new(Kind::NotFound, "the replica is gone").path(self.store.path())
    }

    fn release(&mut self) {
        if let Some(reading) = self.reading.take() {
            reading.release();
        }
    }
}

impl Shortening for Shorten {
    fn start(&self) -> ShortenStart {
        self.start.clone()
    }

    fn step(&mut self, bytes_max: u64) -> Result<ShortenStep> {
        if let Some(lease) = self.reading.as_mut().and_then(|r| r.lease.as_mut()) {
            // Whoever cannot prolong it goes on: what is needed is open.
            drop(lease.renew((self.store.clock)()));
        }
        let end = self.work(bytes_max.clamp(1, SHORTEN_STEP_MAX)).and_then(|all| match all {
            true => self.switch().map(|()| true),
            false => Ok(false),
        });
        let end = end.map_err(|e| {
            // A disk that was cut short is made anew anyway; on a file system that is full, all of it is in the way.
            if !matches!(e.kind(), Kind::Busy) {
                self.at = None;
                let swept = self.dir_of_point().and_then(|dir| remove_all_aside(&dir, &self.start.disks));
                drop(swept);
            }
            e.point(&self.start.point)
        })?;
        Ok(ShortenStep { bytes_done: self.bytes_done, end })
    }

    fn close(mut self: Box<Self>) -> Result<()> {
        self.release();
        Ok(())
    }
}

/// Steps s5 to s7, also of a shortening that died behind s4. The caller holds the writer's lock, has closed the gate,
/// and knows that nobody reads through these points.
pub(super) fn finish_detaching(dir: &Dir, points: &Dir, manifest: &mut Manifest) -> Result<()> {
    let detaching: Vec<Point> = manifest.all().into_iter().filter(|p| p.is_detaching()).cloned().collect();
    for point in detaching {
        let of_point = point_dir(points, &point.id)?;
        for disk in point.disks.iter().filter(|d| d.detaching) {
            // step s5
            put_in_place(&of_point, &alone_image_file(&disk.name), &image_file(&disk.name))?;
            crate::failpoint!("s5");
            // step s6
            put_in_place(&of_point, &alone_changes_file(&disk.name), &changes_file(&disk.name))?;
            crate::failpoint!("s6");
        }
        // step s7
        let mut next = manifest.clone();
        next.detached(&point.id)?;
        publish(dir, &next)?;
        *manifest = next;
        crate::failpoint!("s7");
    }
    Ok(())
}

/// As [`finish_detaching`], of what an earlier shortening left; later, if one of the leases in force reads through it.
pub(super) fn finish_left_over(dir: &Dir, points: &Dir, manifest: &mut Manifest, held: &[Lease]) -> Result<()> {
    let reads = |point: &Point| held.iter().any(|lease| reads_through(manifest, &lease.point, &point.id));
    match manifest.all().into_iter().any(|p| p.is_detaching() && reads(p)) {
        true => Ok(()),
        false => finish_detaching(dir, points, manifest),
    }
}

/// What is not there any more is in its place; that, too, is durable only from here on.
fn put_in_place(dir: &Dir, from: &str, to: &str) -> Result<()> {
    if dir.open(from)?.is_some() {
        dir.rename(from, to)?;
    }
    dir.sync()
}

/// The disks of a point that consist of so many images.
fn too_deep(points: &Dir, manifest: &Manifest, point: &Point, depth_max: u64) -> Result<Vec<manifest::Disk>> {
    let mut deep = Vec::new();
    for disk in &point.disks {
        let depth = chain::image_links(points, manifest, &point.id, &disk.name)?.len() as u64;
        // One image is as few as it gets.
        if depth >= depth_max.max(2) {
            deep.push(disk.clone());
        }
    }
    Ok(deep)
}

/// Whether both files are there, and the list is whole and that of the disk: it is written behind the image. Then both
/// are durable: whoever finished the list may have died before its fsync.
fn is_whole_aside(dir: &Dir, disk: &manifest::Disk) -> Result<bool> {
    if dir.open(&alone_image_file(&disk.name))?.is_none() {
        return Ok(false);
    }
    let Some(file) = dir.open(&alone_changes_file(&disk.name))? else { return Ok(false) };
    let root = || -> Result<Digest> { MergedChanges::new([ChangesReader::new(BufReader::new(file))?])?.check_root() };
    match root() {
        Ok(root) if root == disk.root => {
            dir.sync_file(&alone_image_file(&disk.name))?;
            dir.sync_file(&alone_changes_file(&disk.name))?;
            dir.sync().map(|()| true)
        }
        Ok(_) => Ok(false),
        Err(e) if e.kind() == Kind::Corrupt => Ok(false),
        Err(e) => Err(e),
    }
}

/// Whether an earlier shortening left something aside, of any point.
fn has_remains(points: &Dir, manifest: &Manifest) -> Result<bool> {
    for point in manifest.all().into_iter().filter(|p| !p.is_detaching()) {
        let Some(dir) = points.sub(point.id.as_str())? else { continue };
        for disk in &point.disks {
            if dir.open(&alone_image_file(&disk.name))?.is_some()
                || dir.open(&alone_changes_file(&disk.name))?.is_some()
            {
                return Ok(true);
            }
        }
    }
    Ok(false)
}

/// Removes what earlier shortenings left aside, but for what is of use for `but`.
fn sweep_aside(points: &Dir, manifest: &Manifest, but: Option<&PointId>) -> Result<()> {
    for point in manifest.all().into_iter().filter(|p| !p.is_detaching() && Some(&p.id) != but) {
        if let Some(dir) = points.sub(point.id.as_str())? {
            remove_all_aside(&dir, point.disks.iter().map(|d| &d.name))?;
        }
    }
    Ok(())
}

fn remove_all_aside<'d>(dir: &Dir, disks: impl IntoIterator<Item = &'d DiskName>) -> Result<()> {
    disks.into_iter().try_for_each(|disk| remove_aside(dir, disk))
}

/// The list first: without it the image counts for nothing.
fn remove_aside(dir: &Dir, disk: &DiskName) -> Result<()> {
    dir.remove(&alone_changes_file(disk))?;
    dir.remove(&alone_image_file(disk))
}

fn lock(dir: &Dir) -> Result<Flock> {
    let file = dir.open_or_create(LOCK_FILE)?;
    let locked = Flock::exclusive(file).map_err(|e| Error::io("cannot lock the shortening", dir.join(LOCK_FILE), e))?;
    locked.map_err(|_| Error::new(Kind::Busy, "the chain is being shortened already").path(dir.join(LOCK_FILE)))
}
