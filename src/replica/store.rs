//! The replica on this host: a directory with one qcow2 chain per disk and one manifest.
//!
//! Owns every file in the directory; no path is used that [`manifest`] did not produce.
//!
//! Invariants
//! - A point exists if and only if the manifest names it (I9). Directories it does not name are rubbish: the next
//!   [`Replica::begin`] removes them, [`Replica::describe`] only tells of them.
//! - The manifest is replaced whole, by rename, after the data it names is durable (I11). Whatever is on disk when the
//!   machine stops, a reader finds the old head or the new one, whole.
//! - One writer, by the lock (I15); a reader needs none.
//! - After any error the open point is condemned: every later call returns that error, and it cannot be sealed.
//!
//! Format: docs/formats/replica.md. Crash order: docs/replication.md, steps 5 and 6.

use super::begin::{check_head, check_request, check_room, judge_claim};
use super::digests::DigestFile;
use super::files::{Dir, Space};
use super::lock::WriterLock;
use super::manifest::{self, MANIFEST_FILE, MANIFEST_MAX, Manifest, POINTS_DIR, REPLICAS_DIR};
use super::point::OpenPoint;
use super::root::{self, StoreSeen};
use super::source::{self, Claim, Claimed, Owner};
use super::upkeep::Held;
use super::{age, chain, damage, lease, seed};
use crate::block::BlockIndex;
use crate::block::digest::{BlockPieces, Digest};
use crate::engine::disk_target::{DiskApplied, DiskTarget, NODES_MAX, check_blocks};
use crate::error::{Error, Kind, Result};
use crate::image::Image;
use crate::name::{DiskName, DomainName, DomainUuid, Generation, PointId, StoreId};
use crate::replica::age::Clock;
use crate::replica::{Attachment, BeginPoint, Begun, PointView, Replica, ReplicaView, SealPoint, VerifyReport, verify};
use jiff::Timestamp;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// The demands of a store's host, for every client.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Points sealed less long ago are not removed.
    pub min_age: Duration,
    /// Images of a disk from which on the newest point gets some that stand alone; at least 2.
    pub depth_max: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { min_age: Duration::ZERO, depth_max: 64 }
    }
}

/// The replica of one domain in a store on this host.
pub struct Store {
    root: PathBuf,
    /// The store that the root has to be whenever something is created in it; `None`: nobody has asked.
    mark: Option<StoreId>,
    pub(super) uuid: DomainUuid,
    /// Whose points are begun; `None`: the client did not say.
    claim: Mutex<Option<Claim>>,
    pub(super) clock: Clock,
    pub(super) limits: Limits,
    /// Time of this host that nobody sets.
    pub(super) boot: age::BootClock,
    /// A source asks: this host's own holds are not its to lift.
    pub(super) for_source: bool,
    pub(super) open: Mutex<Option<Arc<OpenPoint>>>,
}

impl Store {
    /// The replica of domain `uuid` in the store that was opened. Touches nothing: the replica need not exist before
    /// the first [`Replica::begin`], which creates it.
    pub fn within(
        store: &StoreSeen,
        uuid: &DomainUuid,
        clock: impl Fn() -> Timestamp + Send + Sync + 'static,
    ) -> Result<Store> {
        Ok(Store { mark: store.id.clone(), ..Store::open(&store.root, uuid, clock)? })
    }

    /// The same in a directory of which nobody asks whether it is a store: for one that was asked already, and for
    /// tests. The first [`Replica::begin`] creates it.
    pub fn open(
        root: &Path,
        uuid: &DomainUuid,
        clock: impl Fn() -> Timestamp + Send + Sync + 'static,
    ) -> Result<Store> {
        let root = std::path::absolute(root).map_err(|e| Error::io("this cannot be the root of a store", root, e))?;
        let (clock, limits, boot) = (Arc::new(clock), Limits::default(), age::this_host());
        Ok(Store {
            root,
            mark: None,
            uuid: uuid.clone(),
            claim: Mutex::default(),
            clock,
            limits,
            boot,
            for_source: false,
            open: Mutex::new(None),
        })
    }

    /// With what this host demands.
    pub fn with_limits(self, limits: Limits) -> Store {
        Store { limits, ..self }
    }

    /// The caller serves a source. Without this the caller is the operator of this host.
    pub fn for_source(self) -> Store {
        Store { for_source: true, ..self }
    }

    /// With another clock of this boot than the host's; for tests, which own time.
    pub fn with_boot_clock(self, boot: impl Fn() -> age::BootTime + Send + Sync + 'static) -> Store {
        Store { boot: Arc::new(boot), ..self }
    }

    /// The same replica, for somebody who works beside this.
    pub(super) fn beside(&self) -> Store {
        let (root, uuid, clock, boot) = (self.root.clone(), self.uuid.clone(), self.clock.clone(), self.boot.clone());
        let (mark, claim, open) = (self.mark.clone(), Mutex::default(), Mutex::new(None));
        let (limits, for_source) = (self.limits, self.for_source);
        Store { root, mark, uuid, claim, clock, limits, boot, for_source, open }
    }

    /// Absolute path of the replica's directory.
    pub fn path(&self) -> PathBuf {
        self.root.join(REPLICAS_DIR).join(self.uuid.as_str())
    }

    /// The replica's directory, created if it is missing, in the store that was opened and in no other.
    fn create_replica_dir(&self) -> Result<Dir> {
        let root = match &self.mark {
            Some(id) => root::reopen(&self.root, id)?,
            None => Dir::create_root(&self.root)?,
        };
        root.sub_or_create(REPLICAS_DIR)?.sub_or_create(self.uuid.as_str())
    }

    pub(super) fn replica_dir(&self) -> Result<Option<Dir>> {
        let Some(root) = Dir::open_root(&self.root)? else { return Ok(None) };
        let Some(replicas) = root.sub(REPLICAS_DIR)? else { return Ok(None) };
        replicas.sub(self.uuid.as_str())
    }

    fn current(&self) -> Result<Arc<OpenPoint>> {
        let open = self.open.lock().expect("no code panics with this lock").clone();
        open.ok_or_else(|| Error::new(Kind::Usage, "there is no open point: begin comes first"))
    }

    /// Whose the point is that is begun; judged again under the lock, since another source may have come in between.
    fn owner_of_the_next(&self, manifest: &Manifest) -> Result<Option<Owner>> {
        let claim = self.claim.lock().expect("no code panics with this lock").clone();
        let Some(claim) = claim else { return Ok(None) };
        let claimed = judge_claim(Some(manifest), &claim)?;
        Ok(Some(source::owner(manifest.owner.as_ref(), &claim, &claimed, (self.clock)())))
    }

    /// Runs `act` on the open point; its error condemns the point.
    fn with_open<T>(&self, act: impl FnOnce(&OpenPoint) -> Result<T>) -> Result<T> {
        let open = self.current()?;
        open.poison.check()?;
        act(&open).map_err(|e| open.poison.put(e.point(&open.id)))
    }
}

/// Every replica in the store at `root` that has a point, in the order of the domains' names. One that cannot be read
/// is left out with a warning: on the day when another domain has to be brought up, it must not be in the way.
pub fn list(root: &Path) -> Result<Vec<(DomainUuid, DomainName, ReplicaView)>> {
    let Some(replicas) = Dir::open_root(root)?.map(|r| r.sub(REPLICAS_DIR)).transpose()?.flatten() else {
        return Ok(Vec::new());
    };
    let mut found = Vec::new();
    for name in replicas.entries()? {
        let Ok(uuid) = DomainUuid::new(name) else { continue };
        match describe_named(root, &replicas, &uuid) {
            Ok(Some((domain, view))) => found.push((uuid, domain, view)),
            Ok(None) => {}
            Err(e) => tracing::warn!(%uuid, error = %e.chain(), "a replica cannot be read"),
        }
    }
    found.sort_by(|a, b| (&a.1, &a.0).cmp(&(&b.1, &b.0)));
    Ok(found)
}

fn describe_named(root: &Path, replicas: &Dir, uuid: &DomainUuid) -> Result<Option<(DomainName, ReplicaView)>> {
    let Some(dir) = replicas.sub(uuid.as_str())? else { return Ok(None) };
    let Some(manifest) = read_manifest(&dir, uuid)? else { return Ok(None) };
    Ok(Some((manifest.name, Store::open(root, uuid, Timestamp::now)?.describe()?)))
}

/// The manifest in a replica's directory; `None` if nothing was ever sealed there.
pub(super) fn read_manifest(dir: &Dir, uuid: &DomainUuid) -> Result<Option<Manifest>> {
    let Some(json) = dir.read(MANIFEST_FILE, MANIFEST_MAX)? else { return Ok(None) };
    let at = |e: Error| e.path(dir.join(MANIFEST_FILE));
    let manifest = Manifest::parse(&json).map_err(at)?;
    if manifest.uuid != *uuid {
        return Err(at(Error::new(Kind::Corrupt, format!("the manifest is that of domain {}", manifest.uuid))));
    }
    Ok(Some(manifest))
}

/// Directories of points that `manifest` does not name, by name. Whatever is not named like a point is not ours.
fn unnamed(points: &Dir, manifest: Option<&Manifest>) -> Result<Vec<PointId>> {
    let ids = points.entries()?.into_iter().filter_map(|name| PointId::new(name).ok());
    Ok(ids.filter(|id| manifest.is_none_or(|m| m.named(id).is_none())).collect())
}

impl DiskTarget for Store {
    fn nodes(&self, disk: &DiskName, level: u8, range: Range<u64>) -> Result<Vec<Digest>> {
        let count = range.end.checked_sub(range.start).filter(|n| *n <= NODES_MAX);
        let count = count
            .ok_or_else(|| Error::new(Kind::Usage, format!("{range:?} is not a range of at most {NODES_MAX} nodes")))?;
        let open = self.open.lock().expect("no code panics with this lock").clone();
        let file = match &open {
            Some(open) => open.head_digests(disk)?,
            None => self.head_digests_unlocked(disk)?,
        };
        let Some(file) = file else { return Ok(vec![Digest::ZERO; count as usize]) };
        let mut nodes = file.nodes(level, range.clone()).map_err(|e| e.disk(disk))?;
        if let Some(open) = &open {
            open.make_differ(disk, level, range.start, &mut nodes);
        }
        // Without the lock a writer may have begun to update the file under our hands.
        if open.is_none() && !file.is_as_opened()? {
            return Err(Error::new(Kind::Busy, "the head changed while its digests were read").disk(disk));
        }
        Ok(nodes)
    }

    /// Unlike what writes, a failure does not condemn the open point: the source may send whole blocks instead.
    fn pieces(&self, disk: &DiskName, blocks: &[BlockIndex]) -> Result<Vec<BlockPieces>> {
        check_blocks(blocks).map_err(|e| e.disk(disk))?;
        let open = self.current()?;
        open.poison.check()?;
        open.pieces(disk, blocks).map_err(|e| e.disk(disk))
    }

    fn apply(&self, disk: &DiskName, patch_bytes: &[u8]) -> Result<()> {
        self.with_open(|open| open.apply(disk, patch_bytes).map_err(|e| e.disk(disk)))
    }

    fn finish_disk(&self, disk: &DiskName) -> Result<DiskApplied> {
        self.with_open(|open| open.finish_disk(disk).map_err(|e| e.disk(disk)))
    }
}

impl Replica for Store {
    /// Never modifies anything and takes no lock. Safe beside a writer.
    fn describe(&self) -> Result<ReplicaView> {
        let path = self.path();
        let mut view = ReplicaView {
            generation: Generation(1),
            points: Vec::new(),
            free_bytes: Space::at(&path)?.free_bytes,
            path: path.clone(),
            open_point: None,
            seeds: Vec::new(),
            damaged: Vec::new(),
            promoted: None,
        };
        let Some(dir) = self.replica_dir()? else { return Ok(view) };
        // First the directories, then the manifest: a point that is sealed in between is named, not open.
        let points = dir.sub(POINTS_DIR)?;
        let present = points.as_ref().map(|p| unnamed(p, None)).transpose()?.unwrap_or_default();
        let manifest = read_manifest(&dir, &self.uuid)?;
        // The remains of a removed point are no open point.
        let head = manifest.as_ref().and_then(Manifest::head).map_or(0, |p| p.id.seq());
        view.open_point = present.into_iter().filter(|id| id.seq() > head).max_by_key(PointId::seq);
        view.seeds = seed::list(&dir)?;
        if let Some(manifest) = &manifest {
            let points_dir = path.join(POINTS_DIR);
            view.generation = manifest.generation;
            view.promoted = manifest.promotion.clone();
            view.points = manifest.points().iter().map(|p| p.view(&points_dir)).collect();
            view.damaged = damage::head_damage(&damage::in_head(&dir, manifest));
        }
        Ok(view)
    }

    fn claim(&self, claim: &Claim) -> Result<Claimed> {
        let manifest = self.replica_dir()?.map(|dir| read_manifest(&dir, &self.uuid)).transpose()?.flatten();
        let claimed = judge_claim(manifest.as_ref(), claim)?;
        *self.claim.lock().expect("no code panics with this lock") = Some(claim.clone());
        Ok(claimed)
    }

    fn begin(&self, request: &BeginPoint) -> Result<Begun> {
        check_request(request, &self.uuid)?;
        let mut slot = self.open.lock().expect("no code panics with this lock");
        // The lock of an earlier attempt of ours is freed before it is asked for again.
        *slot = None;
        let dir = self.create_replica_dir()?;
        let lock = WriterLock::take(&dir, Some(&request.run), (self.clock)())?;
        let mut manifest = read_manifest(&dir, &self.uuid)?
            .unwrap_or_else(|| Manifest::new(self.uuid.clone(), request.name.clone(), Generation(1)));
        check_head(request, &manifest)?;
        check_room(request, &dir)?;
        let points = dir.sub_or_create(POINTS_DIR)?;
        sweep(&points, &manifest)?;
        self.fold_left_over(&dir, &points, &mut manifest)?;
        seed::sweep(&dir, &manifest)?;
        manifest.owner = self.owner_of_the_next(&manifest).map_err(|e| e.domain(&request.name))?;
        crate::failpoint!("3a");
        let open = OpenPoint::begin(lock, dir, points, manifest, request)?;
        let begun = open.begun();
        *slot = Some(Arc::new(open));
        Ok(begun)
    }

    fn attach(&self, name: Attachment, content: &[u8]) -> Result<()> {
        self.with_open(|open| open.attach(name, content))
    }

    fn seal(&self, request: &SealPoint) -> Result<PointView> {
        let view = self.with_open(|open| open.seal(request, &self.clock, &self.boot))?;
        // Frees the lock.
        *self.open.lock().expect("no code panics with this lock") = None;
        Ok(view)
    }

    /// Also cleans up after a writer that died, if nobody else writes now. What arrived of a disk that the head does
    /// not have becomes a seed.
    fn abandon(&self) -> Result<()> {
        let mut slot = self.open.lock().expect("no code panics with this lock");
        if let Some(open) = slot.take() {
            open.keep_seeds();
        }
        let Some(dir) = self.replica_dir()? else { return Ok(()) };
        let Some(points) = dir.sub(POINTS_DIR)? else { return Ok(()) };
        let _lock = match WriterLock::take(&dir, None, (self.clock)()) {
            Ok(lock) => lock,
            // Somebody else's point is not ours to throw away.
            Err(e) if e.kind() == Kind::Busy => return Ok(()),
            Err(e) => return Err(e),
        };
        // Read again, under the lock: a seal that failed after the rename has made the point exist.
        match read_manifest(&dir, &self.uuid)? {
            Some(manifest) => sweep(&points, &manifest),
            None => unnamed(&points, None)?.iter().try_for_each(|id| points.remove_all(id.as_str())),
        }
    }

    fn verify(&self, point: &PointId, progress: &mut dyn FnMut(u64, u64)) -> Result<VerifyReport> {
        let mut reading = self.read(point, "verify")?;
        let clock = self.clock.clone();
        let lease = &mut reading.lease;
        let mut and_renew = |done, total| {
            // A reader whose lease cannot be prolonged goes on: what it needs is open.
            drop(lease.as_mut().map(|l| l.renew(clock())));
            progress(done, total);
        };
        let (points, manifest) = (&reading.points, &reading.manifest);
        let report = verify::verify(points, manifest, manifest.point(point).expect("read says so"), &mut and_renew);
        reading.release();
        report
    }
}

/// A point that is read: it stays, with its images as they are, until it is released.
pub(super) struct Reading {
    pub points: Dir,
    pub manifest: Manifest,
    /// `None` where nothing can be written, so that nobody can prune either.
    pub lease: Option<lease::Holder>,
}

impl Reading {
    pub fn release(self) {
        if let Some(lease) = self.lease {
            lease.release();
        }
    }
}

/// A point of this store that is held.
pub struct HeldPoint {
    reading: Reading,
    view: PointView,
    clock: Clock,
}

impl Held for HeldPoint {
    fn point(&self) -> &PointView {
        &self.view
    }

    fn images(&self, disk: &DiskName) -> Result<crate::image::Chain> {
        chain::images(&self.reading.points, &self.reading.manifest, &self.view.id, disk)
    }

    fn attachment(&self, name: Attachment) -> Result<Option<Vec<u8>>> {
        let point = self.reading.manifest.point(&self.view.id).expect("it was found when it was leased");
        let Some(attached) = point.attachments.iter().find(|a| a.name == name) else { return Ok(None) };
        verify::read_attachment(&self.reading.points, &self.view.id, attached)
            .and_then(|content| {
                let damaged = || Error::new(Kind::Corrupt, "the file is not what was sealed");
                content.map(Some).ok_or_else(|| damaged().path(attached.name.file_name()))
            })
            .map_err(|e| e.point(&self.view.id))
    }

    fn renew(&mut self) -> Result<()> {
        let now = (self.clock)();
        self.reading.lease.as_mut().map_or(Ok(()), |lease| lease.renew(now))
    }

    fn release(self: Box<Self>) {
        self.reading.release();
    }
}

impl Store {
    /// Leases a point for `purpose`.
    pub fn hold(&self, point: &PointId, purpose: &str) -> Result<HeldPoint> {
        let reading = self.read(point, purpose)?;
        let record = reading.manifest.point(point).expect("read says so");
        let view = record.view(&self.path().join(POINTS_DIR));
        Ok(HeldPoint { reading, view, clock: self.clock.clone() })
    }

    /// Leases a point for reading. [`Kind::NotFound`] if there is no such point.
    pub(super) fn read(&self, point: &PointId, purpose: &str) -> Result<Reading> {
        let missing = || Error::new(Kind::NotFound, "the replica has no such point").point(point).path(self.path());
        let dir = self.replica_dir()?.ok_or_else(missing)?;
        let find = || -> Result<(Dir, Manifest)> {
            let manifest = read_manifest(&dir, &self.uuid)?.ok_or_else(missing)?;
            manifest.point(point).ok_or_else(missing)?;
            Ok((dir.sub(POINTS_DIR)?.ok_or_else(missing)?, manifest))
        };
        match lease::Leases::take(&dir, point, purpose, (self.clock)(), find) {
            Ok((lease, (points, manifest))) => Ok(Reading { points, manifest, lease: Some(lease) }),
            // A file system that is full or read-only: reading what is there matters more, and nothing is folded there.
            Err(e) if matches!(e.kind(), Kind::Space | Kind::Io) => {
                tracing::warn!(%point, error = %e.chain(), "the point is read without a lease");
                let (points, manifest) = find()?;
                Ok(Reading { points, manifest, lease: None })
            }
            Err(e) => Err(e),
        }
    }
}

impl Store {
    /// Adopts a copy of a disk, from wherever it came: it becomes the disk's seed, from which the first copy of that
    /// disk starts. The image itself is only read. `progress` is told bytes done and all. Returns the bytes of data
    /// copied; durable then. [`Kind::Conflict`] if the head has the disk already.
    pub fn adopt(&self, disk: &DiskName, image: &dyn Image, progress: &mut dyn FnMut(u64, u64)) -> Result<u64> {
        let dir = self.create_replica_dir()?;
        let _lock = WriterLock::take(&dir, None, (self.clock)())?;
        let head = read_manifest(&dir, &self.uuid)?.and_then(|m| m.head().cloned());
        if let Some(head) = head.filter(|p| p.disk(disk).is_some()) {
            let what = format!("point {} has this disk: there is nothing to seed", head.id);
            return Err(Error::new(Kind::Conflict, what)
                .disk(disk)
                .hint("the next run sends only what changed anyway"));
        }
        if image.size().0 > manifest::DISK_SIZE_MAX {
            return Err(Error::new(Kind::Usage, "the image is larger than any disk").disk(disk));
        }
        seed::adopt(&dir, disk, image, progress).map_err(|e| e.disk(disk))
    }

    /// Without an open point: read where it is sound, mended under the lock where it is not.
    fn head_digests_unlocked(&self, disk: &DiskName) -> Result<Option<Arc<DigestFile>>> {
        let Some(dir) = self.replica_dir()? else { return Ok(None) };
        let Some(manifest) = read_manifest(&dir, &self.uuid)? else { return Ok(None) };
        if let Some(file) = chain::ready_head_digests(&dir, &manifest, disk)? {
            return Ok(Some(Arc::new(file)));
        }
        let _lock = WriterLock::take(&dir, None, (self.clock)())?;
        // Read again, under the lock.
        let Some(manifest) = read_manifest(&dir, &self.uuid)? else { return Ok(None) };
        Ok(chain::mend_head_digests(&dir, &manifest, disk)?.map(Arc::new))
    }
}

/// Removes what is left of removed points. An open point, which lies above the head, stays. The caller holds the lock.
pub(super) fn sweep_below_head(points: &Dir, manifest: &Manifest) -> Result<()> {
    let head = manifest.head().map_or(0, |p| p.id.seq());
    let rubbish: Vec<PointId> = unnamed(points, Some(manifest))?.into_iter().filter(|id| id.seq() < head).collect();
    rubbish.iter().try_for_each(|id| points.remove_all(id.as_str()))?;
    if rubbish.is_empty() { Ok(()) } else { points.sync() }
}

/// Removes the directories that the manifest does not name. The caller holds the lock.
fn sweep(points: &Dir, manifest: &Manifest) -> Result<()> {
    let rubbish = unnamed(points, Some(manifest))?;
    for id in &rubbish {
        tracing::info!(point = %id, "removing a point that was never sealed");
        points.remove_all(id.as_str())?;
    }
    if rubbish.is_empty() { Ok(()) } else { points.sync() }
}
