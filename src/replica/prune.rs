//! Removing points: first the manifest, then, as far as nobody is in the way, the folding of what is left of them.
//!
//! Invariants
//! - The manifest says durably that a point is gone before any byte of it is changed. Until then it is whole.
//! - A point that was named goes or stays as a whole; the head, and what is younger than this host's floor, stay
//!   whoever asks.
//! - What cannot be folded now (somebody reads through it, there is no room, something is damaged) waits: it takes room
//!   and does no harm. The next prune and the next run try again.
//!
//! Crash order: docs/replication.md, step p1 (the others in `fold.rs`).

use super::damage::State;
use super::files::Dir;
use super::fold::Folder;
use super::lease::{Gate, Leases};
use super::lock::WriterLock;
use super::manifest::{MANIFEST_MAX, Manifest, POINTS_DIR, Pinned, Point, SOURCE_MAX, image_file};
use super::store::{self, Store, read_manifest};
use super::upkeep::{Holds, Kept, Lease, PatchStream, Pin, PruneReport, ScrubTold, Scrubbing, Shortening, Upkeep};
use super::{Attachment, age, chain, shorten};
use crate::error::{Error, Kind, Result, advice, printable};
use crate::image::locks::is_open_in_qemu;
use crate::name::{DiskName, PointId};
use crate::replica::manifest_file::{publish, publish_within};
use jiff::Timestamp;

/// Longest reason of a pin, in bytes.
const REASON_MAX: usize = 200;

impl Upkeep for Store {
    fn holds(&self) -> Result<Holds> {
        let now = (self.clock)();
        let mut holds = Holds {
            now,
            young: Vec::new(),
            min_age_s: self.limits.min_age.as_secs(),
            pins: Vec::new(),
            leases: Vec::new(),
            links: Vec::new(),
            depth: 0,
            depth_max: self.limits.depth_max,
            scrub: ScrubTold::default(),
        };
        let Some(dir) = self.replica_dir()? else { return Ok(holds) };
        let Some(manifest) = read_manifest(&dir, &self.uuid)? else { return Ok(holds) };
        let Some(points) = dir.sub(POINTS_DIR)? else { return Ok(holds) };
        holds.leases = in_use(&dir, &points, &manifest, now)?;
        let pin = |p: &Point| {
            let pinned = p.pinned.as_ref()?;
            Some(Pin { point: p.id.clone(), reason: pinned.reason.clone(), since: pinned.since })
        };
        let (clock, min_age) = (age::look(&dir, &manifest, &(self.boot)(), now), self.limits.min_age);
        let left_s = |p: &Point| Some((p.id.clone(), min_age.checked_sub(clock.age(p))?.as_secs()));
        holds.young = manifest.points().iter().filter_map(left_s).filter(|(_, left_s)| *left_s > 0).collect();
        holds.pins = manifest.points().iter().filter_map(pin).collect();
        holds.links = manifest.links().iter().map(|l| l.id.clone()).collect();
        holds.depth = depth(&points, &manifest)?;
        holds.scrub = State::load_if_sound(&dir).told(&points, &manifest);
        Ok(holds)
    }

    fn prune(&self, remove: &[PointId], progress: &mut dyn FnMut(u64, u64)) -> Result<PruneReport> {
        let (dir, _lock, mut manifest) = self.to_change()?;
        let points = dir.sub(POINTS_DIR)?.ok_or_else(|| self.nothing())?;
        let now = (self.clock)();
        self.may_remove(&dir, &manifest, remove, now)?;
        // Nobody begins to read from here on; the leases there are will be seen.
        let leases = Leases::of(&dir)?;
        let _gate = leases.close_gate()?;
        leases.sweep(now)?;
        let held = in_use(&dir, &points, &manifest, now)?;
        let mut report = PruneReport::default();
        for id in remove {
            match why_kept(&manifest, &held, id) {
                Some(why) => report.kept.push(Kept { point: id.clone(), why }),
                None if !report.removed.contains(id) => report.removed.push(id.clone()),
                None => {}
            }
        }
        if !report.removed.is_empty() {
            manifest.remove(&report.removed)?;
            // step p1
            publish(&dir, &manifest)?;
            crate::failpoint!("p1");
        }
        store::sweep_below_head(&points, &manifest)?;
        shorten::finish_left_over(&dir, &points, &mut manifest, &held)?;
        self.fold_all(&dir, &points, &mut manifest, &held, &mut report, progress);
        Ok(report)
    }

    fn pin(&self, point: &PointId, reason: Option<&str>) -> Result<()> {
        let (dir, _lock, mut manifest) = self.to_change()?;
        let since = (self.clock)();
        let missing = || Error::new(Kind::NotFound, "the replica has no such point").point(point);
        let record = manifest.point_mut(point).ok_or_else(missing)?;
        if self.for_source && record.pinned.as_ref().is_some_and(|p| p.by_target) {
            let error = Error::new(Kind::Refused, "the target's own operator pinned this point").point(point);
            // Pinned it is, for another reason than the source has.
            return if reason.is_some() { Ok(()) } else { Err(error.advise(advice::Store::UnpinThere)) };
        }
        let by_target = !self.for_source;
        record.pinned = reason.map(|reason| Pinned { since, reason: printable(reason, REASON_MAX), by_target });
        // Room for the records of recovery is this host's own.
        let bytes_max = if self.for_source && reason.is_some() { SOURCE_MAX } else { MANIFEST_MAX };
        publish_within(&dir, &manifest, bytes_max)
    }

    fn export(&self, point: &PointId, disk: &DiskName) -> Result<Box<dyn PatchStream>> {
        Ok(Box::new(super::export::Export::begin(self, point, disk)?))
    }

    fn changes(&self, since: &PointId, point: &PointId, disk: &DiskName) -> Result<Box<dyn PatchStream>> {
        Ok(Box::new(super::export::Export::begin_since(self, since, point, disk)?))
    }

    fn attachment(&self, point: &PointId, name: Attachment) -> Result<Box<dyn PatchStream>> {
        Ok(Box::new(super::export::AttachmentStream::begin(self, point, name)?))
    }

    fn scrub(&self, restart: bool) -> Result<Box<dyn Scrubbing>> {
        Ok(Box::new(super::scrub::Scrub::begin(self, restart)?))
    }

    fn shorten(&self) -> Result<Option<Box<dyn Shortening>>> {
        let shorten = shorten::Shorten::begin(self)?;
        Ok(shorten.map(|s| Box::new(s) as Box<dyn Shortening>))
    }
}

impl Store {
    fn nothing(&self) -> Error {
        Error::new(Kind::NotFound, "there is no replica of this domain").path(self.path())
    }

    /// The replica and its manifest, to be changed under the lock.
    pub(super) fn to_change(&self) -> Result<(Dir, WriterLock, Manifest)> {
        if self.open.lock().expect("no code panics with this lock").is_some() {
            return Err(Error::new(Kind::Usage, "a point is being written in this session"));
        }
        let dir = self.replica_dir()?.ok_or_else(|| self.nothing())?;
        let lock = WriterLock::take(&dir, None, (self.clock)())?;
        let manifest = read_manifest(&dir, &self.uuid)?.ok_or_else(|| self.nothing())?;
        Ok((dir, lock, manifest))
    }

    /// What is refused, whoever asks for it, before anything is done.
    fn may_remove(&self, dir: &Dir, manifest: &Manifest, remove: &[PointId], now: Timestamp) -> Result<()> {
        let clock = age::observe(dir, manifest, &(self.boot)(), now);
        for id in remove {
            let point = manifest
                .point(id)
                .ok_or_else(|| Error::new(Kind::NotFound, "the replica has no such point").point(id))?;
            if manifest.head().is_some_and(|head| head.id == *id) {
                return Err(Error::new(Kind::Refused, "the newest point is never removed").point(id));
            }
            let age = clock.age(point);
            if age < self.limits.min_age {
                let what = format!(
                    "the point is {} s old by this host's uptime, and this host removes none of less than {} s; no point was removed",
                    age.as_secs(),
                    self.limits.min_age.as_secs()
                );
                return Err(Error::new(Kind::Refused, what).point(id).advise(advice::Store::LowerMinAge));
            }
        }
        Ok(())
    }

    /// What earlier prunes left, before a run begins. Never in its way.
    pub(super) fn fold_left_over(&self, dir: &Dir, points: &Dir, manifest: &mut Manifest) -> Result<()> {
        if manifest.links().is_empty() && !manifest.points().iter().any(Point::is_detaching) {
            return Ok(());
        }
        let now = (self.clock)();
        let gate: Result<Gate> = Leases::of(dir).and_then(|leases| leases.close_gate());
        let held = gate.and_then(|gate| Ok((gate, in_use(dir, points, manifest, now)?)));
        let mut report = PruneReport::default();
        match held {
            Ok((_gate, held)) => {
                shorten::finish_left_over(dir, points, manifest, &held)?;
                self.fold_all(dir, points, manifest, &held, &mut report, &mut |_, _| {});
            }
            Err(e) => tracing::debug!("removed points wait: {}", e.chain()),
        }
        Ok(())
    }

    /// Folds every row of links that nobody reads through; the others wait.
    fn fold_all(
        &self,
        dir: &Dir,
        points: &Dir,
        manifest: &mut Manifest,
        held: &[Lease],
        report: &mut PruneReport,
        progress: &mut dyn FnMut(u64, u64),
    ) {
        let ids = |m: &Manifest| -> Vec<(PointId, Vec<PointId>)> {
            let row = |(above, links): (&Point, Vec<&Point>)| {
                (above.id.clone(), links.into_iter().map(|l| l.id.clone()).collect())
            };
            m.rows().into_iter().map(row).collect()
        };
        for (above, links) in ids(manifest) {
            let mut wait = |why: String| {
                report.waiting.extend(links.iter().map(|l| Kept { point: l.clone(), why: why.clone() }));
            };
            if let Some(lease) = held.iter().find(|lease| reads_through(manifest, &lease.point, &above)) {
                wait(format!("point {} above is in use ({}, {})", lease.point, lease.purpose, lease.owner));
                continue;
            }
            let mut copied = |bytes| {
                report.bytes_copied += bytes;
                progress(report.bytes_copied, report.bytes_copied);
            };
            match (Folder { replica: dir, points, copied: &mut copied }).fold(manifest, &above) {
                Ok(()) => report.folded.extend(links),
                Err(e) if e.kind() == Kind::Busy => wait(e.chain()),
                Err(e) => {
                    tracing::warn!(point = %above, "removed points below it still take room: {}", e.chain());
                    wait(e.chain());
                }
            }
        }
    }
}

/// Whether who reads `point` reads through `above`.
pub(super) fn reads_through(manifest: &Manifest, point: &PointId, above: &PointId) -> bool {
    let Some(record) = manifest.named(point) else { return false };
    let mut chains = record.disks.iter().filter_map(|d| manifest.chain(point, &d.name).ok());
    chains.any(|chain| chain.iter().any(|link| link.id == *above))
}

fn why_kept(manifest: &Manifest, held: &[Lease], id: &PointId) -> Option<String> {
    if let Some(pinned) = manifest.point(id).and_then(|p| p.pinned.as_ref()) {
        let reason = if pinned.reason.is_empty() { String::new() } else { format!(": {}", pinned.reason) };
        return Some(format!("pinned{reason}"));
    }
    let lease = held.iter().find(|lease| lease.point == *id)?;
    Some(format!("in use: {}, {}", lease.purpose, lease.owner))
}

/// The leases in force, and the points that a QEMU program has open: the uppermost of an unbroken row of open images.
/// The ones below it are open because of it, and may go: their images stay as long as it is.
pub(super) fn in_use(dir: &Dir, points: &Dir, manifest: &Manifest, now: Timestamp) -> Result<Vec<Lease>> {
    let mut held = Leases::of(dir)?.in_force(now)?;
    let open = |point: &Point, disk: &DiskName| -> Result<bool> {
        is_open_in_qemu(&points.join(point.id.as_str()).join(image_file(disk)))
    };
    let all: Vec<&Point> = manifest.points().iter().collect();
    for (at, point) in all.iter().enumerate() {
        for disk in &point.disks {
            let above = all.get(at + 1).and_then(|p| Some((*p, p.disk(&disk.name)?)));
            let read_from_above = match above {
                Some((above, record)) => record.backing.is_some() && open(above, &disk.name)?,
                None => false,
            };
            if !read_from_above && open(point, &disk.name)? {
                held.push(Lease {
                    point: point.id.clone(),
                    owner: "a QEMU program".to_owned(),
                    purpose: format!("it has the image of {} open", disk.name),
                    since: now,
                    expires: now,
                });
                break;
            }
        }
    }
    Ok(held)
}

/// Images that the deepest disk of the head consists of.
fn depth(points: &Dir, manifest: &Manifest) -> Result<u64> {
    let Some(head) = manifest.head() else { return Ok(0) };
    let mut deepest = 0;
    for disk in &head.disks {
        deepest = deepest.max(chain::image_links(points, manifest, &head.id, &disk.name)?.len() as u64);
    }
    Ok(deepest)
}
