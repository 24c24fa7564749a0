//! Reading every point again, a bit at a time: what each of them has of its own, against its change list.
//!
//! Oldest point first, disk by disk. A block is read through the images of its point, so that what is found is what
//! anybody would read there; it lies in the point's own image, because the list names it. Links, the removed points
//! that others still read through, are read like points.
//!
//! Invariants
//! - Nothing of the replica is changed but `scrub.json`, and no lock is taken that a run could want. What is read is
//!   leased for just as long: prune goes around it.
//! - What a step has read and found is durable when it returns. Whatever ends a scrub, the next one reads the rest.
//! - An error of this machine, such as one of its memory, is an error; bytes that cannot be read are damage.

use super::chain::{self, List};
use super::damage::{Cursor, RECORDS_MAX, SCRUB_FILE, State, with_readers};
use super::files::Dir;
use super::manifest::{self, Manifest, Point};
use super::store::{Reading, Store, read_manifest};
use super::upkeep::{Damage, DamageKind, SCRUB_STEP_MAX, ScrubStart, ScrubStep, ScrubbedOnce, Scrubbing};
use super::verify;
use crate::block::changes::Run;
use crate::block::digest::{Digest, block_digest};
use crate::block::extent::Content;
use crate::block::{BLOCK_LEN, BlockIndex, ByteRange};
use crate::error::{Error, Kind, Result};
use crate::flock::Flock;
use crate::image::Image;
use crate::image::qcow2::Qcow2Image;
use crate::name::{DiskName, PointId};
use std::collections::VecDeque;
use std::ops::Range;

/// Held by the one scrub. Never removed.
const LOCK_FILE: &str = "scrub.lock";

/// How much of the map of the images is asked for at once, where blocks are to be zero.
const WINDOW_BLOCKS: u64 = 16 << 10;

/// Bytes of a change list that stand for no block, if it has one run, and bytes for each block.
const LIST_EMPTY_LEN: u64 = 163;
const LISTED_LEN: u64 = Digest::LEN as u64;

pub(super) struct Scrub {
    store: Store,
    dir: Dir,
    state: State,
    cursor: Cursor,
    start: ScrubStart,
    at: Option<Place>,
    _lock: Flock,
}

/// One disk of one point, open.
struct Place {
    /// `None` once it was released.
    reading: Option<Reading>,
    point: PointId,
    disk: manifest::Disk,
    image: Qcow2Image,
    list: List,
    /// What the list says next, taken apart.
    expected: VecDeque<(u64, Digest)>,
    /// Blocks that are to be zero, and that the map was not asked about yet.
    zeros: Range<u64>,
}

impl Scrub {
    pub fn begin(store: &Store, restart: bool) -> Result<Scrub> {
        let missing = || Error::new(Kind::NotFound, "there is no replica of this domain").path(store.path());
        let dir = store.replica_dir()?.ok_or_else(missing)?;
        let manifest = read_manifest(&dir, &store.uuid)?.ok_or_else(missing)?;
        let lock = lock(&dir)?;
        let mut state = match State::load(&dir) {
            Err(e) if restart && e.kind() == Kind::Corrupt => State::default(),
            state => state?,
        };
        let left = state.cursor.take().filter(|_| !restart);
        let resumed = left.is_some();
        let cursor = left.unwrap_or_else(|| {
            state.scrub += 1;
            Cursor { point: None, disk: None, block: 0, started_at: (store.clock)(), bytes_read: 0 }
        });
        let bytes_total = own_bytes(&dir, &manifest)?;
        let start = ScrubStart { resumed, bytes_done: cursor.bytes_read, bytes_total };
        Ok(Scrub { store: store.beside(), dir, state, cursor, start, at: None, _lock: lock })
    }

    /// Opens what comes next. `None`: all was read. A disk that cannot be opened is damaged, and passed by.
    fn open_next(&mut self) -> Result<Option<Place>> {
        loop {
            let manifest = read_manifest(&self.dir, &self.store.uuid)?;
            let Some((point, disk)) = manifest.as_ref().and_then(|m| next(m, &self.cursor)) else { return Ok(None) };
            let point = point.clone();
            let resumes = self.cursor.point.as_ref() == Some(&point) && self.cursor.disk.as_ref() == Some(&disk);
            if !resumes {
                self.cursor = Cursor { point: Some(point), disk: Some(disk), block: 0, ..self.cursor.clone() };
            }
            if let Some(place) = self.open_here()? {
                return Ok(Some(place));
            }
        }
    }

    /// Opens the disk that the cursor names; `None` if there is nothing to be read, with the cursor moved on.
    fn open_here(&mut self) -> Result<Option<Place>> {
        let (point, name) =
            (self.cursor.point.clone().expect("set before"), self.cursor.disk.clone().expect("set before"));
        let manifest = read_manifest(&self.dir, &self.store.uuid)?;
        let Some(leased) = manifest.as_ref().and_then(|m| at_or_above(m, &point)) else {
            self.pass_by();
            return Ok(None);
        };
        let reading = match self.store.read(&leased, "scrub") {
            Ok(reading) => reading,
            // It was removed just now; what comes next is looked up again.
            Err(e) if e.kind() == Kind::NotFound => return Ok(None),
            Err(e) => return Err(e),
        };
        // Under the lease, what the manifest says stays so.
        let opened = self.open_under(&reading, &leased, &point, &name);
        match opened {
            Ok(Some((disk, image, list))) => {
                let (expected, zeros) = (VecDeque::new(), 0..0);
                Ok(Some(Place { reading: Some(reading), point, disk, image, list, expected, zeros }))
            }
            other => {
                reading.release();
                other?;
                self.pass_by();
                Ok(None)
            }
        }
    }

    /// `None`: it is read no more, or it is damaged as a whole, of which note was taken.
    fn open_under(
        &mut self,
        reading: &Reading,
        leased: &PointId,
        point: &PointId,
        name: &DiskName,
    ) -> Result<Option<(manifest::Disk, Qcow2Image, List)>> {
        let (points, manifest) = (&reading.points, &reading.manifest);
        let Some(record) = manifest.named(point) else { return Ok(None) };
        if self.cursor.block == 0 && record.disks.first().is_some_and(|d| d.name == *name) && !manifest.is_link(point) {
            self.read_attachments(reading, record)?;
        }
        let Some(disk) = record.disk(name).cloned() else { return Ok(None) };
        let found_at = (self.store.clock)();
        let damaged = |what| Damage::whole(point, Some(name), what, found_at);
        let image = match own_images(reading, leased, point, name) {
            Ok(None) => return Ok(None),
            Ok(Some(image)) if image.size() >= disk.size => image,
            Ok(Some(_)) => {
                self.state.add(damaged(DamageKind::Image));
                return Ok(None);
            }
            Err(e) if is_of_this_host(&e) => return Err(e),
            Err(e) => {
                tracing::warn!(%point, disk = %name, "the image cannot be opened: {}", e.chain());
                self.state.add(damaged(DamageKind::Image));
                return Ok(None);
            }
        };
        match chain::changes(points, record, name) {
            Ok(list) => Ok(Some((disk, image, list))),
            Err(e) if is_of_this_host(&e) => Err(e),
            Err(e) => {
                tracing::warn!(%point, disk = %name, "the change list cannot be read: {}", e.chain());
                self.state.add(damaged(DamageKind::Changes));
                Ok(None)
            }
        }
    }

    fn read_attachments(&mut self, reading: &Reading, point: &Point) -> Result<()> {
        let found_at = (self.store.clock)();
        for name in verify::damaged_attachments(&reading.points, point)? {
            let whole = Damage::whole(&point.id, None, DamageKind::Attachment, found_at);
            self.state.add(Damage { attachment: Some(name), ..whole });
        }
        self.state.forget_older(&reading.manifest, &point.id, None);
        Ok(())
    }

    /// What the cursor names is done with.
    fn pass_by(&mut self) {
        self.cursor.block = u64::MAX;
    }

    /// Reads in an open place; gives the bytes read, and whether it came to its end.
    fn read_on(&mut self, place: &mut Place, bytes_max: u64) -> Result<(u64, bool)> {
        let mut bytes_read = 0;
        let mut buffer = vec![0; BLOCK_LEN];
        while bytes_read < bytes_max {
            let (block, digest) = match place.next_block(self.cursor.block) {
                Ok(Some(next)) => next,
                Ok(None) => {
                    self.end_of(place)?;
                    return Ok((bytes_read, true));
                }
                Err((what, e)) => {
                    if is_of_this_host(&e) {
                        return Err(e);
                    }
                    tracing::warn!(point = %place.point, disk = %place.disk.name, "{}", e.chain());
                    let found_at = (self.store.clock)();
                    self.state.add(Damage::whole(&place.point, Some(&place.disk.name), what, found_at));
                    self.end_of(place)?;
                    return Ok((bytes_read, true));
                }
            };
            let range = BlockIndex(block).bytes(place.disk.size);
            let bytes = &mut buffer[..range.len() as usize];
            let whole = match place.image.read_at(range.start, bytes) {
                Ok(()) => block_digest(bytes) == digest,
                Err(e) if is_of_this_host(&e) => return Err(e),
                Err(e) => {
                    tracing::warn!(point = %place.point, disk = %place.disk.name, block, "cannot be read: {}", e.chain());
                    false
                }
            };
            if !whole {
                self.state.add(Damage::of_block(&place.point, &place.disk, block, (self.store.clock)()));
            }
            bytes_read += range.len();
            self.cursor.block = block + 1;
        }
        Ok((bytes_read, false))
    }

    fn end_of(&mut self, place: &Place) -> Result<()> {
        let manifest = &place.reading.as_ref().expect("held as long as it is read").manifest;
        self.state.forget_older(manifest, &place.point, Some(&place.disk.name));
        self.pass_by();
        Ok(())
    }

    /// Makes durable what was read and found. `None`: all of it.
    fn keep(&mut self, cursor: Option<Cursor>) -> Result<()> {
        if self.state.damage.len() > RECORDS_MAX {
            return Err(Error::new(Kind::Corrupt, "more is damaged than is worth a list")
                .path(self.dir.join(SCRUB_FILE))
                .hint("look at the target's storage first"));
        }
        self.state.cursor = cursor;
        self.state.store(&self.dir)
    }
}

impl Scrubbing for Scrub {
    fn start(&self) -> ScrubStart {
        self.start
    }

    fn step(&mut self, bytes_max: u64) -> Result<ScrubStep> {
        let before = self.state.damage.clone();
        let place = match self.at.take() {
            Some(place) => Some(place),
            None => self.open_next()?,
        };
        let (mut bytes_read, end) = (0, place.is_none());
        if let Some(mut place) = place {
            place.renew((self.store.clock)());
            let read = self.read_on(&mut place, bytes_max.clamp(1, SCRUB_STEP_MAX));
            match read {
                Ok((bytes, false)) => {
                    bytes_read = bytes;
                    self.at = Some(place);
                }
                Ok((bytes, true)) => {
                    bytes_read = bytes;
                    place.release();
                }
                Err(e) => {
                    let e = e.point(&place.point).disk(&place.disk.name);
                    place.release();
                    return Err(e);
                }
            }
        }
        self.cursor.bytes_read += bytes_read;
        if end {
            let (started_at, finished_at) = (self.cursor.started_at, Some((self.store.clock)()));
            self.state.last = Some(ScrubbedOnce { started_at, finished_at, bytes_read: self.cursor.bytes_read });
        }
        let cursor = (!end).then(|| self.cursor.clone());
        self.keep(cursor)?;
        Ok(ScrubStep { bytes_read, bytes_done: self.cursor.bytes_read, found: self.found_since(&before)?, end })
    }

    fn close(mut self: Box<Self>) -> Result<()> {
        if let Some(place) = self.at.take() {
            place.release();
        }
        Ok(())
    }
}

impl Scrub {
    /// What this scrub has put on record that was not there in `before`.
    fn found_since(&self, before: &[super::damage::Record]) -> Result<Vec<Damage>> {
        let is_new = |r: &&super::damage::Record| r.scrub == self.state.scrub && !before.contains(r);
        let new: Vec<_> = self.state.damage.iter().filter(is_new).collect();
        if new.is_empty() {
            return Ok(Vec::new());
        }
        let Some(manifest) = read_manifest(&self.dir, &self.store.uuid)? else { return Ok(Vec::new()) };
        let Some(points) = self.dir.sub(manifest::POINTS_DIR)? else { return Ok(Vec::new()) };
        Ok(new.into_iter().filter_map(|r| with_readers(&points, &manifest, &r.damage)).collect())
    }
}

impl Place {
    /// The next block from `from` on that the list names and that has to be read, with its digest: one that is to be
    /// zero only where the map does not say that it is. An error with what it is the damage of.
    fn next_block(&mut self, from: u64) -> std::result::Result<Option<(u64, Digest)>, (DamageKind, Error)> {
        loop {
            while let Some(next) = self.expected.pop_front() {
                if next.0 >= from {
                    return Ok(Some(next));
                }
            }
            self.zeros.start = self.zeros.start.max(from.min(self.zeros.end));
            if !self.zeros.is_empty() {
                self.ask_map().map_err(|e| (DamageKind::Image, e))?;
                continue;
            }
            match self.list.next() {
                Some(Ok(Run::Digests { first, digests })) => self.expected.extend((first.0..).zip(digests)),
                Some(Ok(Run::Zero { first, count })) => self.zeros = first.0..first.0 + count,
                Some(Err(e)) => return Err((DamageKind::Changes, e)),
                None => return self.list_is_right().map(|()| None).map_err(|e| (DamageKind::Changes, e)),
            }
        }
    }

    fn list_is_right(&self) -> Result<()> {
        match self.list.trailer() {
            Some(trailer) if trailer.to_root == self.disk.root => Ok(()),
            _ => Err(Error::new(Kind::Corrupt, "the change list ends with another root than the manifest has")),
        }
    }

    /// Takes the next blocks that are to be zero, and looks which of them have data.
    fn ask_map(&mut self) -> Result<()> {
        let blocks = self.zeros.start..self.zeros.end.min(self.zeros.start + WINDOW_BLOCKS);
        self.zeros.start = blocks.end;
        let end = BlockIndex(blocks.end - 1).bytes(self.disk.size).end;
        let extents = self.image.extents(ByteRange::new(BlockIndex(blocks.start).offset(), end))?;
        for extent in extents.into_iter().filter(|e| e.content == Content::Data) {
            let first = extent.range.start / BLOCK_LEN as u64;
            let first = self.expected.back().map_or(first, |(last, _)| first.max(last + 1));
            self.expected.extend((first..extent.range.end.div_ceil(BLOCK_LEN as u64)).map(|b| (b, Digest::ZERO)));
        }
        Ok(())
    }

    fn renew(&mut self, now: jiff::Timestamp) {
        if let Some(lease) = self.reading.as_mut().and_then(|r| r.lease.as_mut()) {
            // Whoever cannot prolong it goes on: what is needed is open.
            drop(lease.renew(now));
        }
    }

    fn release(mut self) {
        if let Some(reading) = self.reading.take() {
            reading.release();
        }
    }
}

/// The first disk of a point or link that was not read yet; the one that the cursor names, if it was not read to its
/// end.
fn next(manifest: &Manifest, cursor: &Cursor) -> Option<(PointId, DiskName)> {
    for point in manifest.all() {
        let mut names: Vec<&DiskName> = point.disks.iter().map(|d| &d.name).collect();
        let order = |name: &&DiskName| point.disks.iter().position(|d| d.name == **name);
        names.sort_by_key(order);
        let reached = match &cursor.point {
            None => 0,
            Some(id) if id.seq() > point.id.seq() => continue,
            Some(id) if id.seq() < point.id.seq() => 0,
            Some(_) => {
                let at = names.iter().position(|n| Some(*n) == cursor.disk.as_ref());
                at.map_or(0, |at| if cursor.block == u64::MAX { at + 1 } else { at })
            }
        };
        if let Some(name) = names.get(reached) {
            return Some((point.id.clone(), (*name).clone()));
        }
    }
    None
}

/// The point to lease for reading `id`: itself, or the one that reads through a link.
fn at_or_above(manifest: &Manifest, id: &PointId) -> Option<PointId> {
    manifest.points().iter().find(|p| p.id.seq() >= id.seq()).map(|p| p.id.clone())
}

/// The images of a point, or those from a link on down that `leased` reads. `None`: the link is folded already.
fn own_images(reading: &Reading, leased: &PointId, point: &PointId, disk: &DiskName) -> Result<Option<Qcow2Image>> {
    let (points, manifest) = (&reading.points, &reading.manifest);
    if manifest.point(leased).and_then(|p| p.disk(disk)).is_none() {
        return Ok(None);
    }
    let images = chain::image_links(points, manifest, leased, disk)?;
    let lists = chain::list_links(points, manifest, leased, disk)?;
    let Some(at) = images.iter().position(|p| p.id == *point) else { return Ok(None) };
    if !lists.iter().any(|p| p.id == *point) {
        return Ok(None);
    }
    let layers = chain::layers(points, &images[at..], disk)?;
    if leased == point {
        verify::check_headers(&layers, disk)?;
    }
    Qcow2Image::open(&layers).map(Some)
}

/// Bytes that points and links have of their own, by the lengths of their lists. What is missing counts for nothing.
fn own_bytes(dir: &Dir, manifest: &Manifest) -> Result<u64> {
    let Some(points) = dir.sub(manifest::POINTS_DIR)? else { return Ok(0) };
    let mut bytes = 0;
    for point in manifest.all() {
        let Some(of_point) = points.sub(point.id.as_str())? else { continue };
        for disk in &point.disks {
            let length = of_point.open(&manifest::changes_file(&disk.name))?.map(|f| f.metadata());
            let length = length.and_then(|m| m.ok()).map_or(0, |m| m.len());
            bytes += length.saturating_sub(LIST_EMPTY_LEN) / LISTED_LEN * BLOCK_LEN as u64;
        }
    }
    Ok(bytes)
}

/// Whether it says nothing of what is stored: of this host's memory, or of its limits.
fn is_of_this_host(error: &Error) -> bool {
    !matches!(error.kind(), Kind::Corrupt | Kind::Refused | Kind::NotFound | Kind::Io | Kind::Conflict | Kind::Protocol)
}

fn lock(dir: &Dir) -> Result<Flock> {
    let file = dir.open_or_create(LOCK_FILE)?;
    let locked = Flock::exclusive(file).map_err(|e| Error::io("cannot lock the scrub", dir.join(LOCK_FILE), e))?;
    locked.map_err(|_| Error::new(Kind::Busy, "the replica is being scrubbed already").path(dir.join(LOCK_FILE)))
}
